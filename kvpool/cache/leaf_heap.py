"""A heap of rows by rank whose dead entries never pile up and never have to be thrown out at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heappop, heappush

Entry = tuple[float, int, int]
"""Rank, stamp and row of an evictable leaf, compared in this order. It is dead once the row has another stamp."""

_DRAIN_AT_LEAST = 1024
_DRAIN_STEP = 4


class LeafHeap:
    """Entries in ascending order, deleted lazily.

    A row that is taken leaves its entry behind. When the heap has doubled since it was last cleaned, it becomes the
    *old* one, from whose end (which keeps it a heap) each push moves a few entries that are alive to a new one. So the
    work is spread, where cleaning 150,000 entries at once would take 30 ms.

    Parameters
    ----------
    alive
        Whether an entry still holds.
    """

    def __init__(self, alive: Callable[[Entry], bool]) -> None:
        self._alive = alive
        self._heap: list[Entry] = []
        self._old: list[Entry] = []
        self._drain_at = _DRAIN_AT_LEAST

    def push(self, entry: Entry) -> None:
        """Add an entry."""
        heappush(self._heap, entry)
        old = self._old
        if old:
            for _ in range(min(_DRAIN_STEP, len(old))):
                last = old.pop()
                if self._alive(last):
                    heappush(self._heap, last)
            if not old:
                self._drain_at = max(_DRAIN_AT_LEAST, 2 * len(self._heap))
        elif len(self._heap) >= self._drain_at:
            self._old, self._heap = self._heap, []

    def lowest(self) -> Entry | None:
        """Return the lowest living entry."""
        self._drop_dead()
        return min((heap[0] for heap in (self._heap, self._old) if heap), default=None)

    def ascending(self) -> Iterator[Entry]:
        """Yield the living entries from the lowest on. They stay; the heap must not change meanwhile."""
        self._drop_dead()
        heaps = (self._heap, self._old)
        frontier = [(heap[0], which, 0) for which, heap in enumerate(heaps) if heap]
        frontier.sort()
        before = None
        while frontier:
            entry, which, place = heappop(frontier)
            heap = heaps[which]
            for child in (2 * place + 1, 2 * place + 2):
                if child < len(heap):
                    heappush(frontier, (heap[child], which, child))
            if entry != before and self._alive(entry):  # a row exposed twice has two equal entries
                yield entry
            before = entry

    def _drop_dead(self) -> None:
        for heap in (self._heap, self._old):
            while heap and not self._alive(heap[0]):
                heappop(heap)
