"""Which leaves go first, where worth changes with time: some are drawn, and the cheapest of them go."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpool.cache.chains import unique
from kvpool.cache.leaf_sets import LeafSets
from kvpool.cache.request_clock import RequestClock

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex

Candidate = tuple[float, int, float]
"""Worth, row, and when the turn was born by which it was reckoned: it is dead once the row has another one."""

Worths = Callable[[NDArray[np.int32]], tuple[NDArray[np.float64], NDArray[np.float64]]]

_SAMPLE, _LARGEST_SAMPLE = 512, 1024
_LEAVES_FOR_A_SAMPLED_ONE = 4
_KEPT, _GO, _GO_ALONE = 1 / 4, 3 / 32, 7 / 32
"""Shares of a sample that are remembered, and that go before the next one is drawn: several at once, and one by one,
where a sample costs more than what it is drawn for."""
_REQUESTS_BETWEEN_SAMPLES = 1
_CHANGED_BY_REQUEST, _CHANGED_BY_REQUEST_OF_ONE = 6, 4
"""Where there are many leaves, a request changes less of what is worth least, and a sample serves longer, for a request
for each so many leaves: the second where nothing goes behind a leaf, since a request is for a block there."""
_LARGER_THAN_GONE = 32
_ROWS_AT_ONCE = 8
_LEAST_BY, _SORTED_WHOLE = 16, 256


class Sample(NamedTuple):
    """Columns of :data:`Candidate`."""

    worths: NDArray[np.float64]
    rows: NDArray[np.int32]
    born: NDArray[np.float64]


class Drawn:
    """The victims of one device in the order in which they go, drawn as far as anybody asked, and somewhat further.

    Parameters
    ----------
    rank
        Appends to rows and worths, and pauses now and then.
    """

    def __init__(self, rank: Callable[[list[int], list[float]], Iterator[None]]) -> None:
        self.rows: list[int] = []
        self.worths: list[float] = []
        self._more = rank(self.rows, self.worths)

    def more(self) -> None:
        """Draw more, if there are any."""
        next(self._more, None)

    def __iter__(self) -> Iterator[tuple[float, int]]:
        """Yield worth and row of each."""
        place = 0
        while True:
            if place == len(self.rows):
                self.more()
                if place == len(self.rows):
                    return
            yield self.worths[place], self.rows[place]
            place += 1


class _Ranked:
    """What is known of the order among the leaves of one device."""

    __slots__ = ("candidates", "exposed", "left", "resample_at", "spare")

    def __init__(self) -> None:
        self.candidates: list[Candidate] = []  # of the last sample, what goes first at the end
        self.left = 0  # candidates that may go before the next sample
        self.spare = 0  # those of them that may go only if all go one by one
        self.resample_at = 0  # count of requests
        self.exposed: list[Candidate] = []  # a heap of leaves that were parents at the last sample


class SampledRanking:
    """Ranks the leaves of each device by worth, from samples of them.

    A sample serves for some requests, or until some of it has gone, whichever is first. Asking changes nothing, and the
    same question has the same answer until something changes.

    A row that is taken, or gets a child, mostly comes back soon; so it stays in the set of leaves until it is drawn and
    put out.

    Parameters
    ----------
    index
        For its chains and devices.
    clock
        Which counts requests.
    turns, kinds, idle
        By row: the turn and kind by which it is worth something; whether it may go.
    born
        By turn.
    worth_of, worths_of
        What a row is worth now; the same for many, with when their turns were born.
    """

    def __init__(
        self,
        index: CacheIndex,
        clock: RequestClock,
        turns: array[int],
        kinds: bytearray,
        idle: bytearray,
        born: array[float],
        worth_of: Callable[[int], float],
        worths_of: Worths,
    ) -> None:
        self._parent, self._children, self._device = index.parent, index.children, index.partition
        self._turn, self._kind, self._idle, self._born = turns, kinds, idle, born
        self._worth_of, self._worths_of = worth_of, worths_of
        self._clock = clock
        self._chance = np.random.default_rng(index.seed)
        self._leaves = LeafSets()
        self.add = self._leaves.add
        """Add a row that is a leaf from now on, by its device; it may be in."""
        self.discard = self._leaves.discard
        """Take a row out, which may not be in."""
        self.where = self._leaves.where
        """By row, the device among whose leaves it is, negative if it is none."""
        self.devices = self._leaves.devices
        """Devices that had leaves so far, from 0 on."""
        self._ranked: list[_Ranked] = []  # by device
        self._known: dict[int, Drawn] = {}
        self.changed = True
        """Whether anything has changed, since it was asked last, on which an answer depends. To be set by who does."""
        self._asked_device = -1  # for which :meth:`first` was asked since
        self._answer: Candidate | None = None

    def grow(self, rows: int) -> None:
        """Make room for row numbers below ``rows``."""
        self._leaves.grow(rows)

    def _ranked_of(self, device: int) -> _Ranked:
        while device >= len(self._ranked):
            self._ranked.append(_Ranked())
        return self._ranked[device]

    def expose(self, row: int) -> None:
        """Add a leaf that was a parent until now: it may go right behind its last child."""
        device = self._device[row]
        self._leaves.add(row, device)
        heappush(self._ranked_of(device).exposed, (self._worth_of(row), row, self._born[self._turn[row]]))

    def sift(self) -> None:
        """Put all out that are no leaves any more."""
        for device in self.devices:
            self._leaves.keep(device, self._living(self._leaves.all(device)))

    def of(self, device: int) -> Drawn:
        """Return the victims of a device, the first to go first."""
        known = None if self.changed else self._known.get(device)
        if known is None:
            self.first(device)  # a look for new candidates, if it is time
            known = self._known[device] = Drawn(partial(self._rank, device))
        return known

    def first(self, device: int) -> Candidate | None:
        """Return what goes first of a device, after a look for new candidates if it is time.

        None: that takes a look for more, see :meth:`of`.
        """
        if self.changed:
            self.changed = False
            if self._known:
                self._known = {}
        elif self._asked_device == device:
            return self._answer
        ranked = self._ranked[device] if device < len(self._ranked) else self._ranked_of(device)
        candidates = ranked.candidates
        found = None
        while candidates:
            found = candidates[-1]
            row = found[1]
            if self._idle[row] and self._born[self._turn[row]] == found[2] and not self._children[row]:
                break
            candidates.pop()
            ranked.left -= 1
            found = None
        if self._clock.requests >= ranked.resample_at or ranked.left <= 0:
            self._look(device, ranked)
            found = ranked.candidates[-1] if ranked.candidates else None  # others may be cheaper than what is exposed
        exposed = ranked.exposed
        while exposed:
            _, row, since = exposed[0]
            if self._idle[row] and not self._children[row] and self._born[self._turn[row]] == since:
                if found is not None and exposed[0] < found:
                    found = exposed[0]
                break
            heappop(exposed)
        self._asked_device, self._answer = device, found
        return found

    def _look(self, device: int, ranked: _Ranked) -> None:
        """Draw new candidates."""
        leaves = self._leaves.count(device)
        drawn = min(max(_SAMPLE, leaves // _LEAVES_FOR_A_SAMPLED_ONE), _LARGEST_SAMPLE)
        changes = _CHANGED_BY_REQUEST
        ranked.candidates = []
        if leaves:
            sample = self._sample(device, drawn, _KEPT)
            ranked.candidates = _listed(sample)
            if self._alone(sample.rows):
                changes = _CHANGED_BY_REQUEST_OF_ONE
        ranked.left = int(drawn * _GO_ALONE)
        ranked.spare = ranked.left - int(drawn * _GO)
        ranked.resample_at = self._clock.requests + max(_REQUESTS_BETWEEN_SAMPLES, leaves // changes)
        ranked.exposed = []

    def _rank(self, device: int, rows: list[int], worths: list[float]) -> Iterator[None]:
        """Append row and worth of the victims of a device: the cheapest candidate, then up its chain.

        Some go in at a time, since going on after a pause costs as much as the next one of them.
        """
        if not self._leaves.count(device):
            return
        turns, born, kinds, idle = self._turn, self._born, self._kind, self._idle
        parent, children, devices = self._parent, self._children, self._device
        ranked = self._ranked_of(device)
        ranked.left -= ranked.spare
        ranked.spare = 0
        candidates, left = ranked.candidates[:], ranked.left
        exposed = ranked.exposed[:]  # and parents whose children are all among those that went
        leaves_gone = 0
        all_seen = False
        gone = bytearray(len(idle))  # by row
        gone_children: dict[int, int] = {}
        pause_at = _ROWS_AT_ONCE
        while True:
            if ((left <= 0 and rows) or not candidates) and not all_seen:  # what :meth:`first` found goes first here
                # The longer the list, the more are drawn at once. What is left of the last sample is forgotten.
                drawn = max(_SAMPLE, _LARGER_THAN_GONE * leaves_gone)
                sample = self._sample(device, drawn, _GO, gone)
                if not len(sample.rows):
                    sample = self._sample(device, self._leaves.count(device), _GO, gone)
                    all_seen = not len(sample.rows)
                candidates, left = [], len(sample.rows)
                if not exposed and self._alone(sample.rows):
                    leaves_gone += left
                    left = 0
                    np.frombuffer(gone, np.uint8)[sample.rows] = 1
                    rows += sample.rows.tolist()
                    worths += sample.worths.tolist()
                else:
                    candidates = _listed(sample)
            if candidates and not (exposed and exposed[0] < candidates[-1]):
                worth, row, since = candidates.pop()
            elif exposed:
                worth, row, since = heappop(exposed)
            elif all_seen:
                return
            else:
                if len(rows) >= pause_at:
                    yield
                    pause_at = len(rows) + max(_ROWS_AT_ONCE, len(rows) // 4)
                continue
            if gone[row] or not idle[row] or children[row] > gone_children.get(row, 0) or born[turns[row]] != since:
                continue
            if not children[row]:
                leaves_gone += 1
            left -= 1
            while True:
                gone[row] = 1
                rows.append(row)
                worths.append(worth)
                above = parent[row]
                if above < 0 or not idle[above] or devices[above] != device:
                    break
                gone_children[above] = gone_children.get(above, 0) + 1
                if gone_children[above] < children[above]:
                    break
                if turns[above] != turns[row] or kinds[above] != kinds[row]:
                    worth, since = self._worth_of(above), born[turns[above]]
                    if candidates and candidates[-1][0] < worth:
                        heappush(exposed, (worth, above, since))
                        break
                row = above
            if len(rows) >= pause_at:
                yield
                pause_at = len(rows) + max(_ROWS_AT_ONCE, len(rows) // 4)

    def _sample(self, device: int, count: int, share: float, gone: bytearray | None = None) -> Sample:
        """Return the share worth least of so many leaves that are drawn, in order: if it is told which are gone, none
        of them, and each of the others once.
        """
        rows = self._leaves.draw(device, count, self._chance)
        living = self._living(rows)
        alive = np.count_nonzero(living)
        if alive < len(rows):
            if 2 * alive < len(rows):
                self._leaves.keep(device, self._living(self._leaves.all(device)))
                rows = self._leaves.draw(device, count, self._chance)
            else:
                for row in rows[~living].tolist():
                    self._leaves.discard(row)
                rows = rows[living]
        if gone is not None:
            rows = unique(rows[np.frombuffer(gone, np.uint8)[rows] == 0])
            if count > _LARGEST_SAMPLE and 2 * count >= self._leaves.count(device):
                share = _KEPT  # of all that there are
        worths, born = self._worths_of(rows)
        order = _least(worths, int(count * share))
        return Sample(worths.take(order), rows.take(order), born.take(order))

    def _alone(self, rows: NDArray[np.int32]) -> bool:
        """Whether nothing goes behind any of these leaves: none has a parent."""
        return not np.count_nonzero(np.frombuffer(self._parent, np.int32).take(rows) >= 0)

    def _living(self, rows: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return which of these are leaves that may go."""
        living: NDArray[np.bool_] = np.frombuffer(self._children, np.uint32).take(rows) == 0
        living &= np.frombuffer(self._idle, np.bool_).take(rows)
        return living


def _listed(sample: Sample) -> list[Candidate]:
    """Return the candidates of a sample, what goes first at the end."""
    return list(zip(*(column[::-1].tolist() for column in sample), strict=True))


def _least(worths: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return where the ``count`` least are, about, in order.

    Many may be equal, on which :func:`numpy.argpartition` takes many times as long.
    """
    if len(worths) <= max(count, _SORTED_WHOLE):
        return worths.argsort(kind="stable")[:count]
    some = worths[::_LEAST_BY].copy()
    some.sort()
    (least,) = (worths <= some[min(count // _LEAST_BY + 2, len(some) - 1)]).nonzero()
    order: NDArray[np.int64] = least.take(worths.take(least).argsort(kind="stable")[:count])
    return order
