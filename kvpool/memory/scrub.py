"""Zeroing what is left in a tenant's memory of caches that are gone."""

from __future__ import annotations

from collections.abc import Mapping

from kvpool.memory.allocation import Allocation
from kvpool.memory.backend import Backend
from kvpool.memory.packing import shares_pages
from kvpool.memory.ranges import RangeAllocator

_CALL_BYTES = 8192
"""What could be zeroed in the time that a call takes."""


class Scrubber:
    """Zeroes, step by step, every byte of a tenant's pages that is no live cache's.

    A step zeroes a bounded number of bytes: what lies between the caches in pages in use, then warm pages. Each page
    is marked with the scrub that has been through it. Until the last step, whatever the tenant is given is zeroed first
    (:meth:`busy`): so nothing that was there when the scrub began survives by moving from a hole that is not reached
    yet into a new cache. A warm page that comes into use before it is reached is reached there, by a later step.

    On two shared cores a step looks 120,000 caches through in 30 ms; 64 MiB take 5 to 20 ms to zero, in thousands of
    pieces 35 ms.

    Parameters
    ----------
    backend
        The memory.
    ranges
        Ranges in use, and the warm reserve.
    live
        The caches that live there, kept up to date by its owner.
    """

    def __init__(self, backend: Backend, ranges: RangeAllocator, live: Mapping[int, Allocation]) -> None:
        self._backend = backend
        self._ranges = ranges
        self._live = live
        self._page_bytes = ranges.table.page_size_bytes
        self._numbers: dict[str, int] = {}  # by tenant: the latest scrub under way

    def busy(self, tenant: str) -> bool:
        """Whether a scrub of this tenant's memory is under way."""
        return tenant in self._numbers

    def zero(self, offset: int, size_bytes: int) -> None:
        """Set bytes of the arena to zero."""
        self._backend.zero(self._ranges.table.address + offset, size_bytes)

    def scrub(self, tenant: str, number: int, most_bytes: int) -> bool:
        """Take one step; returns whether it was the last.

        Parameters
        ----------
        tenant
            Whose memory.
        number
            Which scrub this is a step of; each has a higher one than those before.
        most_bytes
            Memory to zero in this step, at least a page. A call for less than 8 KiB counts as 8 KiB.
        """
        self._numbers[tenant] = max(number, self._numbers.get(tenant, 0))
        left_bytes = self._scrub_in_use(tenant, number, max(most_bytes, self._page_bytes))
        if left_bytes is None:
            return False
        for page in self._ranges.warm_pages(tenant):
            if page.scrubbed >= number:
                continue
            if left_bytes < self._page_bytes:
                return False
            self.zero(page.index * self._page_bytes, self._page_bytes)
            page.scrubbed = number
            left_bytes -= self._page_bytes
        if self._numbers.get(tenant) == number:
            del self._numbers[tenant]
        return True

    def _scrub_in_use(self, tenant: str, number: int, left_bytes: int) -> int | None:
        """Zero between the caches in pages that the scrub has not reached; returns the bytes left, None: not done."""
        ranges = {
            index: each
            for index, (_, each) in self._ranges.in_use.items()
            if each.tenant == tenant and any(page.scrubbed < number for page in each.pages)
        }
        if not ranges:
            return left_bytes
        caches: dict[int, list[tuple[int, int]]] = {index: [] for index in ranges}  # offset, bytes
        for cache in self._live.values():
            # A cache with pages of its own begins its range; another one lies in one page, or across borders.
            there = caches.get(cache.offset // self._page_bytes)
            if there is not None:
                there.append((cache.offset, cache.size_bytes))
            if len(cache.pages) > 1 and shares_pages(cache.size_bytes, cache.max_size_bytes, self._page_bytes):
                for index, _ in cache.pages[1:]:
                    border = index * self._page_bytes
                    if (there := caches.get(index)) is not None:
                        there.append((border, max(0, cache.offset + cache.size_bytes - border)))
        for index, each in ranges.items():
            if left_bytes < self._page_bytes:
                return None
            left_bytes -= self._zero_between(sorted(caches[index]), index, len(each.pages))
            for page in each.pages:
                page.scrubbed = number
        return left_bytes

    def _zero_between(self, caches: list[tuple[int, int]], index: int, pages: int) -> int:
        """Zero what is no cache's in a range; returns the bytes that counts as."""
        zeroed_bytes = 0
        clean, end = index * self._page_bytes, (index + pages) * self._page_bytes
        for offset, live_bytes in [*caches, (end, 0)]:
            if offset > clean:
                self.zero(clean, offset - clean)
                zeroed_bytes += max(offset - clean, _CALL_BYTES)
            clean = offset + live_bytes  # beyond the end, where a cache goes on in the next page: nothing is left then
        return zeroed_bytes
