"""What to move into the pages that stay, so that no hole is left beside what is leased.

A page with something unmovable stays, and so do those that a cache lies across from it: together they are *anchored*.
Their holes are as large as chance made them, and none goes on where a run of such pages ends. Two things make them
useful: caches are chosen from the other pages so that their sizes add up to a hole, and where the addresses before or
behind it are free, pages are added there, so that caches lie across the border.

The caches come from the emptiest of the pages that are not anchored. What is left in these slides together in the next
step, and more pages come free by that than are added here: else there is no plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import gcd
from typing import NamedTuple

from kvpool.memory.anchors import Bounds, anchored_pages, in_pages, movable_by_page, side_by_side
from kvpool.memory.compaction import (
    NOTHING,
    WINDOW_PAGES,
    Part,
    Plan,
    Snapshot,
    bytes_in_use,
    choose_join,
    moved,
    plan_slide,
    regrouping,
)
from kvpool.memory.moves import Move, Moves
from kvpool.memory.subset import SubsetSums

MOST_ADDED = 8
"""Most pages added at one border, but for those between two runs of anchored pages, which may be twice as many."""

_WORTH = 32
"""Most bytes that are moved for each byte that is wasted less."""

_MOST_SITES = 256
"""Holes that are filled in one plan, the largest."""


class Gap(NamedTuple):
    """A place for caches: a hole, with pages added to it. They lie from its start on, or (``flush``) up to its end."""

    start: int
    end: int
    added: tuple[int, ...]
    #: Starts of the holes in it.
    holes: tuple[int, ...]
    flush: bool


#: The gaps that one hole may become, of which at most one is filled.
Site = tuple[Gap, ...]


class _Choice(NamedTuple):
    gap: Gap
    #: Bytes that fit it best.
    fill_bytes: int
    #: By which less is wasted.
    saved_bytes: int

    @property
    def worth(self) -> float:
        """What is saved, less what moving costs."""
        return self.saved_bytes - self.fill_bytes / _WORTH


class _Filled(NamedTuple):
    """Moves into gaps, and the pages that are added for them."""

    moves: tuple[Move, ...]
    added: tuple[int, ...]


_NONE = _Filled((), ())


class _Stock:
    """Caches that may be taken, by size; of each size first those from the emptiest pages."""

    def __init__(self, parts: Iterable[Part], unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        self._by_size: dict[int, deque[Part]] = {}
        for part in parts:
            self._by_size.setdefault(part.size_bytes // unit_bytes, deque()).append(part)

    def sums(self, most_bytes: int) -> SubsetSums:
        stock = {size: len(parts) for size, parts in self._by_size.items()}
        return SubsetSums(stock, most_bytes // self._unit_bytes)

    def best(self, site: Site, sums: SubsetSums, page_bytes: int, spare_pages: int) -> _Choice | None:
        """Return the gap of a site that is most worth filling, if one is."""
        best = None
        for gap in site:
            if len(gap.added) > spare_pages:
                continue
            fill_bytes = sums.at_most((gap.end - gap.start) // self._unit_bytes) * self._unit_bytes
            choice = _Choice(gap, fill_bytes, fill_bytes - len(gap.added) * page_bytes)
            if choice.worth > (0 if best is None else best.worth):
                best = choice
        return best

    def take(self, sums: SubsetSums, fill_bytes: int) -> list[Part]:
        """Remove and return caches of this many bytes together."""
        return [self._by_size[size].popleft() for size in sums.parts(fill_bytes // self._unit_bytes)]


def plan_filling(snapshot: Snapshot) -> Plan:
    """Fill the holes of anchored pages, as they are or when all has slid, if more pages come free than are added."""
    if all(part.movable for part in snapshot.parts):
        return NOTHING
    filled, added = _plan(snapshot)
    if filled:
        return Plan(Moves.of(filled), (), added)
    slid = regrouping(snapshot)
    filled, added = _plan(moved(snapshot, slid)) if slid else _NONE
    return Plan(Moves.of((*slid, *filled)), (), added) if filled else NOTHING


def _plan(snapshot: Snapshot) -> _Filled:
    anchored, groups, ends = anchored_pages(snapshot)
    sites = sorted(_sites(snapshot, anchored), key=_hole_bytes, reverse=True)[:_MOST_SITES]
    if not sites:
        return _NONE
    unit_bytes = gcd(snapshot.page_bytes, *(bound for part in snapshot.parts for bound in part[:2]))
    by_page, used = movable_by_page(snapshot), bytes_in_use(snapshot)
    groups.sort(key=lambda group: sum(used[page] for page in group) / len(group))
    sources = [page for group in groups for page in reversed(group)]
    ranked = _rank(snapshot, sites, _Stock(in_pages(by_page, sources), unit_bytes))
    filled = _fill(snapshot, [site for _, site in ranked], _Stock(in_pages(by_page, sources), unit_bytes))
    if not filled.moves and ends:
        everything = [*sources, *(page for end in ends for page in end)]
        ranked = _rank(snapshot, sites, _Stock(in_pages(by_page, everything), unit_bytes))
        chosen, more = _match(by_page, snapshot.page_bytes, ranked, sum(used[page] for page in sources), ends)
        filled = _fill(snapshot, chosen, _Stock(in_pages(by_page, [*sources, *more]), unit_bytes))
    return filled


def _rank(snapshot: Snapshot, sites: Sequence[Site], stock: _Stock) -> list[tuple[_Choice, Site]]:
    """Return the sites that are worth filling, with what would be put there, the best first."""
    sums = stock.sums(max(gap.end - gap.start for site in sites for gap in site))
    ranked = []
    for site in sites:
        choice = stock.best(site, sums, snapshot.page_bytes, snapshot.spare_pages)
        if choice is not None:
            ranked.append((choice, site))
    ranked.sort(key=lambda each: each[0].saved_bytes / each[0].fill_bytes, reverse=True)
    return ranked


def _match(
    by_page: Mapping[int, Sequence[Part]],
    page_bytes: int,
    ranked: Iterable[tuple[_Choice, Site]],
    supply_bytes: int,
    ends: Iterable[Sequence[int]],
) -> tuple[list[Site], list[int]]:
    """Return sites to fill, and pages at the ends of anchored runs that are emptied for it, which lose least by it."""
    offers: list[tuple[float, Sequence[int]]] = []
    for end in ends:
        # By so much more is wasted in the page next to an empty end than was in that.
        held_bytes = sum(part.size_bytes for part in in_pages(by_page, end))
        offers.append((held_bytes / len(end) - page_bytes, end))
    offers.sort()
    sites: list[Site] = []
    emptied: list[int] = []
    filled: set[int] = set()  # pages
    for choice, site in ranked:
        at = _pages_of(choice.gap, page_bytes)
        if not at.isdisjoint(emptied):
            continue
        needed_bytes, lost_bytes = choice.fill_bytes - supply_bytes, 0.0
        taken = []
        for offer in offers:
            if needed_bytes <= 0:
                break
            loss_bytes, end = offer
            if at.isdisjoint(end) and filled.isdisjoint(end):
                taken.append(offer)
                lost_bytes += loss_bytes * len(end)
                needed_bytes -= len(end) * page_bytes
        if needed_bytes > 0 or choice.worth <= lost_bytes:
            continue
        supply_bytes = -needed_bytes
        emptied += (page for _, end in taken for page in end)
        offers = [offer for offer in offers if offer not in taken]
        sites.append(site)
        filled |= at
    return sites, emptied


def _pages_of(gap: Gap, page_bytes: int) -> set[int]:
    """Return the pages that lie in a gap, at least in part, or next to it."""
    return set(range(gap.start // page_bytes * page_bytes - page_bytes, gap.end + page_bytes, page_bytes))


def _fill(snapshot: Snapshot, sites: Iterable[Site], stock: _Stock) -> _Filled:
    """Return moves into the gaps that are most worth it; none if no more pages come free by it than they need."""
    page_bytes, spare_pages = snapshot.page_bytes, snapshot.spare_pages
    moves: list[Move] = []
    added: list[int] = []
    taken: set[int] = set()
    for site in sites:
        open_gaps = tuple(gap for gap in site if taken.isdisjoint(gap.added + gap.holes))
        if not open_gaps:
            continue
        sums = stock.sums(max(gap.end - gap.start for gap in open_gaps))
        choice = stock.best(open_gaps, sums, page_bytes, spare_pages - len(added))
        if choice is None:
            continue
        gap = choice.gap
        cursor = gap.end - choice.fill_bytes if gap.flush else gap.start
        for part in stock.take(sums, choice.fill_bytes):
            moves.append(Move(part.cache_id, part.offset, cursor, part.size_bytes))
            cursor += part.size_bytes
        added += gap.added
        taken.update(gap.added + gap.holes)
    if not moves or _freed_after(snapshot, moves, added) <= len(added):
        return _NONE
    return _Filled(tuple(moves), tuple(added))


def _freed_after(snapshot: Snapshot, moves: Sequence[Move], added: Sequence[int]) -> int:
    """Return how many pages are empty when these moves are done, or come free by the next step."""
    after = moved(snapshot, moves)._replace(pages=tuple(sorted((*snapshot.pages, *added))))
    used = bytes_in_use(after)
    left = after._replace(pages=tuple(page for page in after.pages if used[page]))
    empty = len(after.pages) - len(left.pages)
    everything = len(left.pages) * left.page_bytes
    joined = choose_join(left, everything, WINDOW_PAGES)
    by_joining = len(joined) - -(-sum(used[page] for page in joined) // left.page_bytes)
    return empty + max(by_joining, len(plan_slide(left, everything, WINDOW_PAGES).freed))


def _hole_bytes(site: Site) -> int:
    return min(gap.end - gap.start for gap in site)


def _sites(snapshot: Snapshot, anchored: set[int]) -> Iterator[Site]:
    """Yield what each hole of the anchored pages may become, alone or with the one behind the free pages after it."""
    regions = list(side_by_side(anchored, snapshot.page_bytes))
    holes = list(_holes(snapshot, regions))
    for (start, end), inside in zip(regions, holes, strict=True):
        for hole in inside:
            if hole[0] != start and hole[1] != end:
                yield (Gap(*hole, (), (hole[0],), False),)
    for number in range(-1, len(regions)):
        yield from _between(
            snapshot,
            (regions[number], holes[number]) if number >= 0 else None,
            (regions[number + 1], holes[number + 1]) if number + 1 < len(regions) else None,
        )


def _between(
    snapshot: Snapshot,
    before: tuple[Bounds, Sequence[Bounds]] | None,
    behind: tuple[Bounds, Sequence[Bounds]] | None,
) -> Iterator[Site]:
    """Yield what the last hole of a run of pages and the first one of the next may become."""
    page_bytes = snapshot.page_bytes
    tail: list[Gap] = []
    head: list[Gap] = []
    across: list[Gap] = []
    if before is not None:
        (_, end), inside = before
        start = inside[-1][0] if inside and inside[-1][1] == end else end
        if start < end:
            added = _free_pages(snapshot.room, end, page_bytes, MOST_ADDED)
            tail = [Gap(start, end + k * page_bytes, added[:k], (start,), False) for k in range(len(added) + 1)]
    if behind is not None:
        (start, _), inside = behind
        end = inside[0][1] if inside and inside[0][0] == start else start
        if start < end:
            added = _free_pages(snapshot.room, start - page_bytes, -page_bytes, MOST_ADDED)
            head = [Gap(start - k * page_bytes, end, added[:k], (start,), True) for k in range(len(added) + 1)]
    if before is not None and behind is not None and (tail or head):
        apart = (behind[0][0] - before[0][1]) // page_bytes
        added = _free_pages(snapshot.room, before[0][1], page_bytes, 2 * MOST_ADDED)
        if apart <= len(added):
            start = tail[0].start if tail else before[0][1]
            end = head[0].end if head else behind[0][0]
            covered = tuple(gap.start for gap in (*tail[:1], *head[:1]))
            across = [Gap(start, end, added[:apart], covered, False)]
    if tail:
        yield (*tail, *across)
    if head:
        yield (*head, *across)


def _free_pages(room: frozenset[int], first: int, step: int, most: int) -> tuple[int, ...]:
    """Return free addresses of pages from ``first`` on, side by side."""
    found: list[int] = []
    while len(found) < most and first in room:
        found.append(first)
        first += step
    return tuple(found)


def _holes(snapshot: Snapshot, regions: Iterable[Bounds]) -> Iterator[list[Bounds]]:
    """Yield for each region (ascending) what is free in it, as (start, end)."""
    parts = iter(snapshot.parts)
    part = next(parts, None)
    for start, end in regions:
        holes = []
        cursor = start
        while part is not None and part.offset < end:
            if part.end > start:
                if part.offset > cursor:
                    holes.append((cursor, part.offset))
                cursor = max(cursor, part.end)
            if part.end > end:
                break
            part = next(parts, None)
        if cursor < end:
            holes.append((cursor, end))
        yield holes
