"""Leaf-first by a worth that is fixed when a cache is given back: the frame for policies that need only that."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from kvpool.cache.eviction import CacheEvictionPolicy
from kvpool.cache.leaf_heap import Entry, LeafHeap
from kvpool.cache.policy_module import defined_at
from kvpool.errors import PolicyError, ensure

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex

Worth = Callable[[int, float], float]
"""What a row is worth when it loses its last pin at a time (seconds); the index's columns tell more about it."""


class LeafFirst(CacheEvictionPolicy):
    """The evictable cache worth least goes first, among those without a resident child.

    Of equal ones that which lost its last pin longest ago. O(log leaves) for each row; 16 bytes a row and an entry for
    each leaf.

    Parameters
    ----------
    index
        The index it serves.
    worth
        Called once whenever a row becomes evictable. What it returns holds until the row is taken.
    """

    def __init__(self, index: CacheIndex, worth: Worth) -> None:
        self._parent, self._children, self._device = index.parent, index.children, index.partition
        self._worth = worth
        self._stamp = array("q")  # 0: not evictable
        self._rank = array("d")
        self._clock = 0
        self._heaps: list[LeafHeap] = []  # by device
        self.floor = 0.0
        """Highest worth of an evictable leaf that has left, so far: what room costs."""
        self.grown(len(index.parent))

    def grown(self, rows: int) -> None:
        added = rows - len(self._stamp)
        self._stamp.extend(array("q", [0]) * added)
        self._rank.extend(array("d", [0.0]) * added)

    def evictable(self, rows: Sequence[int], now: float) -> None:
        children, stamp, rank, worth = self._children, self._stamp, self._rank, self._worth
        for row in rows:
            self._clock += 1
            stamp[row] = self._clock
            value = worth(row, now)
            try:
                rank[row] = value
            except (TypeError, OverflowError) as error:
                raise PolicyError(f"the worth of row {row} is {value!r}: {error}{defined_at(worth)}") from error
            if value != value:
                raise PolicyError(f"the worth of row {row} is NaN, which has no place in any order{defined_at(worth)}")
            if not children[row]:
                self._push(row)

    def taken(self, rows: Sequence[int], now: float) -> None:
        stamp = self._stamp
        for row in rows:
            stamp[row] = 0

    def sheltered(self, row: int) -> None:
        # Its entry is dead while it has a child. It gets another when the child goes.
        pass

    def removed(self, rows: Sequence[int]) -> None:
        parent, children, stamp, rank = self._parent, self._children, self._stamp, self._rank
        for row in rows:
            if stamp[row]:
                self.floor = max(self.floor, rank[row])
            stamp[row] = 0
        for row in rows:  # once all stamps are cleared, so that parents that went in the same batch are not exposed
            above = parent[row]
            if above >= 0 and stamp[above] and not children[above]:
                self._push(above)

    def victim(self) -> int:
        lowest = [entry for entry in (heap.lowest() for heap in self._heaps) if entry is not None]
        return min(lowest)[2] if lowest else -1

    def victims(self, device: int) -> Iterator[int]:
        if device >= len(self._heaps):
            return
        parent, children, devices, stamp = self._parent, self._children, self._device, self._stamp
        leaves = self._heaps[device].ascending()
        leaf = next(leaves, None)
        exposed: list[Entry] = []
        gone: dict[int, int] = {}  # children of evictable rows among those yielded
        while leaf is not None or exposed:
            if exposed and (leaf is None or exposed[0] < leaf):
                row = heappop(exposed)[2]
            else:
                ensure(leaf is not None, "a victim from an empty heap")
                row = leaf[2]  # type: ignore[index]
                leaf = next(leaves, None)
            yield row
            above = parent[row]
            if above >= 0 and devices[above] == device and stamp[above]:
                gone[above] = gone.get(above, 0) + 1
                if gone[above] == children[above]:
                    heappush(exposed, (self._rank[above], stamp[above], above))

    def worth(self, row: int) -> tuple[float, int]:
        return self._rank[row], self._stamp[row]

    def _push(self, row: int) -> None:
        device = self._device[row]
        while device >= len(self._heaps):
            self._heaps.append(LeafHeap(self._is_leaf))
        self._heaps[device].push((self._rank[row], self._stamp[row], row))

    def _is_leaf(self, entry: Entry) -> bool:
        row = entry[2]
        return self._stamp[row] == entry[1] and not self._children[row]
