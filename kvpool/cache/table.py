"""A row of numbers for each cache of a pool, and the ids that name rows outside the process.

A pool holds hundreds of thousands of caches. An object for each would cost 377 bytes, and a garbage collection that
stops the event loop for 48 ms. Arrays of numbers are small and the collector does not traverse them.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from kvpool.errors import StaleCacheError, UnknownCacheError, ensure

Rows = npt.NDArray[np.int64]

NO_ROW = -1

RESIDENT = 1  # the row is in use
SEALED = 2  # immutable
KEYED = 4  # published: found by its key

_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1
MAX_STAMP = 2**31 - 1  # ids stay positive in 64 signed bits
_GROWTH_ROWS = 4096


class CacheTable:
    """Columns of numbers, one row a cache, and one value a device.

    Columns are open for reading. A row is handed out again when its cache has gone, so what leaves the process is the
    id (:meth:`id_of`), which also counts the uses of the row: :meth:`row_of` tells the ids of former caches apart.

    (Columns of bytes, and arrays of unsigned numbers, are written to in half the time of others.)
    """

    def __init__(self) -> None:
        self.parent = array("i")  # row of the parent, or NO_ROW
        self.children = array("I")  # resident children
        self.pins = array("I")  # leases
        self.device = array("I")
        self.partition = array("I")  # what a policy ranks apart: a device, or a quota's part of one
        self.size_bytes = array("Q")  # what it takes of its device
        self.asked_bytes = array("Q")  # what was asked for: the bytes that have a meaning
        self.last_accessed = array("d")  # added, pinned, or given up by its last holder
        self.access_count = array("I")  # times it was pinned after it was added
        self.flags = bytearray()
        self.resident_bytes: list[int] = []  # by device
        self.evictable_bytes: list[int] = []  # by device: published and held by nobody
        self.orphans: set[int] = set()
        """Rows whose parent left before them: no chain leads to them, though a key may."""
        self._space = array("I")
        self._stamps = array("I")  # uses of the row so far: tells ids of its former caches apart
        self._free = array("i")
        self._resident = 0

    def __len__(self) -> int:
        """Caches in the table."""
        return self._resident

    def add_device(self, number: int) -> None:
        """Make a device known. Devices are numbered in order, from 0."""
        ensure(number == len(self.resident_bytes), "devices are numbered in order", asked=number)
        self.resident_bytes.append(0)
        self.evictable_bytes.append(0)

    def is_sealed(self, row: int) -> bool:
        """Whether a cache is immutable."""
        return bool(self.flags[row] & SEALED)

    def id_of(self, row: int) -> int:
        """Return the id of the cache in a row: never given out again, positive, below 2**63."""
        return self._stamps[row] << _ROW_BITS | row

    def ids_of(self, rows: Rows) -> list[int]:
        """Return the ids of the caches in some rows."""
        stamps = np.frombuffer(self._stamps, np.uint32)[rows].astype(np.int64)
        ids: list[int] = (stamps << _ROW_BITS | rows).tolist()
        return ids

    def live_row(self, cache_id: int) -> int:
        """Return the row of a cache, or -1 if there is none of that id (any more)."""
        row = cache_id & _ROW_MASK
        if row < len(self._stamps) and self._stamps[row] == cache_id >> _ROW_BITS and self.flags[row]:
            return row
        return NO_ROW

    def row_of(self, cache_id: int) -> int:
        """Return the row of a cache.

        Raises
        ------
        StaleCacheError
            If the cache is gone.
        UnknownCacheError
            If this index never gave out such an id.
        """
        row = self.live_row(cache_id)
        if row >= 0:
            return row
        place, stamp = cache_id & _ROW_MASK, cache_id >> _ROW_BITS
        if place < len(self._stamps) and 0 < stamp < self._stamps[place]:
            raise StaleCacheError(
                f"cache {cache_id} is gone: released, evicted or lost; look its key up again", cache_id=cache_id
            )
        raise UnknownCacheError(f"there is no cache {cache_id}: this pool never gave out such an id", cache_id=cache_id)

    def rows_of(self, *spaces: int) -> Rows:
        """Return the rows of all caches of some spaces, published or not."""
        column = np.frombuffer(self._space, np.int32)
        there = column == spaces[0] if len(spaces) == 1 else np.isin(column, spaces)
        rows: Rows = np.flatnonzero(there & (np.frombuffer(self.flags, np.uint8) != 0))
        return rows

    def totals_by_space(self, count: int) -> tuple[list[int], list[int], list[int]]:
        """Return for each of ``count`` spaces how many caches and keys it has, and the bytes they take. O(rows)."""
        flags = np.frombuffer(self.flags, np.uint8)
        used = np.flatnonzero(flags)
        spaces = np.frombuffer(self._space, np.int32)[used]
        caches = np.bincount(spaces, minlength=count)
        keys = np.bincount(spaces[flags[used] & KEYED != 0], minlength=count)
        size_bytes = np.bincount(spaces, np.frombuffer(self.size_bytes, np.int64)[used], minlength=count)
        return caches.tolist(), keys.tolist(), size_bytes.astype(np.int64).tolist()

    def totals_by_partition(self, count: int) -> tuple[list[int], list[int]]:
        """Return for each of ``count`` partitions what its caches take, and what nobody holds of it. O(rows)."""
        flags, sizes = np.frombuffer(self.flags, np.uint8), np.frombuffer(self.size_bytes, np.int64)
        partitions, pins = np.frombuffer(self.partition, np.int32), np.frombuffer(self.pins, np.uint32)
        used = flags != 0
        idle = used & (flags & KEYED != 0) & (pins == 0)
        held, evictable = (
            np.bincount(partitions[rows], sizes[rows], count).astype(np.int64).tolist() for rows in (used, idle)
        )
        return held, evictable

    def pinned_bytes(self, device: int) -> dict[int, int]:
        """Return by space what those of its caches take of a device that somebody holds, in bytes. O(rows)."""
        held = np.frombuffer(self.pins, np.uint32) > 0
        held &= (np.frombuffer(self.device, np.int32) == device) & (np.frombuffer(self.flags, np.uint8) != 0)
        spaces, sizes = np.frombuffer(self._space, np.int32)[held], np.frombuffer(self.size_bytes, np.int64)[held]
        return {space: int(size_bytes) for space, size_bytes in enumerate(np.bincount(spaces, sizes)) if size_bytes}

    def check(self) -> None:
        """Raise InvariantError unless counts, links and bytes add up. O(rows), for tests."""
        flags, devices = np.array(self.flags), np.array(self.device)
        used, keyed = np.flatnonzero(flags), np.flatnonzero(flags & KEYED)
        above = np.array(self.parent)[used]
        above = above[above >= 0]
        idle, sizes = keyed[np.array(self.pins)[keyed] == 0], np.array(self.size_bytes)
        ensure(len(used) == self._resident, "count of caches")
        ensure(bool(flags[above].all()), "a parent that is gone")
        ensure(np.bincount(above, minlength=len(flags)).tolist() == list(self.children), "counts of children")
        for rows, kept in ((used, self.resident_bytes), (idle, self.evictable_bytes)):
            counted = [int(sizes[rows[devices[rows] == device]].sum()) for device in range(len(kept))]
            ensure(counted == kept, "bytes by device", counted=counted, kept=kept)
        ensure(
            all(flags[row] and self.parent[row] < 0 for row in self.orphans), "orphans that are gone, or have a parent"
        )
        free = set(self._free)
        ensure(len(free) == len(self._free) and free.isdisjoint(used.tolist()), "rows both free and in use")

    def _cut_off(self, lost: Rows) -> None:
        """Cut the children of these rows off."""
        parent, children = np.frombuffer(self.parent, np.int32), np.frombuffer(self.children, np.uint32)
        cut_off = np.flatnonzero(np.isin(parent, lost))
        self.orphans.update(cut_off[np.frombuffer(self.flags, np.uint8)[cut_off] != 0].tolist())
        parent[cut_off] = NO_ROW  # of free rows too, which have no parent
        children[lost] = 0

    def _grow(self) -> int:
        """Add free rows; returns how many."""
        rows = len(self.flags) + _GROWTH_ROWS
        ints = (self.parent, self.children, self.pins, self.device, self.partition, self._space, self.access_count)
        for column in (*ints, self.size_bytes, self.asked_bytes, self.last_accessed):
            column.frombytes(bytes(_GROWTH_ROWS * column.itemsize))
        self.flags.extend(bytes(_GROWTH_ROWS))
        self._stamps.extend(array("I", [1]) * _GROWTH_ROWS)
        self._free.extend(range(rows - 1, rows - 1 - _GROWTH_ROWS, -1))
        return _GROWTH_ROWS
