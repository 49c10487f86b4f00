"""Which leaves go first, where worth changes with time: some are drawn, and the cheapest of them go."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvpool.cache.leaf_sets import LeafSets

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex

Candidate = tuple[float, int, int]
"""Worth, row, and the turn by which it was reckoned: it is dead once the row has another one."""

Worths = Callable[[NDArray[np.int32]], tuple[NDArray[np.float64], NDArray[np.int32]]]

_SAMPLE = 256
_KEPT = 64
_MOST_SAMPLED = 4096
_BLOCKS_BETWEEN_SAMPLES = 24
_LEAVES_BETWEEN_SAMPLES = 24


class Drawn:
    """The victims of one device in the order in which they go, drawn as far as anybody asked."""

    def __init__(self, version: int, more: Iterator[tuple[float, int]]) -> None:
        self.version = version
        self._drawn: list[tuple[float, int]] = []
        self._more = more

    def __iter__(self) -> Iterator[tuple[float, int]]:
        place = 0
        while True:
            if place == len(self._drawn):
                entry = next(self._more, None)
                if entry is None:
                    return
                self._drawn.append(entry)
            yield self._drawn[place]
            place += 1


class SampledRanking:
    """Ranks the leaves of each device by worth, from samples of them.

    A sample serves for some blocks of requests, or until some of it has gone, whichever is first; so the cost is spread
    where requests are short. Asking changes nothing, and the same question has the same answer until something changes.

    Parameters
    ----------
    index
        For its chains and devices.
    turns, kinds, idle
        By row: the turn and kind by which it is worth something; whether it may go.
    worth_of, worths_of
        What a row is worth now; the same for many, with their turns.
    """

    def __init__(
        self,
        index: CacheIndex,
        turns: array[int],
        kinds: array[int],
        idle: array[int],
        worth_of: Callable[[int], float],
        worths_of: Worths,
    ) -> None:
        self._parent, self._children, self._device = index.parent, index.children, index.partition
        self._turn, self._kind, self._idle = turns, kinds, idle
        self._worth_of, self._worths_of = worth_of, worths_of
        self._chance = np.random.default_rng(index.seed)
        self._leaves = LeafSets()
        self._candidates: list[list[Candidate]] = []  # by device: heaps
        self._resample_at: list[int] = []  # by device: count of blocks
        self._leaves_left: list[int] = []  # by device: candidates that may go before the next sample
        self._known: dict[int, Drawn] = {}
        self.version = 0
        """Of everything that an answer depends on."""
        self.blocks = 0
        """Blocks of all requests so far."""

    @property
    def devices(self) -> range:
        """Devices that had leaves so far."""
        return range(len(self._candidates))

    def grow(self, rows: int) -> None:
        """Make room for row numbers below ``rows``."""
        self._leaves.grow(rows)

    def add(self, row: int) -> None:
        """Add a leaf."""
        device = self._device[row]
        while device >= len(self._candidates):
            self._candidates.append([])
            self._resample_at.append(0)
            self._leaves_left.append(0)
        self._leaves.add(row, device)

    def expose(self, row: int) -> None:
        """Add a leaf that was a parent until now, if it is none yet: it may go right behind its last child."""
        if self._leaves.place[row] < 0:
            self.add(row)
            heappush(self._candidates[self._device[row]], (self._worth_of(row), row, self._turn[row]))

    def discard(self, row: int) -> None:
        """Take a row out, if it is a leaf."""
        if self._leaves.place[row] >= 0:
            self._leaves.discard(row, self._device[row])

    def of(self, device: int) -> Drawn:
        """Return worth and row of the victims of a device, the first to go first."""
        known = self._known.get(device)
        if known is None or known.version != self.version:
            known = self._known[device] = Drawn(self.version, self._rank(device))
        return known

    def _rank(self, device: int) -> Iterator[tuple[float, int]]:
        """Yield worth and row of the victims of a device: the cheapest candidate, then up its chain."""
        if not self._leaves.count(device):
            return
        place, turns, kinds, idle = self._leaves.place, self._turn, self._kind, self._idle
        parent, children, devices = self._parent, self._children, self._device
        heap = self._candidates[device]
        while heap and (place[heap[0][1]] < 0 or turns[heap[0][1]] != heap[0][2]):
            heappop(heap)
            self._leaves_left[device] -= 1
        if self.blocks >= self._resample_at[device] or self._leaves_left[device] <= 0:
            heap = self._candidates[device] = self._sample(device, set(), _SAMPLE)
            self._resample_at[device] = self.blocks + _BLOCKS_BETWEEN_SAMPLES
            self._leaves_left[device] = _LEAVES_BETWEEN_SAMPLES
        heap = heap[:]
        left = self._leaves_left[device]
        exposed: list[Candidate] = []  # parents whose children are all among those that went
        gone: set[int] = set()
        gone_children: dict[int, int] = {}
        while True:
            if not heap or left <= 0:
                # The longer the list, the more are drawn at once. What is left of the last sample is forgotten.
                drawn = min(max(_SAMPLE, len(gone)), _MOST_SAMPLED)
                heap = self._sample(device, gone, drawn)
                left = drawn * _LEAVES_BETWEEN_SAMPLES // _SAMPLE
                if not heap and not exposed:
                    heap = self._sample(device, gone, self._leaves.count(device))
                    if not heap:
                        return
            if exposed and (not heap or exposed[0] < heap[0]):
                worth, row, turn = heappop(exposed)
            else:
                worth, row, turn = heappop(heap)
                if row in gone or place[row] < 0 or turns[row] != turn:
                    continue
            left -= 1
            while True:
                gone.add(row)
                yield worth, row
                above = parent[row]
                if above < 0 or not idle[above] or devices[above] != device:
                    break
                gone_children[above] = gone_children.get(above, 0) + 1
                if gone_children[above] < children[above]:
                    break
                if turns[above] != turn or kinds[above] != kinds[row]:
                    worth, turn = self._worth_of(above), turns[above]
                    if heap and heap[0][0] < worth:
                        heappush(exposed, (worth, above, turn))
                        break
                row = above

    def _sample(self, device: int, gone: set[int], count: int) -> list[Candidate]:
        """Return those worth least of some leaves that are drawn and not gone, in order."""
        rows = self._leaves.draw(device, count, self._chance)
        if gone:
            rows = np.array([row for row in rows.tolist() if row not in gone], np.int32)
        worths, turns = self._worths_of(rows)
        kept = count * _KEPT // _SAMPLE
        if len(rows) > kept:
            least = np.argpartition(worths, kept)[:kept]
            worths, rows, turns = worths[least], rows[least], turns[least]
        return sorted(set(zip(worths.tolist(), rows.tolist(), turns.tolist(), strict=True)))
