"""Writing caches, to files of their own or to a pack: evict for them, write, and only then let them be found."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

from kvpool.cache.disk.advice import advice_on
from kvpool.cache.disk.file_names import CacheName, space_name
from kvpool.cache.disk.folder import Folder, remove_all
from kvpool.cache.disk.folder_syncs import FolderSyncs
from kvpool.cache.disk.header import header_bytes, make_header
from kvpool.cache.disk.index import DiskEntry, DiskIndex
from kvpool.cache.disk.key_locks import KeyLocks
from kvpool.cache.disk.model_notes import ModelNotes
from kvpool.cache.disk.pack import make_table, padding
from kvpool.cache.disk.removals import Removals
from kvpool.cache.disk.statistics import DiskCounters, cause_of
from kvpool.cache.disk.threads import Threads
from kvpool.cache.key import CacheKey
from kvpool.errors import KvpoolError, TierError

_REFUSALS = {
    "queue_full": "as many writes wait as may",
    "budget": "it does not fit into the disk tier's budget (disk_budget), or all that could go for it is in use, is "
    "its own chain, or is made durable by the same call: make less durable at once, or start the pool with a larger "
    "budget",
    "removed": "it was removed meanwhile",
    "closed": "the disk tier is closed",
}
_CLOCK_REALTIME_COARSE = 5  # linux/time.h; Python has no name for it
FULL = ("ENOSPC", "EDQUOT")
"""Causes of errors of a store that has no room."""
NO_ROOM = (*FULL, "budget")
"""Causes of all errors for want of room."""


def refusal(counters: DiskCounters, cause: str) -> TierError:
    """Count a write that is not tried, and return its error."""
    counters.count_given_up(cause)
    return TierError(f"a cache is not written to disk: {_REFUSALS[cause]}", cause=cause)


class Writer:
    """Writes caches. Callers hold a thread and the key.

    Parameters
    ----------
    folder, index, locks, counters, removals, threads, syncs, on_gone
        Of the tier.
    kept
        Keys whose files do not go for others.
    models
        Has the names of the models of what is written on disk before it.
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
        models: ModelNotes,
    ) -> None:
        self._folder, self._index, self._locks, self._counters = folder, index, locks, counters
        self._removals, self._threads, self._syncs, self._on_gone = removals, threads, syncs, on_gone
        self._kept, self._models = kept, models
        #: What is going for others, and may still be on disk.
        self.evicting: dict[CacheKey, DiskEntry] = {}

    async def store_anew(self, entry: DiskEntry, payload: memoryview) -> None:
        """Write a file as :meth:`store`, also if somebody has removed it behind our back."""
        known = self._index.get(entry.key)
        try:
            if known is not None and await self._threads.run(self._folder.size, known.path) != known.file_bytes:
                await self._threads.run(self._folder.remove, known.path)  # what comes may have another name
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
            raise TierError(f"{entry.path} is to be removed first, and cannot be", cause="removal")
        try:
            if known is not None:
                await self._threads.run(self._folder.remove, known.path)
                index.drop(key)
            victims = self.claim(entry)
            if victims is None:
                raise self.no_room()
        except KvpoolError:
            raise
        except Exception as error:
            raise self._failure(entry, error) from error
        await self.write_claimed([entry], [payload], victims)

    def is_new(self, key: CacheKey) -> bool:
        """Whether nothing is to be done about a key before it is written."""
        return self._index.get(key) is None and not self._removals.is_stuck(key)

    def no_room(self) -> TierError:
        """Count a cache for which there is no room, and return its error."""
        return refusal(self._counters, "budget")

    def claim(self, entry: DiskEntry) -> list[DiskEntry] | None:
        """Take room for a cache; returns what must go for it, which can be found no more, or None if it has no room."""
        if self._index.try_to_claim(entry):
            return []
        victims = self._index.victims(entry.file_bytes, partial(self._stays, (entry,)))
        if victims is None:
            return None
        self._take(victims)
        self._index.claim(entry)
        return victims

    async def write_claimed(
        self, entries: Sequence[DiskEntry], payloads: Sequence[memoryview], victims: Sequence[DiskEntry]
    ) -> None:
        """Write caches to a file each, or several to their pack; all or none of them are there then.

        Parameters
        ----------
        entries, payloads
            For which room has been taken.
        victims
            What must go for them.

        Raises
        ------
        TierError
            If they are not there.
        """
        try:
            await self._evict(victims)
            try:
                await self._write(entries, payloads)
            except Exception:
                for entry in entries:  # a store may have taken it and failed to say so
                    await self._removals.undo(entry)
                raise
        except BaseException as error:
            for entry in entries:
                self._index.unclaim(entry.key)
            if isinstance(error, KvpoolError) or not isinstance(error, Exception):
                raise
            raise self._failure(entries[0], error, len(entries)) from error
        for entry in entries:
            self._index.settle(entry)
            self._counters.count_written(entry.size_bytes)

    async def _write(self, entries: Sequence[DiskEntry], payloads: Sequence[memoryview]) -> None:
        """Write files; where the store is full though the budget is not, once more when others have gone for them."""
        try:
            await self._threads.run(_write_files, self._folder, self._models, entries, payloads)
        except Exception as error:
            if cause_of(error) not in FULL:
                raise
            file_bytes = sum(entry.file_bytes for entry in entries)
            victims = self._index.oldest(file_bytes, partial(self._stays, entries))
            if victims is None:
                raise
            self._counters.count_error(f"writing {entries[0].path}", error)
            self._take(victims)
            await self._evict(victims)
            await self._threads.run(_write_files, self._folder, self._models, entries, payloads)

    async def evict(self, keys: Sequence[CacheKey]) -> None:
        """Let those of the caches go that nobody uses or keeps, as for others; what cannot be removed stays."""
        free = [key for key in keys if key not in self._kept and not self._locks.is_held(key)]
        victims = [entry for key in free if (entry := self._index.get(key)) is not None]
        self._take(victims)
        try:
            await self._evict(victims)
        except Exception as error:  # noqa: BLE001  drivers raise what they like
            self._counters.count_error("evicting", error)

    def _stays(self, entries: Sequence[DiskEntry], key: CacheKey) -> bool:
        """Whether a cache must not go for others."""
        return key in self._kept or self._locks.is_held(key) or any(key == entry.above for entry in entries)

    def _take(self, victims: Sequence[DiskEntry]) -> None:
        for entry in victims:
            self._locks.take(entry.key)
            self._index.drop(entry.key)
            self.evicting[entry.key] = entry

    async def _evict(self, victims: Sequence[DiskEntry]) -> None:
        """Remove what was taken; raises the first error once all have been tried."""
        if not victims:
            return
        try:
            errors = await self._threads.run(remove_all, self._folder, [entry.path for entry in victims])
        finally:
            for entry in victims:
                del self.evicting[entry.key]
                self._locks.release(entry.key)
        self._index.restore([entry for entry in victims if entry.path in errors])
        gone = [entry.key for entry in victims if entry.path not in errors]
        self._counters.evicted_files += len(gone)
        self._on_gone(gone)
        for error in errors.values():
            raise error

    def _failure(self, entry: DiskEntry, error: Exception, caches: int = 1) -> TierError:
        """Count an error of the store, and return what it means for one or more caches, of which one is named."""
        cause = self._counters.count_error(f"writing {entry.path}", error)
        more = f" and {caches - 1} more that go with it are" if caches > 1 else " is"
        return TierError(
            f"cache {entry.key.block_hash.hex()}{more} not written to the disk tier at {self._folder.url}: {error}; "
            f"{advice_on(cause)}",
            cause=cause,
        )


