"""What is on disk, in the order of use, and what must go so that something else fits.

The tail of a chain goes before its head, as on the devices: behind a block that is missing nothing can be hit.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from kvpool.cache.disk.file_names import CacheName, cache_path, parse_cache, parse_space
from kvpool.cache.disk.header import header_bytes
from kvpool.cache.key import BlockHash, CacheKey
from kvpool.cache.leaf_heap import Entry, LeafHeap
from kvpool.errors import ensure

MOST_FILES = 1 << 20
"""Files of one tier at most: the bound of its memory (an entry takes 620 bytes) and of its start."""


class DiskEntry(NamedTuple):
    """A cache on disk."""

    key: CacheKey
    parent: BlockHash | None
    size_bytes: int
    """Of the payload."""
    pack: str | None = None
    """The name of the pack that it lies in; None if it has a file of its own."""

    @classmethod
    def at(cls, path: str) -> DiskEntry | None:
        """Return the cache that lies at a path, or None if no cache lies at such a path."""
        folder, _, file = path.partition("/")
        space, name = parse_space(folder), parse_cache(file)
        if space is None or name is None:
            return None
        return cls(CacheKey(*space, name.block_hash), name.parent, name.payload_bytes, name.pack)

    @property
    def file_bytes(self) -> int:
        """What it takes of the budget: header and payload."""
        return header_bytes(self.key) + self.size_bytes

    @property
    def above(self) -> CacheKey | None:
        """The key of the cache that it hangs on."""
        return None if self.parent is None else self.key._replace(block_hash=self.parent)

    @property
    def path(self) -> str:
        """Where it lies in the tier's folder."""
        return cache_path(self.key, self.name)

    @property
    def name(self) -> CacheName:
        """What tells it from the others of its folder."""
        return CacheName(self.key.block_hash, self.parent, self.size_bytes, self.pack)


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
        self._claims: dict[CacheKey, DiskEntry] = {}
        # Each use gives an entry a stamp of its own, so that the heap need not be searched for the old one.
        self._stamps: dict[CacheKey, int] = {}
        self._stamped: dict[int, CacheKey] = {}
        self._first_stamp = self._next_stamp = 0
        self._children: Counter[CacheKey] = Counter()
        self._leaves = LeafHeap(self._is_leaf)
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
        self._stamp(key, self._next_stamp)
        self._next_stamp += 1

    def age(self, keys: Sequence[CacheKey]) -> None:
        """Make those of the keys that are there the least recently used, in this order."""
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key, last=False)
                self._first_stamp -= 1
                self._stamp(key, self._first_stamp)

    def add(self, entry: DiskEntry) -> None:
        """Enter a cache as the most recently used."""
        ensure(entry.key not in self._entries, "a key is entered twice in the disk index")
        self._entries[entry.key] = entry
        self._used_bytes += entry.file_bytes
        self._hang(entry)
        self.touch(entry.key)

    def restore(self, entries: Sequence[DiskEntry]) -> None:
        """Enter caches again whose files could not be removed: they go first next time, in this order."""
        for entry in entries:
            self.add(entry)
        self.age([entry.key for entry in entries])

    def drop(self, key: CacheKey) -> DiskEntry | None:
        """Forget a cache, and return what it was."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._used_bytes -= entry.file_bytes
            del self._stamped[self._stamps.pop(key)]
            self._take_off(entry)
        return entry

    def claim(self, entry: DiskEntry) -> None:
        """Take room for a file that is not to be found: one being written, or one that could not be removed."""
        self._claim(entry, entry.file_bytes)

    def try_to_claim(self, entry: DiskEntry) -> bool:
        """:meth:`claim` room for a file if it fits though nothing goes."""
        file_bytes = entry.file_bytes
        if not self.has_room(file_bytes):
            return False
        self._claim(entry, file_bytes)
        return True

    def _claim(self, entry: DiskEntry, file_bytes: int) -> None:
        ensure(entry.key not in self._claims, "room is claimed twice for a key")
        self._claims[entry.key] = entry
        self._used_bytes += file_bytes
        self._hang(entry)

    def unclaim(self, key: CacheKey) -> None:
        """Give that room back."""
        entry = self._claims.pop(key)
        self._used_bytes -= entry.file_bytes
        self._take_off(entry)

    def settle(self, entry: DiskEntry) -> None:
        """Enter a cache for which room was claimed, under this name or another, as the most recently used."""
        key = entry.key
        ensure(key not in self._entries, "a key is entered twice in the disk index")
        claimed = self._claims.pop(key)
        ensure(claimed.size_bytes == entry.size_bytes and claimed.parent == entry.parent, "another cache than claimed")
        self._entries[key] = entry
        self.touch(key)

    def has_room(self, file_bytes: int) -> bool:
        """Whether a file fits though nothing goes."""
        files = len(self._entries) + len(self._claims)
        return self._used_bytes + file_bytes <= self.budget_bytes and files < self._most_files

    def victims(self, file_bytes: int, busy: Callable[[CacheKey], bool]) -> list[DiskEntry] | None:
        """Return what must go so that a file fits, or None if it cannot fit now.

        Of what nothing hangs on, the least recently used goes first; then what it hung on is one of these, if nothing
        else hangs on that.

        Parameters
        ----------
        file_bytes
            Size of the file to be written.
        busy
            Whether a key's file is being read, written or removed right now, or is wanted; such ones stay, and with
            them what they hang on.
        """
        excess_bytes = self._used_bytes + file_bytes - self.budget_bytes
        excess_files = len(self._entries) + len(self._claims) + 1 - self._most_files
        return None if file_bytes > self.budget_bytes else self._choose(excess_bytes, excess_files, busy)

    def oldest(self, file_bytes: int, busy: Callable[[CacheKey], bool]) -> list[DiskEntry] | None:
        """Return what goes first, as many bytes as a file has, however much is allowed; None if that cannot be had."""
        return self._choose(file_bytes, 1, busy)

    def _choose(self, bytes_: int, files: int, busy: Callable[[CacheKey], bool]) -> list[DiskEntry] | None:
        if bytes_ <= 0 and files <= 0:
            return []
        chosen: list[DiskEntry] = []
        going: Counter[CacheKey] = Counter()
        exposed: list[int] = []  # what nothing hangs on once the chosen have gone
        leaves = self._leaves.ascending()
        leaf = next(leaves, None)
        while bytes_ > 0 or files > 0:
            if exposed and (leaf is None or exposed[0] < leaf[1]):
                stamp = heappop(exposed)
            elif leaf is not None:
                stamp, leaf = leaf[1], next(leaves, None)
            else:
                return None
            entry = self._entries[self._stamped[stamp]]
            if busy(entry.key):
                continue
            chosen.append(entry)
            bytes_ -= entry.file_bytes
            files -= 1
            above = entry.above
            if above is not None and above in self._stamps:
                going[above] += 1
                if going[above] == self._children[above]:
                    heappush(exposed, self._stamps[above])
        return chosen

    def _is_leaf(self, leaf: Entry) -> bool:
        key = self._stamped.get(leaf[1])
        return key is not None and key not in self._children

    def _stamp(self, key: CacheKey, stamp: int) -> None:
        self._stamped.pop(self._stamps.get(key, stamp), None)
        self._stamps[key] = stamp
        self._stamped[stamp] = key
        self._expose(key)

    def _expose(self, key: CacheKey) -> None:
        if key not in self._children:
            stamp = self._stamps[key]
            self._leaves.push((stamp, stamp, 0))

    def _hang(self, entry: DiskEntry) -> None:
        """Count an entry as a reason to keep what it hangs on, there or not yet."""
        if entry.above is not None:
            self._children[entry.above] += 1

    def _take_off(self, entry: DiskEntry) -> None:
        above = entry.above
        if above is None:
            return
        self._children[above] -= 1
        if not self._children[above]:
            del self._children[above]
            if above in self._stamps:
                self._expose(above)

    def check(self) -> None:
        """Raise InvariantError unless the sums are right. O(entries), for tests."""
        total = sum(entry.file_bytes for entry in self) + sum(entry.file_bytes for entry in self._claims.values())
        ensure(total == self._used_bytes, "used bytes of the disk index", used_bytes=self._used_bytes, total=total)
        ensure(self._claims.keys().isdisjoint(self._entries), "a key is both entered and claimed")
        hanging = Counter(entry.above for entry in (*self, *self._claims.values()) if entry.above is not None)
        ensure(hanging == self._children, "what hangs on what in the disk index")
        ensure(list(self._entries) == sorted(self._entries, key=self._stamps.__getitem__), "the order of use")
        ensure({stamp: key for key, stamp in self._stamps.items()} == self._stamped, "stamps of the disk index")
        leaves = [key for key in self._entries if key not in self._children]
        ensure(leaves == [self._stamped[leaf[1]] for leaf in self._leaves.ascending()], "leaves of the disk index")
