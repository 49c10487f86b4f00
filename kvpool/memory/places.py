"""Where there is room in a device's memory as it is: nothing moves for it, and nothing goes."""

from __future__ import annotations

from kvpool.errors import CapacityError
from kvpool.memory.allocation import Place, Request, no_addresses, no_room
from kvpool.memory.live_caches import LiveCaches
from kvpool.memory.ranges import RangeAllocator
from kvpool.memory.reserve import Shape
from kvpool.memory.shared import SharedPages
from kvpool.memory.usage import MemoryUsage


class Places:
    """Finds a place for a cache, or for more pages of one; and says what there is.

    Parameters
    ----------
    ranges, shared
        The pages, and what lies in those that caches share.
    live
        The caches that lie there.
    """

    def __init__(self, ranges: RangeAllocator, shared: SharedPages, live: LiveCaches) -> None:
        self._ranges = ranges
        self._shared = shared
        self._live = live
        self._page_bytes = ranges.table.page_size_bytes
        self._page_shift = self._page_bytes.bit_length() - 1

    def find(self, request: Request) -> Place | None:
        """Return offset and pages, or ``None`` if there is no room."""
        cache_id, tenant, size_bytes, maximum_bytes, shared, wanted = request
        if wanted:
            each = self._live.by_id[cache_id]
            grown = self._ranges.back(each.offset >> self._page_shift, wanted)
            return None if grown is None else (each.offset, grown.refs)
        if not shared:
            pages = -(-size_bytes >> self._page_shift)
            taken = self._ranges.take(tenant, Shape(self._range_bytes(size_bytes, maximum_bytes), pages))
            return None if taken is None else (taken.index << self._page_shift, taken.refs)
        return self._shared.allocate(
            cache_id, tenant, size_bytes, None if maximum_bytes == size_bytes else maximum_bytes
        )

    def largest_bytes(self, tenant: str | None) -> int:
        """The largest cache that ``tenant``, or any, could allocate now without an eviction."""
        pages_bytes = self._ranges.pages_for(tenant) * self._page_bytes
        return max(min(pages_bytes, self._ranges.largest_range_bytes()), self._shared.largest_hole_bytes(tenant))

    def usage(self) -> MemoryUsage:
        """Return the figures of this moment."""
        return MemoryUsage.of(
            self._ranges.table, self._live.size_bytes, self._shared.withheld_bytes, self.largest_bytes(None)
        )

    def no_room(self, request: Request) -> CapacityError:
        """Return the error of a request for which there is no memory."""
        return no_room(CapacityError, request, self.usage(), self.largest_bytes(request.tenant))

    def full(self, request: Request) -> CapacityError:
        """Return the error of a request for which there is no memory, or no range of addresses."""
        backed = self._ranges.pages_for(request.tenant) * self._page_bytes >= request.size_bytes
        range_bytes = self._range_bytes(request.size_bytes, request.max_size_bytes)
        largest_bytes = self._ranges.largest_range_bytes()
        if backed and not request.wanted and largest_bytes < range_bytes:
            addresses = self._ranges.addresses
            return no_addresses(request, self.usage(), range_bytes, *addresses, largest_bytes)
        return self.no_room(request)

    def _range_bytes(self, size_bytes: int, maximum_bytes: int) -> int:
        """Return the addresses that a cache with pages of its own takes."""
        if maximum_bytes > size_bytes:
            return 1 << (maximum_bytes - 1).bit_length()
        return -(-size_bytes >> self._page_shift) << self._page_shift
