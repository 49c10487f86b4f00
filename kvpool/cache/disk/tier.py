"""The disk tier of one device, as its event loop uses it.

**One file a cache, but for small ones.** Four threads that each write a few files of 2 MiB, let the disk begin with
each at once, and sync and rename them then, take 0.6 to 0.9 of the time of one file of the same bytes with one sync at
its end (two cores, ext4 on a virtual disk): the disk always has something to do. Without being told to begin they take
as long as that file or a quarter longer, four threads with one file at a time as long as it, and one thread twice as
long. With caches of 64 KiB that is 10 to 50 times as long, whether each is synced or one ``syncfs`` serves all: making
a file takes 50 to 500 µs of a core (the more, the more were removed in the last minute). So small caches that wait
together are written as one file, a pack, from which each can still go by itself
(:mod:`~kvpool.cache.disk.pack`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from kvpool.cache.disk.admission import Admission
from kvpool.cache.disk.advice import advice_on
from kvpool.cache.disk.batches import answered
from kvpool.cache.disk.file_names import models_path, space_name
from kvpool.cache.disk.folder import Folder
from kvpool.cache.disk.folder_syncs import FolderSyncs
from kvpool.cache.disk.index import DiskEntry, DiskIndex
from kvpool.cache.disk.key_locks import KeyLocks
from kvpool.cache.disk.model_notes import ModelNotes
from kvpool.cache.disk.models_file import NotedModel
from kvpool.cache.disk.packing import Packing, Write
from kvpool.cache.disk.reading import Read, Reading
from kvpool.cache.disk.removal import Removal
from kvpool.cache.disk.removals import Removals
from kvpool.cache.disk.scan import scan
from kvpool.cache.disk.statistics import DiskCounters, DiskStatistics
from kvpool.cache.disk.threads import Threads, uncancelled
from kvpool.cache.disk.writer import Writer, refusal
from kvpool.cache.key import BlockHash, CacheKey
from kvpool.errors import InvalidSizeError, KvpoolError, TierError

DEFAULT_THREADS = 4
DEFAULT_QUEUE_LIMIT = 1024


class DiskTier:
    """Caches as files, within a budget. Errors of the store become misses; they never leave as anything but TierError.

    All methods belong to one event loop, in which all decisions are taken; threads only move bytes. The memory given
    to a call must stay as it is until the call returns. Cancelling a call that has not got a thread yet ends it at
    once; else the cancellation takes effect when the thread is done with the memory. A call waits as long as the store
    makes it wait: a caller that has a deadline keeps the memory until then.

    Parameters
    ----------
    folder
        Where the files lie (:func:`~kvpool.cache.disk.folder.folder_at`); this tier's alone.
    budget_bytes
        Bytes of all files together at most, headers included. (Beside it: 16 bytes and a path for each cache being
        removed, and what the file system takes for itself.)
    on_gone
        Called with keys that could be found until now and no longer can: evicted, or their files were no good.
        Not called for :meth:`remove`.
    threads
        Of them as many write as read and remove.
    queue_limit
        Writes, and reads, that are under way or wait at most.

    Raises
    ------
    InvalidSizeError
        If the budget is not positive.
    """

    def __init__(
        self,
        folder: Folder,
        budget_bytes: int,
        *,
        on_gone: Callable[[Sequence[CacheKey]], None] = lambda keys: None,
        threads: int = DEFAULT_THREADS,
        queue_limit: int = DEFAULT_QUEUE_LIMIT,
    ) -> None:
        if budget_bytes <= 0:
            raise InvalidSizeError(f"a disk tier needs at least 1 byte, not {budget_bytes}", asked_bytes=budget_bytes)
        self._folder = folder
        self.on_gone = on_gone
        self._index = DiskIndex(budget_bytes)
        self._counters = DiskCounters(folder.url)
        self._locks = KeyLocks()
        self.threads = threads
        self._writers, self._readers = Threads(threads, "kvpool-disk-write"), Threads(threads, "kvpool-disk-read")
        # Of their own, so that a removal is noted on disk though all others hang in the store.
        self._removers = Threads(threads, "kvpool-disk-remove")
        self._writes, self._reads = Admission(self._locks, queue_limit), Admission(self._locks, queue_limit)
        self._removing: Counter[CacheKey] = Counter()
        self._writing: dict[CacheKey, DiskEntry] = {}
        self._kept: Counter[CacheKey] = Counter()
        self._removals = Removals(folder, self._index, self._counters, self._removers)
        self._syncs = FolderSyncs(folder, threads)
        self._models = ModelNotes(folder)
        self._noting: set[asyncio.Task[None]] = set()
        self._writer = Writer(
            folder, self._index, self._locks, self._counters, self._removals, self._writers, self._syncs, self._gone,
            self._kept, self._models,
        )  # fmt: skip
        self._packing = Packing(self._writers, self._writer, self._refused, self._writing, budget_bytes)
        self._reading = Reading(self._readers, folder, self._index, self._counters, self.find, self._gone)
        self._started = self._open = False

    async def start(self) -> Sequence[DiskEntry]:
        """Take the folder and find again what is in it; returns the entries, least recently used first.

        Raises
        ------
        TierError
            If the folder cannot be used, another process uses it, or this was called before. Make a new tier then.
        """
        if self._started:
            raise TierError(f"the disk tier at {self._folder.url} was started before: make a new one", cause="started")
        self._started = True
        try:
            await uncancelled(self._readers.run(self._folder.open))
            removals, unread, spaces = await uncancelled(
                self._readers.run(scan, self._folder, self._index, self._counters)
            )
        except BaseException as error:
            await self.close()
            if isinstance(error, KvpoolError) or not isinstance(error, Exception):
                raise
            cause = self._counters.count_error("opening the folder", error)
            raise TierError(
                f"the disk tier at {self._folder.url} cannot be used: {error}; {advice_on(cause)}", cause=cause
            ) from error
        self._removals.take_over(removals, unread)
        self._models.take_over(spaces)
        self._open = True
        return list(self._index)

    async def close(self) -> None:
        """Finish what has a thread, give up what waits, and let others have the folder. Files stay.

        Removals that the store has refused are tried a last time where they are not noted: the next start would not
        know of them.
        """
        was_open, self._open = self._open, False
        if was_open:
            async with self._removers.one():
                await uncancelled(self._removals.note_left())
        while self._noting:  # after that: one that hangs in the store must not keep a removal from being noted
            await asyncio.wait(self._noting)
        await self._writers.close()
        await self._readers.close()
        await self._removers.close()
        await self._syncs.close()
        self._folder.close()

    @property
    def url(self) -> str:
        """Of the folder."""
        return self._folder.url

    @property
    def takes_packs(self) -> bool:
        """Whether small caches that come together lie together; else each is a call of the store by itself."""
        return self._folder.takes_packs

    def find(self, key: CacheKey) -> DiskEntry | None:
        """Return what is known of a cache on disk, or None. No use, no hit, no miss."""
        return self._index.get(key) if self._open and key not in self._removing else None

    def entries(self) -> list[DiskEntry]:
        """Return all that is on disk, least recently used first."""
        return list(self._index)

    def touch(self, key: CacheKey) -> None:
        """Count as use of a cache what spares its being written again."""
        if self.find(key) is not None:
            self._index.touch(key)

    def keep(self, keys: Iterable[CacheKey]) -> None:
        """Let no file of these keys go for others, there or not yet, until as many times :meth:`unkeep`."""
        self._kept.update(keys)

    def unkeep(self, keys: Iterable[CacheKey]) -> None:
        """End what :meth:`keep` began."""
        for key in keys:
            self._kept[key] -= 1
            if not self._kept[key]:
                del self._kept[key]

    @contextmanager
    def giving_way(self, keys: Sequence[CacheKey]) -> Iterator[None]:
        """Let files of keys that the caller keeps go within the block, before all others; the last of a chain first."""
        self.unkeep(keys)
        self._index.age(keys)
        try:
            yield
        finally:
            self.keep(keys)
            for key in keys:
                self.touch(key)

    async def evict(self, keys: Sequence[CacheKey]) -> None:
        """Let those of the caches go that nobody uses or keeps, as if for others."""
        async with self._writers.one():
            if self._open:
                await uncancelled(self._writer.evict(keys))

    def keys_of(self, tenant: str, fingerprint: str) -> list[CacheKey]:
        """Return the keys of a tenant and fingerprint that can be found. O(files)."""
        space = (tenant, fingerprint)
        return [each.key for each in self._index if each.key[:2] == space and self.find(each.key) is not None]

    def known(self) -> list[DiskEntry]:
        """Return all that is on disk, and what is being evicted: should the store refuse that, it is found again."""
        return [*self._index, *self._writer.evicting.values()]

    def known_of(self, tenant: str, fingerprint: str) -> set[CacheKey]:
        """Return the keys of a tenant and fingerprint among :meth:`known`. O(files)."""
        return {entry.key for entry in self.known() if entry.key[:2] == (tenant, fingerprint)}

    async def space(self, tenant: str, fingerprint: str) -> set[CacheKey]:
        """Return the keys of a tenant and fingerprint of which there are files, or may be, to :meth:`remove` them.

        What was evicted of them does not come back after a failure of power. What is being written is not among them.

        Raises
        ------
        TierError
            If the store does not tell.
        """
        async with self._removers.one():
            if not self._open:
                raise TierError("caches cannot be removed: the disk tier is closed", cause="closed")
            found = await uncancelled(self._removals.space(tenant, fingerprint))
        return found | self.known_of(tenant, fingerprint)

    async def check_there(self) -> None:
        """Return when the store has answered that the folder is there.

        Raises
        ------
        TierError
            If it is not, or that is not known: nothing of what the index has can be counted on.
        """
        async with self._removers.one():
            if not self._open:
                raise TierError("the disk tier is closed", cause="closed")
            try:
                await uncancelled(self._removers.run(self._folder.sync, ""))
            except Exception as error:
                cause = self._counters.count_error("looking for the folder", error)
                raise TierError(
                    f"what lies in the disk tier at {self._folder.url} cannot be counted on: {error}; "
                    f"{advice_on(cause)}",
                    cause=cause,
                ) from error
        self._counters.answered()

    def overdue(self, what: str, deadline_s: float) -> TierError:
        """Count a call that a caller gave up because the store did not answer in time, and return its error."""
        error = TimeoutError(f"no answer within {deadline_s:g} s")
        cause = self._counters.count_error(what, error)
        return TierError(f"the disk tier at {self._folder.url}: {what}: {error}; {advice_on(cause)}", cause=cause)

    def statistics(self) -> DiskStatistics:
        """Return the figures of now."""
        counters = self._counters
        return DiskStatistics(
            files=len(self._index),
            used_bytes=self._index.used_bytes,
            budget_bytes=self._index.budget_bytes,
            waiting_writes=self._writes.admitted,
            hits=counters.hits,
            misses=counters.misses,
            written_files=counters.written_files,
            written_bytes=counters.written_bytes,
            read_bytes=counters.read_bytes,
            evicted_files=counters.evicted_files,
            removed_files=counters.removed_files,
            bad_files=dict(counters.bad_files),
            leftover_files=counters.leftover_files,
            errors=dict(counters.errors),
            given_up=dict(counters.given_up),
            url=self._folder.url,
            problem=counters.problem,
            lost=counters.lost,
            pending_removals=self._removals.pending,
        )

    # -- names of models ------------------------------------------------------------------------------------------

    def spaces(self) -> list[tuple[str, str, list[NotedModel]]]:
        """Return the tenants and fingerprints of which the start found content, with their models as far as noted."""
        return self._models.found()

    def name(self, tenant: str, fingerprint: str, models: Sequence[NotedModel]) -> None:
        """Say which models the content of a tenant and fingerprint is of: noted on disk before any of it is written.

        Content that is not named comes back all the same, and nobody who asks by a model's name is told of it.
        """
        if self._models.name(tenant, fingerprint, models) and self._open:  # not only when more of it comes
            task = asyncio.ensure_future(self._note_models(space_name(tenant, fingerprint)))
            self._noting.add(task)
            task.add_done_callback(self._noting.discard)

    async def _note_models(self, space: str) -> None:
        async with self._writers.one():
            try:
                await self._writers.run(self._models.write, space)
            except Exception as error:  # noqa: BLE001  drivers raise what they like; the next write there tries again
                self._counters.count_error(f"writing {models_path(space)}", error)

    # -- writing --------------------------------------------------------------------------------------------------

    async def write_back(self, key: CacheKey, parent: BlockHash | None, view: memoryview) -> bool:
        """Store a cache if that is possible now; True once it can be found.

        It survives the death of this process, not always a failure of power. When as many writes wait as may, it is
        given up at once: memory that is being evicted must not wait for a slow store.
        """
        write = Write(key, parent, view, durable=False)
        await self.write((write,))
        try:
            write.done.result()
        except TierError:  # counted
            return False
        return True

    async def write_through(self, key: CacheKey, parent: BlockHash | None, view: memoryview) -> None:
        """Store a cache; returns when it survives the death of every process and a failure of power.

        Raises
        ------
        TierError
            If it is not on disk, or not surely.
        """
        write = Write(key, parent, view, durable=True)
        await self.write((write,))
        write.done.result()

    async def write(self, writes: Sequence[Write]) -> None:
        """Store caches, each as if it were asked for alone; returns when all are answered, some with an error maybe.

        Many in one call cost a third of what as many calls cost: a task for each is more than the work itself.
        """
        for write in writes:
            if write.done.done():
                continue
            if self._writes.full and not write.durable:
                write.fail(refusal(self._counters, "queue_full"))
            else:
                self._writes.admit(write, write.entry.key, self._store)
        await answered(writes)

    def _store(self, write: Write) -> None:
        entry = write.entry
        if self._folder.takes_packs and self._writer.is_new(entry.key):
            self._packing.add(write)
        else:
            self._writes.begin(write, self._store_alone(write))

    async def _store_alone(self, write: Write) -> None:
        entry, key = write.entry, write.entry.key
        async with self._writers.one():
            if write.done.done():
                return
            if (refused := self._refused(key)) is not None:
                raise refused
            self._writing[key] = entry
            write.hold(write)
            try:
                store = self._writer.store_anew if write.durable else self._writer.store
                await uncancelled(store(entry, write.payload))
            finally:
                del self._writing[key]
                write.release()
        if write.durable:
            # In this very step: who closes the tier has waited for the thread, and waits for syncs that were asked for.
            await self._writer.make_durable(entry)
        write.succeed(None)

    def _refused(self, key: CacheKey) -> TierError | None:
        """Count a write that must not be, and return its error; None if it may."""
        if not self._open:
            return refusal(self._counters, "closed")
        # Told to go after this was asked for.
        return refusal(self._counters, "removed") if key in self._removing else None

    # -- reading --------------------------------------------------------------------------------------------------

    async def read_into(self, key: CacheKey, view: memoryview) -> bool:
        """Fill ``view`` with a cache's bytes. False is a miss: what ``view`` holds then is worth nothing.

        Raises
        ------
        InvalidSizeError
            If ``view`` has another size than the cache (:meth:`find` tells it).
        """
        read = Read(key, view)
        await self.read((read,))
        return read.done.result()

    async def read(self, reads: Sequence[Read]) -> None:
        """Fill memory with caches' bytes, each as if it were asked for alone; returns when all are answered."""
        for read in reads:
            if read.done.done():
                continue
            entry = self.find(read.key)
            if entry is not None and read.payload.nbytes != entry.size_bytes:
                read.fail(_other_size(read, entry))
                continue
            if entry is None or self._reads.full:
                self._counters.misses += 1
                read.succeed(False)
            else:
                read.done.add_done_callback(partial(self._count_read, read))
                self._reads.admit(read, read.key, self._reading.add)
        await answered(reads)

    def _count_read(self, read: Read, done: asyncio.Future[bool]) -> None:
        if done.cancelled() or done.exception() is not None:
            return
        if done.result():
            self._counters.count_hit(read.payload.nbytes)
        else:
            self._counters.misses += 1

    def _gone(self, keys: Sequence[CacheKey]) -> None:
        self.on_gone(keys)

    # -- removing -------------------------------------------------------------------------------------------------

    async def remove(self, keys: Iterable[CacheKey]) -> int:
        """Remove caches for good; returns how many there were.

        They cannot be found from the call on. Writes of these keys that wait are given up, one under way is waited
        for. When this returns, no crash brings any of them back, and they may be written anew. What must be waited for
        is noted on disk first: the next start removes it, should this life end with it.

        Raises
        ------
        TierError
            If that is not sure. They cannot be found in this life of the tier, but may be in the next: call again.
        """
        wanted = set(keys)
        self._removing.update(wanted)
        return await uncancelled(self._remove(wanted))

    async def complete_removals(self) -> None:
        """Try again the removals that the store has refused, if there are any."""
        async with self._removers.one():
            if self._open:
                await uncancelled(self._removals.again())

    async def _remove(self, wanted: set[CacheKey]) -> int:
        # Beside the wait for the locks: who asks for these keys from now on stands behind this.
        noting = asyncio.ensure_future(self._note([key for key in wanted if self._locks.is_held(key)]))
        try:
            async with self._locks.hold(wanted):
                noted = await noting
                async with self._removers.one():
                    if not self._open:
                        raise TierError("caches cannot be removed: the disk tier is closed", cause="closed")
                    return await self._removals.remove(wanted, noted)
        finally:
            self._removing.subtract(wanted)
            for key in wanted:
                if not self._removing[key]:
                    del self._removing[key]

    async def _note(self, held: Sequence[CacheKey]) -> Removal | None:
        """Decide on the removal of files that are in use: nothing tells when that ends."""
        places = (self._index, self._writing, self._writer.evicting)
        entries = [entry for key in held for place in places if (entry := place.get(key)) is not None]
        if not entries or not self._open:
            return None
        async with self._removers.one():
            return await self._removals.note(dict.fromkeys(entries))


def _other_size(read: Read, entry: DiskEntry) -> InvalidSizeError:
    return InvalidSizeError(
        f"the cache has {entry.size_bytes} bytes, the memory to read it into {read.payload.nbytes}",
        asked_bytes=read.payload.nbytes,
        size_bytes=entry.size_bytes,
    )
