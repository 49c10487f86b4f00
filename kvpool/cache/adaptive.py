"""Adaptive: what goes is worth least by what the requests so far have shown about turns, kinds of blocks and ages."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from heapq import merge
from math import inf
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvpool.cache.chains import unique
from kvpool.cache.eviction import CacheEvictionPolicy, register_policy
from kvpool.cache.hazard import GAPS, KINDS, LEVELS, WIDTH, Floats, HazardTable, age_level, age_levels
from kvpool.cache.key import BlockHash
from kvpool.cache.request_clock import RequestClock
from kvpool.cache.sampled_ranking import SampledRanking
from kvpool.cache.table import NO_ROW, Rows
from kvpool.cache.turns import BODY, CONTINUED, NO_TURN, OLD, SHARED, TAIL, TurnTable
from kvpool.errors import ensure

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex

_REBUILD_REQUESTS, _REBUILD_BLOCKS, _REBUILD_BLOCKS_AT_FIRST = 50, 2000, 40
_RESIDENT_FOR_A_REBUILD = 32_768
"""Where many are resident, tables last longer, and surprises come less often, for the same reason as sweeps: by so many
times as there are so many. After a surprise tables get to last that long as much sooner."""
_REBUILT_LESS_OFTEN = 8
_MANY = 512
_DOUBT = 0.7
"""By what the worth of a session's first turn is multiplied when it is to be admitted: less is known of it than of what
would have to go."""
_SWEEP_REQUESTS, _SWEEP_BLOCKS = 8, 256
_RESIDENT_FOR_A_SWEPT_BLOCK = 256
"""Where many are resident, each block changes less of what is known: a sweep waits for one for each so many of them."""
_FORGOTTEN_REQUESTS = 7000
"""By how many requests what is known is older after a surprise: it leaves a quarter of it."""
_BETWEEN_SURPRISES_REQUESTS, _BETWEEN_SURPRISES_BLOCKS = 50, 1000
_SOON_AGAIN = 4
"""A surprise is soon if it comes within so many times the blocks that had to be waited for: the next wait is twice as
long, for where changes come and go there is less to gain, and the tables that are rebuilt after each cost time."""
_NONE = (0,) * KINDS
_TAIL_PLACE, _BODY_PLACE = TAIL * WIDTH, BODY * WIDTH
_PLACES = np.array([TAIL, BODY, SHARED, OLD] * CONTINUED + [OLD, OLD, SHARED, OLD] * CONTINUED, np.intp) * WIDTH
"""Where the class of a block lies in its group, by the flags of its turn times ``KINDS`` plus its kind: what a session
left behind when it went on is old."""


@register_policy("adaptive")
class Adaptive(CacheEvictionPolicy):
    """Ranks blocks by the turn that used them last; see ``docs/eviction.md``.

    Every request makes a turn, which may continue the session of an earlier one. What became of earlier turns tells the
    hazard of being used again, by kind of block, gap between turns, age, and features of the turn; the worth of a block
    is the best rate of hits it promises. The victim is the leaf worth least among some hundred that are drawn; new
    blocks that are worth less than the victims they would need are not admitted.

    Costs 18 bytes a row, and about 250 bytes for each turn with resident blocks or among the latest (as many of these
    as there are resident blocks, at least 256, and some hundred more for a while, or as many as went at once).
    """

    def __init__(self, index: CacheIndex) -> None:
        self._index = index
        self._parent, self._children, self._partition = index.parent, index.children, index.partition
        self._turn = array("i")  # by row, as are the next three
        self._uses = array("I")
        self._kind = bytearray()
        self._idle = bytearray()  # evictable
        self._hazards = HazardTable()
        self._turns = TurnTable(self._hazards)
        self._clock = RequestClock()
        self._ranking = SampledRanking(
            index, self._clock, self._turn, self._kind, self._idle, self._turns.born, self._worth_of, self._worths_of
        )
        self._rebuilt_at = self._swept_at = self._surprised_at = (0, 0)  # requests and blocks
        self._patience_blocks = _BETWEEN_SURPRISES_BLOCKS  # before the next surprise
        self._blocks = 0  # of all requests so far
        self._due_blocks = 0  # of them, before which neither is due
        self._space = -1
        self._hashes: Sequence[BlockHash] = ()  # of the request whose turn was asked for last
        self._latest = NO_TURN
        self.grown(len(index.parent))

    # -- rows -----------------------------------------------------------------------------------------------------

    def grown(self, rows: int) -> None:
        added = rows - len(self._turn)
        self._turn.extend(array("i", [NO_TURN]) * added)
        self._uses.frombytes(bytes(added * self._uses.itemsize))
        self._kind.extend(bytes(added))
        self._idle.extend(bytes(added))
        self._ranking.grow(rows)

    def evictable(self, rows: Sequence[int], now: float) -> None:
        ranking = self._ranking
        ranking.changed = True
        if len(rows) == 1:  # here and below: of a single row nothing is fetched for a loop
            row = rows[0]
            if self._turn[row] < 0:
                self._adopt(rows, now)
            self._idle[row] = 1
            if not self._children[row]:
                if self._kind[row] == BODY and self._index.key_of(row) == self._turns.last[self._turn[row]]:
                    self._kind[row] = TAIL
                if ranking.where[row] != self._partition[row]:
                    ranking.add(row, self._partition[row])
            return
        children, turns, idle, kinds, partitions = self._children, self._turn, self._idle, self._kind, self._partition
        where = ranking.where
        for row in rows:
            if turns[row] < 0:
                self._adopt(rows, now)
            idle[row] = 1
            if not children[row]:
                if kinds[row] == BODY and self._index.key_of(row) == self._turns.last[turns[row]]:
                    kinds[row] = TAIL
                if where[row] != partitions[row]:
                    ranking.add(row, partitions[row])

    def taken(self, rows: Sequence[int], now: float) -> None:
        self._ranking.changed = True
        if len(rows) == 1:
            self._idle[rows[0]] = 0
            return
        idle = self._idle
        for row in rows:
            idle[row] = 0

    def sheltered(self, row: int) -> None:
        self._ranking.changed = True

    def removed(self, rows: Sequence[int]) -> None:
        ranking, table = self._ranking, self._turns
        ranking.changed = True
        if len(rows) == 1:  # it is the next to be given out, mostly for a leaf again: it stays in the set of leaves
            row = rows[0]
            self._idle[row] = 0
            turns = self._turn
            turn = turns[row]
            if turn >= 0:
                turns[row] = NO_TURN
                held = table.held
                held[turn] = left = held[turn] - 1
                if not left:
                    table.bereave(turn)
            above = self._parent[row]
            if above >= 0 and self._idle[above] and not self._children[above]:
                ranking.expose(above)
            return
        if len(rows) >= _MANY:
            self._removed_many(np.array(rows, np.int64))
            return
        idle, turns, parent, children = self._idle, self._turn, self._parent, self._children
        held, queued = table.held, table.queued
        for row in rows:
            idle[row] = 0
            turn = turns[row]
            if turn >= 0:
                turns[row] = NO_TURN
                held[turn] = left = held[turn] - 1
                if not left and not queued[turn]:
                    table.bereave(turn)
        for row in rows:
            ranking.discard(row)
            above = parent[row]  # all are out by now, so that parents that went in the same batch do not become leaves
            if above >= 0 and idle[above] and not children[above]:
                ranking.expose(above)

    def _removed_many(self, rows: Rows) -> None:
        """Do as :meth:`removed` for many, with a tenth of the time for each and some for all leaves that stay."""
        idle, turns = np.frombuffer(self._idle, np.uint8), np.frombuffer(self._turn, np.int32)
        idle[rows] = 0
        self._ranking.sift()
        counts = np.bincount(turns[rows] + 1, minlength=1)
        turns[rows] = NO_TURN
        touched = np.flatnonzero(counts[1:])
        np.frombuffer(self._turns.held, np.int32)[touched] -= counts[touched + 1].astype(np.int32)
        self._turns.bereave_all(touched)
        above = np.frombuffer(self._parent, np.int32)[rows]
        above = unique(above[above >= 0])
        bare = (idle[above] != 0) & (np.frombuffer(self._children, np.uint32)[above] == 0)
        for row in above[bare].tolist():
            self._ranking.expose(row)

    def _adopt(self, rows: Sequence[int], now: float) -> None:
        """Give turns to rows that no request brought: whole caches, or what was there before this policy."""
        turns, parent = self._turn, self._parent
        run: list[int] = []
        for row in (*rows, -1):
            if run and (row < 0 or turns[row] >= 0 or parent[run[-1]] != row):
                run.reverse()
                hashes = [self._index.key_of(one) or b"" for one in run]
                space = self._index.space_of(run[0])
                self.looked_up(space, hashes, (), now)
                self.stored(space, hashes, run, now)
                run = []
            if row >= 0 and turns[row] < 0:
                run.append(row)

    # -- victims --------------------------------------------------------------------------------------------------

    def victim(self) -> int:
        ranking = self._ranking
        devices = ranking.devices
        if len(devices) == 1:
            first = ranking.first(0)
            if first is not None:
                return first[1]
        lowest, victim = inf, NO_ROW
        for device in devices:
            first = ranking.first(device)
            if first is not None:
                worth, row, _ = first
            else:
                worth, row = next(iter(ranking.of(device)), (inf, NO_ROW))
            if worth < lowest or (worth == lowest and row < victim):
                lowest, victim = worth, row
        return victim

    def victims(self, device: int) -> Iterator[int]:
        ranking = self._ranking
        first = ranking.first(device)
        place = 0
        if first is not None:  # mostly that is all that is asked for
            yield first[1]
            place = 1
        drawn = ranking.of(device)
        rows = drawn.rows
        while True:
            if place >= len(rows):
                drawn.more()
                if place >= len(rows):
                    return
            if first is not None and rows[0] != first[1]:
                ensure(False, "two answers on what goes first", row=first[1], drawn=rows[0])
            yield from rows[place:]
            place = len(rows)

    def worth(self, row: int) -> float:
        return self._worth_of(row)

    # -- worth ----------------------------------------------------------------------------------------------------

    def _worth(self, turn: int, kind: int, level: float) -> float:
        """Return what a block is worth, hits in a unit of time: between those of the ages around it."""
        bucket = int(level)
        place = self._turns.base[turn] + kind * WIDTH + bucket
        worths = self._hazards.worths
        low = worths[place]
        return (low + (level - bucket) * (worths[place + 1] - low)) * self._hazards.factors[self._turns.level[turn]]

    def _worth_of(self, row: int) -> float:
        turn, kind = self._turn[row], self._kind[row]
        if kind != SHARED and self._turns.flags[turn] & CONTINUED:
            kind = OLD
        return self._worth(turn, kind, age_level(self._clock.now - self._turns.born[turn]))

    def _worths_of(self, rows: NDArray[np.int32]) -> tuple[Floats, Floats]:
        table = self._turns
        turns = np.frombuffer(self._turn, np.int32).take(rows).astype(np.intp)
        born = np.frombuffer(table.born).take(turns)
        levels = age_levels(self._clock.now - born)
        buckets = levels.astype(np.intp)
        kinds = np.frombuffer(table.flags, np.uint8).take(turns)
        kinds *= KINDS
        kinds += np.frombuffer(self._kind, np.uint8).take(rows)
        places = _PLACES.take(kinds)
        places += np.frombuffer(table.base, np.int32).take(turns)
        places += buckets
        worths = self._hazards.all_worths
        low = worths.take(places)
        places += 1
        step = worths.take(places)
        step -= low
        levels -= buckets
        levels *= step
        levels += low
        levels *= self._hazards.all_factors.take(np.frombuffer(table.level, np.uint8).take(turns))
        return levels, born

    # -- requests -------------------------------------------------------------------------------------------------

    def looked_up(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> None:
        """Begin the turn of a request: find its session, learn from what it hits, and take that over."""
        count = len(hashes)
        if not count:
            return
        self._ranking.changed = True
        self._blocks += count
        clock = self._clock.advance(now)
        turn = NO_TURN
        if count == 1:
            if not rows:
                turn = self._turns.ask_for_block(space, hashes[0], clock)
            else:
                turn = self._repeat_block(rows[0], clock)
        if turn < 0:
            turn = self._begin_chain(space, hashes, rows, clock)
        self._space, self._hashes, self._latest = space, hashes, turn
        if self._blocks >= self._due_blocks:
            self._keep_up()

    def answered(
        self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], output_tokens: int, now: float
    ) -> None:
        self._ranking.changed = True
        # Within one decision, here and below: the turn was found before.
        known = hashes is self._hashes and space == self._space
        turn = self._latest if known else self._turn_of(space, hashes, rows, now)
        digits = output_tokens.bit_length()
        level = self._turns.level
        level[turn] = level[turn] & -LEVELS | (digits if digits < LEVELS else LEVELS - 1)

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
        table = self._turns
        known = hashes is self._hashes and space == self._space
        turn = self._latest if known else self._turn_of(space, hashes, rows, now)
        missing = len(hashes) - len(rows)
        factor = self._hazards.factors[table.level[turn]]
        if not table.number[turn]:
            factor *= _DOUBT
        base, worths = table.base[turn], self._hazards.worths  # at age 0
        worth = worths[base + _TAIL_PLACE] * factor
        ranking, sizes = self._ranking, self._index.size_bytes
        if missing == 1 and len(devices) == 1:
            first = ranking.first(devices[0])
            if first is not None and sizes[first[1]] >= short * size_bytes:
                return 1 if worth >= first[0] else 0
        left = float(short)
        rankings = [ranking.of(device) for device in devices]
        for victim_worth, row in rankings[0] if len(rankings) == 1 else merge(*rankings):
            while left > 0 and missing and worth < victim_worth:  # tail first, as victims
                left -= 1
                missing -= 1
                worth = worths[base + _BODY_PLACE] * factor
            if left <= 0 or not missing:
                break
            left -= sizes[row] / size_bytes
            if left <= 0:
                break
        return missing

    def stored(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> None:
        known = hashes is self._hashes and space == self._space
        turn = self._latest if known else self._turn_of(space, hashes, (), now)
        kind = BODY if len(hashes) > 1 else TAIL
        if len(rows) == 1:
            row = rows[0]
            self._turn[row] = turn
            self._kind[row] = kind
            self._uses[row] = 1
            self._turns.held[turn] += 1
            return
        turns, kinds, uses = self._turn, self._kind, self._uses
        for row in rows:
            turns[row] = turn
            kinds[row] = kind
            uses[row] = 1
        self._turns.held[turn] += len(rows)

    def _turn_of(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> int:
        """Return the turn of a request, begun if nobody looked its chain up."""
        turn = self._turns.anchored(space, hashes[-1])
        if turn < 0 or self._turns.last[turn] != hashes[-1]:
            self.looked_up(space, hashes, rows, now)
            return self._latest
        self._space, self._hashes, self._latest = space, hashes, turn
        return turn

    def _repeat_block(self, row: int, clock: float) -> int:
        """:meth:`_begin_chain` for a prompt of one block that is resident; -1 if its turn was for a longer one."""
        table = self._turns
        turn = self._turn[row]
        if turn < 0 or table.blocks[turn] > 1:
            return NO_TURN
        uses = self._uses
        uses[row] = used = uses[row] + 1
        shared = used > table.number[turn] + 2
        self._kind[row] = SHARED if shared else TAIL
        table.repeat(turn, clock, shared, 0)
        return turn

    def _begin_chain(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], clock: float) -> int:
        table = self._turns
        before, depth = NO_TURN, len(rows)
        if depth < len(hashes):
            before, depth = table.deepest(space, hashes, depth)
        if before < 0 and rows:
            before = self._turn[rows[-1]]
        number = gap_bucket = shared = bucket = 0
        if before >= 0 and 2 * depth >= table.blocks[before]:
            number = table.number[before] + 1
            level = age_level(clock - table.born[before])
            bucket = int(level)
            gap_bucket = min(1 + int(level / 2), GAPS - 1)
        else:
            before = NO_TURN
        touched: dict[int, list[int]] = {}
        if rows:
            if len(set(rows)) < len(rows):  # a chain in which a block comes again
                rows = list(dict.fromkeys(rows))
            touched, shared = self._touch(rows, number)
            for turn, counts in touched.items():
                if turn != before:
                    self._learn_sharing(turn, counts, clock)
                table.held[turn] -= sum(counts)
        if before >= 0:
            self._learn_continuation(before, depth, hashes[depth - 1], touched.get(before, _NONE), bucket)
        new = len(hashes) - depth
        if before >= 0 and table.last[before] == hashes[-1] and not table.held[before]:
            turn = before  # the same prompt again; nothing is left of the record that could be asked for
            table.renew(turn, clock, number, gap_bucket, shared, new)
        else:
            turn = table.add(space, hashes, clock, number, gap_bucket, shared, new)
        if rows:
            table.held[turn] = len(rows)
            turns = self._turn
            for row in rows:
                turns[row] = turn
            if len(rows) == len(hashes) and self._kind[rows[-1]] == BODY:
                self._kind[rows[-1]] = TAIL
            for turn_before in touched:
                if not table.held[turn_before]:
                    table.bereave(turn_before)
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
        self, turn: int, depth: int, deepest: BlockHash, counts: Sequence[int], bucket: int
    ) -> None:
        """Count hits on blocks of the turn that a request continues, ``depth`` blocks deep, in an age bucket."""
        table = self._turns
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
        requests, blocks, resident = self._clock.requests, self._blocks, len(self._index)
        # More often at first, and after a surprise: each request changes more of what is known then.
        since_requests, since_blocks = requests - self._surprised_at[0], blocks - self._surprised_at[1]
        rebuild_requests = min(_REBUILD_REQUESTS, 4 + since_requests // _REBUILT_LESS_OFTEN)
        scale = max(1, resident // _RESIDENT_FOR_A_REBUILD)
        most_blocks, least_blocks = _REBUILD_BLOCKS * scale, _REBUILD_BLOCKS_AT_FIRST * scale
        rebuild_blocks = min(most_blocks, least_blocks + since_blocks * scale // _REBUILT_LESS_OFTEN)
        patience_blocks = self._patience_blocks * scale
        sweep_blocks = max(_SWEEP_BLOCKS, resident // _RESIDENT_FOR_A_SWEPT_BLOCK)
        if requests - self._rebuilt_at[0] >= rebuild_requests and blocks - self._rebuilt_at[1] >= rebuild_blocks:
            self._turns.count_fresh(self._clock.now)
            self._hazards.rebuild(requests - self._rebuilt_at[0])
            self._rebuilt_at = requests, blocks
        elif requests - self._swept_at[0] >= _SWEEP_REQUESTS and blocks - self._swept_at[1] >= sweep_blocks:
            self._turns.sweep(self._clock.now, resident, sweep_blocks)
            self._swept_at = requests, blocks
            if (
                requests - self._rebuilt_at[0] >= _BETWEEN_SURPRISES_REQUESTS
                and since_blocks >= patience_blocks
                and self._hazards.surprised()
            ):
                soon = since_blocks < _SOON_AGAIN * patience_blocks
                self._patience_blocks = 2 * self._patience_blocks if soon else _BETWEEN_SURPRISES_BLOCKS
                self._hazards.rebuild(requests - self._rebuilt_at[0] + _FORGOTTEN_REQUESTS)
                self._rebuilt_at = self._surprised_at = requests, blocks
                rebuild_blocks = least_blocks
        # The first bounds grow: too early is harmless.
        self._due_blocks = min(self._rebuilt_at[1] + rebuild_blocks, self._swept_at[1] + sweep_blocks)
