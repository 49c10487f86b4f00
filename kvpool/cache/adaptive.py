"""prototype"""
from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from math import exp
from heapq import heapify, heappop, heappush, merge
from random import Random

import numpy as np

from kvpool.cache.eviction import CacheEvictionPolicy, register_policy
from kvpool.cache.hazard import AGES, BODY, GAPS, KINDS, OLD, SHARED, FEATURES, SIZES, TAIL, HazardTable, age_of, ages_of

SAMPLE = 256
GHOSTS_AT_LEAST = 256
SLICE = 2048


class Ranking:
    def __init__(self, version, generator):
        self.version = version
        self.seen = []
        self.more = generator

    def __iter__(self):
        place = 0
        while True:
            while place < len(self.seen):
                yield self.seen[place]
                place += 1
            entry = next(self.more, None)
            if entry is None:
                return
            self.seen.append(entry)


@register_policy("adaptive")
class Adaptive(CacheEvictionPolicy):
    def __init__(self, index) -> None:
        self.index = index
        self.rng = Random(index.seed)
        self.parent, self.children, self.device = index.parent, index.children, index.device
        # rows
        self.turn = array("i")
        self.kind = array("B")
        self.touches = array("I")
        self.place = array("i")
        self.idle = array("B")
        # turns
        self.born = array("d")
        self.number = array("i")
        self.shape = array("i")
        self.blocks = array("i")
        self.n_body = array("i")
        self.n_shared = array("i")
        self.n_old = array("i")
        self.flags = array("B")
        self.accounted = array("b")
        self.held = array("i")
        self.f0 = array("b")
        self.f1 = array("b")
        self.f2 = array("b")
        self.space = array("i")
        self.queued = array("B")
        self.last = []
        self.last2 = []
        self.free = []
        self.order = deque()
        self.anchors = {}
        self.hazard = HazardTable()
        self.clock = 0.0
        self.mean = 0.0
        self.then = None
        self.requests = 0
        self.since_requests = self.since_blocks = 0
        self.sweep_requests = self.sweep_blocks = 0
        self.cursor = 0
        self.leaves = []
        self.candidates = []
        self.fresh_until = []
        self.budget = []
        self.rankings = {}
        self.version = 0
        self.grown(len(index.parent))

    def grown(self, rows):
        added = rows - len(self.turn)
        self.turn.extend(array("i", [-1]) * added)
        self.place.extend(array("i", [-1]) * added)
        for c in (self.kind, self.touches, self.idle):
            c.frombytes(bytes(added * c.itemsize))

    # -- rows
    def evictable(self, rows, now):
        self.version += 1
        children, turn, idle = self.children, self.turn, self.idle
        last = self.last
        for row in rows:
            idle[row] = 1
            if turn[row] < 0:
                self.adopt(rows, now)
            if not children[row]:
                if self.index.key_of(row) == last[turn[row]]:
                    if self.kind[row] == BODY:
                        self.kind[row] = TAIL
                self.add_leaf(row)

    def adopt(self, rows, now):
        turn, parent = self.turn, self.parent
        run = []
        for row in (*rows, -1):
            if run and (row < 0 or turn[row] >= 0 or parent[run[-1]] != row):
                run.reverse()
                hashes = [self.index.key_of(r) for r in run]
                t = self.begin(self.index.space_of(run[0]), hashes, [], now)
                for r in run:
                    turn[r] = t
                    self.kind[r] = BODY
                    self.touches[r] = 1
                self.held[t] += len(run)
                run = []
            if row >= 0 and turn[row] < 0:
                run.append(row)

    def taken(self, rows, now):
        self.version += 1
        idle, place = self.idle, self.place
        for row in rows:
            idle[row] = 0
            if place[row] >= 0:
                self.drop_leaf(row)

    def sheltered(self, row):
        self.version += 1
        if self.place[row] >= 0:
            self.drop_leaf(row)

    def removed(self, rows):
        self.version += 1
        idle, place, turn, parent, children = self.idle, self.place, self.turn, self.parent, self.children
        for row in rows:
            idle[row] = 0
            if place[row] >= 0:
                self.drop_leaf(row)
            t = turn[row]
            if t >= 0:
                turn[row] = -1
                self.held[t] -= 1
                if not self.held[t] and not self.queued[t]:
                    self.release(t)
        for row in rows:
            above = parent[row]
            if above >= 0 and idle[above] and not children[above] and place[above] < 0:
                self.add_leaf(above)
                heappush(self.candidates[self.device[above]], (self.value(above), above, turn[above]))

    def add_leaf(self, row):
        device = self.device[row]
        while device >= len(self.leaves):
            self.leaves.append(array("i"))
            self.candidates.append([])
            self.fresh_until.append(-1.0)
            self.budget.append(0)
        leaves = self.leaves[device]
        self.place[row] = len(leaves)
        leaves.append(row)

    def drop_leaf(self, row):
        leaves = self.leaves[self.device[row]]
        last = leaves.pop()
        if last != row:
            place = self.place[row]
            leaves[place] = last
            self.place[last] = place
        self.place[row] = -1

    # -- worth
    def value(self, row):
        t = self.turn[row]
        age = age_of(self.clock - self.born[t])
        kind = self.kind[row]
        if kind != SHARED and self.flags[t] & 16:
            kind = OLD
        return self.worth(t, kind, age)

    def worth(self, t, kind, age):
        base = (self.shape[t] * KINDS + kind) * AGES
        bucket = int(age)
        worths = self.hazard.worths
        low = worths[base + bucket]
        if bucket < AGES - 1:
            low += (age - bucket) * (worths[base + bucket + 1] - low)
        return low * self.factor(t)

    def factor(self, t):
        w = self.hazard.weights
        return exp(w[self.f0[t]] + w[self.f1[t]] + w[self.f2[t]])

    def values(self, rows):
        turn = np.frombuffer(self.turn, np.int32)[rows]
        kind = np.frombuffer(self.kind, np.uint8)[rows]
        old = (np.frombuffer(self.flags, np.uint8)[turn] & 16) != 0
        kind = np.where(old & (kind != SHARED), OLD, kind)
        age = ages_of(self.clock - np.frombuffer(self.born)[turn])
        bucket = age.astype(np.int64)
        base = (np.frombuffer(self.shape, np.int32)[turn] * KINDS + kind) * AGES
        worths = np.frombuffer(self.hazard.worths)
        low = worths[base + bucket]
        high = worths[base + np.minimum(bucket + 1, AGES - 1)]
        return (low + (age - bucket) * (high - low)) * self.factors(turn), turn

    def factors(self, turn):
        w = np.frombuffer(self.hazard.weights)
        return np.exp(sum(w[np.frombuffer(f, np.int8)[turn]] for f in (self.f0, self.f1, self.f2)))

    def refill(self, device, gone):
        leaves = self.leaves[device]
        rows = np.frombuffer(leaves, np.int32)
        if len(rows) > 2 * SAMPLE:
            rng = np.random.default_rng(self.rng.getrandbits(32)) if not hasattr(self, "np_rng") else self.np_rng
            self.np_rng = rng
            rows = rows[rng.integers(0, len(rows), SAMPLE)]
        values, turn = self.values(rows)
        keep = 64
        if len(rows) > keep:
            best = np.argpartition(values, keep)[:keep]
            values, rows, turn = values[best], rows[best], turn[best]
        found = sorted(set(zip(values.tolist(), rows.tolist(), turn.tolist(), strict=True)))
        return [e for e in found if e[1] not in gone]

    def ranked(self, device):
        place, turn, parent, children, idle = self.place, self.turn, self.parent, self.children, self.idle
        devices, kind = self.device, self.kind
        if device >= len(self.leaves):
            return
        heap = self.candidates[device]
        while heap and (place[heap[0][1]] < 0 or turn[heap[0][1]] != heap[0][2]):
            heappop(heap)
            self.budget[device] -= 1
        if self.clock > self.fresh_until[device] or self.budget[device] <= 0:
            heap = self.candidates[device] = self.refill(device, ())
            self.fresh_until[device] = self.clock + 2
            self.budget[device] = 4
        heap = heap[:]
        budget = self.budget[device]
        gone = {}
        went = set()
        while True:
            if not heap or budget <= 0:
                if len(went) and len(self.leaves[device]) > 0:
                    extra = self.refill(device, went)
                    heap = sorted(set(heap + extra))
                    budget = 8
                if not heap:
                    return
            v, row, t = heappop(heap)
            if place[row] < 0 and not gone.get(row) or turn[row] != t or row in went:
                continue
            budget -= 1
            while True:
                went.add(row)
                yield v, row
                above = parent[row]
                if above < 0 or devices[above] != device or not idle[above]:
                    break
                count = gone.get(above, 0) + 1
                gone[above] = count
                if count != children[above]:
                    break
                if turn[above] != t or kind[above] != kind[row]:
                    v = self.value(above)
                    t = turn[above]
                    if heap and heap[0][0] < v:
                        heappush(heap, (v, above, t))
                        break
                row = above

    def ranking(self, device):
        known = self.rankings.get(device)
        if known is None or known.version != self.version:
            known = self.rankings[device] = Ranking(self.version, self.ranked(device))
        return known

    def victims(self, device) -> Iterator[int]:
        for _, row in self.ranking(device):
            yield row

    def victim(self):
        best = (float("inf"), -1)
        for device in range(len(self.leaves)):
            first = next(iter(self.ranking(device)), None)
            if first is not None and first < best:
                best = first
        return best[1]

    # -- requests
    def admit(self, space, hashes, rows, devices, size_bytes, short, now):
        t = self.turn_of(space, hashes, rows, now)
        missing = len(hashes) - len(rows)
        new = self.worth(t, TAIL, 0.0)
        body = self.worth(t, BODY, 0.0)
        left = float(short)
        sizes = self.index.size_bytes
        for v, row in merge(*(self.ranking(d) for d in devices)):
            while left > 0 and missing and new < v:
                left -= 1
                missing -= 1
                new = body
            if left <= 0 or not missing:
                break
            left -= sizes[row] / size_bytes
            if left <= 0:
                break
        return missing

    def turn_of(self, space, hashes, rows, now):
        t = self.anchors.get((space, hashes[-1]))
        if t is None or self.last[t] != hashes[-1]:
            t = self.begin(space, hashes, rows, now)
        return t

    def stored(self, space, hashes, rows, now):
        t = self.turn_of(space, hashes, (), now)
        turn, kind, touches = self.turn, self.kind, self.touches
        for row in rows:
            turn[row] = t
            kind[row] = BODY
            touches[row] = 1
        self.held[t] += len(rows)

    def looked_up(self, space, hashes, rows, now):
        self.begin(space, hashes, rows, now)

    def tick(self, now, blocks):
        if self.then is None:
            self.then = now
        gap = now - self.then
        self.then = now
        n = min(self.requests, 200)
        self.mean += (gap - self.mean) / (n + 1)
        self.clock += 0.5 + 0.5 * (min(gap / self.mean, 1000.0) if self.mean > 0 else 1.0)
        self.requests += 1
        self.since_requests += 1
        self.since_blocks += blocks
        self.sweep_requests += 1
        self.sweep_blocks += blocks
        if self.since_requests >= 50 and self.since_blocks >= 1000:
            self.hazard.rebuild(self.since_requests)
            self.since_requests = self.since_blocks = 0
        if self.sweep_requests >= 16 and self.sweep_blocks >= 256:
            self.sweep()
            self.sweep_requests = self.sweep_blocks = 0

    def begin(self, space, hashes, rows, now):
        n, hit = len(hashes), len(rows)
        self.version += 1
        self.tick(now, n)
        anchors, turn, kind, touches = self.anchors, self.turn, self.kind, self.touches
        prev, depth = -1, hit
        for p in range(n - 1, hit - 1, -1):
            t = anchors.get((space, hashes[p]))
            if t is not None:
                prev, depth = t, p + 1
                break
        else:
            if rows:
                prev = turn[rows[-1]]
        number, gap = 0, 0
        clock = self.clock
        if prev >= 0 and 2 * depth >= self.blocks[prev]:
            age = age_of(clock - self.born[prev])
            number = self.number[prev] + 1
            gap = 1 + min(int(age / 2), GAPS - 2)
        else:
            prev = -1
        # what is touched, by the turn that touched it before
        hits = self.hazard.hits
        flags, held, number_of, shape_of, born = self.flags, self.held, self.number, self.shape, self.born
        n_shared = 0
        t_before = -2
        counts = [0, 0, 0, 0]
        sums = {}
        for row in rows:
            t = turn[row]
            if t != t_before:
                t_before = t
                counts = sums.get(t)
                if counts is None:
                    counts = sums[t] = [0, 0, 0, 0]
            counts[kind[row]] += 1
            touches[row] = c = touches[row] + 1
            if c > number + 1:
                kind[row] = SHARED
                n_shared += 1
            else:
                kind[row] = BODY
        for t, counts in sums.items():
            if t < 0:
                continue
            age = age_of(clock - born[t])
            b = int(age)
            f = flags[t]
            self.account(t, b)
            base = shape_of[t] * KINDS * AGES + b
            if counts[SHARED] and f & 4:
                hits[base + SHARED * AGES] += counts[SHARED] / self.n_shared[t]
                flags[t] &= ~4
            if t != prev and counts[BODY]:
                if f & 16:
                    hits[base + OLD * AGES] += min(1.0, counts[BODY] / self.n_old[t])
                elif f & 2:
                    hits[base + BODY * AGES] += min(1.0, counts[BODY] / self.n_body[t])
                    self.gain(t, min(1.0, counts[BODY] / self.n_body[t]))
            held[t] -= sum(counts)
        if prev >= 0:
            counts = sums.get(prev, (0, 0, 0, 0))
            b = int(age_of(clock - born[prev]))
            self.account(prev, b)
            base = shape_of[prev] * KINDS * AGES + b
            f = flags[prev]
            whole = depth >= self.blocks[prev] - 1
            body = 1.0 if whole else min(1.0, counts[BODY] / max(self.n_body[prev], 1))
            if f & 16:
                if f & 8:
                    hits[base + OLD * AGES] += min(1.0, counts[BODY] / self.n_old[prev])
            else:
                if f & 2:
                    hits[base + BODY * AGES] += body
                    self.gain(prev, body)
                if f & 1 and (hashes[depth - 1] == self.last[prev]):
                    hits[base + TAIL * AGES] += 1.0
                    self.gain(prev, 1.0)
                left = self.n_body[prev] * (1 - body) + 1
                self.n_old[prev] = max(1, int(left))
                flags[prev] = (f & 4) | 8 | 16
        # the new record
        t = self.new_turn()
        born[t] = clock
        number_of[t] = number
        shape_of[t] = min(number, 2) * GAPS + gap
        self.blocks[t] = n
        self.n_shared[t] = n_shared
        self.n_body[t] = n - 1 - n_shared
        self.n_old[t] = 1
        self.f0[t] = min(n.bit_length(), SIZES - 1)
        self.f1[t] = SIZES + min((n - depth).bit_length(), SIZES - 1)
        self.f2[t] = 2 * SIZES + min(number, SIZES - 1)
        self.space[t] = space
        self.accounted[t] = -1
        flags[t] = 1 | (2 if n - 1 - n_shared > 0 else 0) | (4 if n_shared else 0)
        held[t] = hit
        for row in rows:
            turn[row] = t
        if hit == n and kind[rows[-1]] != SHARED:
            kind[rows[-1]] = TAIL
        self.account(t, 0)
        self.last[t] = hashes[-1]
        anchors[space, hashes[-1]] = t
        if n > 1:
            self.last2[t] = hashes[-2]
            anchors[space, hashes[-2]] = t
        else:
            self.last2[t] = None
        for old in sums:
            if old >= 0 and not held[old] and not self.queued[old]:
                self.release(old)
        self.queued[t] = 1
        self.order.append(t)
        limit = max(GHOSTS_AT_LEAST, len(self.index))
        while len(self.order) > limit:
            old = self.order.popleft()
            self.queued[old] = 0
            if not held[old]:
                self.release(old)
        return t

    def account(self, t, b):
        first = self.accounted[t] + 1
        if b < first:
            return
        f = self.flags[t]
        exposures, hazards = self.hazard.exposures, self.hazard.hazards
        expected = 0.0
        for k, bit in ((TAIL, 1), (BODY, 2), (SHARED, 4), (OLD, 8)):
            if f & bit:
                base = (self.shape[t] * KINDS + k) * AGES
                for bucket in range(base + first, base + b + 1):
                    exposures[bucket] += 1.0
                if k <= BODY:
                    expected += sum(hazards[base + first : base + b + 1])
        if expected:
            self.gain(t, -expected * self.factor(t))
        self.accounted[t] = b

    def gain(self, t, g):
        gain = self.hazard.gain
        gain[self.f0[t]] += g
        gain[self.f1[t]] += g
        gain[self.f2[t]] += g
        if g < 0:
            e = self.hazard.expected
            e[self.f0[t]] -= g
            e[self.f1[t]] -= g
            e[self.f2[t]] -= g

    def sweep(self):
        start = self.cursor
        stop = min(start + SLICE, len(self.born))
        self.cursor = stop if stop < len(self.born) else 0
        where = slice(start, stop)
        flags = np.frombuffer(self.flags, np.uint8)[where]
        accounted = np.frombuffer(self.accounted, np.int8)[where]
        age = ages_of(self.clock - np.frombuffer(self.born)[where]).astype(np.int8)
        (behind,) = np.nonzero((flags & 15 != 0) & (age > accounted))
        exposures = np.frombuffer(self.hazard.exposures)
        hazards = np.frombuffer(self.hazard.hazards)
        expected = np.frombuffer(self.hazard.expected)
        gain = np.frombuffer(self.hazard.gain)
        shape = np.frombuffer(self.shape, np.int32)[where]
        while len(behind):
            accounted[behind] += 1
            for k in range(KINDS):
                which = behind[flags[behind] & (1 << k) != 0]
                places = (shape[which] * KINDS + k) * AGES + accounted[which]
                np.add.at(exposures, places, 1.0)
                if k <= BODY:
                    turns = which + start
                    ex = hazards[places] * self.factors(turns)
                    for f in (self.f0, self.f1, self.f2):
                        b = np.frombuffer(f, np.int8)[turns]
                        np.add.at(expected, b, ex)
                        np.subtract.at(gain, b, ex)
            behind = behind[age[behind] > accounted[behind]]

    def new_turn(self):
        if self.free:
            return self.free.pop()
        t = len(self.born)
        for c in (
            self.born, self.number, self.shape, self.blocks, self.n_body, self.n_shared, self.n_old, self.flags,
            self.accounted, self.held, self.f0, self.f1, self.f2, self.space, self.queued,
        ):
            c.append(0)
        self.last.append(None)
        self.last2.append(None)
        return t

    def release(self, t):
        self.flags[t] = 0
        for h in (self.last[t], self.last2[t]):
            if h is not None and self.anchors.get((self.space[t], h)) == t:
                del self.anchors[self.space[t], h]
        self.last[t] = self.last2[t] = None
        self.free.append(t)
