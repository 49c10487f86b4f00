"""Zeroing what is left in a tenant's memory of caches that are gone."""

from __future__ import annotations

from collections.abc import Mapping

from kvpool.memory.allocation import Allocation
from kvpool.memory.backend import Backend
from kvpool.memory.page import runs
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

    def revisit(self, offset: int, size_bytes: int) -> None:
        """Let the scrub that is under way go through the pages in use under these bytes once more."""
        for index in range(offset // self._page_bytes, -(-(offset + size_bytes) // self._page_bytes)):
            for page in self._ranges.in_use[index][1].pages:
                page.scrubbed = 0

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
        caches: dict[int, list[tuple[int, int]]] = {index: [] for index in ranges}  # (start, end)
        for cache in self._live.values():
            # A cache with pages of its own begins its range; another one lies in one page, or across borders.
            there = caches.get(cache.offset // self._page_bytes)
            if there is not None:
                there += _parts(cache)
            if len(cache.pages) > 1 and cache.shared:
                for index, _ in cache.pages[1:]:
                    if (there := caches.get(index)) is not None:
                        there += _parts(cache)
        for index, each in ranges.items():
            if left_bytes < self._page_bytes:
                return None
            parts = sorted(caches[index])
            for first, count in runs(page.index for page in each.pages):
                left_bytes -= self._zero_between(parts, first, count)
            for page in each.pages:
                page.scrubbed = number
        return left_bytes

    def _zero_between(self, parts: list[tuple[int, int]], index: int, pages: int) -> int:
        """Zero what is no cache's in pages side by side; returns the bytes that counts as."""
        zeroed_bytes = 0
        clean, border = index * self._page_bytes, (index + pages) * self._page_bytes
        for start, end in [*parts, (border, border)]:
            unused_bytes = min(start, border) - clean
            if unused_bytes > 0:
                self.zero(clean, unused_bytes)
                zeroed_bytes += max(unused_bytes, _CALL_BYTES)
            clean = max(clean, end)  # perhaps beyond the border, where a cache goes on in the next page
        return zeroed_bytes


def _parts(cache: Allocation) -> list[tuple[int, int]]:
    """Return where a cache's bytes are, as (start, end) in the arena."""
    return [(cache.offset + start, cache.offset + end) for start, end in cache.extents]
