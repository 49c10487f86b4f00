"""Calls of the disk tier with memory of a caller, which a removal or a cancellation ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.gathering import settle
from kvpool.cache.key import CacheKey
from kvpool.cache.source import Source
from kvpool.cache.under_way import UnderWay
from kvpool.errors import InvalidSizeError, TierError

_Result = TypeVar("_Result")

_CALLS_AT_ONCE = 16
"""Reads, and writes: well below the bound of the tier's queue, where more would be misses."""


class DiskCalls:
    """Reads and writes a bounded number of caches at a time. A call returns when no thread uses the memory any more.

    Parameters
    ----------
    disk
        The tier.
    under_way
        Where each call is entered: a removal cancels it.
    """

    def __init__(self, disk: DiskTier, under_way: UnderWay) -> None:
        self._disk, self._under_way = disk, under_way
        self._reads, self._writes = asyncio.Semaphore(_CALLS_AT_ONCE), asyncio.Semaphore(_CALLS_AT_ONCE)

    async def read(self, target: Source) -> bool:
        """Fill memory with a cache's bytes; False is a miss."""

        async def read() -> bool:
            try:
                return await self._disk.read_into(target.key, target.view())
            except InvalidSizeError:  # what is there is another cache than the caller thinks
                return False

        return await self._call(target.key, self._reads, read) is True

    async def write_back(self, source: Source) -> bool:
        """Store a cache if that is possible; True once it can be found."""

        async def write() -> bool:
            return await self._disk.write_back(source.key, source.parent, source.view())

        return await self._call(source.key, self._writes, write) is True

    async def write_through(self, source: Source) -> TierError | None:
        """Store a cache so that it survives a failure of power; returns why not, if not."""

        async def write() -> bool:
            await self._disk.write_through(source.key, source.parent, source.view())
            return True

        try:
            written = await self._call(source.key, self._writes, write)
        except TierError as error:
            return error
        return None if written else TierError("a cache is not stored: it was removed meanwhile", cause="removed")

    async def _call(
        self, key: CacheKey, room: asyncio.Semaphore, call: Callable[[], Coroutine[Any, Any, _Result]]
    ) -> _Result | None:
        """Do a call when its turn has come; None if the key is being removed, or was meanwhile."""

        async def in_turn() -> _Result:
            async with room:
                return await call()

        work = self._under_way.begin(key)
        if work is None:
            return None
        task = work.task = asyncio.ensure_future(in_turn())
        try:
            await asyncio.wait((task,))
        finally:
            await settle((task,))
            self._under_way.end(work)
        return None if work.void or task.cancelled() else task.result()
