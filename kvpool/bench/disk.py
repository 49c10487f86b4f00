"""The disk tier: writing and reading back, beside ``dd`` of the same bytes with the same sync in the same folder."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kvpool.bench.rows import median, row
from kvpool.cache.disk.header import make_header
from kvpool.cache.disk.index import DiskEntry, DiskIndex
from kvpool.cache.disk.local import LocalFolder
from kvpool.cache.disk.scan import scan
from kvpool.cache.disk.statistics import DiskCounters
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.key import CacheKey, encode_block_id
from kvpool.errors import ensure
from kvpool.sizes import KIB, MIB

TOTAL_BYTES = 256 * MIB
SMALL_TOTAL_BYTES = 32 * MIB
FILES_TO_FIND = 20_000
_ROUNDS = 5
_HASH_ROUNDS = 5
_HASHED_BYTES = 256 * MIB  # more than the processor's cache


async def measure(folder: Path) -> dict[str, Any]:
    """Run the benchmark in an empty folder; returns ``{"bench": "disk", "rows": [...]}``."""
    rows = await _rows(folder, 2 * MIB, TOTAL_BYTES)
    rows += await _rows(folder, 64 * KIB, SMALL_TOTAL_BYTES)
    rows += [_checksum(), await asyncio.to_thread(_start, folder / "start")]
    return {"bench": "disk", "rows": rows}


async def _rows(folder: Path, size_bytes: int, total_bytes: int) -> list[dict[str, Any]]:
    """Measure with caches of one size; all kinds take turns, so that what disturbs one disturbs all."""
    count = total_bytes // size_bytes
    source = np.random.default_rng(1).integers(0, 255, (count, size_bytes), dtype=np.uint8)
    into = np.zeros_like(source)
    views = [memoryview(block) for block in source]
    keys = [CacheKey("bench", "bench", encode_block_id(number)) for number in range(count)]
    seconds: dict[str, list[float]] = {}

    async def time_it(kind: str, work: Callable[[], Awaitable[object]]) -> None:
        began = time.perf_counter()
        await work()
        seconds.setdefault(kind, []).append(time.perf_counter() - began)

    for number in range(_ROUNDS):
        one_file, tier_folder = folder / "dd", folder / f"{size_bytes}-{number}"
        await time_it("dd", lambda path=one_file: asyncio.to_thread(_write_one, path, views))  # type: ignore[misc]
        _forget(one_file)
        await time_it("dd read", lambda path=one_file: asyncio.to_thread(_read_one, path, into))  # type: ignore[misc]
        _unlink([one_file])
        await time_it("each", lambda: asyncio.to_thread(_write_each, folder, views))
        _unlink([folder / f"each-{written}" for written in range(count)])
        for kind in ("back", "through"):
            tier = DiskTier(LocalFolder(tier_folder / kind), 4 * total_bytes, queue_limit=count)
            await tier.start()
            write = tier.write_back if kind == "back" else tier.write_through
            await time_it(kind, lambda write=write: _all(write(k, None, v) for k, v in zip(keys, views, strict=True)))  # type: ignore[misc]
            ensure(tier.statistics().files == count, "all caches are on disk", **tier.statistics().errors)
            if kind == "back":
                for path in (tier_folder / kind).rglob("*.kvcache"):
                    _forget(path)
                into[:] = 0
                parts = [memoryview(block) for block in into]
                await time_it(
                    "read",
                    lambda tier=tier, parts=parts: _all(  # type: ignore[misc]
                        tier.read_into(k, part) for k, part in zip(keys, parts, strict=True)
                    ),
                )
                ensure(bool((into == source).all()), "what was read back is what was written")
            await tier.remove(keys)
            await tier.close()
    rate = {kind: total_bytes / MIB / median(times) for kind, times in seconds.items()}
    size = f"{size_bytes // KIB} KiB" if size_bytes < MIB else f"{size_bytes // MIB} MiB"
    return [
        row(f"{size}: write back, beside one file with one sync (dd conv=fsync)", rate["back"], "MiB/s", rate["dd"]),
        row(f"{size}: write back, beside as many files, each synced", rate["back"], "MiB/s", rate["each"]),
        row(f"{size}: write through, beside one file with one sync", rate["through"], "MiB/s", rate["dd"]),
        row(f"{size}: read and verify, beside reading one file", rate["read"], "MiB/s", rate["dd read"]),
    ]


async def _all(work: Any) -> None:
    coroutines: list[Coroutine[Any, Any, Any]] = list(work)
    await asyncio.gather(*coroutines)


def _write_one(path: Path, views: list[memoryview]) -> None:
    """Do what ``dd conv=fsync`` does with a block size of one cache."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for view in views:
            os.write(file, view)
        os.fsync(file)
    finally:
        os.close(file)


def _write_each(folder: Path, views: list[memoryview]) -> None:
    for number, view in enumerate(views):
        _write_one(folder / f"each-{number}", [view])


def _unlink(paths: list[Path]) -> None:
    """Remove files for good, so that what follows does not pay for it: a journal may discard blocks as it commits."""
    for path in paths:
        path.unlink()
    folder = os.open(paths[0].parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_one(path: Path, into: np.ndarray[Any, Any]) -> None:
    with open(path, "rb", buffering=0) as file:
        for block in into:
            file.readinto(memoryview(block))


def _forget(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _checksum() -> dict[str, Any]:
    source = np.random.default_rng(2).integers(0, 255, _HASHED_BYTES, dtype=np.uint8)
    copy = np.zeros_like(source)
    hashed: list[float] = []
    copied: list[float] = []
    for _ in range(_HASH_ROUNDS):
        began = time.perf_counter()
        xxhash.xxh3_128_digest(source.data)
        hashed.append(time.perf_counter() - began)
        began = time.perf_counter()
        np.copyto(copy, source)
        copied.append(time.perf_counter() - began)
    size_gb = _HASHED_BYTES / 1e9
    return row("xxh3-128 of 256 MiB, beside memcpy", size_gb / median(hashed), "GB/s", size_gb / median(copied))


def _start(folder: Path) -> dict[str, Any]:
    """Time the start on a folder that holds many caches, beside listing it with sizes."""
    payload = memoryview(b"x")
    store = LocalFolder(folder)
    store.open()
    entries = [DiskEntry(CacheKey("bench", "bench", encode_block_id(n)), None, 1) for n in range(FILES_TO_FIND)]
    content = make_header(entries[0].key, None, payload) + payload
    space = folder / entries[0].path.partition("/")[0]
    space.mkdir()
    for entry in entries:
        (folder / entry.path).write_bytes(content)
    found: list[float] = []
    listed: list[float] = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        index = DiskIndex(1 << 40)
        scan(store, index, DiskCounters(store.url))
        found.append(time.perf_counter() - began)
        ensure(len(index) == FILES_TO_FIND, "all files are found")
        began = time.perf_counter()
        with os.scandir(space) as listing:
            for entry_on_disk in listing:
                entry_on_disk.stat()
        listed.append(time.perf_counter() - began)
    store.close()
    thousand = FILES_TO_FIND / 1000
    name = "start, a thousand caches to find, beside listing them"
    return row(name, 1000 * median(found) / thousand, "ms", 1000 * median(listed) / thousand)
