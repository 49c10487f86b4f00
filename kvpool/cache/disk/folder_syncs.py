"""Syncs of folders, each for all who asked before it began."""

from __future__ import annotations

import asyncio

from kvpool.cache.disk.folder import Folder
from kvpool.cache.disk.threads import Threads


class FolderSyncs:
    """Makes names durable: one sync of a folder at a time, and one for all names written while another went on.

    (A sync for each file costs a commit of the file system's journal each.)

    Parameters
    ----------
    folder
        Of the tier.
    threads
        How many folders are synced at the same time, at most.
    """

    def __init__(self, folder: Folder, threads: int) -> None:
        self._folder = folder
        self._threads = Threads(threads, "kvpool-disk-sync")
        self._next: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    async def sync(self, path: str) -> None:
        """Return when the names written in a folder so far survive a failure of power. Raises what the store raises."""
        task = self._next.get(path)
        if task is None:
            task = self._next[path] = asyncio.ensure_future(self._sync(path))
        await asyncio.shield(task)  # others wait for it, too

    async def _sync(self, path: str) -> None:
        before = self._running.get(path)
        if before is not None:
            await asyncio.wait((before,))
        # From here on a name that is written may come too late for this one.
        task = self._running[path] = self._next.pop(path)
        try:
            async with self._threads.one():
                await self._threads.run(self._folder.sync, path)
        finally:
            if self._running.get(path) is task:
                del self._running[path]

    async def close(self) -> None:
        """Return when no sync goes on. Nobody may ask for one any more."""
        while left := [*self._next.values(), *self._running.values()]:
            await asyncio.wait(left)
        await self._threads.close()
