"""Adaptive: what goes is worth least by what the requests so far have shown about turns, kinds of blocks and ages."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from heapq import merge
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvpool.cache.eviction import CacheEvictionPolicy, register_policy
from kvpool.cache.hazard import AGES, GAPS, KINDS, Floats, HazardTable, age_level, age_levels
from kvpool.cache.key import BlockHash
from kvpool.cache.request_clock import RequestClock
from kvpool.cache.sampled_ranking import SampledRanking
from kvpool.cache.turns import BODY, CONTINUED, NO_TURN, OLD, SHARED, TAIL, TurnTable

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex

_REBUILD_REQUESTS, _REBUILD_BLOCKS = 50, 2000
_SWEEP_REQUESTS, _SWEEP_BLOCKS = 8, 256
NEW, OUTPUT = range(2)
"""Features of a turn: blocks behind the part that was known, tokens of the answer; by their number of binary digits."""


@register_policy("adaptive")
class Adaptive(CacheEvictionPolicy):
    """Ranks blocks by the turn that used them last; see ``docs/eviction.md``.

    Every request makes a turn, which may continue the session of an earlier one. What became of earlier turns tells the
    hazard of being used again, by kind of block, gap between turns, age, and features of the turn; the worth of a block
    is the best rate of hits it promises. The victim is the leaf worth least among some hundred that are drawn; new
    blocks that are worth less than the victims they would need are not admitted.

    Costs 14 bytes a row, and about 250 bytes for each turn with resident blocks or among the latest (as many of these
    as there are resident blocks, at least 256).
    """

    def __init__(self, index: CacheIndex) -> None:
        self._index = index
        self._parent, self._children = index.parent, index.children
        self._turn = array("i")  # by row, as are the next three
        self._kind = array("B")
        self._uses = array("I")
        self._idle = array("B")  # evictable
        self._hazards = HazardTable()
        self._turns = TurnTable(self._hazards)
        self._clock = RequestClock()
        self._ranking = SampledRanking(index, self._turn, self._kind, self._idle, self._worth_of, self._worths_of)
        self._rebuilt_at = self._swept_at = (0, 0)  # requests and blocks
        self.grown(len(index.parent))

    # -- rows -----------------------------------------------------------------------------------------------------

    def grown(self, rows: int) -> None:
        added = rows - len(self._turn)
        self._turn.extend(array("i", [NO_TURN]) * added)
        for column in (self._kind, self._uses, self._idle):
            column.frombytes(bytes(added * column.itemsize))
        self._ranking.grow(rows)

    def evictable(self, rows: Sequence[int], now: float) -> None:
        self._ranking.version += 1
        children, turns, idle, kinds = self._children, self._turn, self._idle, self._kind
        last = self._turns.last
        for row in rows:
            if turns[row] < 0:
                self._adopt(rows, now)
            idle[row] = 1
            if not children[row]:
                if kinds[row] == BODY and self._index.key_of(row) == last[turns[row]]:
                    kinds[row] = TAIL
                self._ranking.add(row)

    def taken(self, rows: Sequence[int], now: float) -> None:
        self._ranking.version += 1
        idle, discard = self._idle, self._ranking.discard
        for row in rows:
            idle[row] = 0
            discard(row)

    def sheltered(self, row: int) -> None:
        self._ranking.version += 1
        self._ranking.discard(row)

    def removed(self, rows: Sequence[int]) -> None:
        self._ranking.version += 1
        idle, turns, parent, children = self._idle, self._turn, self._parent, self._children
        held, discard = self._turns.held, self._ranking.discard
        for row in rows:
            idle[row] = 0
            discard(row)
            turn = turns[row]
            if turn >= 0:
                turns[row] = NO_TURN
                held[turn] -= 1
                if not held[turn]:
                    self._turns.forget_if_gone(turn)
        for row in rows:  # once all are out, so that parents that went in the same batch do not become leaves
            above = parent[row]
            if above >= 0 and idle[above] and not children[above]:
                self._ranking.expose(above)

    def _adopt(self, rows: Sequence[int], now: float) -> None:
        """Give turns to rows that no request brought: whole caches, or what was there before this policy."""
        turns, parent = self._turn, self._parent
        run: list[int] = []
        for row in (*rows, -1):
            if run and (row < 0 or turns[row] >= 0 or parent[run[-1]] != row):
                run.reverse()
                hashes = [self._index.key_of(one) or b"" for one in run]
                space = self._index.space_of(run[0])
                self._begin(space, hashes, (), now)
                self.stored(space, hashes, run, now)
                run = []
            if row >= 0 and turns[row] < 0:
                run.append(row)

    # -- victims --------------------------------------------------------------------------------------------------

    def victim(self) -> int:
        firsts = [next(iter(self._ranking.of(device)), None) for device in self._ranking.devices]
        return min((first for first in firsts if first is not None), default=(0.0, -1))[1]

    def victims(self, device: int) -> Iterator[int]:
        for _, row in self._ranking.of(device):
            yield row

    def worth(self, row: int) -> float:
        return self._worth_of(row)

    # -- worth ----------------------------------------------------------------------------------------------------

    def _worth(self, turn: int, kind: int, level: float) -> float:
        """Return what a block is worth, hits in a unit of time: between those of the ages around it."""
        place = (self._turns.group[turn] * KINDS + kind) * AGES + int(level)
        worths = self._hazards.worths
        low = worths[place]
        if level < AGES - 1:
            low += (level - int(level)) * (worths[place + 1] - low)
        return low * self._turns.factor(turn)

    def _worth_of(self, row: int) -> float:
        turn, kind = self._turn[row], self._kind[row]
        if kind != SHARED and self._turns.flags[turn] & CONTINUED:
            kind = OLD
        return self._worth(turn, kind, age_level(self._clock.now - self._turns.born[turn]))

    def _worths_of(self, rows: NDArray[np.int32]) -> tuple[Floats, NDArray[np.int32]]:
        turns = np.frombuffer(self._turn, np.int32)[rows]
        kinds = np.frombuffer(self._kind, np.uint8)[rows]
        continued = np.frombuffer(self._turns.flags, np.uint8)[turns] & CONTINUED != 0
        kinds = np.where(continued & (kinds != SHARED), OLD, kinds)
        levels = age_levels(self._clock.now - np.frombuffer(self._turns.born)[turns])
        buckets = levels.astype(np.int64)
        first = (np.frombuffer(self._turns.group, np.int32)[turns] * KINDS + kinds) * AGES
        worths = np.frombuffer(self._hazards.worths)
        low, high = worths[first + buckets], worths[first + np.minimum(buckets + 1, AGES - 1)]
        return (low + (levels - buckets) * (high - low)) * self._turns.factors(turns), turns

    # -- requests -------------------------------------------------------------------------------------------------

    def looked_up(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> None:
        if hashes:
            self._begin(space, hashes, rows, now)

    def answered(
        self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], output_tokens: int, now: float
    ) -> None:
        self._ranking.version += 1
        turn = self._turn_of(space, hashes, rows, now)
        self._turns.set_level(turn, OUTPUT, output_tokens.bit_length())

    def admit(
        self,
        space: int,
        hashes: Sequence[BlockHash],
        rows: Sequence[int],
        devices: Sequence[int],
        size_bytes: int,
        short: int,
        now: float,
    ) -> int:
        turn = self._turn_of(space, hashes, rows, now)
        missing = len(hashes) - len(rows)
        worth, worth_before = self._worth(turn, TAIL, 0.0), self._worth(turn, BODY, 0.0)
        sizes = self._index.size_bytes
        left = float(short)
        rankings = [self._ranking.of(device) for device in devices]
        for victim_worth, row in rankings[0] if len(rankings) == 1 else merge(*rankings):
            while left > 0 and missing and worth < victim_worth:  # tail first, as victims
                left -= 1
                missing -= 1
                worth = worth_before
            if left <= 0 or not missing:
                break
            left -= sizes[row] / size_bytes
            if left <= 0:
                break
        return missing

    def stored(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> None:
        turn = self._turn_of(space, hashes, (), now)
        turns, kinds, uses = self._turn, self._kind, self._uses
        for row in rows:
            turns[row] = turn
            kinds[row] = BODY
            uses[row] = 1
        self._turns.held[turn] += len(rows)

    def _turn_of(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> int:
        """Return the turn of a request, begun if nobody looked its chain up."""
        turn = self._turns.anchored(space, hashes[-1])
        if turn >= 0 and self._turns.last[turn] == hashes[-1]:
            return turn
        return self._begin(space, hashes, rows, now)

    def _begin(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> int:
        """Begin the turn of a request: find its session, learn from what it hits, and take that over."""
        self._ranking.version += 1
        self._ranking.blocks += len(hashes)
        clock = self._clock.advance(now)
        table = self._turns
        before, depth = table.deepest(space, hashes, len(rows))
        if before < 0 and rows:
            before = self._turn[rows[-1]]
        number = gap_bucket = 0
        if before >= 0 and 2 * depth >= table.blocks[before]:
            number = table.number[before] + 1
            gap_bucket = 1 + min(int(age_level(clock - table.born[before]) / 2), GAPS - 2)
        else:
            before = NO_TURN
        touched, shared = self._touch(rows, number)
        for turn, counts in touched.items():
            if turn != before:
                self._learn_sharing(turn, counts, clock)
        if before >= 0:
            self._learn_continuation(before, depth, hashes[depth - 1], touched.get(before, [0] * KINDS), clock)
        turn = table.add(space, hashes, clock, number, gap_bucket, shared, len(self._index))
        table.set_level(turn, NEW, (len(hashes) - depth).bit_length())
        table.held[turn] = len(rows)
        for row in rows:
            self._turn[row] = turn
        if len(rows) == len(hashes) and self._kind[rows[-1]] == BODY:
            self._kind[rows[-1]] = TAIL
        table.expose(turn, 0)
        for turn_before, counts in touched.items():
            table.held[turn_before] -= sum(counts)
            table.forget_if_gone(turn_before)
        self._keep_up()
        return turn

    def _touch(self, rows: Sequence[int], number: int) -> tuple[dict[int, list[int]], int]:
        """Count the use of rows; returns how many of each kind each turn loses, and how many are shared now."""
        turns, kinds, uses = self._turn, self._kind, self._uses
        touched: dict[int, list[int]] = {}
        shared = 0
        before, counts = NO_TURN, [0] * KINDS  # those without a turn are counted and forgotten
        for row in rows:
            turn = turns[row]
            if turn != before:
                before = turn
                counts = touched.setdefault(turn, [0] * KINDS) if turn >= 0 else [0] * KINDS
            counts[kinds[row]] += 1
            uses[row] = used = uses[row] + 1
            if used > number + 1:
                kinds[row] = SHARED
                shared += 1
            else:
                kinds[row] = BODY
        return touched, shared

    def _learn_sharing(self, turn: int, counts: Sequence[int], clock: float) -> None:
        """Count hits on blocks of a turn by a request that does not continue it."""
        table = self._turns
        bucket = int(age_level(clock - table.born[turn]))
        table.expose(turn, bucket)
        flags = table.flags[turn]
        if counts[SHARED] and flags & 1 << SHARED:
            table.hit(turn, SHARED, bucket, counts[SHARED] / table.shared_blocks[turn])
            table.flags[turn] &= ~(1 << SHARED)
        if counts[BODY] and flags & 1 << OLD:
            table.hit(turn, OLD, bucket, min(1.0, counts[BODY] / table.old_blocks[turn]))
        elif counts[BODY] and flags & 1 << BODY:
            table.hit(turn, BODY, bucket, min(1.0, counts[BODY] / table.body_blocks[turn]))

    def _learn_continuation(
        self, turn: int, depth: int, deepest: BlockHash, counts: Sequence[int], clock: float
    ) -> None:
        """Count hits on blocks of the turn that a request continues, ``depth`` blocks deep."""
        table = self._turns
        bucket = int(age_level(clock - table.born[turn]))
        table.expose(turn, bucket)
        flags = table.flags[turn]
        if counts[SHARED] and flags & 1 << SHARED:
            table.hit(turn, SHARED, bucket, counts[SHARED] / table.shared_blocks[turn])
            flags &= ~(1 << SHARED)
        body = table.body_blocks[turn]
        if flags & CONTINUED:
            if flags & 1 << OLD:
                table.hit(turn, OLD, bucket, min(1.0, counts[BODY] / table.old_blocks[turn]))
            table.flags[turn] = flags
            return
        share = 1.0 if depth >= table.blocks[turn] - 1 else min(1.0, counts[BODY] / max(body, 1))
        if flags & 1 << BODY:
            table.hit(turn, BODY, bucket, share)
        if flags & 1 << TAIL and deepest == table.last[turn]:
            table.hit(turn, TAIL, bucket, 1.0)
        table.old_blocks[turn] = max(1, int(body * (1 - share) + 1))
        table.flags[turn] = flags & 1 << SHARED | 1 << OLD | CONTINUED

    def _keep_up(self) -> None:
        """Do a part of what has to be done now and then."""
        requests, blocks = self._clock.requests, self._ranking.blocks
        # More often at first, when each request changes more of what is known.
        rebuild_requests = min(_REBUILD_REQUESTS, 4 + requests // 8)
        rebuild_blocks = min(_REBUILD_BLOCKS, 40 + blocks // 8)
        if requests - self._rebuilt_at[0] >= rebuild_requests and blocks - self._rebuilt_at[1] >= rebuild_blocks:
            self._hazards.rebuild(requests - self._rebuilt_at[0])
            self._rebuilt_at = requests, blocks
        elif requests - self._swept_at[0] >= _SWEEP_REQUESTS and blocks - self._swept_at[1] >= _SWEEP_BLOCKS:
            self._turns.sweep(self._clock.now)
            self._swept_at = requests, blocks
