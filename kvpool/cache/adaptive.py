"""Adaptive: what goes is worth least by what the requests so far have shown about turns, kinds of blocks and ages."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush, merge
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvpool.cache.eviction import CacheEvictionPolicy, register_policy
from kvpool.cache.hazard import AGES, GAPS, KINDS, Floats, HazardTable, age_level, age_levels
from kvpool.cache.key import BlockHash
from kvpool.cache.leaf_sets import LeafSets
from kvpool.cache.request_clock import RequestClock
from kvpool.cache.turns import BODY, CONTINUED, NO_TURN, OLD, SHARED, TAIL, TurnTable

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex

Candidate = tuple[float, int, int]
"""Worth, row, and the turn by which it was reckoned: it is dead once the row has another one."""

_SAMPLE = 256
_KEPT = 64
_MOST_SAMPLED = 4096
_BLOCKS_BETWEEN_SAMPLES = 24
_LEAVES_BETWEEN_SAMPLES = 24
_REBUILD_REQUESTS, _REBUILD_BLOCKS = 50, 1000
_SWEEP_REQUESTS, _SWEEP_BLOCKS = 16, 512
NEW, OUTPUT = range(2)  # features


class Ranking:
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
        self._parent, self._children, self._device = index.parent, index.children, index.device
        self._turn = array("i")  # by row, as are the next three
        self._kind = array("B")
        self._uses = array("I")
        self._idle = array("B")  # evictable
        self._leaves = LeafSets()
        self._hazards = HazardTable()
        self._turns = TurnTable(self._hazards)
        self._clock = RequestClock()
        self._chance = np.random.default_rng(index.seed)
        self._candidates: list[list[Candidate]] = []  # by device: heaps
        self._resample_at: list[int] = []  # by device: count of blocks
        self._leaves_left: list[int] = []  # by device: candidates that may go before the next sample
        self._rankings: dict[int, Ranking] = {}
        self._version = 0  # of everything a ranking depends on
        self._blocks = 0  # of all requests so far
        self._rebuilt_at = self._swept_at = (0, 0)  # requests and blocks
        self.grown(len(index.parent))

    # -- rows -----------------------------------------------------------------------------------------------------

    def grown(self, rows: int) -> None:
        added = rows - len(self._turn)
        self._turn.extend(array("i", [NO_TURN]) * added)
        for column in (self._kind, self._uses, self._idle):
            column.frombytes(bytes(added * column.itemsize))
        self._leaves.grow(rows)

    def evictable(self, rows: Sequence[int], now: float) -> None:
        self._version += 1
        children, turns, idle, kinds, devices = self._children, self._turn, self._idle, self._kind, self._device
        last = self._turns.last
        for row in rows:
            if turns[row] < 0:
                self._adopt(rows, now)
            idle[row] = 1
            if not children[row]:
                if kinds[row] == BODY and self._index.key_of(row) == last[turns[row]]:
                    kinds[row] = TAIL
                self._add_leaf(row, devices[row])

    def taken(self, rows: Sequence[int], now: float) -> None:
        self._version += 1
        idle, place = self._idle, self._leaves.place
        for row in rows:
            idle[row] = 0
            if place[row] >= 0:
                self._leaves.discard(row, self._device[row])

    def sheltered(self, row: int) -> None:
        self._version += 1
        self._leaves.discard(row, self._device[row])

    def removed(self, rows: Sequence[int]) -> None:
        self._version += 1
        idle, turns, parent, children, place = self._idle, self._turn, self._parent, self._children, self._leaves.place
        held = self._turns.held
        for row in rows:
            idle[row] = 0
            if place[row] >= 0:
                self._leaves.discard(row, self._device[row])
            turn = turns[row]
            if turn >= 0:
                turns[row] = NO_TURN
                held[turn] -= 1
                if not held[turn]:
                    self._turns.forget_if_gone(turn)
        for row in rows:  # once all are out, so that parents that went in the same batch do not become leaves
            above = parent[row]
            if above >= 0 and idle[above] and not children[above] and place[above] < 0:
                device = self._device[above]
                self._add_leaf(above, device)
                heappush(self._candidates[device], (self._worth_of(above), above, turns[above]))

    def _add_leaf(self, row: int, device: int) -> None:
        while device >= len(self._candidates):
            self._candidates.append([])
            self._resample_at.append(0)
            self._leaves_left.append(0)
        self._leaves.add(row, device)

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
        firsts = [first for first in (next(iter(self._ranked(d)), None) for d in range(len(self._leaves))) if first]
        return min(firsts)[1] if firsts else -1

    def victims(self, device: int) -> Iterator[int]:
        for _, row in self._ranked(device):
            yield row

    def _ranked(self, device: int) -> Ranking:
        known = self._rankings.get(device)
        if known is None or known.version != self._version:
            known = self._rankings[device] = Ranking(self._version, self._rank(device))
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
        if self._blocks >= self._resample_at[device] or self._leaves_left[device] <= 0:
            heap = self._candidates[device] = self._sample(device, set(), _SAMPLE)
            self._resample_at[device] = self._blocks + _BLOCKS_BETWEEN_SAMPLES
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
        self._version += 1
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
        rankings = [self._ranked(device) for device in devices]
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
        self._version += 1
        self._blocks += len(hashes)
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
        requests, blocks = self._clock.requests, self._blocks
        # More often at first, when each request changes more of what is known.
        rebuild_requests = min(_REBUILD_REQUESTS, 4 + requests // 8)
        rebuild_blocks = min(_REBUILD_BLOCKS, 40 + blocks // 8)
        if requests - self._rebuilt_at[0] >= rebuild_requests and blocks - self._rebuilt_at[1] >= rebuild_blocks:
            self._hazards.rebuild(requests - self._rebuilt_at[0])
            self._rebuilt_at = requests, blocks
        elif requests - self._swept_at[0] >= _SWEEP_REQUESTS and blocks - self._swept_at[1] >= _SWEEP_BLOCKS:
            self._turns.sweep(self._clock.now)
            self._swept_at = requests, blocks
