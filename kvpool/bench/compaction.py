"""How fast compaction is, by the size of caches, and what allocations notice of it while it runs in the background.

All but the requests to a pool in time of this thread, which does not go on while others have the processor.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from math import inf
from random import Random
from typing import Any

from kvpool.bench import background
from kvpool.bench.memcpy import Memcpy
from kvpool.bench.rows import median, quantile, row
from kvpool.cache.store import STEP_BYTES
from kvpool.config import PoolConfig
from kvpool.errors import CapacityError, ensure
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.host import HostBackend
from kvpool.memory.pacer import CompactionPacer
from kvpool.sizes import KIB, MIB, format_size

_CAPACITY_BYTES = 256 * MIB
_PAGE_BYTES = 2 * MIB
_SIZES = (4 * KIB, 64 * KIB, 96 * KIB, 256 * KIB, 640 * KIB, 1 * MIB)
_FOREGROUND_SIZES = (64 * KIB, 256 * KIB, 1 * MIB)
_ELSEWHERE_SIZE = 64 * KIB
_STEPWISE_SIZE = 96 * KIB
_ASKED_BYTES = 96 * MIB
_REPEATS = 3
_LEAST_INTERVAL_S, _MOST_INTERVAL_S = 0.00025, 0.00075
"""An allocation, and the end of the one before, so often. By chance: intervals all alike that the clock's tick (4 ms)
is a multiple of would let each tick fall into an allocation for a whole round, or none."""
_ROUNDS = 5
_OPERATIONS = 2000
"""Of a round."""
_TURN = 50
"""After so many it is the other's turn, so that whatever the machine does meets both."""


Rows = list[dict[str, Any]]


class _Free:
    """Lets everything move."""

    def may_move(self, _cache_id: int) -> bool:
        return True

    def moved(self, _allocation: Allocation) -> None:
        """Nobody is to be told."""


def measure(run: Callable[[Coroutine[Any, Any, Rows]], Rows]) -> dict[str, Any]:
    """Return ``{"bench": "compaction", "rows": [...]}``.

    Parameters
    ----------
    run
        Runs a coroutine to its end: most of this needs no event loop, in which a signal would wait for its turn.
    """
    return {"bench": "compaction", "rows": [*_rows(), *run(background.measure())]}


