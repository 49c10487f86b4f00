"""Writing memory that is about to be used again to the disk, where there is no host tier to copy it to."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
from collections.abc import Sequence
from functools import partial

from kvpool.cache.disk.packing import Write
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.gathering import all_of
from kvpool.cache.mover import Move, Mover
from kvpool.cache.parties import parties
from kvpool.cache.source import Source
from kvpool.cache.under_way import UnderWay, Work

_BUFFERS = 8
_SMALL_CACHES, _SMALL_BYTES = 64, 4 << 20
"""Of small ones in a buffer: as much as is worth a thread of the disk tier."""


class StagedWrites:
    """Copies caches to buffers, a large one each, small ones several, writes those, and waits until a deadline at most.

    (A thread that hangs in a store cannot be stopped. Were it given the memory itself, that could not be used again
    for as long; and used again before its checksum is taken, it would store other bytes under the key.)

    Parameters
    ----------
    disk
        Where to.
    mover
        Copies.
    under_way
        Where each write is entered: a removal gives it up.
    """

    def __init__(self, disk: DiskTier, mover: Mover, under_way: UnderWay) -> None:
        self._disk, self._mover, self._under_way = disk, mover, under_way
        self._buffers = asyncio.Semaphore(_BUFFERS)
        self._writing: set[asyncio.Task[None]] = set()
        self._stalled = False

    async def write(self, sources: Sequence[Source], deadline: float) -> list[bool]:
        """Store caches; for each whether that is done in time (seconds of the loop's clock).

        Their memory is free in any case.
        """
        # Before anything is waited for: a removal that began and ended within that time must find it.
        works = [self._under_way.begin(source.key) for source in sources]
        begun = [(source, work) for source, work in zip(sources, works, strict=True) if work is not None]
        stored: set[Work] = set()
        most_caches = _SMALL_CACHES if self._disk.takes_packs else 1
        try:
            grouped = parties(begun, lambda each: each[0].size_bytes, most_caches, _SMALL_BYTES)
            await all_of([self._write(party, deadline, stored) for party in grouped])
        finally:
            for _, work in begun:
                if work.task is None:  # else the write ends it
                    self._under_way.end(work)
        return [work in stored for work in works]

    async def _write(self, party: list[tuple[Source, Work]], deadline: float, stored: set[Work]) -> None:
        if self._stalled and self._writing:  # until the store answers again, nobody waits for it
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self._buffers.acquire()
        except TimeoutError:
            self._stalled = True
            return
        writing: asyncio.Task[None] | None = None
        try:
            wanted = [(source, work) for source, work in party if not work.void]
            staged = _memory(sum(source.size_bytes for source, _ in wanted))
            if staged is None:
                return
            await self._mover.copy(_moves([source for source, _ in wanted], staged))
            writes = self._begin(wanted, memoryview(staged))
            writing = asyncio.ensure_future(self._disk.write(list(writes.values())))
            self._writing.add(writing)
            del staged  # it goes with the writes
            # Not in the coroutine: one that is cancelled before its first step never runs.
            writing.add_done_callback(partial(self._written, list(writes.values())))
            await asyncio.wait((writing,), timeout=max(deadline - asyncio.get_running_loop().time(), 0.0))
            if not writing.done():
                self._stalled = True
            for work, write in writes.items():
                write.cancel()  # at once, unless a thread has it or it is done
                if not work.void and write.stored:
                    stored.add(work)
        finally:
            if writing is None:
                self._buffers.release()

    def _begin(self, wanted: Sequence[tuple[Source, Work]], staged: memoryview) -> dict[Work, Write]:
        writes: dict[Work, Write] = {}
        start = 0
        for source, work in wanted:
            if not work.void:
                view = staged[start : start + source.size_bytes]
                work.task = writes[work] = write = Write(source.key, source.parent, view, durable=False)
                write.done.add_done_callback(lambda _, work=work: self._under_way.end(work))  # type: ignore[misc]
            start += source.size_bytes
        return writes

    def _written(self, writes: Sequence[Write], writing: asyncio.Task[None]) -> None:
        self._writing.discard(writing)
        self._buffers.release()
        if not all(write.done.cancelled() for write in writes):  # the store has answered
            self._stalled = False
        if not writing.cancelled():
            writing.exception()  # else one that nobody waits for any more would be reported


def _memory(size_bytes: int) -> mmap.mmap | None:
    """Return new memory; None if none is wanted, or the system has none."""
    try:
        return mmap.mmap(-1, size_bytes) if size_bytes else None
    except OSError:
        return None


def _moves(sources: Sequence[Source], staged: mmap.mmap) -> list[Move]:
    """Return what copies caches to memory, one behind the other."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(staged))
    moves: list[Move] = []
    for source in sources:
        moves.append(Move(address, source.address, source.size_bytes))
        address += source.size_bytes
    return moves
