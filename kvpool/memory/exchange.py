"""What to move where pages cannot be emptied because nothing that is in them fits a hole, and smaller caches could go.

Between two things that stay, caches may lie in any order: such a stretch is one place for as many bytes as it has. A
cache that is larger than what is free in any stretch gets one from which smaller ones go to others.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import gcd

from kvpool.memory.anchors import anchored_pages, in_pages, movable_by_page, side_by_side
from kvpool.memory.compaction import NOTHING, Part, Plan, Snapshot, bytes_in_use
from kvpool.memory.moves import Move, Moves
from kvpool.memory.subset import SubsetSums

_MOST_SOURCES = 64
"""Runs of pages that are tried, the emptiest first."""

_MOST_STRETCHES = 64
"""Stretches from which smaller caches are tried to be moved, for one cache; those with most free bytes first."""


class _Stretch:
    """Addresses between two things that stay, and the caches there."""

    def __init__(self, start: int, end: int, parts: list[Part]) -> None:
        self.start = start
        self.end = end
        self.parts = parts
        self.free_bytes = end - start - sum(part.size_bytes for part in parts)


class _Stretches:
    """All stretches, and the moves so far."""

    def __init__(self, stretches: Sequence[_Stretch], unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        self._stretches = stretches
        #: (free bytes, number), ascending.
        self._free = sorted((each.free_bytes, number) for number, each in enumerate(stretches))
        self.moves: list[Move] = []

    def place(self, part: Part) -> bool:
        """Move a cache into the stretch where it leaves least free, or in the place of smaller ones."""
        return self._put(part, without=-1) or self._exchange(part)

    def _put(self, part: Part, without: int) -> bool:
        for position in range(bisect_left(self._free, (part.size_bytes, -1)), len(self._free)):
            number = self._free[position][1]
            if number != without:
                self._enter(part, number)
                return True
        return False

    def _exchange(self, part: Part) -> bool:
        for free_bytes, number in reversed(self._free[-_MOST_STRETCHES:]):
            stretch = self._stretches[number]
            left_bytes = stretch.end - stretch.start - part.size_bytes
            if left_bytes < 0:
                continue
            leaving = self._leaving(stretch, left_bytes)
            if sum(each.size_bytes for each in leaving) >= part.size_bytes or not self._fit(leaving, number):
                continue
            for each in leaving:
                stretch.parts.remove(each)
                self._put(each, without=number)
            self._free.remove((free_bytes, number))
            stretch.free_bytes += sum(each.size_bytes for each in leaving)
            insort(self._free, (stretch.free_bytes, number))
            self._enter(part, number)
            return True
        return False

    def _leaving(self, stretch: _Stretch, left_bytes: int) -> list[Part]:
        """Return what has to go so that at most ``left_bytes`` are in use, the largest first."""
        stock = Counter(each.size_bytes // self._unit_bytes for each in stretch.parts)
        sums = SubsetSums(stock, left_bytes // self._unit_bytes)
        staying = Counter(sums.parts(sums.at_most(left_bytes // self._unit_bytes)))
        leaving = []
        for each in stretch.parts:
            if staying[each.size_bytes // self._unit_bytes]:
                staying[each.size_bytes // self._unit_bytes] -= 1
            else:
                leaving.append(each)
        return sorted(leaving, key=lambda each: -each.size_bytes)

    def _fit(self, parts: Sequence[Part], without: int) -> bool:
        """Whether :meth:`_put` finds a place for all, one after the other."""
        free = [free_bytes for free_bytes, number in self._free if number != without]
        for part in parts:
            position = bisect_left(free, part.size_bytes)
            if position == len(free):
                return False
            insort(free, free.pop(position) - part.size_bytes)
        return True

    def _enter(self, part: Part, number: int) -> None:
        """Slide what is in a stretch together, and put a cache behind it."""
        stretch = self._stretches[number]
        cursor = stretch.start
        for position, each in enumerate(stretch.parts):
            if each.offset != cursor:
                self.moves.append(Move(each.cache_id, each.offset, cursor, each.size_bytes))
                stretch.parts[position] = each._replace(offset=cursor)
            cursor += each.size_bytes
        self.moves.append(Move(part.cache_id, part.offset, cursor, part.size_bytes))
        stretch.parts.append(part._replace(offset=cursor))
        self._free.remove((stretch.free_bytes, number))
        stretch.free_bytes -= part.size_bytes
        insort(self._free, (stretch.free_bytes, number))


def plan_exchange(snapshot: Snapshot, most_pages: int) -> Plan:
    """Empty pages that nothing unmovable is in: ``most_pages``, and the rest of a run of pages that was begun."""
    if all(part.movable for part in snapshot.parts):
        return NOTHING
    anchored, groups, ends = anchored_pages(snapshot)
    used, by_page = bytes_in_use(snapshot), movable_by_page(snapshot)
    unit_bytes = gcd(snapshot.page_bytes, *(bound for part in snapshot.parts for bound in part[:2]))
    sources: list[Sequence[int]] = [*([page] for group in groups for page in group), *groups, *ends]
    sources.sort(key=lambda source: sum(used[page] for page in source))
    free_bytes = len(anchored) * snapshot.page_bytes - sum(used[page] for page in anchored)
    for number, first in enumerate(sources[:_MOST_SOURCES]):
        parts = _largest_first(in_pages(by_page, first))
        if sum(part.size_bytes for part in parts) > free_bytes:
            break
        stretches = _Stretches(list(_stretches(snapshot, anchored.difference(first), parts)), unit_bytes)
        if not all(map(stretches.place, parts)):
            continue
        count, freed, gone = len(stretches.moves), [*first], set(parts)
        for source in sources[number + 1 :]:  # more pages, into what is left of the same stretches
            if len(freed) >= most_pages:
                break
            if not anchored.isdisjoint(source):
                continue
            parts = [part for part in _largest_first(in_pages(by_page, source)) if part not in gone]
            if not all(map(stretches.place, parts)):
                break
            count = len(stretches.moves)
            freed += (page for page in source if page not in freed)
            gone.update(parts)
        return Plan(Moves.of(stretches.moves[:count]), tuple(freed))
    return NOTHING


def _largest_first(parts: Iterable[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: -part.size_bytes)


def _stretches(snapshot: Snapshot, pages: set[int], sources: Sequence[Part]) -> Iterator[_Stretch]:
    """Yield what lies between two caches that are unmovable or are to go elsewhere, or the border of ``pages``."""
    leaving = {part.cache_id for part in sources}
    parts = iter(snapshot.parts)
    part = next(parts, None)
    for start, end in side_by_side(pages, snapshot.page_bytes):
        cursor = start
        inside: list[Part] = []
        while part is not None and part.offset < end:
            if part.end > start and (not part.movable or part.cache_id in leaving):
                if part.offset > cursor:
                    yield _Stretch(cursor, part.offset, inside)
                cursor, inside = part.end, []
            elif part.end > start:
                inside.append(part)
            if part.end > end:
                break
            part = next(parts, None)
        if cursor < end:
            yield _Stretch(cursor, end, inside)
