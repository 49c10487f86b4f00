"""Bringing 512 MiB down to the host tier and up again, beside ``memcpy`` of the same bytes in the same run."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np

from kvpool.bench.rows import median, row
from kvpool.cache.host_tier import HostTier
from kvpool.cache.key import CacheKey, encode_block_id
from kvpool.cache.lower_tiers import LowerTiers
from kvpool.cache.source import Source
from kvpool.errors import ensure
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.copying import view_at
from kvpool.memory.host import HostBackend
from kvpool.sizes import GIB, MIB

CACHE_BYTES = 2 * MIB
CACHES = 256
_ROUNDS = 7
_TOTAL_BYTES = CACHES * CACHE_BYTES

_Result = TypeVar("_Result")


async def measure() -> dict[str, Any]:
    """Run the benchmark with a device of host memory; returns ``{"bench": "tiers", "rows": [...]}``. Takes 2 GiB."""
    backend = HostBackend()
    try:
        device = GPUMemoryAllocator(backend, _TOTAL_BYTES, CACHE_BYTES)
        addresses = [device.address + device.allocate(number, CACHE_BYTES).offset for number in range(CACHES)]
        rows = await _rows(addresses)
        device.close()
    finally:
        backend.close()
    return {"bench": "tiers", "rows": rows}


async def _rows(addresses: list[int]) -> list[dict[str, Any]]:
    content = np.random.default_rng(1).integers(0, 255, (CACHES, CACHE_BYTES), dtype=np.uint8)
    private = np.zeros_like(content)
    seconds: dict[str, list[float]] = {}

    async def time_it(kind: str, work: Callable[[], Awaitable[_Result]]) -> _Result:
        began = time.perf_counter()
        result = await work()
        seconds.setdefault(kind, []).append(time.perf_counter() - began)
        return result

    for address, block in zip(addresses, content, strict=True):
        view_at(address, CACHE_BYTES)[:] = block.data
    backend = HostBackend()
    tiers = LowerTiers(HostTier(backend, _TOTAL_BYTES, CACHE_BYTES), None, lambda keys: None)
    try:
        for number in range(1 + _ROUNDS):  # in the first, the host tier has no memory yet
            sources = _sources(addresses, number)
            kinds = ("cold", "cold up") if number == 0 else ("down", "up")
            kept = await time_it(kinds[0], lambda sources=sources: tiers.demote(sources))  # type: ignore[misc]
            ensure(all(kept), "everything is in the host tier")
            for address in addresses:
                ctypes.memset(address, 0, CACHE_BYTES)
            filled = await time_it(kinds[1], lambda sources=sources: tiers.fill(sources))  # type: ignore[misc]
            ensure(all(filled), "everything is brought up")
            for address, block in zip(addresses, content, strict=True):
                ensure(view_at(address, CACHE_BYTES) == block.data, "what comes up is what went down")
            # They are copies now: to demote them again moves no byte.
            kept = await time_it("copies", lambda sources=sources: tiers.demote(sources))  # type: ignore[misc]
            ensure(all(kept), "everything is in the host tier")
            began = time.perf_counter()
            for address, block in zip(addresses, private, strict=True):
                ctypes.memmove(block.ctypes.data, address, CACHE_BYTES)
            seconds.setdefault("memcpy down", []).append(time.perf_counter() - began)
            began = time.perf_counter()
            for address, block in zip(addresses, private, strict=True):
                ctypes.memmove(address, block.ctypes.data, CACHE_BYTES)
            seconds.setdefault("memcpy up", []).append(time.perf_counter() - began)
    finally:
        await tiers.close()
        backend.close()
    rate = {kind: _TOTAL_BYTES / GIB / median(times) for kind, times in seconds.items()}
    return [
        row("down to the host tier, beside memcpy of each cache", rate["down"], "GiB/s", rate["memcpy down"]),
        row("up from the host tier, beside memcpy of each cache", rate["up"], "GiB/s", rate["memcpy up"]),
        row("down, the first time: the host tier has no memory yet", rate["cold"], "GiB/s", rate["memcpy down"]),
        row("down, 256 caches of which there are copies", 1000 * median(seconds["copies"]), "ms"),
    ]


def _sources(addresses: list[int], number: int) -> list[Source]:
    """Name the device's caches anew: each round displaces the one before from the host tier."""
    keys = [CacheKey("bench", "bench", encode_block_id(number * CACHES + block)) for block in range(CACHES)]
    return [Source(key, None, address, CACHE_BYTES) for key, address in zip(keys, addresses, strict=True)]
