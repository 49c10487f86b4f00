"""Where caches are to lie beside what is unmovable, so that the fewest pages are left.

A page under something unmovable stays. What is free in it is a *shelf*: room from where something unmovable ends, up
to where the next begins or to the end of the page. If the pages behind it are kept, too, it goes on in them, and caches
lie across the border; so it does with the pages before. Each page that is kept costs one, and what does not go into
shelves takes as many pages as it has bytes for, since it can slide together elsewhere.

So a choice of shelves is judged by two numbers: pages kept, and bytes that its shelves take. What a shelf takes is the
largest sum of sizes that fits it, of all that may move. For each number of pages the best choice is found gap by gap (a
knapsack, exact as long as the stock of sizes lasts); the number is the one that leaves the fewest pages in sum.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from math import gcd
from operator import itemgetter
from typing import NamedTuple

from kvpool.memory.compaction import Snapshot, pages_under
from kvpool.memory.subset import SubsetSums

MOST_KEPT = 8
"""Most pages that one shelf goes on in, but for those that end at something unmovable on both sides: twice as many."""

_WORTH = 32
"""A byte more in a shelf is worth copying so many; of choices that fill about the same the cheaper one wins."""

_NEAR = 2 * MOST_KEPT
"""Numbers of pages that are looked at on either side of the likely one: as many as one gap may keep."""


class Shelf(NamedTuple):
    """Room for caches."""

    start: int
    end: int
    #: Caches lie up to its end, rather than from its start on.
    flush: bool = False

    @property
    def size_bytes(self) -> int:
        """From start to end."""
        return self.end - self.start


_State = tuple[float, int, int]
"""Worth of a choice for several gaps, what it takes of large caches, and what is left in its shelves then."""


class Shelves(NamedTuple):
    """Those of one gap: one or two, or none."""

    shelves: tuple[Shelf, ...]
    #: Pages that they go on in, beside those that stay anyway.
    kept: tuple[int, ...]
    #: What they take of large caches.
    fill_bytes: int
    #: What is left in them then.
    rest_bytes: int
    #: What they take, less what moving it costs. (Half of the rest: small caches may fill it, or may not.)
    worth: float

    def beside(self, other: Shelves) -> Shelves:
        """Return both."""
        return Shelves(
            self.shelves + other.shelves,
            self.kept + other.kept,
            self.fill_bytes + other.fill_bytes,
            self.rest_bytes + other.rest_bytes,
            self.worth + other.worth,
        )


_NONE = Shelves((), (), 0, 0, 0.0)


def fixed_pages(snapshot: Snapshot) -> set[int]:
    """Return the pages under what is unmovable."""
    page_bytes, known = snapshot.page_bytes, set(snapshot.pages)
    return {
        page
        for part in snapshot.parts
        if not part.movable
        for page in pages_under(part.offset, part.size_bytes, page_bytes)
        if page in known
    }


def unit_of(snapshot: Snapshot) -> int:
    """Return the largest number of bytes that all places and sizes are multiples of."""
    return gcd(snapshot.page_bytes, *(bound for part in snapshot.parts for bound in part[:2]))


def choose_shelves(snapshot: Snapshot, fixed: set[int], large_bytes: int, least_pages: int) -> list[Shelves] | None:
    """Return the shelves of each gap that leave the fewest pages; ``None`` if too few would come free by it.

    Parameters
    ----------
    snapshot
        What lies where. Shelves go on in its pages and its room.
    fixed
        Its :func:`fixed_pages`.
    large_bytes
        Shelves are chosen for caches of so many bytes or more; smaller ones go into what is left beside these.
    least_pages
        How many are to come free.
    """
    sizes_bytes = [part.size_bytes for part in snapshot.parts if part.movable]
    all_large_bytes = sum(size for size in sizes_bytes if size >= large_bytes)
    all_small_bytes = sum(sizes_bytes) - all_large_bytes
    gaps = list(_Gaps(snapshot, fixed, large_bytes).choices())
    # By pages kept, the best choice in the gaps so far.
    best: dict[int, _State] = {0: (0.0, 0, 0)}
    taken: list[dict[int, Shelves]] = []
    for choices, likely in zip(gaps, _likely(gaps, snapshot.page_bytes, all_large_bytes), strict=True):
        best, chosen = _with_gap(best, choices, range(likely - _NEAR, likely + _NEAR + 1))
        taken.append(chosen)
    fewest, kept = len(snapshot.pages) - len(fixed) - least_pages + 1, -1  # so many are too many
    for number, (_, fill_bytes, rest_bytes) in sorted(best.items()):
        loose_large_bytes = all_large_bytes - fill_bytes
        # (What the shelves would take of large ones beyond what there is, small ones may have, too.)
        loose_small_bytes = all_small_bytes - rest_bytes + min(loose_large_bytes, 0)
        loose_bytes = max(loose_large_bytes, 0) + max(loose_small_bytes, 0)
        pages = number + -(-loose_bytes // snapshot.page_bytes)
        if pages < fewest:
            fewest, kept = pages, number
    if kept < 0:
        return None
    found = []
    for chosen in reversed(taken):
        choice = chosen.get(kept)
        if choice is not None:
            found.append(choice)
            kept -= len(choice.kept)
    return found


def _likely(gaps: Sequence[Sequence[Shelves]], page_bytes: int, most_bytes: int) -> Iterator[int]:
    """Return for each gap how many pages it and those before it keep, if those that take most are kept first.

    No more are kept when a page takes less than a page's bytes, or all of ``most_bytes`` have a place.
    """
    steps: list[tuple[float, int, Shelves, Shelves]] = []
    kept = [0] * len(gaps)
    for number, choices in enumerate(gaps):
        now = max((each for each in choices if not each.kept), key=lambda each: each.worth, default=_NONE)
        most_bytes -= now.fill_bytes
        left = choices
        while left := [each for each in left if len(each.kept) > len(now.kept)]:
            gains = [(each.fill_bytes - now.fill_bytes) / (len(each.kept) - len(now.kept)) for each in left]
            best = max(gains)
            then = left[gains.index(best)]
            steps.append((best, number, now, then))
            now = then
    for gain, number, now, then in sorted(steps, key=itemgetter(0), reverse=True):  # (of one gap they descend already)
        if gain < page_bytes or most_bytes <= 0:
            break
        kept[number] = len(then.kept)
        most_bytes -= then.fill_bytes - now.fill_bytes
    return accumulate(kept)


def _with_gap(
    best: Mapping[int, _State], choices: Iterable[Shelves], near: range
) -> tuple[dict[int, _State], dict[int, Shelves]]:
    """Return the best for each number of pages kept ``near`` with one more gap, and which of its choices it takes."""
    after = {kept: state for kept, state in best.items() if kept in near}  # without any of them
    taken: dict[int, Shelves] = {}
    for choice in choices:
        worth, pages = choice.worth, len(choice.kept)
        for before, state in best.items():
            kept = before + pages
            if near.start <= kept < near.stop and (kept not in after or state[0] + worth > after[kept][0]):
                after[kept] = state[0] + worth, state[1] + choice.fill_bytes, state[2] + choice.rest_bytes
                taken[kept] = choice
    return after, taken


class _Gaps:
    """The gaps between what is unmovable, and which shelves each of them may have."""

    def __init__(self, snapshot: Snapshot, fixed: set[int], large_bytes: int) -> None:
        self._snapshot = snapshot
        self._page_bytes = snapshot.page_bytes
        self._known = set(snapshot.pages)
        self._fixed = fixed
        unit_bytes = unit_of(snapshot)
        stock = Counter(
            part.size_bytes // unit_bytes for part in snapshot.parts if part.movable and part.size_bytes >= large_bytes
        )
        sums = SubsetSums(stock, (2 * MOST_KEPT + 2) * snapshot.page_bytes // unit_bytes)
        self._fill_bytes = cache(lambda size_bytes: sums.at_most(size_bytes // unit_bytes) * unit_bytes)
        movable = [part for part in snapshot.parts if part.movable]
        #: Of all that may move: where they begin and end, and how many bytes the first so many have.
        self._starts = [part.offset for part in movable]
        self._ends = [part.end for part in movable]
        self._sums_bytes = list(accumulate((part.size_bytes for part in movable), initial=0))

    def choices(self) -> Iterator[list[Shelves]]:
        """Yield for each gap the best that its shelves can take, by pages kept, if the gap has any."""
        start: int | None = None
        for part in self._snapshot.parts:
            if not part.movable:
                if start is None or part.offset > start:
                    yield self._best(start, part.offset)
                start = part.end
        if start is not None:
            yield self._best(start, None)

    def _best(self, start: int | None, end: int | None) -> list[Shelves]:
        best: dict[int, Shelves] = {}
        for choice in self._between(start, end):
            other = best.get(len(choice.kept))
            if other is None or choice.worth > other.worth:
                best[len(choice.kept)] = choice
        return list(best.values())

    def _between(self, start: int | None, end: int | None) -> Iterator[Shelves]:
        """Yield the shelves that a gap may have. ``None``: nothing is there."""
        page_bytes = self._page_bytes
        most = 2 * MOST_KEPT
        if start is not None and end is not None:
            under = range(start // page_bytes * page_bytes, end, page_bytes)
            between = range(-(-start // page_bytes) * page_bytes, end // page_bytes * page_bytes, page_bytes)
            if len(between) <= most and all(page in self._fixed or self._usable(page) for page in under):
                yield self._filled(Shelf(start, end), tuple(between))
            if start // page_bytes == end // page_bytes:
                return
            # (Where no page is between them, the shelf that ends at both is the better one; where it cannot be, one
            # of the pages is not among those that are looked at.)
            most = max(len(between) - 1, 0)
        tails = () if start is None else tuple(self._growing(start, 1, end))
        heads = () if end is None else tuple(self._growing(end, -1, start))
        for tail in (_NONE, *tails):
            for head in (_NONE, *heads):
                if len(tail.kept) + len(head.kept) <= most:
                    yield tail.beside(head)

    def _growing(self, bound: int, way: int, stop: int | None) -> Iterator[Shelves]:
        """Yield the shelf from a bound to the edge of its page, and on in one page after the other.

        ``way`` is 1 where it goes up and -1 where it goes down, to ``stop`` at most.
        """
        page_bytes = self._page_bytes
        edge = -(-bound // page_bytes) * page_bytes if way > 0 else bound // page_bytes * page_bytes
        if bound == edge or bound // page_bytes * page_bytes not in self._fixed:
            return
        kept: tuple[int, ...] = ()
        while True:
            yield self._filled(Shelf(bound, edge) if way > 0 else Shelf(edge, bound, True), kept)
            page = edge if way > 0 else edge - page_bytes
            edge += way * page_bytes
            passed = stop is not None and (edge > stop if way > 0 else edge < stop)
            if passed or len(kept) == MOST_KEPT or not self._usable(page):
                return
            kept = (*kept, page)

    def _filled(self, shelf: Shelf, kept: tuple[int, ...]) -> Shelves:
        """Return a shelf with what it takes at best."""
        fill_bytes = self._fill_bytes(shelf.size_bytes)
        first, last = bisect_left(self._starts, shelf.start), bisect_right(self._ends, shelf.end)
        there_bytes = max(self._sums_bytes[last] - self._sums_bytes[first], 0)  # (a cache may lie across both ends)
        copied_bytes = max(fill_bytes - there_bytes, 0)
        rest_bytes = shelf.size_bytes - fill_bytes
        return Shelves((shelf,), kept, fill_bytes, rest_bytes, fill_bytes + rest_bytes / 2 - copied_bytes / _WORTH)

    def _usable(self, page: int) -> bool:
        return page not in self._fixed and (page in self._known or page in self._snapshot.room)
