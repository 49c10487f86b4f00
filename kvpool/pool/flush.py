"""Everything that is stored, written to the disks below the devices: by word, before a pool ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from kvpool.cache.key import BlockHash
from kvpool.cache.table import KEYED
from kvpool.errors import InvalidatedError, TierError, UnknownCacheError
from kvpool.pool.durability import Durability
from kvpool.pool.instructions import Answer, Batch, Move
from kvpool.pool.ledger import Ledger
from kvpool.sizes import MIB, format_count

STEP_CACHES = 256
STEP_BYTES = 64 * MIB
"""What is held for one step, so that it stays where it is while it is written."""

_NO_ROOM = "budget"
"""Cause of the error of what the disk's budget has no room for. A disk that is full below that is to be mended."""

_GONE = ("DeviceLostError", InvalidatedError.__name__, UnknownCacheError.__name__)
"""Errors of what is not to be kept, or is lost, and no failure of a flush."""


@dataclass(slots=True, eq=False)
class _Flush:
    batch: Batch
    tenant: str | None
    devices: int
    caches: int = 0
    size_bytes: int = 0
    evicted: int = 0
    refused: set[tuple[str, str, BlockHash]] = field(default_factory=set)
    """``(tenant, fingerprint, hash)`` of what the budget had no room for, beside what it holds of the same chain."""
    failed: set[tuple[str, str, BlockHash]] = field(default_factory=set)
    """Of what else could not be written: one that is tried twice may fail twice."""
    failed_calls: int = 0
    error: tuple[Any, ...] | None = None
    """The first."""
    lists: dict[int, deque[tuple[int, BlockHash]]] = field(default_factory=dict)
    """By device what is to be written, as ``(space, hash)``: it may go down and come up meanwhile."""
    lasts: dict[int, tuple[int, Sequence[Any]]] = field(default_factory=dict)
    """By device what tells what has gone down since, and the keys of what could not be written before."""


