"""Lower tiers below a device's memory that is a plain array, with stores that can fail; closed after each test."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
from disk_stores import DEADLINE_S, Faults, FaultyFileSystem, content_of, key_of
from fsspec.implementations.memory import MemoryFileSystem

from kvpool.cache import mover
from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.host_tier import HostTier
from kvpool.cache.key import CacheKey
from kvpool.cache.lower_tiers import LowerTiers
from kvpool.cache.source import Source
from kvpool.memory.copying import view_at
from kvpool.memory.host import HostBackend

PAGE = 64 << 10
FILE = DiskEntry(key_of(0), None, PAGE).file_bytes
PLACES = 64


class Device:
    """Memory above the tiers: places of one page each."""

    def __init__(self, tiers: LowerTiers, host: HostTier | None, disk: DiskTier | None, gone: list[CacheKey]) -> None:
        self.tiers, self.host, self.disk, self.gone = tiers, host, disk, gone
        self.restored: list[CacheKey] = []
        self._memory = bytearray((PLACES + 1) * PAGE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def source(self, number: int, size: int = PAGE, place: int | None = None, tenant: str = "default") -> Source:
        """Return where cache ``number`` is in the device's memory, without its bytes."""
        address = self._start + (number if place is None else place) % PLACES * PAGE
        return Source(key_of(number, tenant), None, address, size)

    def written(self, number: int, *args: Any, **kwargs: Any) -> Source:
        """Return it with its bytes."""
        source = self.source(number, *args, **kwargs)
        source.view()[:] = content_of(number, source.size_bytes)
        return source

    async def demote(self, *numbers: int, **kwargs: Any) -> list[bool]:
        """Demote caches, and use their memory again at once."""
        sources = [self.written(number, **kwargs) for number in numbers]
        kept = await self.tiers.demote(sources)
        self.overwrite(sources)
        return kept

    async def copy_ahead(self, *numbers: int) -> list[bool]:
        return await self.tiers.copy_ahead([self.written(number) for number in numbers])

    async def fill(self, *numbers: int, **kwargs: Any) -> list[bool]:
        """Bring caches up into other memory, and check what is said to be there."""
        targets = [self.source(number, place=number + PLACES // 2, **kwargs) for number in numbers]
        self.overwrite(targets)
        filled = await self.tiers.fill(targets)
        for number, target, there in zip(numbers, targets, filled, strict=True):
            assert not there or target.view() == content_of(number, target.size_bytes), number
        return filled

    def overwrite(self, sources: Sequence[Source]) -> None:
        for source in sources:
            source.view()[:] = b"\xff" * source.size_bytes

    def found(self, *numbers: int) -> list[str | None]:
        return [self.tiers.find(key_of(number)) for number in numbers]

    def memory_of(self, number: int) -> memoryview:
        """Where a cache lies in the host tier."""
        entry = self.host.index.get(key_of(number))
        return view_at(entry.address, entry.size_bytes)

    async def saved(self) -> None:
        """Return when no write to the disk is under way."""
        async with asyncio.timeout(DEADLINE_S):
            while self.tiers._contents.under_way._works:
                await self.tiers._contents.under_way.idle(list(self.tiers._contents.under_way._works))

    def check(self) -> None:
        if self.host is not None and not self.tiers._closed:
            self.host.check()
        assert not self.tiers._demotion.arrivals


OpenDevice = Callable[..., Awaitable[Device]]


@pytest.fixture
def faults() -> Iterator[Faults]:
    fresh = FaultyFileSystem.faults = Faults()
    yield fresh
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]


class Gate:
    """Holds the threads that copy until it is opened."""

    def __init__(self) -> None:
        self.copying = threading.Event()
        self._open = threading.Event()

    def check(self) -> None:
        self.copying.set()
        assert self._open.wait(DEADLINE_S), "a gate was never opened"

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.copying.wait, DEADLINE_S)

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()
        self.copying.clear()


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate in front of each copy; batches of any size are copied in a thread."""
    gate, real = Gate(), mover._copy

    def copy(moves: Sequence[mover.Move]) -> None:
        if moves:
            gate.check()
        real(moves)

    monkeypatch.setattr(mover, "_copy", copy)
    monkeypatch.setattr(mover, "_INLINE_BYTES", 0)
    yield gate
    gate.open()


@pytest.fixture
async def open_device(faults: Faults) -> AsyncIterator[OpenDevice]:
    """Opens tiers: ``pages`` of host memory (0: no host tier), a disk at ``where`` (None: no disk)."""
    devices: list[Device] = []
    backends: list[HostBackend] = []
    before = len(os.listdir("/proc/self/fd"))

    async def open_it(
        pages: int,
        where: Any = None,
        budget_bytes: int = 1 << 30,
        start_deadline_s: float = DEADLINE_S,
        **options: Any,
    ) -> Device:
        gone: list[CacheKey] = []
        host = disk = None
        if pages:
            backends.append(HostBackend(1 << 30))
            host = HostTier(backends[-1], pages * PAGE, PAGE)
        if where is not None:
            disk = DiskTier(folder_at(where) if isinstance(where, str) else where, budget_bytes)
        device = Device(LowerTiers(host, disk, gone.extend, **options), host, disk, gone)
        devices.append(device)
        device.tiers._start_deadline_s = start_deadline_s  # a busy machine is not a store that hangs
        device.restored = await device.tiers.start()
        return device

    yield open_it
    for gate in faults.gates.values():
        gate.set()
    for device in devices:
        device.check()
        await device.tiers.close()
    for backend in backends:
        backend.close()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    devices.clear()
    # (Fewer: a cycle that an earlier test of this process left, an event loop's, was collected meanwhile.)
    assert len(os.listdir("/proc/self/fd")) <= before, "descriptors stay open"
