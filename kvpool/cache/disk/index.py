"""What is on disk, in the order of use, and what must go so that something else fits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvpool.cache.disk.header import header_bytes
from kvpool.cache.disk.names import cache_path, parse_cache, parse_space
from kvpool.cache.key import BlockHash, CacheKey
from kvpool.errors import ensure

MOST_FILES = 1 << 20
"""Files of one tier at most: the bound of its memory (an entry takes 380 bytes) and of its start."""


class DiskEntry(NamedTuple):
    """A cache on disk."""

    key: CacheKey
    parent: BlockHash | None
    size_bytes: int
    """Of the payload."""

    @classmethod
    def at(cls, path: str) -> DiskEntry | None:
        """Return the cache that lies at a path, or None if no cache lies at such a path."""
        folder, _, file = path.partition("/")
        space, name = parse_space(folder), parse_cache(file)
        if space is None or name is None:
            return None
        return cls(CacheKey(*space, name.block_hash), name.parent, name.payload_bytes)

    @property
    def file_bytes(self) -> int:
        """What it takes of the budget: header and payload."""
        return header_bytes(self.key) + self.size_bytes

    @property
    def path(self) -> str:
        """Where it lies in the tier's folder."""
        return cache_path(self.key, self.parent, self.size_bytes)


class DiskIndex:
    """Entries by key, least recently used first. Integers only: no files, no clock.

    Parameters
    ----------
    budget_bytes
        Bytes of all files together, headers included.
    most_files
        Files at most.
    """

    def __init__(self, budget_bytes: int, most_files: int = MOST_FILES) -> None:
        self.budget_bytes = budget_bytes
        self._most_files = most_files
        self._entries: OrderedDict[CacheKey, DiskEntry] = OrderedDict()
        self._claims: dict[CacheKey, int] = {}
        self._used_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[DiskEntry]:
        """Yield the entries, least recently used first."""
        return iter(self._entries.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of files that are there, are being written, or could not be removed."""
        return self._used_bytes

    def get(self, key: CacheKey) -> DiskEntry | None:
        """Return the entry of a key without counting as use."""
        return self._entries.get(key)

    def touch(self, key: CacheKey) -> None:
        """Make a key the most recently used."""
        self._entries.move_to_end(key)

    def add(self, entry: DiskEntry) -> None:
        """Enter a cache as the most recently used."""
        ensure(entry.key not in self._entries, "a key is entered twice in the disk index")
        self._entries[entry.key] = entry
        self._used_bytes += entry.file_bytes

    def restore(self, entries: Sequence[DiskEntry]) -> None:
        """Enter caches again whose files could not be removed: they go first next time, in this order."""
        for entry in reversed(entries):
            self.add(entry)
            self._entries.move_to_end(entry.key, last=False)

    def drop(self, key: CacheKey) -> DiskEntry | None:
        """Forget a cache, and return what it was."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._used_bytes -= entry.file_bytes
        return entry

    def claim(self, entry: DiskEntry) -> None:
        """Take room for a file that is not to be found: one being written, or one that could not be removed."""
        ensure(entry.key not in self._claims, "room is claimed twice for a key")
        self._claims[entry.key] = entry.file_bytes
        self._used_bytes += entry.file_bytes

    def unclaim(self, key: CacheKey) -> None:
        """Give that room back."""
        self._used_bytes -= self._claims.pop(key)

    def victims(self, file_bytes: int, busy: Callable[[CacheKey], bool]) -> list[DiskEntry] | None:
        """Return what must go so that a file fits, least recently used first, or None if it cannot fit now.

        Parameters
        ----------
        file_bytes
            Size of the file to be written.
        busy
            Whether a key's file is being read, written or removed right now; such ones stay.
        """
        excess_bytes = self._used_bytes + file_bytes - self.budget_bytes
        excess_files = len(self._entries) + len(self._claims) + 1 - self._most_files
        chosen: list[DiskEntry] = []
        if file_bytes > self.budget_bytes:
            return None
        for entry in self._entries.values():
            if excess_bytes <= 0 and excess_files <= 0:
                break
            if not busy(entry.key):
                chosen.append(entry)
                excess_bytes -= entry.file_bytes
                excess_files -= 1
        return chosen if excess_bytes <= 0 and excess_files <= 0 else None

    def check(self) -> None:
        """Raise InvariantError unless the sums are right. O(entries), for tests."""
        total = sum(entry.file_bytes for entry in self) + sum(self._claims.values())
        ensure(total == self._used_bytes, "used bytes of the disk index", used_bytes=self._used_bytes, total=total)
        ensure(self._claims.keys().isdisjoint(self._entries), "a key is both entered and claimed")
