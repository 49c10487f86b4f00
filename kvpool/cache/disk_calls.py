"""Calls of the disk tier with memory of a caller, which a removal, a cancellation or a deadline ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from kvpool.cache.disk.packing import MOST_PACKED_BYTES
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.gathering import settle
from kvpool.cache.key import CacheKey
from kvpool.cache.source import Source
from kvpool.cache.under_way import UnderWay
from kvpool.errors import InvalidSizeError, TierError

_Result = TypeVar("_Result")

_CALLS_AT_ONCE = 16
"""Reads, and writes. All that are admitted must be done within a deadline."""
_SMALL_READS_AT_ONCE, _SMALL_WRITES_AT_ONCE = 64, 256
"""Of those that the tier does together: enough for all its threads, and below the bound of its queue, where more would
be misses."""


class _Lanes:
    """Calls of one kind."""

    def __init__(self, small_at_once: int) -> None:
        self._large, self._small = asyncio.Semaphore(_CALLS_AT_ONCE), asyncio.Semaphore(small_at_once)
        self.late: set[asyncio.Task[Any]] = set()
        """Those that nobody waits for any more. Each still has a thread, or a part of one."""

    def room(self, size_bytes: int) -> asyncio.Semaphore:
        """Return what bounds the calls with caches of a size."""
        return self._small if size_bytes <= MOST_PACKED_BYTES else self._large


class DiskCalls:
    """Reads and writes a bounded number of caches at a time.

    A call that the store does not answer in time is given up: it returns, but its thread cannot be stopped and goes on
    with the caller's memory until :meth:`late` ends. Once such calls have all threads, others are given up at once.
    Any other call returns when no thread uses the memory any more.

    Parameters
    ----------
    disk
        The tier.
    under_way
        Where each call is entered: a removal cancels it.
    deadline_s
        How long a call may take, from when its turn has come.
    """

    def __init__(self, disk: DiskTier, under_way: UnderWay, deadline_s: float) -> None:
        self._disk, self._under_way, self._deadline_s = disk, under_way, deadline_s
        self._reads, self._writes = _Lanes(_SMALL_READS_AT_ONCE), _Lanes(_SMALL_WRITES_AT_ONCE)
        self._late: dict[int, asyncio.Task[Any]] = {}

    def late(self, address: int) -> asyncio.Task[Any] | None:
        """Return the call that was given up and still uses the memory at an address, None if there is none."""
        return self._late.get(address)

    async def read(self, target: Source) -> bool:
        """Fill memory with a cache's bytes; False is a miss."""

        async def read() -> bool:
            try:
                return await self._disk.read_into(target.key, target.view())
            except InvalidSizeError:  # what is there is another cache than the caller thinks
                return False

        try:
            return await self._call(target, "reading", self._reads, read) is True
        except TierError:  # it took too long
            return False

    async def write_through(self, source: Source) -> TierError | None:
        """Store a cache so that it survives a failure of power; returns why not, if not."""

        async def write() -> bool:
            await self._disk.write_through(source.key, source.parent, source.view())
            return True

        try:
            written = await self._call(source, "writing", self._writes, write)
        except TierError as error:
            return error
        return (
            None if written else TierError("a cache is not written to disk: it was removed meanwhile", cause="removed")
        )

    async def _call(
        self, source: Source, what: str, lanes: _Lanes, call: Callable[[], Coroutine[Any, Any, _Result]]
    ) -> _Result | None:
        """Do a call when its turn has come; None if the key is being removed, or was meanwhile.

        Raises
        ------
        TierError
            If the store does not answer in time.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def in_turn() -> _Result:
            async with lanes.room(source.size_bytes):
                if len(lanes.late) >= self._disk.threads:
                    raise self._overdue(what, source.key)
                turn.set_result(None)
                return await call()

        work = self._under_way.begin(source.key)
        if work is None:
            return None
        task: asyncio.Task[_Result] = asyncio.ensure_future(in_turn())
        work.task = task
        task.add_done_callback(lambda _: self._under_way.end(work))
        try:
            await asyncio.wait((task, turn), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((task,), timeout=self._deadline_s)
            overdue = not task.done()
            if overdue:
                task.cancel()
                await asyncio.sleep(0)  # now one that has no thread yet has ended
        except asyncio.CancelledError:
            await settle((task,))
            raise
        if not task.done():
            lanes.late.add(task)
            self._late[source.address] = task
            task.add_done_callback(partial(self._ended, lanes, source.address))
        if work.void:
            return None
        if overdue and (not task.done() or task.cancelled()):  # else it came at the last moment
            raise self._overdue(what, source.key)
        return task.result()

    def _ended(self, lanes: _Lanes, address: int, task: asyncio.Task[Any]) -> None:
        lanes.late.discard(task)
        del self._late[address]
        if not task.cancelled():
            task.exception()  # else one that nobody waits for any more would be reported

    def _overdue(self, what: str, key: CacheKey) -> TierError:
        return self._disk.overdue(f"{what} cache {key.block_hash.hex()}", self._deadline_s)
