"""One item's operations on several devices, and their answers put together again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvpool.errors import KvpoolError
from kvpool.pool.client import Client
from kvpool.pool.instructions import Answer, Batch, distinct
from kvpool.pool.ledger import Ledger


@dataclass(slots=True, eq=False)
class _Gather:
    """Answers of several devices for one item, put together at the end."""

    answers: list[Any]
    done: Callable[[list[Any], float], None]
    open_operations: int = 0


class Fanout:
    """Sends the parts of an item to the devices concerned.

    Parameters
    ----------
    ledger
        The pool's books.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def each(
        self,
        batch: Batch,
        client_id: str,
        items: Sequence[tuple[Any, ...]],
        decide: Callable[[Batch, int, Client, tuple[Any, ...]], None],
    ) -> None:
        """Decide on each item of a batch; what one raises is its answer."""
        client = self._ledger.client(client_id)
        for item, content in enumerate(items):
            try:
                decide(batch, item, client, content)
            except KvpoolError as error:
                self._ledger.answer(batch, item, ("error", *error.to_wire()))

    def ask(
        self,
        ids: Sequence[int],
        rows: Sequence[int],
        operation: Callable[[list[int], list[int]], tuple[Any, ...]],
        done: Callable[[list[Any], float], None],
        now: float,
        traces: Sequence[Any] = (),
    ) -> None:
        """Send one operation to each device concerned; ``done`` gets the answers in the order of ``ids``.

        ``operation`` is given the ids of one device and their positions; ``traces`` has one trace for each id, or none.
        """
        if not ids:
            done([], now)
            return
        index = self._ledger.index
        by_device: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            by_device.setdefault(index.device[row], []).append(position)
        gather = _Gather([None] * len(ids), done, len(by_device))
        for device, positions in by_device.items():
            self._ledger.send(
                device,
                operation([ids[position] for position in positions], positions),
                partial(self._gathered, gather, positions),
                distinct(traces[position] for position in positions) if traces else (),
            )

    def _gathered(self, gather: _Gather, positions: list[int], answer: Answer, now: float) -> None:
        gather.open_operations -= 1
        whole = isinstance(answer, tuple) and answer[:1] == ("error",)
        for part, position in enumerate(positions):
            gather.answers[position] = answer if whole else answer[part]
        if not gather.open_operations:
            gather.done(gather.answers, now)


def nothing_more(answer: Answer, now: float) -> None:
    """Continue with nothing: the operation's outcome changes no decision."""
