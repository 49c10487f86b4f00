"""Storing and reading 512 MiB: beside ``memcpy`` of the same bytes, and ``ray.put`` / ``ray.get``."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kvpool.actors.cluster import object_get, object_put
from kvpool.bench.rows import median, row
from kvpool.cache.key import encode_block_id
from kvpool.client import Model, ModelSpec
from kvpool.client.putting import threads_for
from kvpool.client.temporary import temporary_pool
from kvpool.sizes import MIB

BLOCK_BYTES = 2 * MIB
BLOCKS = 256
_ROUNDS = 7
_GIB = 1 << 30


async def measure() -> dict[str, Any]:
    """Run the benchmark on a pool of its own; returns ``{"bench": ..., "rows": [...]}``."""
    async with temporary_pool(name=f"bench-{os.getpid()}", devices="host:1x1GiB") as pool:
        rows = await _rows(await pool.model(ModelSpec("bench", block_bytes=BLOCK_BYTES)))
    return {"bench": "put-get", "rows": rows}


async def _rows(model: Model) -> list[dict[str, Any]]:
    source = np.random.default_rng(1).integers(0, 255, (BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    private = np.zeros_like(source)
    put: list[float] = []
    copied: list[float] = []
    copied_whole: list[float] = []
    copied_threads: list[float] = []
    got: list[float] = []
    read: list[float] = []
    read_private: list[float] = []
    ray_put: list[float] = []
    ray_read: list[float] = []
    tensors: list[float] = []
    threads = threads_for(source.nbytes)
    # The device holds two rounds of blocks. From the third on a put evicts the oldest and takes over its warm pages.
    for number in range(2 + _ROUNDS):
        hashes = [encode_block_id(number * BLOCKS + block) for block in range(BLOCKS)]
        began = time.perf_counter()
        stored = await model.put_blocks(hashes, source)
        if number >= 2:
            put.append(time.perf_counter() - began)
        if stored != BLOCKS:
            raise RuntimeError(f"{stored} of {BLOCKS} blocks were stored")
        copied.append(_seconds(lambda: _copy(private, source, BLOCK_BYTES)))
        copied_whole.append(_seconds(lambda: _copy(private, source, source.nbytes)))
        copied_threads.append(_seconds(lambda: _copy_in_threads(private, source, threads)))

        began = time.perf_counter()
        async with await model.match_prefix(hashes) as hit:
            blocks = hit.numpy()
            seconds = time.perf_counter() - began
            read_s = _seconds(lambda blocks=blocks: _read(blocks))  # type: ignore[misc]
            if number >= 2:  # every page is mapped in both views by now
                got.append(seconds)
                read.append(seconds + read_s)
            began = time.perf_counter()
            views = hit.tensors()
            tensors.append((time.perf_counter() - began) / BLOCKS)
            del views, blocks
        read_private.append(_seconds(lambda: _read(list(private))))

        began = time.perf_counter()
        reference = object_put(source)
        ray_put.append(time.perf_counter() - began)
        began = time.perf_counter()
        _read(list(object_get(reference)))
        ray_read.append(time.perf_counter() - began)
        del reference
    size_gib = BLOCKS * BLOCK_BYTES / _GIB
    return [
        row("put, beside memcpy of each block", size_gib / median(put), "GiB/s", size_gib / median(copied)),
        row("put, beside one memcpy of all", size_gib / median(put), "GiB/s", size_gib / median(copied_whole)),
        row(
            f"put, beside memcpy by {threads} threads, as it copies itself",
            size_gib / median(put),
            "GiB/s",
            size_gib / median(copied_threads),
        ),
        row("put, beside ray.put", size_gib / median(put), "GiB/s", size_gib / median(ray_put)),
        row("zero-copy get of 256 blocks", 1000 * median(got), "ms"),
        row(
            "get and read, beside reading private memory",
            size_gib / median(read),
            "GiB/s",
            size_gib / median(read_private),
        ),
        row("get and read, beside ray.get and read", size_gib / median(read), "GiB/s", size_gib / median(ray_read)),
        row("tensor() of a leased block", 1e6 * median(tensors), "us"),
    ]


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _copy(destination: np.ndarray[Any, Any], source: np.ndarray[Any, Any], step_bytes: int) -> None:
    to, start = destination.ctypes.data, source.ctypes.data
    for offset in range(0, source.nbytes, step_bytes):
        ctypes.memmove(to + offset, start + offset, step_bytes)


def _copy_in_threads(destination: np.ndarray[Any, Any], source: np.ndarray[Any, Any], threads: int) -> None:
    shares = [
        (to, of, of.nbytes) for to, of in zip(*(np.array_split(a, threads) for a in (destination, source)), strict=True)
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda share: _copy(*share), shares))


def _read(blocks: list[Any]) -> int:
    """Read every byte; the sum keeps the work from being skipped."""
    return sum(int(block.view(np.uint64).max()) for block in blocks) & 1
