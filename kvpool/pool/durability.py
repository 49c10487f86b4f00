"""Blocks that are to survive every process: written through to the disk below their device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvpool.cache.key import split_hashes
from kvpool.errors import TierError
from kvpool.pool.client import Client
from kvpool.pool.fanout import Fanout
from kvpool.pool.instructions import Answer, Batch, Move
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model


class Durability:
    """Makes blocks durable.

    Parameters
    ----------
    ledger
        The pool's books.
    fanout
        Decides on each item of a batch.
    memory_freed
        Called when something became evictable or free.
    """

    def __init__(self, ledger: Ledger, fanout: Fanout, memory_freed: Callable[[float], None]) -> None:
        self._ledger = ledger
        self._memory_freed = memory_freed
        self._fanout = fanout

    def persist(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """Answer each item ``("persisted", [True or an error for each hash])`` when its blocks are on disk."""
        self._fanout.each(batch, client_id, items, partial(self._persist, now))

    def _persist(self, now: float, batch: Batch, item: int, client: Client, content: tuple[Any, ...]) -> None:
        _sequence, model_number, joined, _trace = content
        ledger = self._ledger
        index = ledger.index
        model = ledger.model(client, model_number)
        hashes = split_hashes(joined)
        outcomes: list[Any] = [None] * len(hashes)
        by_device: dict[int, list[int]] = {}
        rows = index.find_all(model.space, hashes)
        for position, row in enumerate(rows):
            if row < 0:
                error = TierError(
                    f"block {hashes[position].hex()} is not in the pool any more: store it again", cause="gone"
                )
                outcomes[position] = ("error", *error.to_wire())
            else:
                by_device.setdefault(index.device[row], []).append(position)
        open_writes = len(by_device)

        def written(positions: list[int], answers: list[Any], now: float) -> None:
            nonlocal open_writes
            for position, answer in zip(positions, answers, strict=True):
                outcomes[position] = answer
            open_writes -= 1
            if not open_writes:
                ledger.answer(batch, item, ("persisted", outcomes))

        if not by_device:
            ledger.answer(batch, item, ("persisted", outcomes))
        for device, positions in by_device.items():
            self.write(device, model, [rows[position] for position in positions], partial(written, positions), now)

    def write(
        self, device: int, model: Model, rows: list[int], then: Callable[[list[Any], float], None], now: float
    ) -> None:
        """Write published caches of a model through to the disk below their device.

        ``then`` gets True or an error for each, once they are there.
        """
        ledger = self._ledger
        index = ledger.index
        ids = [index.id_of(row) for row in rows]
        entries = [
            (cache_id, index.key_of(row), index.parent_key_of(row)) for cache_id, row in zip(ids, rows, strict=True)
        ]
        # Held until they are written: what is declared void meanwhile is refused by the device, or removed after it.
        index.guard(rows, now=now)

        def written(answer: Answer, now: float) -> None:
            left = [row for cache_id, row in zip(ids, rows, strict=True) if index.live_row(cache_id) == row]
            index.unpin(left[::-1], now=now)
            for row in set(left):  # declared void meanwhile, and freed on the device when its write ended
                if not index.pins[row] and index.key_of(row) is None:
                    ledger.forget(index.id_of(row))
            then([answer] * len(rows) if isinstance(answer, tuple) else list(answer), now)
            self._memory_freed(now)

        move = Move(device, "persist", (model.tenant, model.fingerprint, entries), written)
        # Nothing, but in order: the seal of what is to be written may still be on its way.
        ledger.send(device, ("evict", []), lambda _answer, _now: ledger.out.append(move))
