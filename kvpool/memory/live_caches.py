"""The caches that live in a device's memory."""

from __future__ import annotations

from kvpool.errors import CacheStateError, DoubleReleaseError, UnknownCacheError, ensure
from kvpool.memory.allocation import Allocation
from kvpool.memory.extents import Extents, total_bytes


class LiveCaches:
    """Where each lies, and what all of them take. Ids are taken to ascend."""

    def __init__(self) -> None:
        self.by_id: dict[int, Allocation] = {}
        """Open to who moves caches: that changes nothing of what they take."""
        self.size_bytes = 0
        """What is backed of all of them."""
        self._highest_id = -1

    def add(self, allocation: Allocation) -> None:
        """Note that a cache lives from now on."""
        cache_id = allocation.cache_id
        self.by_id[cache_id] = allocation
        self.size_bytes += allocation.size_bytes
        if cache_id > self._highest_id:
            self._highest_id = cache_id

    def get(self, cache_id: int) -> Allocation:
        """Return where a live cache lies.

        Raises
        ------
        DoubleReleaseError
            If it was freed or evicted: its id is not above the highest ever seen.
        UnknownCacheError
            If it never lived here.
        """
        try:
            return self.by_id[cache_id]
        except KeyError:
            raise self._not_live(cache_id) from None

    def pop(self, cache_id: int) -> Allocation:
        """Return where a live cache lay, which does no longer. Raises as :meth:`get`."""
        try:
            allocation = self.by_id.pop(cache_id)
        except KeyError:
            raise self._not_live(cache_id) from None
        self.size_bytes -= allocation.size_bytes
        return allocation

    def change(self, cache_id: int, extents: Extents, pages: tuple[tuple[int, int], ...]) -> Allocation:
        """Note what is backed of a live cache from now on."""
        each = self.by_id[cache_id]
        changed = each._replace(size_bytes=total_bytes(extents), extents=extents, pages=pages)
        self.by_id[cache_id] = changed
        self.size_bytes += changed.size_bytes - each.size_bytes
        return changed

    def check(self) -> None:
        """Raise InvariantError unless what they take is counted."""
        ensure(self.size_bytes == sum(each.size_bytes for each in self.by_id.values()), "live bytes are counted")

    def _not_live(self, cache_id: int) -> CacheStateError:
        if 0 <= cache_id <= self._highest_id:
            return DoubleReleaseError(f"cache {cache_id} was freed or evicted before; free it once", cache_id=cache_id)
        return UnknownCacheError(f"no cache {cache_id} ever lived here", cache_id=cache_id)