class Flushes:
    """Writes through what is published when it is asked, and what lies in host memory.

    On each device what lies below it comes first, then what is on it, what is next to go first: that is the order in
    which a disk that is too small drops it. At the end comes what has gone down meanwhile, and no more: what the disk
    has dropped by then would take the room of what is used more, or of what it is chained behind.

    Parameters
    ----------
    ledger
        The pool's books.
    durability
        Writes.
    """

    def __init__(self, ledger: Ledger, durability: Durability) -> None:
        self._ledger = ledger
        self._durability = durability

    def flush(self, batch: Batch, tenant: str | None, now: float) -> None:
        """Write all that a tenant, or anyone, has stored to the disks, so that it survives the pool.

        The answer is ``{"caches", "bytes", "displaced"}``: what of it lies on the disks then, and how many caches of
        anyone are not there for want of room: they made way for it, or are of it and the budget has no room for them,
        as for the tail of a chain that is longer.

        Raises
        ------
        TierError
            If there is no disk, or all devices that have one are lost. As the answer: if not all could be written.
        """
        with_disk = [each for each in self._ledger.devices if each.disk_url is not None]
        if not with_disk:
            raise TierError(
                "this pool has no disk tier to write to: start it with disk_url, and a write_policy that is not 'none'",
                cause="no_disk",
            )
        devices = [each.number for each in with_disk if each.lost is None]
        if not devices:
            raise TierError(
                "all devices that have a disk are lost, with what was in memory alone: delete the pool and start it "
                "again, which finds what had been written",
                cause="device_lost",
            )
        work = _Flush(batch, tenant, len(devices))
        for number in devices:
            work.lists[number] = deque(self._published(number, tenant))
            self._save_below(work, number, (work.tenant,), self._began)

    def _published(self, number: int, tenant: str | None) -> Iterator[tuple[int, BlockHash]]:
        index = self._ledger.index
        spaces = index.spaces.of(tenant)
        rows = index.rows_of(*spaces).tolist() if spaces else []
        wanted = {row for row in rows if index.device[row] == number and index.flags[row] & KEYED}
        next_to_go = [row for row in self._ledger.policy.victims(number) if row in wanted]
        for row in chain(next_to_go, wanted.difference(next_to_go)):
            key = index.key_of(row)
            if key is not None and not index.is_void(row):
                yield index.space_of(row), key

    def _save_below(
        self, work: _Flush, number: int, arguments: tuple[Any, ...], then: Callable[[_Flush, int, Answer, float], None]
    ) -> None:
        move = Move(number, "save", arguments, partial(then, work, number))

        def save(_answer: Answer, now: float) -> None:
            self._ledger.out.append(move)

        # Nothing, but in order: what has left the device must have arrived below.
        self._ledger.send(number, ("evict", []), save)

    def _began(self, work: _Flush, number: int, answer: Answer, now: float) -> None:
        # What it could not write is tried again, and told, by the second of these calls.
        if isinstance(answer, dict):
            work.evicted -= answer["evicted_before"]
            work.refused.update(map(tuple, answer["refused"]))
            work.lasts[number] = (answer["mark"], answer["failed"])
        self._step(work, number, now)

    def _step(self, work: _Flush, number: int, now: float) -> None:
        left = work.lists[number]
        while left:
            space, rows = self._take(left, number)
            if rows:
                model, index = self._ledger.model_in(space), self._ledger.index
                keys = [(model.tenant, model.fingerprint, index.key_of(row)) for row in rows]
                self._durability.write(number, model, rows, partial(self._written, work, number, keys), now)
                return
        self._save_below(work, number, (work.tenant, *work.lasts.get(number, ())), self._saved)

    def _take(self, left: deque[tuple[int, BlockHash]], number: int) -> tuple[int, list[int]]:
        """Take the rows of one step, all of one space; leaves out what is not on that device any more."""
        index = self._ledger.index
        space, size_bytes = left[0][0], 0
        rows: list[int] = []
        while left and left[0][0] == space and len(rows) < STEP_CACHES and size_bytes < STEP_BYTES:
            row = index.find(*left.popleft())
            if row >= 0 and index.device[row] == number and not index.is_void(row):
                rows.append(row)
                size_bytes += index.size_bytes[row]
        return space, rows

    def _written(
        self, work: _Flush, number: int, keys: Sequence[tuple[str, str, Any]], outcomes: list[Any], now: float
    ) -> None:
        for key, outcome in zip(keys, outcomes, strict=True):
            if outcome is True:
                work.refused.discard(key)  # as a copy in host memory, before what it is chained behind was there
            elif outcome[1] in _GONE:
                pass
            elif outcome[3].get("cause") == _NO_ROOM:
                work.refused.add(key)
            else:
                work.failed.add(key)
                work.error = work.error or outcome
        self._step(work, number, now)

    def _saved(self, work: _Flush, number: int, answer: Answer, now: float) -> None:
        if isinstance(answer, tuple):
            if answer[1] not in _GONE:
                work.failed_calls += 1
                work.error = work.error or answer
        elif isinstance(answer, dict):
            work.caches += answer["caches"]
            work.size_bytes += answer["bytes"]
            work.evicted += answer["evicted"]
            work.refused.update(map(tuple, answer["refused"]))
            work.failed.update(map(tuple, answer["failed"]))
            work.error = work.error or answer["error"]
        work.devices -= 1
        if work.devices:
            return
        displaced = work.evicted + len(work.refused)
        figures = {"caches": work.caches, "bytes": work.size_bytes, "displaced": displaced}
        if work.error is None:
            self._ledger.answer(work.batch, 0, figures)
            return
        failed = len(work.failed) + work.failed_calls
        error = TierError(
            f"not on disk: {format_count(failed, 'cache')}, on disk: {work.caches:,}; the first that is not: "
            f"{work.error[2]}",
            cause=work.error[3].get("cause", "device"),
            failed=failed,
            **figures,
        )
        self._ledger.answer(work.batch, 0, ("error", *error.to_wire()))
