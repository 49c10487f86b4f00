"""How fast compaction is, by the size of caches, and what allocations notice of it while it runs in the background.

All but the requests to a pool in time of this thread, which does not go on while others have the processor.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kvpool.bench import background
from kvpool.bench.rows import quantile, row
from kvpool.config import PoolConfig
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.host import HostBackend
from kvpool.memory.pacer import CompactionPacer
from kvpool.sizes import KIB, MIB, format_size

_CAPACITY_BYTES = 256 * MIB
_PAGE_BYTES = 2 * MIB
_SIZES = (4 * KIB, 64 * KIB, 96 * KIB, 256 * KIB, 640 * KIB, 1 * MIB)
_FOREGROUND_SIZES = (64 * KIB, 256 * KIB, 1 * MIB)
_REPEATS = 3
_INTERVAL_S = 0.0005
"""An allocation, and the end of the one before, so often."""
_OPERATIONS = 2000


class _Free:
    """Lets everything move."""

    def may_move(self, _cache_id: int) -> bool:
        return True

    def moved(self, _allocation: Allocation) -> None:
        """Nobody is to be told."""


async def measure() -> dict[str, Any]:
    """Return ``{"bench": "compaction", "rows": [...]}``."""
    return {"bench": "compaction", "rows": [*_rows(), *await background.measure()]}


def _rows() -> list[dict[str, Any]]:
    rows = []
    gc.freeze()  # as a device does: else a collection of all that was imported is measured with one of the rounds
    memory = _Memcpy()
    for size_bytes in _SIZES:
        compacted, copied = [], [memory.gb_per_s()]
        for _ in range(_REPEATS):  # in turn, so that both meet the same load
            compacted.append(_compact_gb_per_s(size_bytes))
            copied.append(memory.gb_per_s())
        name = f"compaction of caches of {format_size(size_bytes)}, beside memcpy"
        rows.append(row(name, max(compacted), "GB/s", max(copied)))
    del memory
    for size_bytes in _FOREGROUND_SIZES:
        alone, _ = _foreground(size_bytes, None)
        config = PoolConfig()
        pacer = CompactionPacer(0.0, config.compaction_share)
        beside, steps = _foreground(size_bytes, pacer)
        of = format_size(size_bytes)
        for share in (0.5, 0.99):
            name = f"allocation of {of}, p{share * 100:g}, with compaction in the background, beside without"
            rows.append(row(name, quantile(beside, share) * 1e6, "us", quantile(alone, share) * 1e6))
        rows.append(row(f"longest of {len(steps) - 1} steps of it, caches of {of}", max(steps) * 1e3, "ms"))
    return rows


@contextmanager
def _holes(size_bytes: int) -> Iterator[tuple[GPUMemoryAllocator, int]]:
    """Give memory full of caches, of which every other one is freed; and the first id that was not used."""
    backend = HostBackend()
    memory = GPUMemoryAllocator(backend, _CAPACITY_BYTES, _PAGE_BYTES, owner=_Free())
    try:
        count = _CAPACITY_BYTES // size_bytes
        for cache_id in range(count):
            # Written, as caches are: memory that this process touches for the first time takes many times as long.
            ctypes.memset(memory.address + memory.allocate(cache_id, size_bytes).offset, 1, size_bytes)
        for cache_id in range(1, count, 2):
            memory.free(cache_id)
        yield memory, count
    finally:
        memory.close()
        backend.close()


def _compact_gb_per_s(size_bytes: int) -> float:
    with _holes(size_bytes) as (memory, _):
        start = time.thread_time()
        done = memory.compact()
        return done.moved_bytes / (time.thread_time() - start) / 1e9


def _foreground(size_bytes: int, pacer: CompactionPacer | None) -> tuple[list[float], list[float]]:
    """Return how long allocations took from the moment they were due, and how long steps took, seconds."""
    latencies, steps = [], [0.0]
    with _holes(size_bytes) as (memory, first):
        clock: Callable[[], float] = time.thread_time
        start = next_step = clock()
        for number in range(_OPERATIONS):
            due = start + number * _INTERVAL_S
            while (now := clock()) < due:  # no sleep: it would take longer than what is measured
                if pacer is None or now < next_step or not pacer.due(memory.usage().fragmentation):
                    continue
                done = memory.compact_a_little(pacer.step_bytes)
                ended = clock()
                steps.append(ended - now)
                next_step = ended + pacer.stepped(now, ended, memory.usage().fragmentation, done)
            memory.allocate(first + number, size_bytes)
            if number:
                memory.free(first + number - 1)
            ended = clock()
            latencies.append(ended - due)
            if pacer is not None:
                pacer.operated(ended)
    return latencies, steps


class _Memcpy:
    """Memmove between as much warm memory, a page at a time."""

    def __init__(self) -> None:
        self._source, self._destination = (ctypes.create_string_buffer(_CAPACITY_BYTES // 2) for _ in range(2))
        self.gb_per_s()  # memory that this process touches for the first time takes many times as long

    def gb_per_s(self) -> float:
        """Return the billions of bytes copied in a second of this thread."""
        source, destination = ctypes.addressof(self._source), ctypes.addressof(self._destination)
        start = time.thread_time()
        for offset in range(0, _CAPACITY_BYTES // 2, _PAGE_BYTES):
            ctypes.memmove(destination + offset, source + offset, _PAGE_BYTES)
        return _CAPACITY_BYTES / 2 / (time.thread_time() - start) / 1e9
