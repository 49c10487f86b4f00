"""In which order caches move to where they are to lie, while others are still in the way."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Mapping

from kvpool.memory.anchors import side_by_side
from kvpool.memory.compaction import Part, Snapshot
from kvpool.memory.moves import Move


class Rearrangement:
    """Moves, each possible when those before it are done.

    Parameters
    ----------
    snapshot
        What lies where before the first.
    goals
        Where caches are to lie, by id. These places do not overlap, and nothing unmovable lies there.
    kept
        Pages that the places lie in. What is in the way there goes to holes in other pages.
    """

    def __init__(self, snapshot: Snapshot, goals: Mapping[int, int], kept: set[int]) -> None:
        self._page_bytes = snapshot.page_bytes
        self._goals = goals
        self._parts = {part.cache_id: part for part in snapshot.parts}
        self._by_start = {part.offset: part for part in snapshot.parts}
        self._starts = [part.offset for part in snapshot.parts]
        self._open = [page for page in snapshot.pages if page not in kept]
        #: Where pages may be added if there is no hole, and how many.
        self._room = snapshot.room.difference(kept)
        self._spare_pages = snapshot.spare_pages - len(kept.difference(snapshot.pages))
        self.moves: list[Move] = []
        #: Pages added, beside those kept.
        self.added: list[int] = []

    def carry_out(self, away: Iterable[int]) -> bool:
        """Find the moves; returns whether there are such.

        Parameters
        ----------
        away
            Caches without a place that may not stay where they are.
        """
        ready = deque(cache_id for cache_id, goal in self._goals.items() if self._parts[cache_id].offset != goal)
        #: By what is in their way: those that wait until it is gone.
        waiting: dict[int, list[int]] = {}
        evaded: set[int] = set()
        while ready or waiting:
            if ready:
                cache_id = ready.popleft()
                part, goal = self._parts[cache_id], self._goals[cache_id]
                other = self._in_the_way(part, goal)
                if other is not None:
                    waiting.setdefault(other.cache_id, []).append(cache_id)
                    continue
                self._move(part, goal)
            else:  # for one without a place, or for each other in a circle
                cache_id = next(iter(waiting))
                if cache_id in evaded or not self._evade(self._parts[cache_id]):
                    return False
                evaded.add(cache_id)
            ready += waiting.pop(cache_id, ())
        return all(self._evade(self._parts[cache_id]) for cache_id in away if cache_id not in evaded)

    def _in_the_way(self, part: Part, offset: int) -> Part | None:
        """Return what a cache cannot go to ``offset`` for; itself, if it would have to slide up."""
        if part.offset < offset < part.end:
            return part
        position = bisect_right(self._starts, offset) - 1
        if position >= 0:
            before = self._by_start[self._starts[position]]
            if before.end > offset and before is not part:
                return before
        for start in self._starts[position + 1 : position + 3]:  # the cache itself, perhaps, and the next one
            if start < offset + part.size_bytes and start != part.offset:
                return self._by_start[start]
        return None

    def _move(self, part: Part, offset: int) -> None:
        self.moves.append(Move(part.cache_id, part.offset, offset, part.size_bytes))
        del self._by_start[part.offset], self._starts[bisect_left(self._starts, part.offset)]
        part = part._replace(offset=offset)
        self._parts[part.cache_id] = self._by_start[offset] = part
        insort(self._starts, offset)

    def _evade(self, part: Part) -> bool:
        """Move a cache to a hole in pages that no place is in; returns whether there is one."""
        if not part.movable:
            return False
        hole = self._hole(part.size_bytes)
        if hole is None:
            hole = self._add_pages(-(-part.size_bytes // self._page_bytes))
        if hole is None:
            return False
        self._move(part, hole)
        return True

    def _add_pages(self, count: int) -> int | None:
        """Add pages side by side; returns the first."""
        if len(self.added) + count > self._spare_pages:
            return None
        for start, end in side_by_side(self._room, self._page_bytes):
            if end - start >= count * self._page_bytes:
                pages = range(start, start + count * self._page_bytes, self._page_bytes)
                self._room = self._room.difference(pages)
                self.added += pages
                self._open = sorted((*self._open, *pages))
                return start
        return None

    def _hole(self, size_bytes: int) -> int | None:
        """Return the first hole of so many bytes."""
        for start, end in side_by_side(self._open, self._page_bytes):
            behind = bisect_right(self._starts, start)
            if behind:
                start = max(start, self._by_start[self._starts[behind - 1]].end)
            for position in range(behind, len(self._starts)):
                offset = self._starts[position]
                if offset - start >= size_bytes or offset >= end:
                    break
                start = self._by_start[offset].end
            if end - start >= size_bytes:
                return start
        return None
