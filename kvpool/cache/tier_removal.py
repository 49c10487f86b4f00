"""Removing caches from every tier below a device, for good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from kvpool.cache.contents import LowerContents
from kvpool.cache.disk.threads import uncancelled
from kvpool.cache.host_tier import HostMemory
from kvpool.cache.key import CacheKey
from kvpool.cache.mover import Mover
from kvpool.errors import TierError


class TierRemoval:
    """Takes caches out of the host tier and removes their files, once what is under way on them has ended.

    Parameters
    ----------
    contents
        What lies below.
    mover
        Zeroes memory.
    """

    def __init__(self, contents: LowerContents, mover: Mover) -> None:
        self._contents, self._mover = contents, mover
        self._going: set[asyncio.Future[None]] = set()
        self._closed = False

    async def close(self) -> None:
        """Refuse removals from now on, and return when those that have begun are done."""
        self._closed = True
        while self._going:
            await asyncio.wait(self._going)

    async def remove(self, keys: Iterable[CacheKey]) -> int:
        """Remove caches; returns how many could be found."""
        contents = self._contents
        wanted = set(keys)
        found = {key for key in wanted if contents.locate(key) is not None}
        with self._removing(), contents.under_way.removal(wanted):
            memories = self._take_out(wanted)
            await uncancelled(self._remove(wanted, memories, partial(self._remove_files, wanted)))
        return len(found)

    async def remove_space(self, tenant: str, fingerprint: str) -> int:
        """Remove all caches of a tenant and fingerprint; returns how many could be found."""
        contents = self._contents
        host, disk, under_way = contents.host, contents.disk, contents.under_way
        in_host = [entry.key for entry in (host.index if host is not None else ())]
        wanted = {key for key in in_host if (key.tenant, key.fingerprint) == (tenant, fingerprint)}
        found = {key for key in wanted if contents.locate(key) is not None}
        wanted.update(under_way.keys_of(tenant, fingerprint))
        if disk is not None:
            found |= {key for key in disk.keys_of(tenant, fingerprint) if not under_way.refuses(key)}
        with self._removing(), under_way.removal_of_space(tenant, fingerprint):
            memories = self._take_out(wanted)
            files = partial(self._remove_space_files, tenant, fingerprint, wanted)
            await uncancelled(self._remove(wanted, memories, files))
        return len(found)

    def _take_out(self, keys: Iterable[CacheKey]) -> list[HostMemory]:
        """Let nobody find these in the host any more; returns their memory, which may still be read."""
        host = self._contents.host
        if host is None or self._closed:
            return []
        entries = [entry for key in keys if (entry := host.index.get(key)) is not None]
        return [host.take_out(entry) for entry in entries]

    @contextmanager
    def _removing(self) -> Iterator[None]:
        """Keep :meth:`close` waiting until the end of the block."""
        if self._closed and self._contents.disk is not None:
            raise TierError("caches cannot be removed: the tiers are closed", cause="closed")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._going.add(done)
        try:
            yield
        finally:
            self._going.discard(done)
            done.set_result(None)

    async def _remove(
        self, keys: Collection[CacheKey], memories: list[HostMemory], files: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        host = self._contents.host
        await self._contents.under_way.idle(keys)
        if memories and host is not None:
            await self._mover.run(host.wipe, memories)
            for memory in memories:
                host.give_back(memory)
        await files()

    async def _remove_files(self, keys: Collection[CacheKey]) -> None:
        contents = self._contents
        if contents.disk is not None:
            await contents.disk.remove(keys)
        elif contents.disk_problem is not None:
            raise TierError(
                f"files of removed caches may be left in the disk tier: {contents.disk_problem}", cause="no_disk"
            )

    async def _remove_space_files(self, tenant: str, fingerprint: str, keys: Collection[CacheKey]) -> None:
        disk = self._contents.disk
        found = await disk.space(tenant, fingerprint) if disk is not None else set()
        await self._remove_files(found.union(keys))
