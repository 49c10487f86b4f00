"""The warm reserve: ranges that nothing lives in, kept with addresses and pages for their tenant.

The next request of the same tenant for the same shape takes the newest one as it is: no system call, and what clients
have mapped stays right.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from typing import NamedTuple

from kvpool.errors import ensure
from kvpool.memory.page import PageRange

_MOST_LOOKS = 64
"""How many pages from a range's first on are found by their index."""


class Shape(NamedTuple):
    """What makes one range as good as another: its addresses and its pages."""

    range_bytes: int
    pages: int


class _Shelf:
    """One tenant's ranges, by age and by shape."""

    __slots__ = ("by_age", "by_shape", "pages")

    def __init__(self) -> None:
        #: By first index, the oldest first: (age, shape, range). Ordered, as the oldest of a dict is slow to find.
        self.by_age: OrderedDict[int, tuple[int, Shape, PageRange]] = OrderedDict()
        self.by_shape: dict[Shape, dict[int, PageRange]] = {}
        self.pages = 0


class WarmReserve:
    """Holds ranges; maps and moves nothing itself. :meth:`put` and :meth:`take` are on the fast path: O(1)."""

    def __init__(self) -> None:
        self.pages = 0
        self.newest = 0
        """Number of the range that was put here last; each has a higher one than those before."""
        self._shelves: dict[str, _Shelf] = {}

    def put(self, shape: Shape, warm: PageRange) -> None:
        """Keep ``warm`` as its tenant's newest."""
        shelf = self._shelves.get(warm.tenant)
        if shelf is None:
            shelf = self._shelves[warm.tenant] = _Shelf()
        self.newest += 1
        shelf.by_age[warm.index] = (self.newest, shape, warm)
        try:
            shelf.by_shape[shape][warm.index] = warm
        except KeyError:
            shelf.by_shape[shape] = {warm.index: warm}
        shelf.pages += shape.pages
        self.pages += shape.pages

    def take(self, tenant: str, shape: Shape) -> PageRange | None:
        """Remove and return the tenant's newest range of exactly this shape."""
        shelf = self._shelves.get(tenant)
        ranges = shelf.by_shape.get(shape) if shelf is not None else None
        if shelf is None or not ranges:
            return None
        index, warm = ranges.popitem()
        del shelf.by_age[index]
        shelf.pages -= shape.pages
        self.pages -= shape.pages
        return warm

    def find(self, tenant: str, index: int) -> tuple[Shape, PageRange] | None:
        """Return the tenant's range that has a page at ``index``, if it is one of its first pages."""
        shelf = self._shelves.get(tenant)
        if shelf is not None:
            for first in range(index, index - _MOST_LOOKS, -1):
                if first in shelf.by_age:
                    _, shape, warm = shelf.by_age[first]
                    return (shape, warm) if first + shape.pages > index else None
        return None

    def remove(self, warm: PageRange) -> None:
        """Remove a range that :meth:`find` returned."""
        self._remove(self._shelves[warm.tenant].by_age[warm.index])

    def take_oldest(self, tenant: str | None = None, most: float = math.inf) -> tuple[Shape, PageRange] | None:
        """Remove and return the oldest range, of ``tenant`` or of all, if its number is ``most`` or lower."""
        shelves = self._shelves.values() if tenant is None else filter(None, [self._shelves.get(tenant)])
        oldest = min((next(iter(shelf.by_age.values())) for shelf in shelves if shelf.by_age), default=None)
        return None if oldest is None or oldest[0] > most else self._remove(oldest)

    def take_foreign(self, tenant: str, pages: int) -> list[PageRange]:
        """Remove and return others' ranges with ``pages`` pages or a few more, first those that no client maps.

        If these are too few, also ranges that clients have to drop first: as many pages as are missing of each circle
        of clients. Some may never answer (a stopped process), and must not stand before those that would.
        """
        if pages <= 0:
            return []
        others = [entry for other, shelf in self._shelves.items() if other != tenant for entry in shelf.by_age.values()]
        others.sort(key=lambda entry: (entry[2].held, entry[0]))
        nobody: frozenset[str] = frozenset()
        missing = {nobody: pages}
        taken: list[PageRange] = []
        for entry in others:
            circles = Counter(frozenset(page.holders) for page in entry[2].pages)
            for circle in circles:
                missing.setdefault(circle, missing[nobody])
            if any(missing[circle] > 0 for circle in circles):
                missing = {circle: count - circles[circle] for circle, count in missing.items()}
                taken.append(self._remove(entry)[1])
        return taken

    def pages_of(self, tenant: str) -> int:
        """Pages kept for ``tenant``."""
        shelf = self._shelves.get(tenant)
        return 0 if shelf is None else shelf.pages

    def largest_range_bytes(self) -> int:
        """The most addresses that one range has."""
        shelves = self._shelves.values()
        return max((shape.range_bytes for each in shelves for shape, kept in each.by_shape.items() if kept), default=0)

    def ranges(self) -> list[tuple[Shape, PageRange]]:
        """Return all that is kept."""
        return [(shape, warm) for shelf in self._shelves.values() for _, shape, warm in shelf.by_age.values()]

    def check(self) -> None:
        """Prove that ages, shapes and counts tell the same.

        Raises
        ------
        InvariantError
            If they do not.
        """
        for tenant, shelf in self._shelves.items():
            by_age = {index: (shape, warm) for index, (_, shape, warm) in shelf.by_age.items()}
            by_shape = {i: (shape, warm) for shape, ranges in shelf.by_shape.items() for i, warm in ranges.items()}
            ensure(by_age == by_shape, "each warm range is known by age and by shape", tenant=tenant)
            ensure(shelf.pages == sum(shape.pages for shape, _ in by_age.values()), "warm pages are counted")
            ensure(all(warm.tenant == tenant for _, warm in by_age.values()), "warm ranges stay with their tenant")
        ensure(self.pages == sum(shelf.pages for shelf in self._shelves.values()), "warm pages add up")

    def _remove(self, entry: tuple[int, Shape, PageRange]) -> tuple[Shape, PageRange]:
        _, shape, warm = entry
        shelf = self._shelves[warm.tenant]
        del shelf.by_age[warm.index], shelf.by_shape[shape][warm.index]
        shelf.pages -= shape.pages
        self.pages -= shape.pages
        if not shelf.pages:  # so that neither tenants nor shapes of the past pile up
            del self._shelves[warm.tenant]
        return shape, warm
