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

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from math import gcd
from typing import NamedTuple

from kvpool.memory.compaction import Part, Snapshot
from kvpool.memory.subset import SubsetSums

MOST_KEPT = 8
"""Most pages that one shelf goes on in, but for those that end at something unmovable on both sides: twice as many."""

_WORTH = 32
"""Most bytes that are moved for each byte that is wasted less."""


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

_Room = tuple[tuple[Shelf, ...], tuple[int, ...]]
"""Shelves of a gap, and the pages kept for them."""


class Shelves(NamedTuple):
    """Those of one gap: one or two, or none."""

    shelves: tuple[Shelf, ...]
    #: Pages that they go on in, beside those that stay anyway.
    kept: tuple[int, ...]
    #: What they take of large caches.
    fill_bytes: int
    #: What is left in them then.
    rest_bytes: int
    #: Of what they take, what lies elsewhere now.
    copied_bytes: int

    @property
    def worth(self) -> float:
        """What they take, less what moving it costs. (Small caches may fill the rest, or may not.)"""
        return self.fill_bytes + self.rest_bytes / 2 - self.copied_bytes / _WORTH


def fixed_pages(snapshot: Snapshot) -> set[int]:
    """Return the pages under what is unmovable."""
    page_bytes, known = snapshot.page_bytes, set(snapshot.pages)
    return {
        page
        for part in snapshot.parts
        if not part.movable
        for page in range(part.offset // page_bytes * page_bytes, part.end, page_bytes)
        if page in known
    }


def unit_of(snapshot: Snapshot) -> int:
    """Return the largest number of bytes that all places and sizes are multiples of."""
    return gcd(snapshot.page_bytes, *(bound for part in snapshot.parts for bound in part[:2]))


def choose_shelves(snapshot: Snapshot, fixed: set[int], large_bytes: int) -> list[Shelves] | None:
    """Return the shelves of each gap that leave the fewest pages; ``None`` if that would be no fewer than there are.

    Parameters
    ----------
    snapshot
        What lies where. Shelves go on in its pages and its room.
    fixed
        Its :func:`fixed_pages`.
    large_bytes
        Shelves are chosen for caches of so many bytes or more; smaller ones go into what is left beside these.
    """
    open_pages = len(snapshot.pages) - len(fixed)
    sizes_bytes = [part.size_bytes for part in snapshot.parts if part.movable]
    all_large_bytes = sum(size for size in sizes_bytes if size >= large_bytes)
    all_small_bytes = sum(sizes_bytes) - all_large_bytes
    # By pages kept, the best choice in the gaps so far.
    best: list[_State | None] = [(0.0, 0, 0), *[None] * open_pages]
    taken: list[list[Shelves | None]] = []
    for choices in _Gaps(snapshot, fixed, large_bytes).choices():
        best, chosen = _with_gap(best, choices)
        taken.append(chosen)
    fewest, kept = open_pages, -1
    for number, state in enumerate(best):
        if state is not None:
            loose_large_bytes = all_large_bytes - state[1]
            # (What the shelves would take of large ones beyond what there is, small ones may have, too.)
            loose_small_bytes = all_small_bytes - state[2] + min(loose_large_bytes, 0)
            loose_bytes = max(loose_large_bytes, 0) + max(loose_small_bytes, 0)
            pages = number + -(-loose_bytes // snapshot.page_bytes)
            if pages < fewest:
                fewest, kept = pages, number
    if kept < 0:
        return None
    found = []
    for chosen in reversed(taken):
        choice = chosen[kept]
        if choice is not None:
            found.append(choice)
            kept -= len(choice.kept)
    return found


def _with_gap(
    best: Sequence[_State | None], choices: Sequence[Shelves]
) -> tuple[list[_State | None], list[Shelves | None]]:
    """Return the best for each number of pages kept with one more gap, and which of its choices that takes."""
    after = list(best)  # without any of them
    taken: list[Shelves | None] = [None] * len(best)
    for choice in choices:
        worth, pages = choice.worth, len(choice.kept)
        for kept, state in enumerate(best[: max(len(best) - pages, 0)], pages):
            if state is not None:
                other = after[kept]
                if other is None or state[0] + worth > other[0]:
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

    def choices(self) -> Iterator[list[Shelves]]:
        """Yield for each gap the best that its shelves can take, by pages kept."""
        start: int | None = None
        inside: list[Part] = []
        for part in self._snapshot.parts:
            if part.movable:
                inside.append(part)
                continue
            if start is None or part.offset > start:
                yield self._best(inside, self._between(start, part.offset))
            start, inside = part.end, []
        if start is not None:
            yield self._best(inside, self._between(start, None))

    def _best(self, inside: Sequence[Part], choices: Iterator[_Room]) -> list[Shelves]:
        best: dict[int, Shelves] = {}
        for shelves, kept in choices:
            fill_bytes = sum(self._fill_bytes(shelf.size_bytes) for shelf in shelves)
            there_bytes = sum(
                part.size_bytes
                for part in inside
                if any(shelf.start <= part.offset and part.end <= shelf.end for shelf in shelves)
            )
            rest_bytes = sum(shelf.size_bytes for shelf in shelves) - fill_bytes
            choice = Shelves(shelves, kept, fill_bytes, rest_bytes, max(fill_bytes - there_bytes, 0))
            if len(kept) not in best or choice.worth > best[len(kept)].worth:
                best[len(kept)] = choice
        return list(best.values())

    def _between(self, start: int | None, end: int | None) -> Iterator[_Room]:
        """Yield the shelves that a gap may have, and the pages kept for them. ``None``: nothing is there."""
        page_bytes = self._page_bytes
        first = None if start is None else -(-start // page_bytes) * page_bytes
        last = None if end is None else end // page_bytes * page_bytes
        most = 2 * MOST_KEPT
        if start is not None and end is not None and first is not None and last is not None:
            under = range(start // page_bytes * page_bytes, end, page_bytes)
            between = range(first, last, page_bytes)
            if len(between) <= most and all(page in self._fixed or self._usable(page) for page in under):
                yield (Shelf(start, end),), tuple(between)
            # (Where no page is between them, the shelf that ends at both is the better one; where it cannot be, one
            # of the pages is not among those that are looked at.)
            most = max(len(between) - 1, 0)
            if start // page_bytes == end // page_bytes:
                return
        tails = () if start is None or first is None else tuple(self._growing(start, first, 1, last))
        heads = () if end is None or last is None else tuple(self._growing(end, last, -1, first))
        for tail_shelf, tail_kept in (((), ()), *tails):
            for head_shelf, head_kept in (((), ()), *heads):
                if len(tail_kept) + len(head_kept) <= most:
                    yield (*tail_shelf, *head_shelf), (*tail_kept, *head_kept)

    def _growing(self, bound: int, edge: int, way: int, stop: int | None) -> Iterator[_Room]:
        """Yield the shelf from a bound to the edge of its page, and on in one page after the other."""
        page_bytes = self._page_bytes
        if bound == edge or (edge if way < 0 else edge - page_bytes) not in self._fixed:
            return
        kept: tuple[int, ...] = ()
        while True:
            yield (Shelf(bound, edge) if way > 0 else Shelf(edge, bound, True),), kept
            page = edge if way > 0 else edge - page_bytes
            edge += way * page_bytes
            passed = stop is not None and (edge > stop if way > 0 else edge < stop)
            if passed or len(kept) == MOST_KEPT or not self._usable(page):
                return
            kept = (*kept, page)

    def _usable(self, page: int) -> bool:
        return page not in self._fixed and (page in self._known or page in self._snapshot.room)
