"""Reading caches into memory: small ones several at a time."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence

from kvpool.cache.disk.batches import Batches, Request
from kvpool.cache.disk.file_names import CacheName, space_name
from kvpool.cache.disk.folder import Folder
from kvpool.cache.disk.header import BadFileError, check_file, header_bytes
from kvpool.cache.disk.index import DiskEntry, DiskIndex
from kvpool.cache.disk.statistics import DiskCounters
from kvpool.cache.disk.threads import Threads
from kvpool.cache.key import CacheKey
from kvpool.errors import InvalidRequestError

_ENOUGH_BYTES = 512 << 10
"""Of a batch. Other threads read at the same time, so that not too much should go with this one."""
_MOST_PACKED_BYTES = 16 << 20
"""Of one pack. What waits of it goes together: several threads that read in one file are in each other's way."""


class Read(Request[bool]):
    """A cache to be read into memory; answered whether that holds it.

    Parameters
    ----------
    key, view
        Its name, and where its bytes go: nobody else may use that until :attr:`done`.

    Raises
    ------
    InvalidRequestError
        If the memory cannot be written to.
    """

    def __init__(self, key: CacheKey, view: memoryview) -> None:
        super().__init__()
        self.key, self.payload = key, memoryview(view).cast("B")
        if self.payload.readonly:
            raise InvalidRequestError("a cache is read into memory that can be written to, this view is read-only")
        self.entry: DiskEntry | None = None


class Reading(Batches[Read, bool]):
    """Reads whatever waits, as many bytes by one thread as one thread should have.

    Parameters
    ----------
    threads, folder, index, counters
        Of the tier.
    find
        Returns what is known of a key, if that may be found.
    gone
        Told what can be found no more.
    """

    def __init__(
        self,
        threads: Threads,
        folder: Folder,
        index: DiskIndex,
        counters: DiskCounters,
        find: Callable[[CacheKey], DiskEntry | None],
        gone: Callable[[Sequence[CacheKey]], None],
    ) -> None:
        super().__init__(threads)
        self._folder, self._index, self._counters, self._find, self._gone = folder, index, counters, find, gone

    def take(self, waiting: deque[Read]) -> list[Read]:
        batch = self._take_packed(waiting)
        # Elsewhere a read is a wait for the store's answer, and all threads should wait at the same time.
        left_bytes = _ENOUGH_BYTES if self._folder.takes_packs else 0
        left_bytes -= sum(read.payload.nbytes for read in batch)
        while waiting and (not batch or waiting[0].payload.nbytes <= left_bytes):
            read = waiting.popleft()
            if self._find_entry(read):
                batch.append(read)
                left_bytes -= read.payload.nbytes
        return batch

    def _take_packed(self, waiting: deque[Read]) -> list[Read]:
        """Take all that waits of the pack of the first, if that is in one."""
        while waiting and not self._find_entry(waiting[0]):
            waiting.popleft()
        if not waiting or (pack := _pack_of(waiting[0])) is None:
            return []
        batch: list[Read] = []
        others: list[Read] = []
        size_bytes = 0
        for read in waiting:
            if size_bytes < _MOST_PACKED_BYTES and self._find_entry(read) and _pack_of(read) == pack:
                batch.append(read)
                size_bytes += read.payload.nbytes
            elif not read.done.done():
                others.append(read)
        waiting.clear()
        waiting.extend(others)
        return batch

    def _find_entry(self, read: Read) -> bool:
        """Find what is to be read now; False, and the read is done, if it was given up or went while it waited."""
        entry = self._find(read.key)
        if entry is None or entry.size_bytes != read.payload.nbytes:
            read.succeed(False)
        read.entry = entry
        return not read.done.done()

    async def do(self, batch: list[Read]) -> None:
        entries = [read.entry for read in batch if read.entry is not None]
        payloads = [read.payload for read in batch]
        outcomes = await self._threads.run(_read_files, self._folder, entries, payloads)
        for read, entry, error in zip(batch, entries, outcomes, strict=True):
            if error is None:
                self._index.touch(entry.key)
            else:
                await self._miss(entry, error)
            read.succeed(error is None)

    async def finish(self, batch: list[Read]) -> None:
        pass

    async def _miss(self, entry: DiskEntry, error: Exception) -> None:
        if isinstance(error, BadFileError):
            await self._discard(entry, error.cause)
            return
        self._counters.count_error(f"reading {entry.path}", error)
        if isinstance(error, FileNotFoundError):
            self._counters.count_bad("missing", entry.path)
            self._forget(entry)
        # Else the file may be good.

    async def _discard(self, entry: DiskEntry, cause: str) -> None:
        """Remove a file that is no good."""
        self._counters.count_bad(cause, entry.path)
        self._forget(entry)
        try:
            await self._threads.run(self._folder.remove, entry.path)
        except Exception as error:  # noqa: BLE001  drivers raise what they like
            self._counters.count_error(f"removing {entry.path}", error)
            self._index.restore((entry,))  # it takes room still, and goes first; each read finds that it is no good

    def _forget(self, entry: DiskEntry) -> None:
        self._index.drop(entry.key)
        self._gone((entry.key,))


def _pack_of(read: Read) -> tuple[str, str, str] | None:
    """Return what tells the pack in which a cache lies from all others, if it lies in one."""
    entry = read.entry
    return None if entry is None or entry.pack is None else (*entry.key[:2], entry.pack)


def _read_files(folder: Folder, entries: Sequence[DiskEntry], payloads: Sequence[memoryview]) -> list[Exception | None]:
    """Read caches, those of one pack together; returns why what is in the memory now is worth nothing, if so."""
    packs: dict[tuple[str, str, str], list[int]] = {}
    outcomes: list[Exception | None] = [None] * len(entries)
    headers = [bytearray(header_bytes(entry.key)) for entry in entries]
    for number, (entry, header, payload) in enumerate(zip(entries, headers, payloads, strict=True)):
        if entry.pack is not None:
            packs.setdefault((*entry.key[:2], entry.pack), []).append(number)
            continue
        try:
            file_bytes = folder.read(entry.path, (header, payload))
            check_file(file_bytes, header, payload, entry.key, entry.parent)
        except Exception as error:  # noqa: BLE001  drivers raise what they like; the caller counts it
            outcomes[number] = error
    waiting = list(packs.items())
    for (tenant, fingerprint, pack), numbers in waiting:  # grows by what is tried once more
        names = [CacheName(entries[n].key.block_hash, entries[n].parent, entries[n].size_bytes) for n in numbers]
        reads = [(name, (headers[number], payloads[number])) for name, number in zip(names, numbers, strict=True)]
        try:
            there = folder.read_packed(f"{space_name(tenant, fingerprint)}/{pack}", reads)
        except Exception as error:  # noqa: BLE001  as above
            if len(numbers) > 1:  # the error may be that of one: each by itself
                waiting += [((tenant, fingerprint, pack), [number]) for number in numbers]
            else:
                outcomes[numbers[0]] = error
            continue
        for number, packed_bytes in zip(numbers, there, strict=True):
            entry = entries[number]
            try:
                if packed_bytes is None:
                    raise FileNotFoundError(errno.ENOENT, "not in its pack", entry.path)
                check_file(packed_bytes, headers[number], payloads[number], entry.key, entry.parent)
            except (BadFileError, OSError) as error:
                outcomes[number] = error
    return outcomes
