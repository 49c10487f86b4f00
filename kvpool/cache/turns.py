"""Turns: one record for each request, kept as long as it has resident blocks, and a while longer as a ghost."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvpool.cache.hazard import GAPS, KINDS, LEVELS, WIDTH, HazardTable, age_level, age_levels
from kvpool.cache.key import SHARDS, BlockHash, KeyShards, key_shards

TAIL, BODY, SHARED, OLD = range(KINDS)
"""Kinds of a turn's blocks: the last one (often partial, then never used again); those before; those used more often
than the session had turns; and what a session left behind when it went on."""

CONTINUED = 1 << KINDS
"""Flag of a turn whose session went on: its blocks are OLD. The lower flags say which kinds are still watched."""

NO_TURN = -1
_WATCHED = CONTINUED - 1
_FLAGS = np.array([1 << kind for kind in range(KINDS)], np.uint8)
_GROUP = KINDS * WIDTH
_NEW_LEVELS = [min(digits, LEVELS - 1) * LEVELS for digits in range(65)]
_PLACES = [[kind * WIDTH for kind in range(KINDS) if flags & 1 << kind] for flags in range(CONTINUED)]
"""By flags: where the kinds that are watched lie behind the first class of a group."""
_GHOSTS_AT_LEAST = 256
_SWEPT_AT_ONCE = 1024
_DROPPED_AT_ONCE = 256
_ADDED = 256


class TurnTable:
    """Columns of numbers, one record a turn; and the anchors by which the next turn of a session finds the last one.

    Parameters
    ----------
    hazards
        Where exposures and hits are counted.
    """

    def __init__(self, hazards: HazardTable) -> None:
        self.hazards = hazards
        self.born = array("d")  # on the clock of requests
        self.number = array("i")  # in its session, from 0
        self.base = array("i")  # by stage and gap: place of its first class in tables by age, kinds follow
        self.blocks = array("i")  # length of the prompt
        self.body_blocks = array("i")
        self.shared_blocks = array("i")
        self.old_blocks = array("i")
        self.flags = array("B")
        self.counted = array("b")  # age bucket up to which its exposures are counted
        self.held = array("i")  # resident blocks it touched last
        self.level = array("B")  # of both features
        self.last: list[BlockHash | None] = []
        self._last_but_one: list[BlockHash | None] = []
        self._space = array("i")
        self.queued = array("B")  # in the line; 2: and renewed since
        self._order: deque[int] = deque()
        self._fresh: list[int] = []  # begun since exposures were last counted
        self._free: list[int] = []
        self._anchors: list[KeyShards] = []  # by space
        self._cursor = 0
        self.now = 0.0  # of the latest request

    def __len__(self) -> int:
        """Records in use."""
        return len(self.born) - len(self._free)

    @property
    def ghosts(self) -> int:
        """Records without any resident block."""
        return sum(not self.held[turn] for turn in set(self._order))

    def anchored(self, space: int, block_hash: BlockHash) -> int:
        """Return the latest turn whose prompt ended with this block, or with one behind it; -1 if none is known."""
        if space >= len(self._anchors):
            return NO_TURN
        return self._anchors[space][block_hash[-1] % SHARDS].get(block_hash, NO_TURN)

    def set_output(self, turn: int, tokens: int) -> None:
        """Say how long the answer was."""
        self.level[turn] = self.level[turn] // LEVELS * LEVELS + min(tokens.bit_length(), LEVELS - 1)

    def deepest(self, space: int, hashes: Sequence[BlockHash], resident: int) -> tuple[int, int]:
        """Return the turn whose anchor lies deepest among the hashes behind the first ``resident``, and its depth."""
        if space < len(self._anchors):
            shards = self._anchors[space]
            for place in range(len(hashes) - 1, resident - 1, -1):
                block_hash = hashes[place]
                turn = shards[block_hash[-1] % SHARDS].get(block_hash)
                if turn is not None:
                    return turn, place + 1
        return NO_TURN, resident

    def add(
        self, space: int, hashes: Sequence[BlockHash], born: float, number: int, gap_bucket: int, shared: int, new: int
    ) -> int:
        """Return a new record for a prompt with ``shared`` blocks of that kind and ``new`` ones behind what was known.

        It stands in the line for :meth:`drop_ghosts`.
        """
        turn = self._free.pop() if self._free else self._extend()
        self._space[turn] = space
        self.held[turn] = 0
        self.last[turn] = last = hashes[-1]
        while space >= len(self._anchors):
            self._anchors.append(key_shards())
        shards = self._anchors[space]
        shards[last[-1] % SHARDS][last] = turn
        self.blocks[turn] = blocks = len(hashes)
        if blocks > 1:
            self._last_but_one[turn] = last = hashes[-2]
            shards[last[-1] % SHARDS][last] = turn
        self.queued[turn] = 1
        self._order.append(turn)
        self._begin(turn, born, number, gap_bucket, shared, new)
        return turn

    def renew(self, turn: int, born: float, number: int, gap_bucket: int, shared: int, new: int) -> None:
        """Write over the record of an equal prompt that has no blocks left; see :meth:`add`."""
        if not self.queued[turn]:
            self._order.append(turn)
        self.queued[turn] = 2
        self._begin(turn, born, number, gap_bucket, shared, new)

    def _begin(self, turn: int, born: float, number: int, gap_bucket: int, shared: int, new: int) -> None:
        self.now = self.born[turn] = born
        self.number[turn] = number
        self.base[turn] = _GROUP * (GAPS + gap_bucket if number else gap_bucket)
        self.counted[turn] = -1
        self.level[turn] = _NEW_LEVELS[new.bit_length()]
        self.shared_blocks[turn] = shared
        self.body_blocks[turn] = body = self.blocks[turn] - 1 - shared
        self.flags[turn] = 1 << TAIL | (1 << BODY if body > 0 else 0) | (1 << SHARED if shared else 0)
        self._fresh.append(turn)

    def repeat(self, turn: int, born: float, shared: int, new: int) -> None:
        """Count a prompt of one block that is asked for again, and :meth:`renew` its record."""
        level = age_level(born - self.born[turn])
        bucket = int(level)
        hazards = self.hazards
        if self.flags[turn] == 1 << TAIL:  # expose() and hit() at once: this is all that lookups of single blocks do
            start = self.base[turn]
            first, stop = start + self.counted[turn] + 1, start + bucket + 1
            features = self.level[turn]
            if first < stop:
                hazards.entered[first] += 1.0
                hazards.entered[stop] -= 1.0
                expected = (hazards.risen[stop] - hazards.risen[first]) * hazards.factors[features]
                hazards.expected[features] += expected
                hazards.gains[features] += 1.0 - expected
            else:
                hazards.gains[features] += 1.0
            hazards.hits[stop - 1] += 1.0
        else:
            self.expose(turn, bucket)
            self.hit(turn, TAIL, bucket, 1.0)
            if self.flags[turn] & 1 << SHARED:
                self.hit(turn, SHARED, bucket, 1.0)
        gap_bucket = int(level / 2) + 1
        self.now = self.born[turn] = born
        self.number[turn] += 1
        self.base[turn] = _GROUP * (GAPS + gap_bucket if gap_bucket < GAPS else 2 * GAPS - 1)
        self.counted[turn] = -1
        self.level[turn] = _NEW_LEVELS[new]
        self.shared_blocks[turn] = shared
        self.flags[turn] = 1 << TAIL | shared << SHARED
        self._fresh.append(turn)
        if not self.queued[turn]:
            self._order.append(turn)
        self.queued[turn] = 2

    def drop_ghosts(self, most: int) -> None:
        """Forget the oldest records without resident blocks once there are an eighth too many of them.

        ``most`` and at least 256 of the latest records stay.
        """
        order, queued, held = self._order, self.queued, self.held
        most = max(most, _GHOSTS_AT_LEAST)
        surplus = len(order) - most
        if surplus < min(most // 8, _DROPPED_AT_ONCE):
            return
        oldest: list[int] = []
        for _ in range(min(surplus, _DROPPED_AT_ONCE)):
            turn = order.popleft()
            queued[turn] -= 1
            if queued[turn]:  # renewed since it was put there
                order.append(turn)
            elif not held[turn]:
                oldest.append(turn)
        if oldest:
            self._forget_all(np.array(oldest, np.int64))

    def forget_if_gone(self, turn: int) -> None:
        """Drop the record unless it has resident blocks or is among the latest ones."""
        if not self.held[turn] and not self.queued[turn] and self.last[turn] is not None:
            self.expose(turn, int(age_level(self.now - self.born[turn])))
            self._forget(turn)

    def forget_those_gone(self, turns: NDArray[np.int64]) -> None:
        """:meth:`forget_if_gone` for many."""
        gone = (np.frombuffer(self.held, np.int32)[turns] == 0) & (np.frombuffer(self.queued, np.uint8)[turns] == 0)
        self._forget_all(turns[gone])

    def _forget_all(self, turns: NDArray[np.int64]) -> None:
        self._count(turns)
        for turn in turns.tolist():
            self._forget(turn)

    def _forget(self, turn: int) -> None:
        shards = self._anchors[self._space[turn]]
        last, last_but_one = self.last[turn], self._last_but_one[turn]
        if last is not None:
            shard = shards[last[-1] % SHARDS]
            if shard.get(last) == turn:
                del shard[last]
            self.last[turn] = None
        if last_but_one is not None:
            shard = shards[last_but_one[-1] % SHARDS]
            if shard.get(last_but_one) == turn:
                del shard[last_but_one]
            self._last_but_one[turn] = None
        self.flags[turn] = 0
        self._free.append(turn)

    # -- learning -------------------------------------------------------------------------------------------------

    def expose(self, turn: int, bucket: int) -> None:
        """Count that what is still watched of a turn reached an age bucket without a hit before it."""
        flags = self.flags[turn] & _WATCHED
        first = self.counted[turn] + 1
        if bucket < first or not flags:
            return
        self.counted[turn] = bucket
        hazards = self.hazards
        entered, risen = hazards.entered, hazards.risen
        start, behind = self.base[turn] + first, bucket + 1 - first
        expected = 0.0
        for place in _PLACES[flags]:
            at = start + place
            entered[at] += 1.0
            entered[at + behind] -= 1.0
            if place <= BODY * WIDTH:
                expected += risen[at + behind] - risen[at]
        if expected:
            level = self.level[turn]
            expected *= hazards.factors[level]
            hazards.gains[level] -= expected
            hazards.expected[level] += expected

    def hit(self, turn: int, kind: int, bucket: int, share: float) -> None:
        """Count that a share of a turn's blocks of one kind was hit."""
        self.hazards.hits[self.base[turn] + kind * WIDTH + bucket] += share
        if kind <= BODY:
            self.hazards.gains[self.level[turn]] += share

    def sweep(self) -> None:
        """:meth:`expose` the new records, and some of the others, so that those that nobody asks for count too."""
        start = self._cursor
        stop = min(start + _SWEPT_AT_ONCE, len(self.born))
        self._cursor = 0 if stop == len(self.born) else stop
        self.count_fresh(start, stop)

    def count_fresh(self, start: int = 0, stop: int = 0) -> None:
        """:meth:`expose` the records that are new since the last time, and a range of others. Takes 0.1 to 0.3 ms."""
        turns = np.unique(np.concatenate([np.array(self._fresh, np.int64), np.arange(start, stop)]))
        self._fresh.clear()
        self._count(turns)

    def _count(self, turns: NDArray[np.int64]) -> None:
        """:meth:`expose` different records up to now."""
        counted = np.frombuffer(self.counted, np.int8)
        buckets = age_levels(self.now - np.frombuffer(self.born)[turns]).astype(np.int8)
        flags = np.frombuffer(self.flags, np.uint8)[turns] & _WATCHED
        flags[buckets <= counted[turns]] = 0
        watched, kinds = np.nonzero(flags[:, None] & _FLAGS)
        records = turns[watched]
        starts = np.frombuffer(self.base, np.int32)[records] + kinds * WIDTH + counted[records] + 1
        stops = starts + (buckets[watched] - counted[records])
        late = flags != 0
        counted[turns[late]] = buckets[late]
        hazards = self.hazards
        entered, risen = np.frombuffer(hazards.entered), np.frombuffer(hazards.risen)
        entered += np.bincount(starts, minlength=len(entered))
        entered -= np.bincount(stops, minlength=len(entered))
        level = np.frombuffer(self.level, np.uint8)[records]
        expected = (risen[stops] - risen[starts]) * np.frombuffer(hazards.factors)[level] * (kinds <= BODY)
        sums = np.bincount(level, expected, len(hazards.gains))
        gains, all_expected = np.frombuffer(hazards.gains), np.frombuffer(hazards.expected)
        gains -= sums
        all_expected += sums

    def _extend(self) -> int:
        """Add free records, and return one of them."""
        columns = (self.number, self.base, self.blocks, self.body_blocks, self.shared_blocks, self.old_blocks)
        for column in (*columns, self.flags, self.counted, self.held, self.level, self._space, self.queued, self.born):
            column.frombytes(bytes(_ADDED * column.itemsize))
        self.last.extend([None] * _ADDED)
        self._last_but_one.extend([None] * _ADDED)
        records = len(self.born)
        self._free.extend(range(records - 1, records - _ADDED, -1))
        return records - _ADDED
