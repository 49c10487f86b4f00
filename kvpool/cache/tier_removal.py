"""Removing caches from every tier below a device, for good."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from kvpool.cache.contents import LowerContents
from kvpool.cache.disk.threads import uncancelled
from kvpool.cache.gathering import all_of
from kvpool.cache.host_tier import HostMemory
from kvpool.cache.key import CacheKey
from kvpool.cache.mover import Mover
from kvpool.errors import TierError

logger = logging.getLogger("kvpool.tiers")


class TierRemoval:
    """Takes caches out of the host tier and removes their files, once what is under way on them has ended.

    Parameters
    ----------
    contents
        What lies below.
    mover
        Zeroes memory.
    deadline_s
        How long a caller waits.
    """

    def __init__(self, contents: LowerContents, mover: Mover, deadline_s: float) -> None:
        self._contents, self._mover, self._deadline_s = contents, mover, deadline_s
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
        self._check_open()
        await self._carry_out(contents.under_way.removal(wanted), wanted, partial(self._remove_files, wanted))
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
        self._check_open()
        files = partial(self._remove_space_files, tenant, fingerprint, wanted)
        await self._carry_out(under_way.removal_of_space(tenant, fingerprint), wanted, files)
        return len(found)

    def _take_out(self, keys: Iterable[CacheKey]) -> list[HostMemory]:
        """Let nobody find these in the host any more; returns their memory, which may still be read."""
        host = self._contents.host
        if host is None or self._closed:
            return []
        entries = [entry for key in keys if (entry := host.index.get(key)) is not None]
        return [host.take_out(entry) for entry in entries]

    def _check_open(self) -> None:
        if self._closed and self._contents.disk is not None:
            raise TierError("caches cannot be removed: the tiers are closed", cause="closed")

    async def _carry_out(
        self,
        refusal: AbstractContextManager[None],
        keys: Collection[CacheKey],
        files: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Remove what is refused from now on; wait for that no longer than until the deadline."""
        refused = ExitStack()
        refused.enter_context(refusal)
        removal = asyncio.ensure_future(self._remove(keys, self._take_out(keys), files))
        self._going.add(removal)
        # Not by who waits: a removal that outlasts its deadline is remembered, and its keys are refused, to its end.
        removal.add_done_callback(lambda _: refused.close())
        removal.add_done_callback(self._going.discard)
        await uncancelled(asyncio.wait((removal,), timeout=self._deadline_s))
        if removal.done():
            removal.result()
            return
        removal.add_done_callback(_ended_late)
        disk = self._contents.disk
        why = f"no answer within {self._deadline_s:g} s" if disk is None else disk.overdue("removing", self._deadline_s)
        raise TierError(
            f"it is not sure that removed caches are gone from the disk tier ({why}). They are found no more while "
            "this pool lives, and their removal goes on; should the pool end before the store answers, the next may "
            "find them: call again, there too",
            cause="timeout",
        )

    async def _remove(
        self, keys: Collection[CacheKey], memories: list[HostMemory], files: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        host = self._contents.host
        # Beside what follows, so that it is noted on disk though something that is under way hangs. (What is void by
        # now begins no new write, and one that has begun has its key, for which this waits.)
        removing = asyncio.ensure_future(files())
        await self._contents.under_way.idle(keys)
        if memories and host is not None:
            await self._mover.run(host.wipe, memories)
            for memory in memories:
                host.give_back(memory)
        await removing

    async def _remove_files(self, keys: Collection[CacheKey]) -> None:
        spaces = sorted({(key.tenant, key.fingerprint) for key in keys})
        # Also where one of them fails: what was tried once goes on by itself.
        await all_of([self._remove_own(keys), *(self._remove_left(*space) for space in spaces)])

    async def _remove_left(self, tenant: str, fingerprint: str) -> None:
        # All of the space: nobody looks these up, and so nobody knows what is chained behind what.
        if self._contents.leftovers is not None:
            await self._contents.leftovers.remove_space(tenant, fingerprint)

    async def _remove_own(self, keys: Collection[CacheKey]) -> None:
        contents = self._contents
        if contents.disk is not None:
            await contents.disk.remove(keys)
        elif contents.disk_problem is not None:
            raise TierError(
                f"files of removed caches may be left in the disk tier: {contents.disk_problem}", cause="no_disk"
            )

    async def _remove_space_files(self, tenant: str, fingerprint: str, keys: Collection[CacheKey]) -> None:
        await all_of([self._remove_own_space(tenant, fingerprint, keys), self._remove_left(tenant, fingerprint)])

    async def _remove_own_space(self, tenant: str, fingerprint: str, keys: Collection[CacheKey]) -> None:
        disk = self._contents.disk
        try:
            found = await disk.space(tenant, fingerprint) if disk is not None else set()
        except TierError:
            if disk is not None:
                await self._remove_own(disk.known_of(tenant, fingerprint).union(keys))  # hidden, at least
            raise
        await self._remove_own(found.union(keys))


def _ended_late(removal: asyncio.Future[None]) -> None:
    error = None if removal.cancelled() else removal.exception()
    if error is None:
        logger.warning("a removal that had not been done in time is done")
    else:
        logger.error("a removal that had not been done in time has failed: %s", error)
