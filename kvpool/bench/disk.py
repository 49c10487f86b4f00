"""The disk tier: writing and reading back, beside ``dd`` of the same bytes with the same sync in the same folder.

``dd conv=fsync`` syncs once, when all bytes are written, and its file's name not at all. The tier syncs each of its
files (a cache of 2 MiB, or a pack of small ones) before that has its name, so what is written *back* is synced, too;
what is written *through* is acknowledged when the folder is synced behind that.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kvpool.bench.rows import median, row
from kvpool.cache.disk.file_names import CACHE_SUFFIX, PACK_SUFFIX
from kvpool.cache.disk.header import make_header
from kvpool.cache.disk.index import DiskEntry, DiskIndex
from kvpool.cache.disk.local import LocalFolder
from kvpool.cache.disk.packing import Write
from kvpool.cache.disk.reading import Read
from kvpool.cache.disk.scan import scan
from kvpool.cache.disk.statistics import DiskCounters
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.key import CacheKey, encode_block_id
from kvpool.errors import ensure
from kvpool.sizes import KIB, MIB

TOTAL_BYTES = 256 * MIB
SMALL_TOTAL_BYTES = 32 * MIB
FILES_TO_FIND = 20_000
_BUDGET_BYTES = 4 << 30  # nothing is evicted
_ROUNDS = 7
_HASH_ROUNDS = 7
_HASHED_BYTES = 256 * MIB  # more than the processor's cache

Measured = tuple[float, Callable[[], Awaitable[None]]]
"""How many seconds something took, and what removes what it has written."""


async def measure(folder: Path) -> dict[str, Any]:
    """Run the benchmark in an empty folder; returns ``{"bench": "disk", "rows": [...]}``."""
    rows = await _rows(folder, 2 * MIB, TOTAL_BYTES)
    rows += await _rows(folder, 64 * KIB, SMALL_TOTAL_BYTES)
    rows += [_checksum(), await asyncio.to_thread(_start, folder / "start")]
    return {"bench": "disk", "rows": rows}


async def _rows(folder: Path, size_bytes: int, total_bytes: int) -> list[dict[str, Any]]:
    """Measure with caches of one size.

    A disk is shared, and what others do to it changes within a second. So each measurement stands right between two of
    what it is compared with, and is compared with their mean: what it has written is removed only then. All kinds take
    turns, each round another first; nothing is left to be written when one begins; the first round warms up and is not
    counted; and what is told is the median of the rounds' ratios.
    """
    count = total_bytes // size_bytes
    source = np.random.default_rng(1).integers(0, 255, (count, size_bytes), dtype=np.uint8)
    into = np.zeros_like(source)
    views = [memoryview(block) for block in source]
    keys = [CacheKey("bench", "bench", encode_block_id(number)) for number in range(count)]
    one_file = folder / "dd"
    pairs: dict[str, list[tuple[float, float]]] = {}
    files: list[int] = []  # caches in each file that the tier has written

    async def time_it(work: Callable[[], Awaitable[object]]) -> float:
        await asyncio.to_thread(os.sync)
        began = time.perf_counter()
        await work()
        return time.perf_counter() - began

    async def write_one() -> float:
        spent_s = await time_it(lambda: asyncio.to_thread(_write_one, one_file, views))
        _unlink([one_file])
        return spent_s

    async def write_each(_number: int) -> Measured:
        spent_s = await time_it(lambda: asyncio.to_thread(_write_each, folder, views))
        return spent_s, partial(unlink, count)

    async def write_files(_number: int) -> Measured:
        spent_s = await time_it(lambda: asyncio.to_thread(_write_files, folder, views, files))
        return spent_s, partial(unlink, len(files))

    async def unlink(written: int) -> None:
        _unlink([folder / f"each-{number}" for number in range(written)])

    async def write(kind: str, number: int) -> Measured:
        tier_folder = folder / f"{size_bytes}-{number}" / kind
        tier = DiskTier(LocalFolder(tier_folder), _BUDGET_BYTES, queue_limit=count)
        await tier.start()

        async def write_all() -> None:
            durable = kind == "through"
            await tier.write([Write(k, None, v, durable=durable) for k, v in zip(keys, views, strict=True)])

        async def clean_up() -> None:
            files[:] = [path.stat().st_size // size_bytes for path in _files_in(tier_folder)]
            ensure(tier.statistics().files == count, "all caches are on disk", **tier.statistics().errors)
            if kind == "back":
                await read(tier, tier_folder)
            await tier.remove(keys)
            await tier.close()

        return await time_it(write_all), clean_up

    async def read(tier: DiskTier, tier_folder: Path) -> None:
        await asyncio.to_thread(_write_one, one_file, views)
        await asyncio.to_thread(_write_each, folder, views)
        files = [folder / f"each-{written}" for written in range(count)]
        parts = [memoryview(block) for block in into]
        spent: dict[str, list[float]] = {"one": [], "each": [], "tier": []}
        for _ in range(2):
            _forget(one_file)
            spent["one"].append(await time_it(lambda: asyncio.to_thread(_read_one, one_file, into)))
            await asyncio.to_thread(_forget_all, files)
            spent["each"].append(await time_it(lambda: asyncio.to_thread(_read_each, files, parts)))
            await asyncio.to_thread(_forget_all, _files_in(tier_folder))
            into[:] = 0
            spent["tier"].append(
                await time_it(lambda: tier.read([Read(k, p) for k, p in zip(keys, parts, strict=True)]))
            )
            ensure(bool((into == source).all()), "what was read back is what is written")
        _unlink([one_file, *files])
        for kind, beside in (("read", "one"), ("read beside each", "each")):
            pairs.setdefault(kind, []).append((spent["tier"][0], sum(spent[beside]) / 2))

    kinds: list[tuple[str, Callable[[int], Awaitable[Measured]]]] = [
        ("back", partial(write, "back")),
        ("files", write_files),
        ("each", write_each),
        ("through", partial(write, "through")),
    ]
    for number in range(1 + _ROUNDS):
        spent: dict[str, float] = {}
        first = number % len(kinds)
        for kind, measured in kinds[first:] + kinds[:first]:
            before = await write_one()
            spent[kind], clean_up = await measured(number)
            after = await write_one()
            pairs.setdefault(kind, []).append((spent[kind], (before + after) / 2))
            await clean_up()
        for kind in ("back", "through"):
            pairs.setdefault(f"{kind} beside files", []).append((spent[kind], spent["files"]))
    each = "files as large as the tier's, by one thread, each synced"
    size = f"{size_bytes // KIB} KiB" if size_bytes < MIB else f"{size_bytes // MIB} MiB"
    return [
        _compared(f"{size}: write back, beside one file with one sync (dd conv=fsync)", pairs["back"], total_bytes),
        _compared(f"{size}: as many files, each synced, beside one file with one sync", pairs["each"], total_bytes),
        _compared(
            f"{size}: write through, each acknowledged when durable, beside one file with one sync",
            pairs["through"],
            total_bytes,
        ),
        _compared(f"{size}: write back, beside {each}", pairs["back beside files"], total_bytes),
        _compared(f"{size}: write through, beside {each}", pairs["through beside files"], total_bytes),
        _compared(f"{size}: read and verify, beside reading one file", pairs["read"], total_bytes),
        _compared(f"{size}: read and verify, beside reading as many files", pairs["read beside each"], total_bytes),
    ]


def _compared(name: str, pairs: list[tuple[float, float]], total_bytes: int) -> dict[str, Any]:
    """Return the row of pairs of seconds, of what is measured and of what it is compared with; the first warmed up."""
    counted = pairs[1:]
    size_mib = total_bytes / MIB
    ratios = [beside_s / spent_s for spent_s, beside_s in counted]
    measured = row(
        name,
        size_mib / median([spent_s for spent_s, _ in counted]),
        "MiB/s",
        size_mib / median([beside_s for _, beside_s in counted]),
    )
    return measured | {"ratio": median(ratios), "ratios": sorted(ratios)}


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


def _write_files(folder: Path, views: list[memoryview], files: list[int]) -> None:
    """Write as many files as the tier has written, each of as many caches, and synced."""
    start = 0
    for number, caches in enumerate(files):
        _write_one(folder / f"each-{number}", views[start : start + caches])
        start += caches


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


def _read_each(files: list[Path], parts: list[memoryview]) -> None:
    for path, part in zip(files, parts, strict=True):
        with open(path, "rb", buffering=0) as file:
            file.readinto(part)


def _forget(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _files_in(tier_folder: Path) -> Iterator[Path]:
    """Yield the files of a tier that hold caches."""
    for suffix in (CACHE_SUFFIX, PACK_SUFFIX):
        yield from tier_folder.rglob(f"*{suffix}")


def _forget_all(files: Iterable[Path]) -> None:
    for path in files:
        _forget(path)


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
