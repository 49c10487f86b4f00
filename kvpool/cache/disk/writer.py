"""Writing a cache's file: evict for it, write it, and only then let it be found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from kvpool.cache.disk.folder import Folder
from kvpool.cache.disk.folder_syncs import FolderSyncs
from kvpool.cache.disk.header import make_header
from kvpool.cache.disk.index import DiskEntry, DiskIndex
from kvpool.cache.disk.key_locks import KeyLocks
from kvpool.cache.disk.names import space_name
from kvpool.cache.disk.removals import Removals
from kvpool.cache.disk.statistics import DiskCounters, cause_of
from kvpool.cache.disk.threads import Threads
from kvpool.cache.key import CacheKey
from kvpool.errors import KvpoolError, TierError

_REFUSALS = {
    "budget": "it does not fit into the disk tier's budget (disk_budget), or all that could go for it is in use, is "
    "its own chain, or is made durable by the same call",
    "removed": "it was removed meanwhile",
    "closed": "the disk tier is closed",
}
_FULL = ("ENOSPC", "EDQUOT")


def refusal(counters: DiskCounters, cause: str) -> TierError:
    """Count a write that is not tried, and return its error."""
    counters.count_given_up(cause)
    return TierError(f"a cache is not written to disk: {_REFUSALS[cause]}", cause=cause)


class Writer:
    """Writes files. Callers hold a thread and the key.

    Parameters
    ----------
    folder, index, locks, counters, removals, threads, syncs, on_gone
        Of the tier.
    kept
        Keys whose files do not go for others.
    """

    def __init__(
        self,
        folder: Folder,
        index: DiskIndex,
        locks: KeyLocks,
        counters: DiskCounters,
        removals: Removals,
        threads: Threads,
        syncs: FolderSyncs,
        on_gone: Callable[[Sequence[CacheKey]], None],
        kept: Collection[CacheKey],
    ) -> None:
        self._folder, self._index, self._locks, self._counters = folder, index, locks, counters
        self._removals, self._threads, self._syncs, self._on_gone = removals, threads, syncs, on_gone
        self._kept = kept

    async def store_anew(self, entry: DiskEntry, payload: memoryview) -> None:
        """Write a file as :meth:`store`, also if somebody has removed it behind our back."""
        known = self._index.get(entry.key)
        try:
            if known is not None and await self._threads.run(self._folder.size, known.path) != known.file_bytes:
                self._index.drop(known.key)
                self._on_gone((known.key,))
        except Exception as error:
            raise self._failure(entry, error) from error
        await self.store(entry, payload)

    async def make_durable(self, entry: DiskEntry) -> None:
        """Return once a file that was stored survives a failure of power. Needs no thread of the caller."""
        try:
            await self._syncs.sync(space_name(entry.key.tenant, entry.key.fingerprint))
        except Exception as error:
            raise self._failure(entry, error) from error

    async def store(self, entry: DiskEntry, payload: memoryview) -> None:
        """Write a file unless it is there, evicting for it first."""
        index, key = self._index, entry.key
        known = index.get(key)
        if known is not None and known.size_bytes == entry.size_bytes:
            index.touch(key)
            return
        if not await self._removals.complete(key):
            raise TierError(f"{entry.path} is to be removed first, and cannot be", cause="removed")
        try:
            if known is not None:
                await self._threads.run(self._folder.remove, known.path)
                index.drop(key)
            victims = index.victims(entry.file_bytes, partial(self._stays, entry))
            if victims is None:
                raise refusal(self._counters, "budget")
            index.claim(entry)
            try:
                await self._evict(victims)
                try:
                    await self._write(entry, payload)
                except Exception:
                    await self._removals.undo(entry)  # a store may have taken it and failed to say so
                    raise
            finally:
                index.unclaim(key)
        except KvpoolError:
            raise
        except Exception as error:
            raise self._failure(entry, error) from error
        index.add(entry)
        self._counters.written_files += 1
        self._counters.written_bytes += entry.size_bytes

    async def _write(self, entry: DiskEntry, payload: memoryview) -> None:
        """Write a file; where the store is full though the budget is not, once more when others have gone for it."""
        try:
            await self._threads.run(_write_file, self._folder, entry, payload)
        except Exception as error:
            if cause_of(error) not in _FULL:
                raise
            victims = self._index.oldest(entry.file_bytes, partial(self._stays, entry))
            if victims is None:
                raise
            self._counters.count_error(f"writing {entry.path}", error)
            await self._evict(victims)
            await self._threads.run(_write_file, self._folder, entry, payload)

    def _stays(self, entry: DiskEntry, key: CacheKey) -> bool:
        """Whether a file must not go for an entry."""
        return key == entry.above or key in self._kept or self._locks.is_held(key)

    async def _evict(self, victims: Sequence[DiskEntry]) -> None:
        """Remove files that nobody uses; raises the first error once all have been tried."""
        if not victims:
            return
        for entry in victims:
            self._locks.take(entry.key)
            self._index.drop(entry.key)
        try:
            errors = await self._threads.run(_remove_files, self._folder, victims)
        finally:
            for entry in victims:
                self._locks.release(entry.key)
        self._index.restore([entry for entry in victims if entry.key in errors])
        gone = [entry.key for entry in victims if entry.key not in errors]
        self._counters.evicted_files += len(gone)
        self._on_gone(gone)
        for error in errors.values():
            raise error

    def _failure(self, entry: DiskEntry, error: Exception) -> TierError:
        cause = self._counters.count_error(f"writing {entry.path}", error)
        return TierError(f"cache {entry.key.block_hash.hex()} is not written to disk: {error}", cause=cause)


def _write_file(folder: Folder, entry: DiskEntry, payload: memoryview) -> None:
    folder.write(entry.path, (make_header(entry.key, entry.parent, payload), payload))


def _remove_files(folder: Folder, entries: Sequence[DiskEntry]) -> dict[CacheKey, Exception]:
    """Remove files; returns the errors of those that stay."""
    errors: dict[CacheKey, Exception] = {}
    for entry in entries:
        try:
            folder.remove(entry.path)
        except Exception as error:  # noqa: BLE001  drivers raise what they like; the caller counts it
            errors[entry.key] = error
    return errors
