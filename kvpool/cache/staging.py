"""Writing memory that is about to be used again to the disk, where there is no host tier to copy it to."""

from __future__ import annotations

import asyncio
import ctypes
import mmap

from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.mover import Mover
from kvpool.cache.source import Source
from kvpool.cache.under_way import UnderWay

_BUFFERS = 8


class StagedWrites:
    """Copies each cache to a buffer of its own, writes that, and waits for it no longer than until a deadline.

    (A thread that hangs in a store cannot be stopped. Were it given the memory itself, that could not be used again
    for as long; and used again before its checksum is taken, it would store other bytes under the key.)

    Parameters
    ----------
    disk
        Where to.
    mover
        Copies.
    under_way
        Where each write is entered: a removal cancels it.
    """

    def __init__(self, disk: DiskTier, mover: Mover, under_way: UnderWay) -> None:
        self._disk, self._mover, self._under_way = disk, mover, under_way
        self._buffers = asyncio.Semaphore(_BUFFERS)
        self._writing = 0
        self._stalled = False

    async def write(self, source: Source, deadline: float) -> bool:
        """Store a cache if that is done in time (seconds of the loop's clock); the memory is free in any case."""
        if self._stalled and self._writing:  # until the store answers again, nobody waits for it
            return False
        # Before anything is waited for: a removal that began and ended within that time must find it.
        work = self._under_way.begin(source.key)
        if work is None:
            return False
        try:
            async with asyncio.timeout_at(deadline):
                await self._buffers.acquire()
        except BaseException as error:
            self._under_way.end(work)
            if not isinstance(error, TimeoutError):
                raise
            self._stalled = True
            return False
        write: asyncio.Task[bool] | None = None
        try:
            if work.void:
                return False
            staged = await self._mover.run(_stage, source)
            if work.void or staged is None:
                return False
            write = asyncio.ensure_future(self._disk.write_back(source.key, source.parent, memoryview(staged)))
            work.task = write
            self._writing += 1
            del staged  # it goes with the write
            # Not in the coroutine: one that is cancelled before its first step never runs.
            write.add_done_callback(self._written)
            write.add_done_callback(lambda _, work=work: self._under_way.end(work))  # type: ignore[misc]
            await asyncio.wait((write,), timeout=max(deadline - asyncio.get_running_loop().time(), 0.0))
            if not write.done():
                self._stalled = True
                write.cancel()  # takes effect at once if it has no thread yet
                return False
            return not work.void and not write.cancelled() and write.result()
        finally:
            if write is None:
                self._buffers.release()
                self._under_way.end(work)

    def _written(self, write: asyncio.Task[bool]) -> None:
        self._writing -= 1
        self._buffers.release()
        if not write.cancelled():
            self._stalled = False
            write.exception()  # else one that nobody waits for any more would be reported


def _stage(source: Source) -> mmap.mmap | None:
    """Copy a cache to new memory; None if the system has none."""
    try:
        staged = mmap.mmap(-1, source.size_bytes)
    except OSError:
        return None
    ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(staged)), source.address, source.size_bytes)
    return staged
