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
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from kvpool.memory.compaction import NOTHING, Move, Part, Plan, Snapshot, moved, pages_under, regrouping

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
    mask = -page_bytes
    filling = _Filling(snapshot)
    used, residents = filling.used, filling.residents
    order = filling.order()
    # Beside what is unmovable holes are of any size, and those of pages that might be emptied are needed, too.
    last = 0 if filling.fixed else filling.count(order, budget_bytes, most_pages)  # the first not to be emptied
    leaving = set(order[:last])
    # A hole goes on in the next page where neither will be emptied.
    holes = _Holes(page_bytes)
    holes.add(_joined(filling.free, filling.fixed or used.keys() - leaving, leaving, page_bytes))
    by_page: dict[int, list[tuple[int, int]]] = {}
    for hole in filling.free:
        if hole[0] & mask in leaving:
            by_page.setdefault(hole[0] & mask, []).append(hole)
    moves: list[Move] = []
    freed: list[int] = []
    moved_ids: set[int] = set()
    received: set[int] = set()
    moved_bytes = failures = 0
    for number, page in enumerate(order):
        if failures == _MOST_FAILURES or len(freed) == most_pages:
            break
        if page in received:
            continue
        parts = [part for part in residents[page] if part[2] not in moved_ids]
        cost = sum([part[1] for part in parts])
        if moves and moved_bytes + cost > budget_bytes:
            break
        placed = holes.place(page, parts)
        while placed is None and last > number + 1:
            last -= 1
            holes.add(by_page.get(order[last], []))
            placed = holes.place(page, parts)
        if placed is None:
            failures += 1
            continue
        failures = 0
        moves += placed
        freed.append(page)
        moved_bytes += cost
        moved_ids.update([part[2] for part in parts])
        for _, _, destination, size_bytes in placed:
            received.add(destination & mask)
            if (destination & ~mask) + size_bytes > page_bytes:
                received.update(pages_under(destination, size_bytes, page_bytes))
    return Plan(tuple(moves), tuple(freed))


def plan_regrouping(snapshot: Snapshot, most_pages: int) -> Plan:
    """Slide everywhere, so that small holes become large ones, if then pages can be emptied into these."""
    moves = regrouping(snapshot)
    then = plan_evacuation(moved(snapshot, moves), len(snapshot.pages) * snapshot.page_bytes, most_pages)
    return Plan((*moves, *then.moves), then.freed) if then.freed else NOTHING


class _Filling:
    """What lies in pages, and what is free in them."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._page_bytes = page_bytes = snapshot.page_bytes
        mask = -page_bytes
        self.residents: dict[int, list[Part]] = {page: [] for page in snapshot.pages}
        self.used = dict.fromkeys(snapshot.pages, 0)
        #: In which something unmovable lies.
        self.fixed: set[int] = set()
        #: (Offset, bytes), ascending, each within a page.
        self.free: list[tuple[int, int]] = []
        residents, used, free = self.residents, self.used, self.free
        page, cursor = -1, 0  # a page, and where the part before ends in it
        for part in snapshot.parts:
            offset, size_bytes, _, movable = part
            if page <= offset and offset + size_bytes <= page + page_bytes and page in residents:  # as most do
                if offset > cursor:
                    free.append((cursor, offset - cursor))
                cursor = offset + size_bytes
                used[page] += size_bytes
                residents[page].append(part)
                if not movable:
                    self.fixed.add(page)
                continue
            end = offset + size_bytes
            for here in range(offset & mask, end, page_bytes):
                if here != page:
                    self._close(page, cursor)
                    page = cursor = here
                if here not in residents:
                    continue
                begin = max(offset, here)
                if begin > cursor:
                    free.append((cursor, begin - cursor))
                cursor = min(end, here + page_bytes)
                used[here] += cursor - begin
                residents[here].append(part)
                if not movable:
                    self.fixed.add(here)
        self._close(page, cursor)

    def _close(self, page: int, cursor: int) -> None:
        if page in self.residents and cursor < page + self._page_bytes:
            self.free.append((cursor, page + self._page_bytes - cursor))

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


def _joined(
    holes: Iterable[tuple[int, int]], staying: AbstractSet[int], without: AbstractSet[int], page_bytes: int
) -> list[tuple[int, int]]:
    """Return holes but those ``without``, those that go on in the next page in one piece, if both pages stay."""
    joined: list[tuple[int, int]] = []
    end = -1
    for offset, size_bytes in holes:
        page = offset & -page_bytes
        if page in without:
            continue
        if offset == end == page and page in staying and page - page_bytes in staying:
            offset, before_bytes = joined.pop()
            size_bytes += before_bytes
        joined.append((offset, size_bytes))
        end = offset + size_bytes
    return joined


class _Holes:
    """Holes by size, so that the smallest that fits is found; not those in a page that was emptied."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        #: Offsets by size, the lowest last.
        self._offsets: dict[int, list[int]] = {}
        self._sizes: list[int] = []
        self._emptied: set[int] = set()

    def add(self, holes: Sequence[tuple[int, int]]) -> None:
        """Add holes, which ascend."""
        for offset, size_bytes in reversed(holes):
            self._put(offset, size_bytes)

    def _put(self, offset: int, size_bytes: int) -> None:
        offsets = self._offsets.get(size_bytes)
        if offsets is None:
            offsets = self._offsets[size_bytes] = []
            insort(self._sizes, size_bytes)
        offsets.append(offset)

    def place(self, page: int, parts: Sequence[Part]) -> list[Move] | None:
        """Place all parts of a page in holes of others, the largest first; or none, and the holes are as they were."""
        self._emptied.add(page)
        new = tuple.__new__  # as Move(...), in a third of the time
        moves: list[Move] = []
        undo: list[tuple[int, int, int]] = []  # holes taken: offset, bytes, bytes of them that are used
        for offset, size_bytes, cache_id, _ in sorted(parts, key=lambda part: (-part[1], part[0])):
            hole = self._take(size_bytes, undo)
            if hole < 0:
                for start, hole_bytes, used_bytes in reversed(undo):
                    if 0 < used_bytes < hole_bytes:
                        self._offsets[hole_bytes - used_bytes].pop()
                    self._offsets[hole_bytes].append(start)
                self._emptied.remove(page)
                return None
            moves.append(new(Move, (cache_id, offset, hole, size_bytes)))
        return moves

    def _take(self, size_bytes: int, undo: list[tuple[int, int, int]]) -> int:
        """Take the front of the smallest hole that fits, and return it; -1: there is none."""
        sizes, emptied, page_bytes = self._sizes, self._emptied, self._page_bytes
        position = bisect_left(sizes, size_bytes)
        while position < len(sizes):
            hole_bytes = sizes[position]
            offsets = self._offsets[hole_bytes]
            while offsets:
                offset = offsets.pop()
                page = offset & -page_bytes
                # Nothing goes to a page that is emptied.
                if page in emptied or (
                    offset + hole_bytes > page + page_bytes
                    and not emptied.isdisjoint(pages_under(offset, hole_bytes, page_bytes))
                ):
                    undo.append((offset, hole_bytes, 0))
                    continue
                undo.append((offset, hole_bytes, size_bytes))
                if hole_bytes != size_bytes:
                    self._put(offset + size_bytes, hole_bytes - size_bytes)
                return offset
            position += 1
        return -1