def _write_files(
    folder: Folder, models: ModelNotes, entries: Sequence[DiskEntry], payloads: Sequence[memoryview]
) -> None:
    """Write caches of one tenant and fingerprint, and before the first of them which models they are of."""
    first = entries[0]
    space = space_name(first.key.tenant, first.key.fingerprint)
    models.write(space)
    if first.pack is not None:
        folder.write(f"{space}/{first.pack}", _pack_parts(entries, payloads))
    elif len(entries) == 1:
        folder.write(first.path, tuple(_file_parts(first, payloads[0])))
    else:
        folder.write_together(
            [(entry.path, _file_parts(entry, payload)) for entry, payload in zip(entries, payloads, strict=True)]
        )


def _file_parts(entry: DiskEntry, payload: memoryview) -> Iterator[bytes | memoryview]:
    """Yield the parts of a cache's own file; the checksum is made when its turn has come, and its bytes are near."""
    yield make_header(entry.key, entry.parent, payload)
    yield payload


def _pack_parts(entries: Sequence[DiskEntry], payloads: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the parts of a pack, made when they are asked for: with the file open, a thread has no more to wait for."""
    described = [
        (CacheName(entry.key.block_hash, entry.parent, entry.size_bytes), header_bytes(entry.key)) for entry in entries
    ]
    # The clock of the files' times, so that the order of writing can be told at the next start.
    yield make_table(described, time.clock_gettime_ns(_CLOCK_REALTIME_COARSE))
    file_bytes = 0
    for entry, payload in zip(entries, payloads, strict=True):
        yield padding(file_bytes)
        header = make_header(entry.key, entry.parent, payload)
        yield header
        yield payload
        file_bytes = len(header) + payload.nbytes
