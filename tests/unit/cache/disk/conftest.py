"""Disk tiers on local files and in memory, closed after each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_stores import Faults, FaultyFileSystem, MovingFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.tier import DiskTier

OpenTier = Callable[..., Awaitable[DiskTier]]


@pytest.fixture
def faults() -> Iterator[Faults]:
    fresh = FaultyFileSystem.faults = Faults()
    yield fresh
    for gate in fresh.gates.values():
        gate.set()
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["file", "memory", "moving"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"{request.param}://{tmp_path}/tier"
    for filesystem in (MemoryFileSystem, MovingFileSystem):
        filesystem.store.clear()
        filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
async def open_tier() -> AsyncIterator[OpenTier]:
    tiers: list[DiskTier] = []

    async def open_it(where: Any, budget_bytes: int = 1 << 30, **options: Any) -> DiskTier:
        tier = DiskTier(folder_at(where) if isinstance(where, str) else where, budget_bytes, **options)
        tiers.append(tier)
        await tier.start()
        return tier

    yield open_it
    for tier in tiers:
        await tier.close()
