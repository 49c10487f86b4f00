"""Turns: one record for each request, kept as long as it has resident blocks, and a while longer as a ghost."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from math import inf

import numpy as np

from kvpool.cache.forgetting import ForgettingLine
from kvpool.cache.hazard import AGES, BOUNDS, GAPS, KINDS, LEVELS, WIDTH, HazardTable
from kvpool.cache.key import SHARDS, BlockHash, KeyShards, key_shards
from kvpool.cache.table import Rows

TAIL, BODY, SHARED, OLD = range(KINDS)
"""Kinds of a turn's blocks: the last one (often partial, then never used again); those before; those used more often
than the session had turns; and what a session left behind when it went on."""

CONTINUED = 1 << KINDS
"""Flag of a turn whose session went on: its blocks are OLD. The lower flags say which kinds are still watched."""

NO_TURN = -1
_WATCHED = CONTINUED - 1
_KINDS_OF = np.array([[flags & 1 << kind != 0 for kind in range(KINDS)] for flags in range(2 * CONTINUED)])
"""By flags: which kinds are watched."""
_GROUP = KINDS * WIDTH
_BOUNDS: list[float] = BOUNDS.tolist()
_BASES_AFTER = [_GROUP * (GAPS + min(bucket // 2 + 1, GAPS - 1)) for bucket in range(AGES)]
"""By the age bucket in which a block is asked for again: where the first class of its next turn is."""
_TAIL_ONLY = 1 << TAIL
_NEW_LEVELS = [min(digits, LEVELS - 1) * LEVELS for digits in range(65)]
_LATE_AT = np.concatenate([[0.0], BOUNDS, [inf]])
"""By the age bucket from which on a turn's exposures are not counted: the age from which on there are some."""
_PLACES = [[kind * WIDTH for kind in range(KINDS) if flags & 1 << kind] for flags in range(CONTINUED)]
"""By flags: where the kinds that are watched lie behind the first class of a group."""
_GHOSTS_AT_LEAST = 256
_SWEPT_FOR_A_BLOCK, _LOOKED_AT_FOR_A_BLOCK = 4, 2
_ADDED, _ADDED_OF = 256, 64


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
        self.number = array("I")  # in its session, from 0
        self.base = array("I")  # by stage and gap: place of its first class in tables by age, kinds follow
        self.blocks = array("I")  # length of the prompt
        self.body_blocks = array("i")
        self.shared_blocks = array("I")
        self.old_blocks = array("I")
        self.flags = bytearray()
        self.uncounted = bytearray()  # age bucket from which on its exposures are not counted yet
        self.held = array("I")  # resident blocks it touched last
        self.level = bytearray()  # of both features
        self.last: list[BlockHash | None] = []
        self._last_but_one: list[BlockHash | None] = []
        self._space = array("I")
        self._place = array("i")  # scratch: where one of several equal ones is
        self.queued = bytearray()  # in the line of those that are forgotten; 2: and renewed since
        self._line = ForgettingLine()
        self._fresh = array("i")  # begun since exposures were last counted
        self._free: list[int] = []  # their columns are those of the turn of a single new block, born never
        self._anchors: list[KeyShards] = []  # by space
        self._cursor = 0

    def __len__(self) -> int:
        """Records in use."""
        return len(self.born) - len(self._free)

    @property
    def ghosts(self) -> int:
        """Records without any resident block."""
        return sum(not held for held in self.held) - len(self._free)

    def anchored(self, space: int, block_hash: BlockHash) -> int:
        """Return the latest turn whose prompt ended with this block, or with one behind it; -1 if none is known."""
        if space >= len(self._anchors):
            return NO_TURN
        return self._anchors[space][block_hash[-1] % SHARDS].get(block_hash, NO_TURN)

    def shard(self, space: int, block_hash: BlockHash) -> dict[BlockHash, int]:
        """Return the part of the anchors where this block's is, if it is known: turns as of :meth:`anchored`."""
        anchors = self._anchors
        while space >= len(anchors):
            anchors.append(key_shards())
        return anchors[space][block_hash[-1] % SHARDS]

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
        """Return a record for a prompt of ``shared`` blocks of that kind, and ``new`` ones behind what was known."""
        turn = self._free.pop() if self._free else self._extend()
        self._space[turn] = space
        self.last[turn] = last = hashes[-1]
        self.shard(space, last)[last] = turn
        self.blocks[turn] = blocks = len(hashes)
        if blocks > 1:
            self._last_but_one[turn] = last = hashes[-2]
            self.shard(space, last)[last] = turn
        self.queued[turn] = 1
        self._line.put_last(turn)
        self._begin(turn, born, number, gap_bucket, shared, new)
        return turn

    def ask_for_block(self, space: int, block_hash: BlockHash, born: float) -> int:
        """Return the record for a prompt of one block that is not resident: a new one, or that of an equal prompt.

        -1 if the block is the anchor of a longer prompt: that one's session may go on.
        """
        try:
            shard = self._anchors[space][block_hash[-1] % SHARDS]
        except IndexError:
            shard = self.shard(space, block_hash)
        turn = shard.get(block_hash)
        if turn is None:  # add(), with what a free record is made for
            shard[block_hash] = turn = self._free.pop() if self._free else self._extend()
            self._space[turn] = space
            self.last[turn] = block_hash
            self.born[turn] = born
            self.queued[turn] = 1
            self._line.put_last(turn)
            self._fresh.append(turn)
            return turn
        if self.blocks[turn] > 1 or self.last[turn] != block_hash:
            return NO_TURN
        self.repeat(turn, born, 0, 1)
        return turn

    def renew(self, turn: int, born: float, number: int, gap_bucket: int, shared: int, new: int) -> None:
        """Write over the record of an equal prompt that has no blocks left; see :meth:`add`."""
        if not self.queued[turn]:
            self._line.put_last(turn)
        self.queued[turn] = 2
        self._begin(turn, born, number, gap_bucket, shared, new)

    def _begin(self, turn: int, born: float, number: int, gap_bucket: int, shared: int, new: int) -> None:
        self.born[turn] = born
        self.number[turn] = number
        self.base[turn] = _GROUP * (GAPS + gap_bucket if number else gap_bucket)
        self.uncounted[turn] = 0
        self.level[turn] = _NEW_LEVELS[new.bit_length()]
        self.shared_blocks[turn] = shared
        self.body_blocks[turn] = body = self.blocks[turn] - 1 - shared
        self.flags[turn] = 1 << TAIL | (1 << BODY if body > 0 else 0) | (1 << SHARED if shared else 0)
        self._fresh.append(turn)

    def repeat(self, turn: int, born: float, shared: int, new: int) -> None:
        """Count a prompt of one block that is asked for again, and :meth:`renew` its record."""
        bucket = bisect_right(_BOUNDS, born - self.born[turn])
        hazards, flags, base, uncounted, level = self.hazards, self.flags, self.base, self.uncounted, self.level
        if flags[turn] == _TAIL_ONLY:  # expose() and hit() at once: this is all that lookups of single blocks do
            start, features, gains = base[turn], level[turn], hazards.gains
            first, last = start + uncounted[turn], start + bucket
            if first <= last:
                entered, risen, stop = hazards.entered, hazards.risen, last + 1
                entered[first] += 1.0
                entered[stop] -= 1.0
                expected = (risen[stop] - risen[first]) * hazards.factors[features]
                hazards.expected[features] += expected
                gains[features] += 1.0 - expected
            else:
                gains[features] += 1.0
            hazards.hits[last] += 1.0
        else:
            self.expose(turn, bucket)
            self.hit(turn, TAIL, bucket, 1.0)
            if flags[turn] & 1 << SHARED:
                self.hit(turn, SHARED, bucket, 1.0)
        self.born[turn] = born
        self.number[turn] += 1
        base[turn] = _BASES_AFTER[bucket]
        uncounted[turn] = 0
        level[turn] = _NEW_LEVELS[new]
        if shared:
            self.shared_blocks[turn] = 1
            flags[turn] = _TAIL_ONLY | 1 << SHARED
        else:
            flags[turn] = _TAIL_ONLY
        self._fresh.append(turn)
        queued = self.queued
        if not queued[turn]:
            self._line.put_last(turn)
        queued[turn] = 2

    def bereave(self, turn: int) -> None:
        """Note that a turn has no resident block any more: it is forgotten soon, unless it is among the latest."""
        queued = self.queued
        if not queued[turn]:
            queued[turn] = 1
            self._line.put_first(turn)

    def bereave_all(self, turns: Rows) -> None:
        """:meth:`bereave` those of different turns that have no resident block."""
        queued = np.frombuffer(self.queued, np.uint8)
        gone = turns[(np.frombuffer(self.held, np.int32)[turns] == 0) & (queued[turns] == 0)]
        queued[gone] = 1
        self._line.put_all_first(gone)

    def _forget_all(self, forgotten: Rows) -> None:
        self._forget_anchors(forgotten, self.last)
        blocks = np.frombuffer(self.blocks, np.int32)
        long = forgotten[blocks.take(forgotten) > 1]
        if len(long):
            self._forget_anchors(long, self._last_but_one)
            blocks[long] = 1
            np.frombuffer(self.body_blocks, np.int32)[long] = 0
        np.frombuffer(self.born)[forgotten] = inf
        for column in (self.number, self.base, self.shared_blocks):
            np.frombuffer(column, np.int32)[forgotten] = 0
        np.frombuffer(self.flags, np.uint8)[forgotten] = 1 << TAIL
        np.frombuffer(self.level, np.uint8)[forgotten] = LEVELS
        np.frombuffer(self.uncounted, np.uint8)[forgotten] = 0
        self._free.extend(forgotten.tolist())

    def _forget_anchors(self, forgotten: Rows, anchors: list[BlockHash | None]) -> None:
        spaces = np.frombuffer(self._space, np.int32).take(forgotten)
        for space in set(spaces.tolist()):
            shards = self._anchors[space]
            for turn in forgotten[spaces == space].tolist():
                block_hash = anchors[turn]
                if block_hash is not None:
                    anchors[turn] = None
                    shard = shards[block_hash[-1] % SHARDS]
                    latest = shard.pop(block_hash, turn)
                    if latest != turn:
                        shard[block_hash] = latest

    # -- learning -------------------------------------------------------------------------------------------------

    def expose(self, turn: int, bucket: int) -> None:
        """Count that what is still watched of a turn reached an age bucket without a hit before it."""
        flags = self.flags[turn] & _WATCHED
        first = self.uncounted[turn]
        if bucket < first or not flags:
            return
        self.uncounted[turn] = bucket + 1
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

    def sweep(self, now: float, resident: int, blocks: int) -> None:
        """:meth:`expose` the new records, and some of the others, so that those that nobody asks for count too.

        Then the oldest without resident blocks are forgotten. As many of the latest records stay as there are blocks
        ``resident``, at least 256. Takes 0.1 to 0.4 ms.
        """
        start = self._cursor
        stop = min(start + _SWEPT_FOR_A_BLOCK * blocks, len(self.born))
        self._cursor = 0 if stop == len(self.born) else stop
        fresh = self._take_fresh()
        queued, held = np.frombuffer(self.queued, np.uint8), np.frombuffer(self.held, np.int32)
        forgotten = self._line.take_oldest(
            max(resident, _GHOSTS_AT_LEAST), _LOOKED_AT_FOR_A_BLOCK * blocks, queued, held
        )
        self._count(np.concatenate([fresh, np.arange(start, stop), forgotten]), now)
        self._forget_all(forgotten)

    def count_fresh(self, now: float) -> None:
        """:meth:`expose` the records that are new since the last time."""
        self._count(self._take_fresh(), now)

    def _take_fresh(self) -> Rows:
        fresh = np.array(self._fresh, np.int64)
        self._fresh = array("i")
        return fresh

    def _count(self, turns: Rows, now: float) -> None:
        """:meth:`expose` these records up to now."""
        uncounted, born = np.frombuffer(self.uncounted, np.uint8), np.frombuffer(self.born)
        late = now - born.take(turns) >= _LATE_AT.take(uncounted.take(turns))
        turns = turns[late]  # most of those that are not new are not late
        place, order = np.frombuffer(self._place, np.int32), np.arange(len(turns), dtype=np.int32)
        place[turns] = order
        turns = turns[place.take(turns) == order]  # each once; sorting them takes five times as long
        buckets = BOUNDS.searchsorted(now - born.take(turns), "right")
        watched, kinds = _KINDS_OF.take(np.frombuffer(self.flags, np.uint8).take(turns), axis=0).nonzero()
        first = uncounted.take(turns)
        buckets += 1
        uncounted[turns] = buckets
        starts = (np.frombuffer(self.base, np.int32).take(turns) + first).take(watched) + kinds * WIDTH
        stops = starts + (buckets - first).take(watched)
        hazards = self.hazards
        entered, risen = np.frombuffer(hazards.entered), np.frombuffer(hazards.risen)
        entered += np.bincount(starts, minlength=len(entered))
        entered -= np.bincount(stops, minlength=len(entered))
        level = np.frombuffer(self.level, np.uint8).take(turns).take(watched)
        expected = (risen.take(stops) - risen.take(starts)) * np.frombuffer(hazards.factors).take(level)
        expected *= kinds <= BODY
        sums = np.bincount(level, expected, len(hazards.gains))
        gains, all_expected = np.frombuffer(hazards.gains), np.frombuffer(hazards.expected)
        gains -= sums
        all_expected += sums

    def _extend(self) -> int:
        """Add free records, and return one of them."""
        added = max(_ADDED, len(self.born) // _ADDED_OF)
        columns = (self.number, self.base, self.body_blocks, self.shared_blocks, self.old_blocks)
        for column in (*columns, self.held, self._space, self._place):
            column.frombytes(bytes(added * column.itemsize))
        self.blocks.extend(array("I", [1]) * added)
        self.uncounted.extend(bytes(added))
        self.born.extend(array("d", [inf]) * added)
        self.flags.extend(bytes([1 << TAIL]) * added)
        self.level.extend(bytes([LEVELS]) * added)
        self.queued.extend(bytes(added))
        self.last.extend([None] * added)
        self._last_but_one.extend([None] * added)
        records = len(self.born)
        self._free.extend(range(records - 1, records - added, -1))
        return records - added
