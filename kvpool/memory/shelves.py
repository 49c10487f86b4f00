"""Where caches are to lie beside what is unmovable, so that the fewest pages are left.

A page under something unmovable stays. What is free in it is a *shelf*: room from where something unmovable ends, up
to where the next begins or to the end of the page. If the pages behind it are kept, too, it goes on in them, and caches
lie across the border; so it does with the pages before. Each page that is kept costs one, and what does not go into
shelves takes as many pages as it has bytes for, since it can slide together elsewhere.

So a choice of shelves is judged by two numbers: pages kept, and bytes that its shelves take. What a shelf takes is the
largest sum of sizes that fits it, of all that may move. A page more is worth keeping if the shelves take more than a
page's bytes more by it: that is true of each gap by itself, and what is best for each is best for all, as long as there
are caches enough for all shelves. Where there are not, the pages that are worth most are kept; and if the last of them
takes more than what is left, a knapsack may save one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, compress, takewhile
from math import ceil, gcd
from operator import add, itemgetter, not_
from typing import NamedTuple

from kvpool.memory.compaction import Parts, Snapshot, pages_of
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
    parts = Parts.of(snapshot.parts)
    fixed = list(map(not_, parts.movable))
    under = pages_of(
        list(compress(parts.offsets, fixed)), list(compress(parts.sizes_bytes, fixed)), snapshot.page_bytes
    )
    return under.intersection(snapshot.pages)


def unit_of(snapshot: Snapshot) -> int:
    """Return the largest number of bytes that all places and sizes are multiples of."""
    parts = Parts.of(snapshot.parts)
    return gcd(snapshot.page_bytes, *parts.offsets, *parts.sizes_bytes)


def choose_shelves(gaps: Gaps, large_bytes: int) -> tuple[list[Shelves], int]:
    """Return the shelves of each gap that leave the fewest pages, and how many these are if all are filled so.

    Parameters
    ----------
    gaps
        Where they may be.
    large_bytes
        Shelves are chosen for caches of so many bytes or more; smaller ones go into what is left beside these.
    """
    choices = list(gaps.choices(large_bytes))
    chosen = [each[0] for each in choices]
    loose = gaps.loose(large_bytes)
    total = _Total.of(chosen)
    fewest, best = loose.pages(total), chosen.copy()
    for number, then in _steps(choices):
        left_bytes, before = loose.large_bytes - total.fill_bytes, chosen[number]
        if left_bytes <= 0:
            break
        now, total = total, total.with_(then, before)
        chosen[number] = then
        pages = loose.pages(total)
        if pages < fewest:
            fewest, best = pages, chosen.copy()
        if total.fill_bytes > loose.large_bytes:  # this takes more than there is: perhaps others would do
            part = left_bytes / (then.fill_bytes - before.fill_bytes)
            possible = ceil(now.kept + part * (len(then.kept) - len(before.kept)))
            if possible < min(fewest, gaps.open_pages):
                best = _knapsack(choices, chosen, loose)
                fewest = loose.pages(_Total.of(best))
    return [each for each in best if each.shelves], len(gaps.fixed) + fewest


class _Total(NamedTuple):
    """What is chosen for several gaps: as :class:`Shelves`."""

    kept: int
    fill_bytes: int
    rest_bytes: int

    @classmethod
    def of(cls, chosen: Iterable[Shelves]) -> _Total:
        """Return the sums."""
        _, kept, fill_bytes, rest_bytes, _ = zip(*chosen, strict=True)
        return cls(sum(map(len, kept)), sum(fill_bytes), sum(rest_bytes))

    def with_(self, more: Shelves, instead_of: Shelves) -> _Total:
        """Return the same with other shelves of one gap."""
        return _Total(
            self.kept + len(more.kept) - len(instead_of.kept),
            self.fill_bytes + more.fill_bytes - instead_of.fill_bytes,
            self.rest_bytes + more.rest_bytes - instead_of.rest_bytes,
        )


class _Loose(NamedTuple):
    """All that may move."""

    large_bytes: int
    small_bytes: int
    page_bytes: int

    def pages(self, total: _Total) -> int:
        """Return how many pages are kept, and taken by what goes into no shelf."""
        large_bytes = self.large_bytes - total.fill_bytes
        # (What the shelves would take of large ones beyond what there is, small ones may have, too.)
        small_bytes = self.small_bytes - total.rest_bytes + min(large_bytes, 0)
        return total.kept - (-(max(large_bytes, 0) + max(small_bytes, 0)) // self.page_bytes)


def _steps(choices: Iterable[Sequence[Shelves]]) -> list[tuple[int, Shelves]]:
    """Return which gaps may keep more pages, and for which shelves: those first that take most for each page."""
    found: list[tuple[float, int, Shelves]] = []
    for number, each in enumerate(choices):
        last = 0
        while last + 1 < len(each):
            now = each[last]
            gains = [(then.fill_bytes - now.fill_bytes) / (len(then.kept) - len(now.kept)) for then in each[last + 1 :]]
            gain = max(gains)
            last += 1 + gains.index(gain)
            found.append((gain, number, each[last]))
    found.sort(key=itemgetter(0), reverse=True)  # (of one gap they descend already)
    return [(number, then) for _, number, then in found]


def _knapsack(choices: Sequence[Sequence[Shelves]], likely: Sequence[Shelves], loose: _Loose) -> list[Shelves]:
    """Return the choice for each gap that leaves the fewest pages, of those that keep about as many as ``likely``."""
    first = _Total.of(each[0] for each in choices)
    # By pages kept the best so far: what it is worth, takes of large caches, and leaves, more than the first choices.
    best = {0: (0.0, 0, 0)}
    taken: list[dict[int, Shelves]] = []
    near = 0
    for each, then in zip(choices, likely, strict=True):
        near += len(then.kept)
        after, chosen = best.copy(), {}
        for choice in each[1:]:
            more, worth = len(choice.kept), choice.worth - each[0].worth
            fill_bytes, rest_bytes = choice.fill_bytes - each[0].fill_bytes, choice.rest_bytes - each[0].rest_bytes
            for before, state in best.items():
                kept = before + more
                if kept not in after or state[0] + worth > after[kept][0]:
                    after[kept] = state[0] + worth, state[1] + fill_bytes, state[2] + rest_bytes
                    chosen[kept] = choice
        if len(after) > 2 * _NEAR + 1:
            after = {kept: state for kept, state in after.items() if abs(kept - near) <= _NEAR}
        best = after
        taken.append(chosen)
    pages = {
        kept: loose.pages(_Total(kept, first.fill_bytes + fill_bytes, first.rest_bytes + rest_bytes))
        for kept, (_, fill_bytes, rest_bytes) in best.items()
    }
    kept = min(pages, key=lambda kept: (pages[kept], kept))
    found = []
    for each, chosen in zip(reversed(choices), reversed(taken), strict=True):
        found.append(chosen.get(kept, each[0]))
        kept -= len(found[-1].kept)
    return found


class _Gap(NamedTuple):
    """From where something unmovable ends to where the next begins."""

    #: At the edge of a page there is no shelf.
    tail: int
    head: int
    #: Pages in which shelves may go on, from the start up and from the end down.
    behind: tuple[int, ...]
    before: tuple[int, ...]
    #: How many of them together.
    most: int
    #: Pages between start and end, if one shelf may take all of it.
    between: tuple[int, ...] | None


class Gaps:
    """The gaps between what is unmovable, and which shelves each of them may have.

    Parameters
    ----------
    snapshot
        What lies where. Shelves go on in its pages and its room.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.page_bytes = snapshot.page_bytes
        self.fixed = fixed_pages(snapshot)
        #: Pages in which nothing unmovable lies.
        self.open_pages = len(snapshot.pages) - len(self.fixed)
        self._usable = snapshot.room.union(snapshot.pages) - self.fixed
        parts = Parts.of(snapshot.parts)
        self._unit_bytes = unit_of(snapshot)
        #: Of all that may move: where they begin and end, and how many bytes the first so many have.
        self._starts = list(compress(parts.offsets, parts.movable))
        self._sizes_bytes = list(compress(parts.sizes_bytes, parts.movable))
        self._ends = list(map(add, self._starts, self._sizes_bytes))
        self._sums_bytes = list(accumulate(self._sizes_bytes, initial=0))
        self._gaps = list(self._all(parts))

    def loose(self, large_bytes: int) -> _Loose:
        """Return what may move, apart what has ``large_bytes`` or more."""
        all_large_bytes = sum(size_bytes for size_bytes in self._sizes_bytes if size_bytes >= large_bytes)
        return _Loose(all_large_bytes, self._sums_bytes[-1] - all_large_bytes, self.page_bytes)

    def choices(self, large_bytes: int) -> Iterator[list[Shelves]]:
        """Yield for each gap what its shelves can take of large caches, by the pages kept, from none on.

        Only those in which less is left than in shelves that keep fewer pages.
        """
        unit_bytes = self._unit_bytes
        stock = Counter(size_bytes // unit_bytes for size_bytes in self._sizes_bytes if size_bytes >= large_bytes)
        sums = SubsetSums(stock, (2 * MOST_KEPT + 2) * self.page_bytes // unit_bytes)
        fill_bytes = cache(lambda size_bytes: sums.at_most(size_bytes // unit_bytes) * unit_bytes)
        return (self._best(gap, fill_bytes) for gap in self._gaps)

    def _best(self, gap: _Gap, fill_bytes: Callable[[int], int]) -> list[Shelves]:
        found: list[Shelves] = []
        if gap.most >= 0:
            tails = self._growing(gap.tail, 1, gap.behind, fill_bytes)
            heads = self._growing(gap.head, -1, gap.before, fill_bytes)
            most = gap.most
            found = [tail.beside(head) for tail in tails for head in heads if len(tail.kept) + len(head.kept) <= most]
        if gap.between is not None:
            found.append(self._filled(Shelf(gap.tail, gap.head), gap.between, fill_bytes(gap.head - gap.tail)))
        if len(found) > 1:
            found.sort(key=lambda each: (len(each.kept), -each.worth))
        best = [found.pop(0) if found and not found[0].kept else _NONE]
        for each in found:
            more = len(each.kept) - len(best[-1].kept)
            # (Of those that keep as many the first is worth most.)
            if more and each.fill_bytes - best[-1].fill_bytes > more * self.page_bytes:
                best.append(each)
        return best

    def _growing(
        self, bound: int, way: int, pages: tuple[int, ...], fill_bytes: Callable[[int], int]
    ) -> Sequence[Shelves]:
        """Return the shelf from a bound to the edge of its page, and on in these, where that leaves less in it.

        ``way`` is 1 where it goes up and -1 where it goes down.
        """
        size_bytes = -way * bound % self.page_bytes
        if not size_bytes:
            return (_NONE,)
        least_bytes = size_bytes + 1
        found: list[Shelves] = []
        for count in range(len(pages) + 1):
            filled_bytes = fill_bytes(size_bytes)
            if size_bytes - filled_bytes < least_bytes:
                least_bytes = size_bytes - filled_bytes
                shelf = Shelf(bound, bound + size_bytes) if way > 0 else Shelf(bound - size_bytes, bound, True)
                found.append(self._filled(shelf, pages[:count], filled_bytes))
                if not least_bytes:
                    break
            size_bytes += self.page_bytes
        return found

    def _filled(self, shelf: Shelf, kept: tuple[int, ...], fill_bytes: int) -> Shelves:
        """Return a shelf with what it takes at best."""
        first, last = bisect_left(self._starts, shelf.start), bisect_right(self._ends, shelf.end)
        there_bytes = max(self._sums_bytes[last] - self._sums_bytes[first], 0)  # (a cache may lie across both ends)
        copied_bytes = max(fill_bytes - there_bytes, 0)
        rest_bytes = shelf.size_bytes - fill_bytes
        return Shelves((shelf,), kept, fill_bytes, rest_bytes, fill_bytes + rest_bytes / 2 - copied_bytes / _WORTH)

    def _all(self, parts: Parts) -> Iterator[_Gap]:
        start: int | None = None
        for offset, size_bytes, movable in zip(parts.offsets, parts.sizes_bytes, parts.movable, strict=True):
            if not movable:
                if start is None or offset > start:
                    yield self._gap(start, offset)
                start = offset + size_bytes
        if start is not None:
            yield self._gap(start, None)

    def _gap(self, start: int | None, end: int | None) -> _Gap:
        """Return the gap between two bounds. ``None``: nothing unmovable is there."""
        page_bytes, usable = self.page_bytes, self._usable
        most, between = 2 * MOST_KEPT, None
        behind: Iterable[int] = ()
        before: Iterable[int] = ()
        if start is not None and end is not None:
            inside = range(-(-start // page_bytes) * page_bytes, end // page_bytes * page_bytes, page_bytes)
            under = range(start // page_bytes * page_bytes, end, page_bytes)
            if len(inside) <= most and all(page in self.fixed or page in usable for page in under):
                between = tuple(inside)
            if start // page_bytes == end // page_bytes:
                return _Gap(start, end, (), (), -1, between)
            # (Where no page is between them, the shelf that ends at both is the better one; where it cannot be, one
            # of the pages is not among those that are looked at.)
            most = max(len(inside) - 1, 0)
        reach_bytes = min(most, MOST_KEPT) * page_bytes
        if start is None or not self._is_known(start):
            start = 0
        else:
            edge = -(-start // page_bytes) * page_bytes
            behind = takewhile(usable.__contains__, range(edge, edge + reach_bytes, page_bytes))
        if end is None or not self._is_known(end):
            end = 0
        else:
            edge = end // page_bytes * page_bytes
            before = takewhile(
                usable.__contains__, range(edge - page_bytes, edge - page_bytes - reach_bytes, -page_bytes)
            )
        return _Gap(start, end, tuple(behind), tuple(before), most, between)

    def _is_known(self, bound: int) -> bool:
        """Whether a bound is at the edge of a page, or within one that is looked at."""
        return not bound % self.page_bytes or bound // self.page_bytes * self.page_bytes in self.fixed
