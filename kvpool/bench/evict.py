"""What eviction costs a pool: for each request, at worst, and for 512 MiB at once. Books only, no memory, no Ray.

Times are those of the thread's CPU, so that what else runs on the machine does not count.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import count, islice
from random import Random
from typing import Any

from kvpool.bench.rows import median, quantile, row
from kvpool.cache.eviction import CacheEvictionPolicy
from kvpool.cache.index import CacheIndex
from kvpool.cache.key import BlockHash
from kvpool.cache.store import FREED, RELEASED
from kvpool.cache.table import NO_ROW
from kvpool.errors import ensure
from kvpool.pool.instructions import (
    Answer,
    Batch,
    BlocksRequested,
    CachesRequested,
    DeviceAnswered,
    Event,
    Instruction,
    PrefixesLookedUp,
    ReleaseRequested,
    SealRequested,
    Send,
)
from kvpool.pool.state import PoolState
from kvpool.sizes import KIB, MIB

POLICIES = ("lru", "adaptive")
RESIDENT = 150_000
BLOCK_BYTES = 64 * KIB
EVICTED_BYTES = 512 * MIB
CHAIN = 25
_BLOCKS = 60_000  # looked up for the cost of each
_AT_ONCE = 64
"""Requests that are timed together: a look at the clock takes half a microsecond."""
_POOL_BLOCKS = 50_000
_ROUNDS = 40
_PARTS = 40
STEPS = len(POLICIES) * 2 * (_PARTS + _ROUNDS) + _PARTS
_CLIENT = "bench"


def run(on_progress: Callable[[int], None] = lambda _done: None) -> dict[str, Any]:
    """Return ``{"bench": "evict", "rows": [...]}``; takes a minute. The baseline of ADAPTIVE is LRU in the same run.

    Parameters
    ----------
    on_progress
        Told how many of :data:`STEPS` are done.
    """
    done = count(1)

    def step() -> None:
        on_progress(next(done))

    rows: list[dict[str, Any]] = []
    baseline: dict[str, float] = {}

    def add(policy: str, what: str, value: float, unit: str) -> None:
        rows.append(row(f"{policy}, {what}", value, unit, baseline.get(what)))
        baseline.setdefault(what, value)

    try:
        index = CacheIndex()
        index.policy = _FirstInFirstOut()
        books_us, _ = _requests(index, 1, step)
        for policy in POLICIES:
            for length in (1, CHAIN):
                kind = f"requests of {length}"
                mean_us, longest_ms = _requests(CacheIndex(policy), length, step)
                add(policy, f"{kind}: a block, {RESIDENT:,} resident", mean_us, "us")
                if length == 1:
                    add(policy, f"{kind}: the policy's own part of that", mean_us - books_us, "us")
                add(policy, f"{kind}: the longest request", longest_ms, "ms")
                evictions_ms = _evictions(policy, length, step)
                evicted = f"{kind}: {EVICTED_BYTES // BLOCK_BYTES:,} blocks evicted at once"
                add(policy, f"{evicted}, median of {_ROUNDS}", median(evictions_ms), "ms")
                add(policy, f"{evicted}, p99", quantile(evictions_ms, 0.99), "ms")
    finally:
        gc.unfreeze()
    return {"bench": "evict", "rows": rows}


class _FirstInFirstOut(CacheEvictionPolicy):
    """Next to no policy, for requests of one block each: what is left is what the books take with any."""

    def __init__(self) -> None:
        self._rows: deque[int] = deque()

    def grown(self, rows: int) -> None:
        pass

    def evictable(self, rows: Sequence[int], now: float) -> None:
        pass

    def taken(self, rows: Sequence[int], now: float) -> None:
        pass

    def sheltered(self, row: int) -> None:
        pass

    def stored(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> None:
        self._rows.append(rows[0])

    def removed(self, rows: Sequence[int]) -> None:
        self._rows.popleft()

    def victim(self) -> int:
        return self._rows[0]

    def victims(self, partition: int) -> Iterator[int]:
        return iter(self._rows)

    def worth(self, row: int) -> float:
        return 0.0


def _requests(index: CacheIndex, length: int, on_step: Callable[[], None]) -> tuple[float, float]:
    """Return the mean microseconds a block, and the milliseconds of the longest request, of an empty index.

    Half of the requests are for what was stored lately or is popular, half are new; a full index evicts for these. By
    turns, some are timed together, for the mean, and each of as many alone, for the longest.
    """
    index.add_device(0)
    _freeze()
    space = index.space("bench", "bench")
    chance = Random(1)
    known = told = 0
    a_part = -(-(RESIDENT + _BLOCKS) // (length * _PARTS))
    together_s, longest_s = 0.0, 0.0
    together = alone = 0
    for round_ in count():
        done = round_ * _AT_ONCE
        while told < min(done // a_part, _PARTS):
            told += 1
            on_step()
        if min(together, alone) * length >= _BLOCKS // 2:
            break
        full = len(index) >= RESIDENT - _AT_ONCE * length
        requests = []
        for number in range(_AT_ONCE):
            again = full and chance.random() < 0.5
            block = int(known * (1 - chance.random() ** 2)) if again else known
            known = max(known, block + 1)
            requests.append((_chain(block, length), (done + number) / 100))
        if full and alone < together:
            for chain, now in requests:
                began = time.thread_time()
                _request(index, space, chain, now)
                longest_s = max(longest_s, time.thread_time() - began)
            alone += _AT_ONCE
            continue
        began = time.thread_time()
        for chain, now in requests:
            _request(index, space, chain, now)
        if full:
            together_s += time.thread_time() - began
            together += _AT_ONCE
    for _ in range(told, _PARTS):
        on_step()
    return 1e6 * together_s / (together * length), 1e3 * longest_s


def _freeze() -> None:
    """Do as a pool's actor does at its start: no collection goes through what is there by now.

    Its table's columns are among that, so it takes 0.5 ms with 150,000 caches to go through the rest.
    """
    gc.unfreeze()  # what the measurement before this one left
    gc.collect()
    gc.freeze()


def _chain(number: int, length: int) -> list[BlockHash]:
    """Return hashes as clients make them: ids as they are would be spread too well, or not at all."""
    return [blake2b(b"%d" % (number * length + place), digest_size=16).digest() for place in range(length)]


def _request(index: CacheIndex, space: int, chain: Sequence[BlockHash], now: float) -> None:
    policy = index.policy
    rows = index.look_up(space, chain, now=now)
    index.pin(rows, now=now)
    missing = chain[len(rows) :]
    policy.answered(space, chain, rows, 100, now)
    if missing:
        short = len(index) + len(missing) - RESIDENT
        if short > 0:
            admitted = policy.admit(space, chain, rows, (0,), 1, short, now)
            short -= len(missing) - admitted
            missing = missing[:admitted]
        if short > 0:
            index.remove_all([policy.victim()] if short == 1 else list(islice(policy.victims(0), short)))
        above = rows[-1] if rows else NO_ROW
        index.add_complete(space, 1, 0, missing, above, now=now, chain=chain)
    index.unpin(rows[::-1], now=now)


def _evictions(policy: str, length: int, on_step: Callable[[], None]) -> list[float]:
    """Return for each round the milliseconds in which a pool decides what goes for 512 MiB, and takes it off the books.

    Between the rounds these are given back, and filled with blocks again, each request storing ``length``.
    """
    pool = _Pool(policy)
    numbers = count()
    spent = []
    for _ in range(_ROUNDS):
        while pool.free_bytes >= length * BLOCK_BYTES:
            pool.store(_chain(next(numbers), length))
        spent.append(1e3 * pool.evict(EVICTED_BYTES))
        on_step()
    return spent


class _Pool:
    """A pool of one device that does whatever it is told, at once."""

    def __init__(self, policy: str) -> None:
        self.state = PoolState("bench", policy, "least_loaded", queue_limit=1, gc_threshold=1.0)
        capacity_bytes = _POOL_BLOCKS * BLOCK_BYTES
        self._device = self.state.add_device(
            "device", "here", capacity_bytes, 2 * MIB, min_block_bytes=4 * KIB, arena_bytes=8 * capacity_bytes
        )
        self._now = 0.0
        self._stamps = count()
        _, _, instructions = self.state.connect(_CLIENT, "default", "here", "token")
        self._carry_out(instructions)
        _freeze()
        spec = {"name": "bench", "identity": {"model": "bench"}, "block_bytes": BLOCK_BYTES, "limit_bytes": None}
        self._model = self.state.register_model(_CLIENT, spec)[0].number

    @property
    def free_bytes(self) -> int:
        """What can be stored without evicting."""
        return self.state.ledger.free_bytes(self._device)

    def store(self, chain: Sequence[BlockHash]) -> None:
        """Look a chain up, store it and give it back."""
        joined = b"".join(chain)
        self._ask(PrefixesLookedUp(Batch(1), _CLIENT, [(1, self._model, joined, None)]))
        _, _, ids, _, _ = self._ask(BlocksRequested(Batch(1), _CLIENT, [(1, self._model, joined, None, 100, None)]))
        ensure(len(ids) == len(chain), "everything is stored")
        self._ask(SealRequested(Batch(1), _CLIENT, [(1, self._model, ids, list(chain), None)], True))

    def evict(self, size_bytes: int) -> float:
        """Ask for so much memory, give it back, and return the seconds of the decision."""
        batch = Batch(1)
        event = CachesRequested(batch, _CLIENT, [(1, self._model, size_bytes, size_bytes, 0.0, 0, None)])
        began = time.thread_time()
        instructions = self.state.handle(event, self._now)
        seconds = time.thread_time() - began
        self._carry_out(instructions)
        self._ask(ReleaseRequested(Batch(1), _CLIENT, [(1, [batch.answers[0][1]], None)]))
        return seconds

    def _ask(self, event: Event) -> Any:
        self._now += 0.01
        self._carry_out(self.state.handle(event, self._now))
        (answer,) = event.batch.answers  # type: ignore[union-attr]
        return answer

    def _carry_out(self, instructions: list[Instruction]) -> None:
        while True:
            sent = [instruction for instruction in instructions if isinstance(instruction, Send)]
            if not sent:
                return
            answers = [_answer(send.operation) for send in sent]
            event = DeviceAnswered(self._device.number, sent, answers, (next(self._stamps), 0))
            instructions = self.state.handle(event, self._now)


def _answer(operation: tuple[Any, ...]) -> Answer:
    match operation:
        case ("allocate", _, _, _, ids, *_):
            return [(0, 0, 0)] * len(ids), [], None
        case ("finish", _, _, ids, _):
            return [RELEASED] * len(ids)
        case ("release", _, _, ids):
            return [FREED] * len(ids)
    return True
