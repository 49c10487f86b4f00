"""Leaf-first least recently used."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from kvpool.cache.eviction import CacheEvictionPolicy, register_policy
from kvpool.errors import ensure

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex

_NONE = -1  # end of a list
_UNLINKED = -2  # in no list
_LAST = 1 << 127  # behind every entry
_ROW_BITS = 32  # an exposed row is kept as stamp << 32 | row: ints order without a tuple each
_PURGE_AT_LEAST = 1024


@register_policy("lru")
class LeafFirstLRU(CacheEvictionPolicy):
    """The cache that lost its last pin longest ago goes first, among those without a resident child.

    Each row that becomes evictable gets the next stamp; the victim is the evictable childless row with the lowest.
    Of the rows that must wait for a child, most never need to be looked at: chains are let go tail first, so that a
    parent lies right behind its only child in the list of its device. Hence the rule:

        a row is *linked* only if each resident child is linked before it in the same list.

    Then a list is in the order of stamps and its first row has no child: a victim is found without any scan. A row
    for which the rule does not hold (a fork in the tree, a child that is pinned or lies on another device) is
    *parked*: it has its stamp and is in no list. When its last child goes it is *exposed*: pushed with its stamp on its
    device's heap, so that the order among all stays exact. Heap entries are deleted lazily, when they surface.

    Every step is O(1) for each row, O(log n) for exposed ones; ``victim`` is O(devices). Costs 16 bytes a row.
    """

    def __init__(self, index: CacheIndex) -> None:
        self._parent, self._children, self._device = index.parent, index.children, index.partition
        self._stamp = array("q")  # 0: not evictable
        self._before, self._after = array("i"), array("i")
        self._clock = 0
        self._first: list[int] = []  # by device
        self._last: list[int] = []
        self._exposed: list[list[int]] = []
        self._purge_at: list[int] = []
        self.grown(len(index.parent))

    def grown(self, rows: int) -> None:
        added = rows - len(self._stamp)
        self._stamp.extend(array("q", [0]) * added)
        self._before.extend(array("i", [_UNLINKED]) * added)
        self._after.extend(array("i", [_UNLINKED]) * added)

    def evictable(self, rows: Sequence[int], now: float) -> None:
        parent, children, devices, stamp = self._parent, self._children, self._device, self._stamp
        before, after = self._before, self._after
        clock = self._clock
        device = last = follower = _NONE  # follower: the row that may lie right behind the one linked last
        for row in rows:
            clock += 1
            stamp[row] = clock
            if devices[row] != device:
                if device >= 0:
                    self._last[device] = last
                device = devices[row]
                if device >= len(self._first):
                    self._add_devices(device + 1)
                last = self._last[device]
                follower = parent[last] if last >= 0 else _NONE
            waits_for = children[row]
            if waits_for and (waits_for > 1 or row != follower):
                continue
            before[row] = last
            after[row] = _NONE
            if last >= 0:
                after[last] = row
            else:
                self._first[device] = row
            last, follower = row, parent[row]
        if device >= 0:
            self._last[device] = last
        self._clock = clock

    def taken(self, rows: Sequence[int], now: float) -> None:
        parent, stamp, before = self._parent, self._stamp, self._before
        for row in rows:
            stamp[row] = 0
            if before[row] != _UNLINKED:
                self._unlink(row)
            above = parent[row]
            if above >= 0 and before[above] != _UNLINKED:
                self.sheltered(above)

    def sheltered(self, row: int) -> None:
        while row >= 0 and self._before[row] != _UNLINKED:  # up the chain: what waits for a parked row must be parked
            self._unlink(row)
            row = self._parent[row]

    def removed(self, rows: Sequence[int]) -> None:
        parent, children, stamp, before = self._parent, self._children, self._stamp, self._before
        for row in rows:
            stamp[row] = 0
            if before[row] != _UNLINKED:
                self._unlink(row)
        for row in rows:  # once all stamps are cleared, so that parents that went in the same batch are not exposed
            above = parent[row]
            if above >= 0 and stamp[above] and before[above] == _UNLINKED and not children[above]:
                self._expose(above)

    def victim(self) -> int:
        stamp = self._stamp
        best, lowest = _NONE, self._clock + 1
        for device, row in enumerate(self._first):
            heap = self._exposed[device]
            if heap:
                self._drop_dead(heap)
            if heap and (row < 0 or heap[0] >> _ROW_BITS < stamp[row]):
                row = heap[0] & ((1 << _ROW_BITS) - 1)
            if row >= 0 and stamp[row] < lowest:
                best, lowest = row, stamp[row]
        return best

    def victims(self, device: int) -> Iterator[int]:
        if device >= len(self._first):
            return
        parent, children, devices, stamp = self._parent, self._children, self._device, self._stamp
        before, after = self._before, self._after
        exposed = self._exposed[device]
        self._drop_dead(exposed)
        copied = False  # of many exposed rows mostly the first few are asked for
        freed: list[int] = []  # parked rows whose children are all among those yielded
        gone: dict[int, int] = {}  # children of parked rows among those yielded
        linked = self._first[device]
        while exposed or freed or linked >= 0:
            if not exposed and not freed:
                row = entry = linked
            else:
                entry = min(
                    stamp[linked] << _ROW_BITS | linked if linked >= 0 else _LAST,
                    exposed[0] if exposed else _LAST,
                    freed[0] if freed else _LAST,
                )
                row = entry & ((1 << _ROW_BITS) - 1)
            if row == linked:
                linked = after[linked]
            elif freed and freed[0] == entry:
                heappop(freed)
            else:
                if not copied:
                    exposed, copied = exposed.copy(), True
                while exposed and (exposed[0] == entry or not self._is_exposed(exposed[0])):
                    heappop(exposed)
            yield row
            above = parent[row]
            if above >= 0 and devices[above] == device and stamp[above] and before[above] == _UNLINKED:
                gone[above] = gone.get(above, 0) + 1
                if gone[above] == children[above]:
                    heappush(freed, stamp[above] << _ROW_BITS | above)

    def worth(self, row: int) -> float:
        return self._stamp[row]

    def check(self) -> None:
        """Raise InvariantError unless the rule of the class and the order of stamps hold. O(rows), for tests."""
        seen: set[int] = set()
        for device, row in enumerate(self._first):
            earlier = _NONE
            while row >= 0:
                ensure(self._device[row] == device and self._before[row] == earlier, "links of the LRU list", row=row)
                ensure(earlier < 0 or self._stamp[earlier] < self._stamp[row], "order of the LRU list", row=row)
                children_seen = sum(self._parent[child] == row for child in seen if self._device[child] == device)
                ensure(children_seen == self._children[row], "a linked row waits for a child not before it", row=row)
                seen.add(row)
                earlier, row = row, self._after[row]
            ensure(self._last[device] == earlier, "end of the LRU list", device=device)
        for row, stamp in enumerate(self._stamp):
            ensure((row in seen) == (self._before[row] != _UNLINKED), "link state of a row", row=row)
            if stamp and row not in seen and not self._children[row]:
                held = stamp << _ROW_BITS | row in self._exposed[self._device[row]]
                ensure(held, "a childless evictable row is neither linked nor exposed", row=row)

    def _add_devices(self, count: int) -> None:
        for _ in range(count - len(self._first)):
            self._first.append(_NONE)
            self._last.append(_NONE)
            self._exposed.append([])
            self._purge_at.append(_PURGE_AT_LEAST)

    def _unlink(self, row: int) -> None:
        before, after = self._before[row], self._after[row]
        if before >= 0:
            self._after[before] = after
        else:
            self._first[self._device[row]] = after
        if after >= 0:
            self._before[after] = before
        else:
            self._last[self._device[row]] = before
        self._before[row] = _UNLINKED

    def _expose(self, row: int) -> None:
        device = self._device[row]
        heap = self._exposed[device]
        heappush(heap, self._stamp[row] << _ROW_BITS | row)
        if len(heap) >= self._purge_at[device]:
            # Rows taken again leave dead entries, which pile up when this device is never asked for a victim.
            heap[:] = {entry for entry in heap if self._is_exposed(entry)}
            heapify(heap)
            self._purge_at[device] = max(_PURGE_AT_LEAST, 2 * len(heap))

    def _drop_dead(self, heap: list[int]) -> None:
        while heap and not self._is_exposed(heap[0]):
            heappop(heap)

    def _is_exposed(self, entry: int) -> bool:
        row = entry & ((1 << _ROW_BITS) - 1)
        return self._stamp[row] == entry >> _ROW_BITS and not self._children[row]