def _rows() -> list[dict[str, Any]]:
    rows = []
    gc.freeze()  # as a device does: else a collection of all that was imported is measured with one of the rounds
    memcpy = Memcpy(_CAPACITY_BYTES // 2, _PAGE_BYTES)
    for size_bytes in _SIZES:
        compacted, copied = [], [memcpy.gb_per_s()]
        for _ in range(_REPEATS):  # in turn, so that both meet the same load
            compacted.append(_compact_gb_per_s(size_bytes))
            copied.append(memcpy.gb_per_s())
        name = f"compaction of caches of {format_size(size_bytes)}, beside memcpy"
        rows.append(row(name, max(compacted), "GB/s", max(copied)))
    rows.append(_elsewhere_row(memcpy))
    del memcpy
    rows.append(_stepwise_row())
    for size_bytes in _FOREGROUND_SIZES:
        rows += _foreground_rows(size_bytes)
    return rows


class _WrittenElsewhere(HostBackend):
    """Memory as if other processes had written to it: its pages are there, but not in the page tables of this one."""

    def create(self, size_bytes: int) -> int:
        handle = super().create(size_bytes)
        descriptor = self.export(handle)
        try:
            os.pwrite(descriptor, b"\1" * size_bytes, 0)
        finally:
            os.close(descriptor)
        return handle


def _write(address: int, size_bytes: int) -> None:
    """Write a cache, as its owner does: memory that is touched for the first time takes many times as long."""
    ctypes.memset(address, 1, size_bytes)


def _leave(_address: int, _size_bytes: int) -> None:
    """Leave a cache as others wrote it."""


@contextmanager
def _holes(
    size_bytes: int,
    kind: type[HostBackend] = HostBackend,
    write: Callable[[int, int], None] = _write,
) -> Iterator[tuple[GPUMemoryAllocator, int]]:
    """Give memory full of caches, of which every other one is freed; and the first id that was not used."""
    backend = kind()
    memory = GPUMemoryAllocator(backend, _CAPACITY_BYTES, _PAGE_BYTES, owner=_Free())
    try:
        count = _CAPACITY_BYTES // size_bytes
        for cache_id in range(count):
            write(memory.address + memory.allocate(cache_id, size_bytes).offset, size_bytes)
        for cache_id in range(1, count, 2):
            memory.free(cache_id)
        yield memory, count
    finally:
        memory.close()
        backend.close()


def _elsewhere_row(memcpy: Memcpy) -> dict[str, Any]:
    """Return how fast caches are compacted for the first time that clients wrote, beside memcpy."""
    compacted, copied = [], [memcpy.gb_per_s()]
    for _ in range(_REPEATS):
        compacted.append(_compact_gb_per_s(_ELSEWHERE_SIZE, _WrittenElsewhere, _leave))
        copied.append(memcpy.gb_per_s())
    name = f"compaction of caches of {format_size(_ELSEWHERE_SIZE)} that others wrote, beside memcpy"
    return row(name, max(compacted), "GB/s", max(copied))


def _compact_gb_per_s(
    size_bytes: int,
    kind: type[HostBackend] = HostBackend,
    write: Callable[[int, int], None] = _write,
) -> float:
    with _holes(size_bytes, kind, write) as (memory, _):
        start = time.thread_time()
        done = memory.compact()
        return done.moved_bytes / (time.thread_time() - start) / 1e9


def _stepwise_row() -> dict[str, Any]:
    """Return how long a device serves nobody for an allocation that has to compact first, beside all of it at once."""
    longest_ms = [1e3 * min(max(_steps_s(most_bytes)) for _ in range(_REPEATS)) for most_bytes in (STEP_BYTES, inf)]
    of = f"{format_size(_ASKED_BYTES)} that have to be compacted for"
    return row(f"allocation of {of}: longest step, beside all at once", longest_ms[0], "ms", longest_ms[1])


def _steps_s(most_bytes: float) -> list[float]:
    """Return the seconds of each step of such an allocation."""
    steps: list[float] = []
    with _holes(_STEPWISE_SIZE) as (memory, unused_id):
        while True:
            memory.compactor.allowance_bytes = most_bytes
            start = time.thread_time()
            try:
                memory.allocate(unused_id, _ASKED_BYTES)
            except CapacityError as error:
                steps.append(time.thread_time() - start)
                ensure(error.details.get("compaction_left"), "half of the memory lies in holes")
            else:
                return [*steps, time.thread_time() - start]


def _foreground_rows(size_bytes: int) -> list[dict[str, Any]]:
    of = format_size(size_bytes)
    with _holes(size_bytes) as holes, _holes(size_bytes) as others:
        beside = _Foreground(size_bytes, *holes, CompactionPacer(0.0, PoolConfig().compaction_share))
        alone = _Foreground(size_bytes, *others, None)
        rounds = [_round(beside, alone) for _ in range(_ROUNDS)]
    rows = []
    for share in (0.5, 0.99):
        pairs = [(quantile(latencies, share) * 1e6, quantile(base, share) * 1e6) for latencies, base in rounds]
        name = f"allocation of {of}, p{share * 100:g}, with compaction in the background, beside without"
        rows.append(row(f"{name}, median of {_ROUNDS} rounds", *_both_medians(pairs)))
        worst, base = max(pairs, key=lambda pair: pair[0] / pair[1])
        rows.append(row(f"{name}, worst round", worst, "us", base))
    ensure(beside.steps[-1] > 0.0, "compaction goes on to the last round", caches=of)
    operations = _ROUNDS * _OPERATIONS
    rows.append(row(f"allocations of {of} that waited for a step", 100 * beside.waited / operations, "%"))
    rows.append(row(f"longest of {len(beside.steps)} steps of it, caches of {of}", max(beside.steps) * 1e3, "ms"))
    return rows


def _both_medians(pairs: list[tuple[float, float]]) -> tuple[float, str, float]:
    values, baselines = zip(*pairs, strict=True)
    return median(list(values)), "us", median(list(baselines))


def _round(beside: _Foreground, alone: _Foreground) -> tuple[list[float], list[float]]:
    """Return how long the operations of a round took with compaction and without, seconds."""
    latencies: tuple[list[float], list[float]] = [], []
    for _ in range(_OPERATIONS // _TURN):
        latencies[0].extend(beside.take_turn())
        latencies[1].extend(alone.take_turn())
    return latencies


class _Foreground:
    """Allocations that are due at times of a clock, which stands still in the other's turns; and steps between them."""

    def __init__(
        self, size_bytes: int, memory: GPUMemoryAllocator, first_id: int, pacer: CompactionPacer | None
    ) -> None:
        self._size_bytes = size_bytes
        self._memory = memory
        self._pacer = pacer
        self._first_id = self._next_id = first_id
        self._random = Random(size_bytes)
        self._now = self._due = self._next_step = 0.0
        #: What steps took, seconds.
        self.steps: list[float] = []
        #: Allocations that were due before a step had ended.
        self.waited = 0

    def take_turn(self) -> list[float]:
        """Return how long allocations took from the moment they were due, seconds."""
        memory, size_bytes, pacer, latencies = self._memory, self._size_bytes, self._pacer, []
        began = time.thread_time() - self._now
        stepped = self._now
        for _ in range(_TURN):
            self._due += self._random.uniform(_LEAST_INTERVAL_S, _MOST_INTERVAL_S)
            while (now := time.thread_time() - began) < self._due:  # no sleep: it takes longer than what is measured
                if pacer is None or now < self._next_step or not pacer.due(memory.usage().fragmentation):
                    continue
                done = memory.compact_a_little(pacer.step_bytes)
                stepped = time.thread_time() - began
                self.steps.append(stepped - now)
                self._next_step = stepped + pacer.stepped(now, stepped, memory.usage().fragmentation, done)
            self.waited += stepped > self._due
            memory.allocate(self._next_id, size_bytes)
            if self._next_id > self._first_id:
                memory.free(self._next_id - 1)
            self._next_id += 1
            self._now = time.thread_time() - began
            latencies.append(self._now - self._due)
            if pacer is not None:
                pacer.operated(self._now)
        return latencies
