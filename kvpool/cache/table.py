"""A row of numbers for each cache of a pool, and the ids that name rows outside the process.

A pool holds hundreds of thousands of caches. An object for each would cost 377 bytes, and a garbage collection that
stops the event loop for 48 ms. Arrays of numbers are small and the collector does not traverse them.
"""

from __future__ import annotations

from array import array

from kvpool.errors import StaleCacheError, UnknownCacheError, ensure

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
