"""The allocators alone, on one core, checks on: pairs of allocate and free a second.

Each row's baseline is measured in the same run: a plain dict that inserts and deletes as many entries, in the same
order, so that the ratio does not depend on the machine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

from kvpool.bench.rows import row
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.buddy import BuddyAllocator
from kvpool.memory.host import HostBackend
from kvpool.sizes import KIB, MIB, format_size

_ROUNDS = 5
STEPS = 10 * _ROUNDS
_PAIRS = 100_000
_LIVE = 2_000
_MIN_BLOCK_BYTES = 4 * KIB
_PAGE_BYTES = 2 * MIB

#: Pairs as (which live one is freed, what is allocated in its place).
Churn = Sequence[tuple[int, int]]


def run(on_progress: Callable[[int], None] = lambda _done: None) -> dict[str, Any]:
    """Return ``{"bench": "alloc", "rows": [...]}``; each row has name, value, unit, baseline and ratio.

    Parameters
    ----------
    on_progress
        Told how many of :data:`STEPS` are done.
    """
    done = count(1)
    rows: list[dict[str, Any]] = []
    for name, measure, churn in _measurements():
        seconds = []
        for _ in range(_ROUNDS):
            seconds.append(measure())
            on_progress(next(done))
        baseline_s = min(_dict(churn) for _ in range(_ROUNDS))
        rows.append(row(name, len(churn) / min(seconds), "pairs/s", len(churn) / baseline_s))
    return {"bench": "alloc", "rows": rows}


def _measurements() -> Iterator[tuple[str, Callable[[], float], Churn]]:
    """Yield the name of each row, what measures its seconds once, and the pairs of that."""
    rng = random.Random(0)
    arena_bytes = _MIN_BLOCK_BYTES << 20
    for size_bytes in (4 * KIB, 64 * KIB, MIB):
        churn: Churn = [(rng.randrange(_LIVE), size_bytes) for _ in range(_PAIRS)]
        yield f"buddy, {format_size(size_bytes)}", _buddy(arena_bytes, churn), churn
    powers = [_MIN_BLOCK_BYTES << order for order in range(8)]
    churn = [(rng.randrange(_LIVE), rng.choice(powers)) for _ in range(_PAIRS)]
    yield "buddy, churn of 8 orders", _buddy(arena_bytes, churn), churn
    churn = [(rng.randrange(_LIVE), rng.randrange(1, 128 * _MIN_BLOCK_BYTES)) for _ in range(_PAIRS)]
    yield "buddy, churn of any sizes", _buddy(arena_bytes, churn), churn
    yield "buddy, split and merge through 20 orders", _split_and_merge, _alone(_MIN_BLOCK_BYTES)
    for size_bytes in (64 * KIB, _PAGE_BYTES, 8 * _PAGE_BYTES):
        churn = _alone(size_bytes)
        yield f"memory, {format_size(size_bytes)}, warm", partial(_memory, churn, live=1), churn
    churn = [(rng.randrange(200), rng.choice((16, 64, 256, 1024)) * KIB) for _ in range(_PAIRS // 4)]
    yield "memory, churn of caches below a page", partial(_memory, churn, live=200), churn


def _alone(size_bytes: int) -> Churn:
    """Pairs of one cache that has the memory for itself."""
    return [(0, size_bytes)] * _PAIRS


def _buddy(arena_bytes: int, churn: Churn) -> Callable[[], float]:
    """Return a measurement: seconds for ``churn``, with ``_LIVE`` ranges allocated at all times."""

    def measure() -> float:
        buddy = BuddyAllocator(arena_bytes, _MIN_BLOCK_BYTES)
        live = [buddy.allocate(size_bytes) for _, size_bytes in churn[:_LIVE]]
        allocate, free = buddy.allocate, buddy.free
        start = time.perf_counter()
        for which, size_bytes in churn:
            free(live[which])
            live[which] = allocate(size_bytes)
        return time.perf_counter() - start

    return measure


def _split_and_merge() -> float:
    """Seconds for pairs in an empty arena of 2**20 minimum blocks: each splits the whole of it and merges it again."""
    buddy = BuddyAllocator(_MIN_BLOCK_BYTES << 20, _MIN_BLOCK_BYTES)
    allocate, free = buddy.allocate, buddy.free
    start = time.perf_counter()
    for _ in range(_PAIRS):
        free(allocate(_MIN_BLOCK_BYTES))
    return time.perf_counter() - start


def _memory(churn: Churn, live: int) -> float:
    """Seconds for ``churn`` on real host memory, with ``live`` caches at all times; all pages are warm before."""
    backend = HostBackend()
    memory = GPUMemoryAllocator(backend, 256 * MIB, _PAGE_BYTES, _MIN_BLOCK_BYTES)
    try:
        first = len(churn)
        ids = list(range(first, first + live))
        for cache_id, (_, size_bytes) in zip(ids, churn, strict=False):
            memory.allocate(cache_id, size_bytes)
        allocate, free = memory.allocate, memory.free
        next_id = first + live
        seconds = 0.0
        for _ in range(2):  # the first time warms the pages
            start = time.perf_counter()
            for which, size_bytes in churn:
                free(ids[which])
                allocate(next_id, size_bytes)
                ids[which] = next_id
                next_id += 1
            seconds = time.perf_counter() - start
        return seconds
    finally:
        memory.close()
        backend.close()


def _dict(churn: Churn) -> float:
    """Seconds for as many deletes and inserts in a dict of the same size."""
    ids = list(range(_LIVE))
    entries: dict[int, int] = dict.fromkeys(ids, 0)
    next_id = _LIVE
    start = time.perf_counter()
    for which, size_bytes in churn:
        del entries[ids[which]]
        entries[next_id] = size_bytes
        ids[which] = next_id
        next_id += 1
    return time.perf_counter() - start
