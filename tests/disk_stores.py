"""Keys and contents for tests of the disk tier, and stores that fail on demand."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from kvpool.cache.disk.file_names import packed_path
from kvpool.cache.disk.folder import Found, NewFile, PackRead, folder_at
from kvpool.cache.disk.pack import rounded_up
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.key import CacheKey, encode_block_id

DEADLINE_S = 60.0


def key_of(number: int, tenant: str = "default", fingerprint: str = "f") -> CacheKey:
    return CacheKey(tenant, fingerprint, encode_block_id(number))


def content_of(number: int, size_bytes: int = 5000) -> memoryview:
    return memoryview((number.to_bytes(8, "little") * (size_bytes // 8 + 1))[:size_bytes])


async def read(tier: DiskTier, key: CacheKey) -> bytes | None:
    """What the tier has under a key, or None for a miss."""
    entry = tier.find(key)
    into = bytearray(entry.size_bytes if entry else 1)
    return bytes(into) if await tier.read_into(key, memoryview(into)) else None


class Faults:
    """Errors to raise and gates to wait at, by the name of an operation."""

    def __init__(self) -> None:
        self.errors: dict[str, BaseException] = {}
        self.gates: dict[str, threading.Event] = {}
        self.arrived = threading.Semaphore(0)
        """Released by each operation that waits at a gate."""

    def check(self, operation: str) -> None:
        gate = self.gates.get(operation)
        if gate is not None:
            self.arrived.release()
            assert gate.wait(DEADLINE_S), "a gate was never opened"
        if operation in self.errors:
            raise self.errors[operation]


async def arrived(faults: Faults, count: int = 1) -> None:
    """Return when so many operations of the store wait at a gate."""
    for _ in range(count):
        assert await asyncio.to_thread(faults.arrived.acquire, timeout=DEADLINE_S)


class FaultyFileSystem(MemoryFileSystem):
    """``faulty://``: the memory file system, with faults."""

    protocol = ("faulty", "memory")
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    faults = Faults()

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("faulty://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.faults.check("put")
        super().pipe_file(path, value, mode, **kwargs)
        self.faults.check("put_answer")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        self.faults.check("get")
        return super().cat_file(path, start, end, **kwargs)

    def _rm(self, path: str) -> None:
        self.faults.check("delete")
        super()._rm(path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self.faults.check("list")
        return super().ls(path, detail, **kwargs)


class MovingFileSystem(MemoryFileSystem):
    """``moving://``: the memory file system as one of the stores that need a temporary name."""

    protocol = "moving"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("moving://"))


register_implementation("moving", MovingFileSystem, clobber=True)
register_implementation("faulty", FaultyFileSystem, clobber=True)


class FaultyFolder:
    """Any folder, with faults in its operations."""

    def __init__(self, url: str, faults: Faults) -> None:
        self._folder, self._faults, self.url = folder_at(url), faults, url

    @property
    def takes_packs(self) -> bool:
        return self._folder.takes_packs

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._folder, name)

        def checked(*args: Any) -> Any:
            self._faults.check(name)
            return operation(*args)

        return checked

    def read_packed(self, pack: str, reads: Sequence[PackRead]) -> Sequence[int | None]:
        self._faults.check("read")
        return self._folder.read_packed(pack, reads)

    def write_together(self, files: Sequence[NewFile]) -> None:
        self._faults.check("write")
        self._folder.write_together(files)

    def remove_packed(self, pack: str, names: Sequence[str]) -> None:
        self._faults.check("remove")
        self._folder.remove_packed(pack, names)

    def list(self, path: str) -> Iterator[Found]:
        self._faults.check("list")
        return self._folder.list(path)


class SmallFolder(FaultyFolder):
    """Any folder, on a disk with room for so many bytes more, which a file that does not fit leaves as it was."""

    def __init__(self, url: str, room_bytes: int) -> None:
        super().__init__(url, Faults())
        self.room_bytes = room_bytes

    def write(self, path: str, parts: Iterable[bytes | memoryview]) -> None:
        written = [bytes(part) for part in parts]
        size_bytes = sum(map(len, written))
        if size_bytes > self.room_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room_bytes -= size_bytes
        self._folder.write(path, written)

    def write_together(self, files: Sequence[NewFile]) -> None:
        for path, parts in files:
            self.write(path, parts)


class FullDisk(FaultyFolder):
    """Any folder, on a disk of so many bytes, of which what is removed gives its own back.

    ``crowded`` says how many writes of a file that holds a cache find no room more, as they do where the files of
    others that are being written have it for a moment.
    """

    def __init__(self, url: str, room_bytes: int) -> None:
        super().__init__(url, Faults())
        self.room_bytes = room_bytes
        self.crowded: Counter[bytes] = Counter()
        self._changing = threading.Lock()

    def write(self, path: str, parts: Iterable[bytes | memoryview]) -> None:
        written = b"".join(map(bytes, parts))
        with self._changing:
            crowded = [content for content in self.crowded if content in written]
            self.crowded.subtract(crowded)
            self.crowded = +self.crowded
            if crowded or rounded_up(len(written)) > self.room_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            self._folder.write(path, (written,))
            self.room_bytes -= rounded_up(len(written))

    def write_together(self, files: Sequence[NewFile]) -> None:
        for path, parts in files:
            self.write(path, parts)

    def remove(self, path: str) -> None:
        self._free((path,))
        self._folder.remove(path)

    def remove_packed(self, pack: str, names: Sequence[str]) -> None:
        self._free([packed_path(pack, name) for name in names])
        self._folder.remove_packed(pack, names)

    def _free(self, paths: Iterable[str]) -> None:
        with self._changing:
            self.room_bytes += sum(rounded_up(self._folder.size(path) or 0) for path in paths)


def refuse_the_first_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full for the first write of a file's parts, and no other."""
    real, fails = os.writev, [True]

    def writev(file: int, parts: Sequence[memoryview]) -> int:
        if fails:
            fails.clear()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, parts)

    monkeypatch.setattr(os, "writev", writev)
