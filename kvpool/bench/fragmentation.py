"""What churn wastes, and what compaction wins back, beside the same churn on two allocators that move nothing.

*pages*: the same shared pages without compaction; a page returns when all that lies in it is free. *buddy*: one
contiguous range in which each cache takes a power of two. Sizes come from a trace, or are made against an allocator.
A tenth of the bytes may be leased in the patterns that say so; else nothing is. Compaction is timed as this thread's,
which does not go on while others have the processor.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvpool.bench.memcpy import Memcpy
from kvpool.errors import CapacityError
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.buddy import BuddyAllocator
from kvpool.memory.host import HostBackend
from kvpool.sizes import KIB, MIB
from kvpool.workload import TraceRequest

_CAPACITY_BYTES = 256 * MIB
_PAGE_BYTES = 2 * MIB
_MIN_BLOCK_BYTES = 4 * KIB
_PAGE_BLOCKS = _PAGE_BYTES // _MIN_BLOCK_BYTES
_ROUNDS = 4
_BYTES_PER_TOKEN = 64
"""Scaled to the memory, so that a long request of the traces (100,000 tokens) takes three pages of 128."""

#: Bytes of the n-th cache.
Sizes = Callable[[int], int]


class _Leases:
    """Says which caches may move."""

    def __init__(self) -> None:
        self.leased: set[int] = set()

    def may_move(self, cache_id: int) -> bool:
        return cache_id not in self.leased

    def moved(self, allocation: Allocation) -> None:
        """Nobody is to be told."""


class _Buddy:
    """A contiguous range; each cache takes the power of two that holds it."""

    def __init__(self) -> None:
        self._buddy = BuddyAllocator(_CAPACITY_BYTES, _MIN_BLOCK_BYTES)
        self._offsets: dict[int, int] = {}

    def allocate(self, cache_id: int, size_bytes: int) -> None:
        self._offsets[cache_id] = self._buddy.allocate(1 << (size_bytes - 1).bit_length())

    def free(self, cache_id: int) -> None:
        self._buddy.free(self._offsets.pop(cache_id))

    def largest_bytes(self) -> int:
        return self._buddy.largest_free_bytes


def run(
    patterns: Sequence[tuple[str, Sizes, float]], on_progress: Callable[[int], None] = lambda _done: None
) -> dict[str, Any]:
    """Return ``{"bench": "fragmentation", "rows": [...]}``, one row a pattern.

    Parameters
    ----------
    patterns
        What :func:`patterns` returns.
    on_progress
        Told how many patterns are done.
    """
    memcpy = Memcpy(_CAPACITY_BYTES // 2, _PAGE_BYTES)
    rows = []
    for pattern in patterns:
        rows.append(_measure(memcpy, *pattern))
        on_progress(len(rows))
    return {"bench": "fragmentation", "rows": rows}


def patterns(requests: Iterable[TraceRequest]) -> list[tuple[str, Sizes, float]]:
    """Return (name, sizes, share of the bytes that is leased).

    Parameters
    ----------
    requests
        Whose tokens give the sizes of one pattern.
    """
    tokens = [each.input_length + each.output_length for each in requests]
    rng = random.Random(0)
    uniform = [rng.randrange(1, _PAGE_BLOCKS) * _MIN_BLOCK_BYTES for _ in range(1 << 14)]

    def traced(number: int) -> int:
        return min(max(1, tokens[number % len(tokens)]) * _BYTES_PER_TOKEN, _CAPACITY_BYTES // 16)

    def blocks(*counts: int) -> Sizes:
        return lambda number: counts[number % len(counts)] * _MIN_BLOCK_BYTES

    half = _PAGE_BLOCKS // 2
    above = [(1 << order) + 1 for order in range(3, 9)]
    return [
        ("tokens of requests", traced, 0.0),
        ("tokens of requests, 10 % leased", traced, 0.1),
        ("all small, one size", blocks(16), 0.0),
        ("above each power of two", blocks(*above), 0.0),
        ("above each power of two, 10 % leased", blocks(*above), 0.1),
        ("half a page and a block", blocks(half + 1), 0.0),
        ("half a page and a block, 10 % leased", blocks(half + 1), 0.1),
        ("sawtooth", blocks(*range(1, _PAGE_BLOCKS, 7)), 0.0),
        ("large beside smallest", blocks(_PAGE_BLOCKS - 1, 1), 0.0),
        ("just above a page, 10 % leased", blocks(_PAGE_BLOCKS + 25), 0.1),
        ("any below a page, 10 % leased", lambda number: uniform[number % len(uniform)], 0.1),
    ]


def _measure(memcpy: Memcpy, name: str, sizes: Sizes, leased_share: float) -> dict[str, Any]:
    leases = _Leases()
    backend = HostBackend()
    memory = GPUMemoryAllocator(backend, _CAPACITY_BYTES, _PAGE_BYTES, _MIN_BLOCK_BYTES, owner=leases)

    def write(cache_id: int, size_bytes: int) -> None:
        # As caches are: memory that this process touches for the first time takes many times as long to copy.
        ctypes.memset(memory.address + memory.allocate(cache_id, size_bytes).offset, 1, size_bytes)

    try:
        utilization, live_bytes = _churn(write, memory.free, sizes, leased_share, leases.leased)
        before = memory.usage()
        copied_gb_per_s = memcpy.gb_per_s()
        start = time.thread_time()
        done = memory.compact()
        elapsed_s = time.thread_time() - start
        copied_gb_per_s = max(copied_gb_per_s, memcpy.gb_per_s())
        after = memory.usage()
        bound = _least_fragmentation(memory, leases.leased, live_bytes)
    finally:
        memory.close()
        backend.close()
    pages = GPUMemoryAllocator(HostBackend(), _CAPACITY_BYTES, _PAGE_BYTES, _MIN_BLOCK_BYTES)
    try:
        pages_utilization, pages_live_bytes = _churn(pages.allocate, pages.free, sizes, leased_share, set())
        pages_largest_bytes = pages.usage().largest_bytes
    finally:
        pages.close()
    buddy = _Buddy()
    buddy_utilization, buddy_live_bytes = _churn(buddy.allocate, buddy.free, sizes, leased_share, set())
    moved_gb_per_s = done.moved_bytes / elapsed_s / 1e9
    freed_bytes = done.freed_pages * _PAGE_BYTES
    return {
        "pattern": name,
        "utilization": utilization,
        "pages_utilization": pages_utilization,
        "buddy_utilization": buddy_utilization,
        "fragmentation_before": before.fragmentation,
        "fragmentation_after": after.fragmentation,
        "fragmentation_bound": bound,
        "largest_of_free": after.largest_bytes / (_CAPACITY_BYTES - live_bytes),
        "pages_largest_of_free": pages_largest_bytes / (_CAPACITY_BYTES - pages_live_bytes),
        "buddy_largest_of_free": buddy.largest_bytes() / (_CAPACITY_BYTES - buddy_live_bytes),
        "moved_MiB": done.moved_bytes / MIB,
        "moved_per_freed": done.moved_bytes / freed_bytes if freed_bytes else None,
        "GB_per_s": moved_gb_per_s if done.moved_bytes else None,
        "memcpy_GB_per_s": copied_gb_per_s,
        "of_memcpy": moved_gb_per_s / copied_gb_per_s if done.moved_bytes else None,
    }


def _least_fragmentation(memory: GPUMemoryAllocator, leased: Iterable[int], live_bytes: int) -> float:
    """Return what no compaction could go below: pages with something leased stay, whatever is moved."""
    leased_pages = {page for cache_id in leased for page in memory.allocation(cache_id).pages}
    return 1 - live_bytes / (max(len(leased_pages), -(-live_bytes // _PAGE_BYTES)) * _PAGE_BYTES)


def _churn(
    allocate: Callable[[int, int], object],
    free: Callable[[int], None],
    sizes: Sizes,
    leased_share: float,
    leased: set[int],
) -> tuple[float, int]:
    """Fill and free half, some times over; returns the lowest utilization at a full memory, and the bytes live at last.

    ``leased`` is kept up to date: a random tenth (or what ``leased_share`` is) of what lives, chosen anew each time,
    which is not freed.
    """
    rng = random.Random(1)
    live: dict[int, int] = {}
    lowest, next_id, live_bytes = 1.0, 0, 0
    for _ in range(_ROUNDS):
        while True:
            size_bytes = sizes(next_id)
            try:
                allocate(next_id, size_bytes)
            except CapacityError:
                break
            live[next_id] = size_bytes
            live_bytes += size_bytes
            next_id += 1
        next_id += 1
        lowest = min(lowest, live_bytes / _CAPACITY_BYTES)
        kept = _some(rng, live, leased_share * _CAPACITY_BYTES)
        for cache_id in [each for number, each in enumerate(live) if number % 2 and each not in kept]:
            free(cache_id)
            live_bytes -= live.pop(cache_id)
        leased.clear()
        leased.update(kept)
    return lowest, live_bytes


def _some(rng: random.Random, live: dict[int, int], most_bytes: float) -> set[int]:
    chosen: set[int] = set()
    for cache_id in rng.sample(sorted(live), len(live)):
        most_bytes -= live[cache_id]
        if most_bytes < 0:
            break
        chosen.add(cache_id)
    return chosen
