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
        held: list[int] = []
        for position, row in enumerate(index.find_all(model.space, hashes)):
            if row < 0:
                error = TierError(
                    f"block {hashes[position].hex()} is not in the pool any more: store it again", cause="gone"
                )
                outcomes[position] = ("error", *error.to_wire())
                continue
            held.append(row)
            by_device.setdefault(index.device[row], []).append(position)
        # Held until they are written: what is declared void meanwhile is refused by the device, or removed after it.
        index.guard(held, now=now)
        ids = {row: index.id_of(row) for row in held}
        open_moves = len(by_device)

        def written(positions: list[int], answer: Answer, now: float) -> None:
            nonlocal open_moves
            for place, position in enumerate(positions):
                outcomes[position] = answer if isinstance(answer, tuple) else answer[place]
            open_moves -= 1
            if not open_moves:
                left = [row for row in held if index.live_row(ids[row]) == row]
                index.unpin(left[::-1], now=now)
                for row in left:  # declared void meanwhile, and freed on the device when its write ended
                    if not index.pins[row] and index.key_of(row) is None:
                        ledger.forget(ids[row])
                ledger.answer(batch, item, ("persisted", outcomes))
                self._memory_freed(now)

        if not by_device:
            ledger.answer(batch, item, ("persisted", outcomes))
        for device, positions in by_device.items():
            entries = []
            for position in positions:
                row = index.find(model.space, hashes[position])
                entries.append((index.id_of(row), hashes[position], index.parent_key_of(row)))
            move = Move(device, "persist", (model.tenant, model.fingerprint, entries), partial(written, positions))

            def write(_answer: Answer, now: float, move: Move = move) -> None:
                ledger.out.append(move)

            # Nothing, but in order: the seal of what is to be written may still be on its way.
            ledger.send(device, ("evict", []), write)
