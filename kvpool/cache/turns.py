"""Turns: one record for each request, kept as long as it has resident blocks, and a while longer as a ghost."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from math import exp

import numpy as np
from numpy.typing import NDArray

from kvpool.cache.hazard import AGES, FEATURES, GAPS, KINDS, LEVELS, Floats, HazardTable, age_level, age_levels
from kvpool.cache.key import BlockHash

TAIL, BODY, SHARED, OLD = range(KINDS)
"""Kinds of a turn's blocks: the last one (often partial, then never used again); those before; those used more often
than the session had turns; and what a session left behind when it went on."""

CONTINUED = 1 << KINDS
"""Flag of a turn whose session went on: its blocks are OLD. The lower flags say which kinds are still watched."""

NO_TURN = -1
_SHARDS = 16  # dictionaries of anchors for each space: one alone would stop everything when it grows
_GHOSTS_AT_LEAST = 256
_SWEPT_AT_ONCE = 384


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
        self.group = array("i")  # stage and gap: the class of a kind of its blocks is group * KINDS + kind
        self.blocks = array("i")  # length of the prompt
        self.body_blocks = array("i")
        self.shared_blocks = array("i")
        self.old_blocks = array("i")
        self.flags = array("B")
        self.counted = array("b")  # age bucket up to which its exposures are counted
        self.held = array("i")  # resident blocks it touched last
        self.levels = [array("B") for _ in range(FEATURES)]  # offset of the level among those of all features
        self.last: list[BlockHash | None] = []
        self._last_but_one: list[BlockHash | None] = []
        self._space = array("i")
        self._queued = array("B")
        self._order: deque[int] = deque()
        self._free: list[int] = []
        self._anchors: list[list[dict[BlockHash, int]]] = []  # by space, then by the last byte of the hash
        self._cursor = 0
        self._now = 0.0

    def __len__(self) -> int:
        """Records in use."""
        return len(self.born) - len(self._free)

    @property
    def ghosts(self) -> int:
        """Records without any resident block."""
        return sum(not self.held[turn] for turn in self._order)

    def anchored(self, space: int, block_hash: BlockHash) -> int:
        """Return the latest turn whose prompt ended with this block, or with one behind it; -1 if none is known."""
        if space >= len(self._anchors):
            return NO_TURN
        return self._anchors[space][block_hash[-1] % _SHARDS].get(block_hash, NO_TURN)

    def deepest(self, space: int, hashes: Sequence[BlockHash], resident: int) -> tuple[int, int]:
        """Return the turn whose anchor lies deepest among the hashes behind the first ``resident``, and its depth."""
        if space < len(self._anchors):
            shards = self._anchors[space]
            for place in range(len(hashes) - 1, resident - 1, -1):
                block_hash = hashes[place]
                turn = shards[block_hash[-1] % _SHARDS].get(block_hash)
                if turn is not None:
                    return turn, place + 1
        return NO_TURN, resident

    def add(
        self,
        space: int,
        hashes: Sequence[BlockHash],
        born: float,
        number: int,
        gap_bucket: int,
        shared: int,
        most_ghosts: int,
    ) -> int:
        """Return a new record for a prompt, ``shared`` of whose blocks are of that kind."""
        self._now = born
        turn = self._free.pop() if self._free else self._extend()
        blocks = len(hashes)
        self.born[turn] = born
        self.number[turn] = number
        self.group[turn] = min(number, 1) * GAPS + gap_bucket
        self.blocks[turn] = blocks
        self.shared_blocks[turn] = shared
        self.body_blocks[turn] = body = blocks - 1 - shared
        self.flags[turn] = 1 << TAIL | (1 << BODY if body > 0 else 0) | (1 << SHARED if shared else 0)
        self.counted[turn] = -1
        self.held[turn] = 0
        self.last[turn] = self._last_but_one[turn] = None
        for feature in range(FEATURES):
            self.levels[feature][turn] = feature * LEVELS
        self._space[turn] = space
        while space >= len(self._anchors):
            self._anchors.append([{} for _ in range(_SHARDS)])
        shards = self._anchors[space]
        self.last[turn] = last = hashes[-1]
        shards[last[-1] % _SHARDS][last] = turn
        if blocks > 1:
            self._last_but_one[turn] = last = hashes[-2]
            shards[last[-1] % _SHARDS][last] = turn
        self._queued[turn] = 1
        self._order.append(turn)
        while len(self._order) > max(_GHOSTS_AT_LEAST, most_ghosts):
            oldest = self._order.popleft()
            self._queued[oldest] = 0
            self.forget_if_gone(oldest)
        return turn

    def set_level(self, turn: int, feature: int, level: int) -> None:
        """Say at which level a feature of the turn is; the highest one is open above."""
        self.levels[feature][turn] = feature * LEVELS + min(level, LEVELS - 1)

    def forget_if_gone(self, turn: int) -> None:
        """Drop the record unless it has resident blocks or is among the latest ones."""
        if self.held[turn] or self._queued[turn] or self.last[turn] is None:
            return
        self.expose(turn, int(age_level(self._now - self.born[turn])))
        shards = self._anchors[self._space[turn]]
        for block_hash in (self.last[turn], self._last_but_one[turn]):
            if block_hash is not None:
                shard = shards[block_hash[-1] % _SHARDS]
                if shard.get(block_hash) == turn:
                    del shard[block_hash]
        self.last[turn] = self._last_but_one[turn] = None
        self.flags[turn] = 0
        self._free.append(turn)

    # -- learning -------------------------------------------------------------------------------------------------

    def factor(self, turn: int) -> float:
        """Return by what the turn's features multiply the hazard of its class."""
        weights = self.hazards.weights
        return exp(sum([weights[levels[turn]] for levels in self.levels]))

    def factors(self, turns: NDArray[np.int32]) -> Floats:
        """Return :meth:`factor` of each."""
        weights = np.frombuffer(self.hazards.weights)
        total = weights[np.frombuffer(self.levels[0], np.uint8)[turns]]
        for levels in self.levels[1:]:
            total += weights[np.frombuffer(levels, np.uint8)[turns]]
        return np.exp(total)

    def expose(self, turn: int, bucket: int) -> None:
        """Count that what is still watched of a turn reached an age bucket without a hit before it."""
        first = self.counted[turn] + 1
        flags = self.flags[turn]
        if bucket < first or not flags & (CONTINUED - 1):
            return
        self.counted[turn] = bucket
        exposures, hazards = self.hazards.exposures, self.hazards.hazards
        expected = 0.0
        for kind in range(KINDS):
            if flags & 1 << kind:
                base = (self.group[turn] * KINDS + kind) * AGES
                for place in range(base + first, base + bucket + 1):
                    exposures[place] += 1.0
                    if kind <= BODY:
                        expected += hazards[place]
        if expected:
            expected *= self.factor(turn)
            gains, all_expected = self.hazards.gains, self.hazards.expected
            for levels in self.levels:
                gains[levels[turn]] -= expected
                all_expected[levels[turn]] += expected

    def hit(self, turn: int, kind: int, bucket: int, share: float) -> None:
        """Count that a share of a turn's blocks of one kind was hit."""
        self.hazards.hits[(self.group[turn] * KINDS + kind) * AGES + bucket] += share
        if kind <= BODY:
            gains = self.hazards.gains
            for levels in self.levels:
                gains[levels[turn]] += share

    def sweep(self, now: float) -> None:
        """:meth:`expose` the next some records, so that those that nobody asks for are counted too. Takes 0.2 ms."""
        start = self._cursor
        stop = min(start + _SWEPT_AT_ONCE, len(self.born))
        self._cursor = 0 if stop == len(self.born) else stop
        span = slice(start, stop)
        flags, counted = np.frombuffer(self.flags, np.uint8)[span], np.frombuffer(self.counted, np.int8)[span]
        buckets = age_levels(now - np.frombuffer(self.born)[span]).astype(np.int8)
        group = np.frombuffer(self.group, np.int32)[span]
        exposures, hazards = np.frombuffer(self.hazards.exposures), np.frombuffer(self.hazards.hazards)
        gains, all_expected = np.frombuffer(self.hazards.gains), np.frombuffer(self.hazards.expected)
        (behind,) = np.nonzero((flags & (CONTINUED - 1) != 0) & (buckets > counted))
        steps = (buckets[behind] - counted[behind]).astype(np.int64)
        which = np.repeat(behind, steps)  # a record for each bucket that it reached
        reached = buckets[which] - (np.repeat(np.cumsum(steps), steps) - np.arange(len(which)) - 1)
        counted[behind] = buckets[behind]
        for kind in range(KINDS):
            watched = flags[which] & 1 << kind != 0
            places = (group[which[watched]] * KINDS + kind) * AGES + reached[watched]
            np.add.at(exposures, places, 1.0)
            if kind <= BODY and len(places):
                turns = (which[watched] + start).astype(np.int32)
                expected = hazards[places] * self.factors(turns)
                for levels in self.levels:
                    level = np.frombuffer(levels, np.uint8)[turns]
                    np.subtract.at(gains, level, expected)
                    np.add.at(all_expected, level, expected)

    def _extend(self) -> int:
        columns = (self.number, self.group, self.blocks, self.body_blocks, self.shared_blocks, self.old_blocks)
        for column in (*columns, self.flags, self.counted, self.held, *self.levels, self._space, self._queued):
            column.append(0)
        self.born.append(0.0)
        self.last.append(None)
        self._last_but_one.append(None)
        return len(self.born) - 1
