"""Which pages are emptied into the holes of others.

Of two pages either may be emptied into the other, and a hole that goes on across the border of two pages is of use only
while both stay. So it is said first which pages are to be emptied: as many of the emptiest as could go into what is
free in the others, by their sums. The holes of the others are known then, and each cache goes into the smallest that
fits. Where holes do not fit, the last of the pages that were to be emptied are not, and their holes are used, too.

Beside what is unmovable nothing is said first: holes are of any size there, and caches go into those of all pages, of
which each that took one stays.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby
from operator import add

from kvpool.memory.compaction import (
    NOTHING,
    Parts,
    Plan,
    Snapshot,
    moved,
    pages_of,
    pages_under,
    regrouping,
)
from kvpool.memory.moves import Moves

_Hole = tuple[int, int]
"""Offset and bytes of what is free in one place."""

_MOST_FAILURES = 32
"""Pages in a row that cannot be evacuated before no fuller one is tried."""

_FILLINGS = 4
"""So many are told apart. Of about the same filling the highest pages go, so that the others lie together."""


def plan_evacuation(snapshot: Snapshot, budget_bytes: int, most_pages: int) -> Plan:
    """Empty pages into the holes of others, the emptiest first, the largest cache first.

    Parameters
    ----------
    budget_bytes
        Bytes to copy at most; what one page holds may be more, and is copied.
    most_pages
        Pages to free at most.
    """
    page_bytes = snapshot.page_bytes
    filling = _Filling(snapshot)
    order = filling.order()
    # Beside what is unmovable holes are of any size, and those of pages that might be emptied are needed, too.
    last = 0 if filling.fixed else filling.count(order, budget_bytes, most_pages)  # the first not to be emptied
    leaving = set(order[:last])
    # A hole goes on in the next page where neither will be emptied.
    holes = _Holes(page_bytes)
    holes.add(filling.holes(filling.fixed or filling.used.keys() - leaving, leaving))
    ids: list[int] = []
    sources: list[int] = []
    destinations: list[int] = []
    sizes_bytes: list[int] = []
    freed: list[int] = []
    received: set[int] = set()  # by the first moves that are known
    moved_bytes = failures = known = 0
    for number, page in enumerate(order):
        if failures == _MOST_FAILURES or len(freed) == most_pages:
            break
        if number >= last:  # else nothing goes there
            if known < len(destinations):
                received |= pages_of(destinations[known:], sizes_bytes[known:], page_bytes)
                known = len(destinations)
            if page in received:
                continue
            if last <= number + 1 and not holes.fit(filling.largest_bytes(page)):
                failures += 1
                continue
        page_ids, offsets, page_sizes = filling.inside(page)
        cost = sum(page_sizes)
        if ids and moved_bytes + cost > budget_bytes:
            break
        if page_sizes and page_sizes[0] == page_sizes[-1]:  # all alike
            wanted = [(page_sizes[0], len(page_sizes))]
        else:
            wanted = [(size_bytes, len(list(same))) for size_bytes, same in groupby(page_sizes)]
        if number >= last:
            holes.withhold(page)
        placed = holes.take(wanted)
        while placed is None and last > number + 1:
            last -= 1
            holes.add(filling.free(order[last]))
            placed = holes.take(wanted)
        if placed is None:
            holes.readmit(page)
            failures += 1
            continue
        failures = 0
        ids += page_ids
        sources += offsets
        destinations += placed
        sizes_bytes += page_sizes
        freed.append(page)
        moved_bytes += cost
        filling.leave(page)
    return Plan(Moves(ids, sources, destinations, sizes_bytes), tuple(freed))


def plan_regrouping(snapshot: Snapshot, most_pages: int) -> Plan:
    """Slide everywhere, so that small holes become large ones, if then pages can be emptied into these."""
    moves = regrouping(snapshot)
    then = plan_evacuation(moved(snapshot, moves), len(snapshot.pages) * snapshot.page_bytes, most_pages)
    return Plan(Moves.of((*moves, *then.moves)), then.freed) if then.freed else NOTHING


class _Filling:
    """What lies in pages, and what is free in them."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._page_bytes = page_bytes = snapshot.page_bytes
        parts = Parts.of(snapshot.parts)
        self._ids = parts.ids
        self._offsets = parts.offsets
        self._sizes_bytes = parts.sizes_bytes
        self._ends = list(map(add, parts.offsets, parts.sizes_bytes))
        self.used: dict[int, int] = {}
        #: In which something unmovable lies.
        self.fixed: set[int] = set()
        #: By page: numbers of the first part that lay in it, and of the first behind it.
        self._lay: dict[int, tuple[int, int]] = {}
        all_movable = all(parts.movable)
        for page, first, last in parts.by_page(snapshot.pages, page_bytes):
            self._lay[page] = first, last
            self.used[page] = parts.bytes_in(page, page_bytes, first, last)
            if not (all_movable or all(parts.movable[first:last])):
                self.fixed.add(page)
        #: The same, without those that have left.
        self._inside = self._lay.copy()

    def free(self, page: int) -> list[_Hole]:
        """Return the holes of a page that were there at first, ascending, each within it."""
        first, last = self._lay[page]
        end = page
        found: list[_Hole] = []
        # (What reaches in from the page before begins before it, and what goes on behind it ends there: no hole.)
        for start, part_end in zip(self._offsets[first:last], self._ends[first:last], strict=True):
            if start > end:
                found.append((end, start - end))
            end = part_end
        if end < page + self._page_bytes:
            found.append((end, page + self._page_bytes - end))
        return found

    def order(self) -> list[int]:
        """Return the pages in which all may move, in the order in which they are emptied."""
        if self.fixed:
            return sorted(self.used.keys() - self.fixed, key=lambda page: (self.used[page], -page))
        # Rounded to the nearest: pages of which every other cache is gone are all about half full.
        part_bytes, used = self._page_bytes // _FILLINGS, self.used
        return sorted(used, key=lambda page: ((used[page] + part_bytes // 2) // part_bytes, -page))

    def count(self, order: Sequence[int], budget_bytes: int, most_pages: int) -> int:
        """Return how many pages, from the first, could be emptied into what is free in the others, by their sums."""
        free_bytes = len(self.used) * self._page_bytes - sum(self.used.values())
        moved_bytes = 0
        for number, page in enumerate(order):
            free_bytes -= self._page_bytes - self.used[page]
            moved_bytes += self.used[page]
            if number == most_pages or moved_bytes > free_bytes or (number and moved_bytes > budget_bytes):
                return number
        return len(order)

    def holes(self, staying: AbstractSet[int], without: AbstractSet[int]) -> list[_Hole]:
        """Return all holes but those ``without``, those that go on in the next page in one piece, if both stay."""
        joined: list[_Hole] = []
        before = end = -1  # the page before, if it stays, and where its last hole ends
        for page in self.used:
            free = [] if page in without else self.free(page)
            if not free:
                continue
            goes_on = page in staying and before == page - self._page_bytes and end == free[0][0] == page
            if goes_on:
                offset, size_bytes = joined[-1]
                joined[-1] = offset, size_bytes + free[0][1]
            joined += free[1:] if goes_on else free
            before = page if page in staying else -1
            end = sum(free[-1])
        return joined

    def inside(self, page: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Return ids, offsets and sizes of what lies in a page and has not left, the largest first."""
        first, last = self._inside[page]
        ids, offsets, sizes_bytes = self._ids[first:last], self._offsets[first:last], self._sizes_bytes[first:last]
        if sizes_bytes and sizes_bytes.count(sizes_bytes[0]) < len(sizes_bytes):
            ranked = sorted(range(len(sizes_bytes)), key=sizes_bytes.__getitem__, reverse=True)
            ids, offsets, sizes_bytes = ([column[each] for each in ranked] for column in (ids, offsets, sizes_bytes))
        return ids, offsets, sizes_bytes

    def largest_bytes(self, page: int) -> int:
        """Return the size of the largest that lies in a page and has not left."""
        first, last = self._inside[page]
        return max(self._sizes_bytes[first:last], default=0)

    def leave(self, page: int) -> None:
        """Note that nothing lies in a page any more, nor what goes on from there in its neighbours."""
        first, last = self._inside[page]
        if first == last:
            return
        end = page + self._page_bytes
        if self._offsets[first] < page:
            for near in pages_under(self._offsets[first], page - self._offsets[first], self._page_bytes):
                if near in self._inside:
                    self._inside[near] = self._inside[near][0], min(self._inside[near][1], first)
        if self._ends[last - 1] > end:
            for near in pages_under(end, self._ends[last - 1] - end, self._page_bytes):
                if near in self._inside:
                    self._inside[near] = max(self._inside[near][0], last), self._inside[near][1]


class _Holes:
    """Holes by size, so that the smallest that fits is found; not those in a page that is emptied."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        #: Offsets by size, the lowest last.
        self._offsets: dict[int, list[int]] = {}
        self._sizes: list[int] = []
        self._withheld: set[int] = set()

    def add(self, holes: Sequence[_Hole]) -> None:
        """Add holes, which ascend."""
        table = self._offsets
        for offset, size_bytes in reversed(holes):
            if size_bytes in table:
                table[size_bytes].append(offset)
            else:
                self._put(offset, size_bytes)

    def _put(self, offset: int, size_bytes: int) -> None:
        offsets = self._offsets.get(size_bytes)
        if offsets is None:
            offsets = self._offsets[size_bytes] = []
            insort(self._sizes, size_bytes)
        offsets.append(offset)

    def withhold(self, page: int) -> None:
        """Give no holes of a page: it is to be emptied itself."""
        self._withheld.add(page)

    def readmit(self, page: int) -> None:
        """End :meth:`withhold`."""
        self._withheld.discard(page)

    def fit(self, size_bytes: int) -> bool:
        """Whether any hole has so many bytes."""
        return any(map(self._offsets.__getitem__, reversed(self._sizes[bisect_left(self._sizes, size_bytes) :])))

    def take(self, wanted: Sequence[tuple[int, int]]) -> list[int] | None:
        """Return places for all of (bytes, how many), in this order, or ``None``, and the holes are as they were."""
        undo: list[tuple[int, list[int], int]] = []  # bytes of holes that were taken, where, bytes of them put back
        places: list[int] = []
        for size_bytes, count in wanted:
            if not self._take(size_bytes, count, places, undo):
                for hole_bytes, offsets, left_bytes in reversed(undo):
                    if left_bytes:
                        self._offsets[left_bytes].pop()
                    self._offsets[hole_bytes] += reversed(offsets)
                return None
        return places

    def _take(self, size_bytes: int, count: int, places: list[int], undo: list[tuple[int, list[int], int]]) -> bool:
        """Take the front of the smallest holes that fit, one after the other; whether there are as many as wanted."""
        sizes = self._sizes
        position = bisect_left(sizes, size_bytes)
        while position < len(sizes):
            hole_bytes = sizes[position]
            offsets = self._offsets[hole_bytes]
            if not offsets:
                position += 1
                continue
            if hole_bytes == size_bytes:
                taken = offsets[: -count - 1 : -1]
                del offsets[-count:]
                undo.append((hole_bytes, taken, 0))
                usable = self._usable(taken, hole_bytes)
                places += usable
                count -= len(usable)
            else:
                taken = [offsets.pop()]
                if self._usable(taken, hole_bytes):
                    fitting = min(count, hole_bytes // size_bytes)
                    places += range(taken[0], taken[0] + fitting * size_bytes, size_bytes)
                    count -= fitting
                    left_bytes = hole_bytes - fitting * size_bytes
                    undo.append((hole_bytes, taken, left_bytes))
                    if left_bytes:
                        self._put(taken[0] + fitting * size_bytes, left_bytes)
                        position = bisect_left(sizes, size_bytes)  # a size was put before it, perhaps
                else:
                    undo.append((hole_bytes, taken, 0))
            if not count:
                return True
        return False

    def _usable(self, offsets: list[int], hole_bytes: int) -> list[int]:
        """Return those of some holes that do not lie in a page that is withheld."""
        withheld, page_bytes = self._withheld, self._page_bytes
        if not withheld:
            return offsets
        return [offset for offset in offsets if withheld.isdisjoint(pages_under(offset, hole_bytes, page_bytes))]
