"""Packs of a local folder: reading a cache, listing, and removing one so that the file system has its room again."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvpool.cache.disk.folder import Found
from kvpool.cache.disk.names import cache_name, parse_cache
from kvpool.cache.disk.pack import PLACE_BYTES, UNIT_BYTES, Packed, Table, parse_table
from kvpool.cache.disk.parts import read_all

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHANGE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_STRIPES = 16
_BLOCK_COUNT_BYTES = 512  # what st_blocks counts in
_SPARE_BYTES = 64 << 10  # what a file system may take for a file's own map


class LocalPacks:
    """What is in packs, by the path of the pack and the name of the cache. A pack that is not there: FileNotFoundError.

    A cache is removed by zeros over its place in the table, and a hole where it was; the last takes the file with it.
    Zeros that are not on disk yet could be undone by a failure of power, as a name that is removed could: :meth:`sync`.

    Parameters
    ----------
    root
        The folder in which the packs' paths begin.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        # Two threads may remove two caches of a pack: one of them is the last.
        self._changing = [threading.Lock() for _ in range(_STRIPES)]
        self._changed_lock = threading.Lock()
        self._changed: dict[str, set[int]] = {}
        self._syncing = threading.Lock()

    def read(self, pack: str, name: str, parts: Sequence[bytearray | memoryview]) -> int:
        """Fill ``parts`` with a cache's header and payload if it has as many bytes; returns how many there are."""
        with self._opened(pack, _READ) as file:
            table = _read_table(file)
            if table is None:
                return 0
            packed = _find(table, name)
            if packed is None:
                raise FileNotFoundError(f"{self._root / pack} has no cache {name}")
            if packed.file_bytes == sum(map(len, parts)) and read_all(file, parts, packed.start):
                return packed.file_bytes
            return _there_bytes(packed, file)

    def size(self, pack: str, name: str) -> int | None:
        """Return the bytes of a cache, header included, or None if it is not there."""
        with self._opened(pack, _READ) as file:
            table = _read_table(file)
            packed = None if table is None else _find(table, name)
            return None if packed is None else _there_bytes(packed, file)

    def list(self, folder: str, pack: str, modified_s: float) -> Iterator[Found]:
        """Yield the caches of a pack, or the pack itself if its table is no good."""
        path = f"{folder}/{pack}"
        with self._opened(path, _READ) as file:
            table = _read_table(file)
            size_bytes = os.fstat(file).st_size
            if table is None:
                yield Found(pack, False, size_bytes, modified_s)
                return
            for packed in table.caches:
                name = cache_name(packed.name._replace(pack=pack))
                # Not the time of the file: a removal changes that.
                yield Found(name, False, _there_bytes(packed, file), table.written_ns / 1e9)
        if table.removed_places:
            self._note_change(path, None)  # an earlier life may not have synced it
            self._make_holes(path)

    def remove(self, pack: str, name: str) -> None:
        """Remove a cache; the pack with it if it was the last, or if nothing can be told from its table."""
        with self._changing[hash(pack) % _STRIPES], self._opened(pack, _CHANGE) as file:
            table = _read_table(file)
            packed = None if table is None else _find(table, name)
            if table is not None and packed is None:
                return
            if table is None or packed is None or len(table.caches) == 1:
                os.unlink(self._root / pack)
                with self._changed_lock:
                    self._changed.pop(pack, None)
                return
            described = os.pread(file, PLACE_BYTES, packed.place)
            os.pwrite(file, bytes(PLACE_BYTES), packed.place)
            try:
                punch_hole(file, packed.start, packed.end - packed.start)
            except OSError:
                os.pwrite(file, described, packed.place)  # it takes room still, so it is still there
                raise
            self._note_change(pack, packed.place)

    def sync(self, folder: str) -> None:
        """Return when no cache that was removed from a pack of a folder so far comes back after a failure of power."""
        with self._syncing:  # who finds nothing to do must wait for who has taken it
            with self._changed_lock:
                packs = [pack for pack in self._changed if pack.startswith(f"{folder}/")]
                changed = {pack: self._changed.pop(pack) for pack in packs}
            try:
                for pack in packs:
                    self._sync(pack, changed[pack])
                    del changed[pack]
            finally:
                with self._changed_lock:
                    for pack, places in changed.items():
                        self._changed.setdefault(pack, set()).update(places)

    def _sync(self, pack: str, places: set[int]) -> None:
        try:
            with self._opened(pack, _CHANGE) as file:
                for place in places:  # again: what a sync before has failed to write is not written by the next
                    os.pwrite(file, bytes(PLACE_BYTES), place)
                os.fsync(file)
        except FileNotFoundError:  # it went as a whole, and the folder's sync is what tells that
            return

    def _note_change(self, pack: str, place: int | None) -> None:
        with self._changed_lock:
            places = self._changed.setdefault(pack, set())
            if place is not None:
                places.add(place)

    def _make_holes(self, pack: str) -> None:
        """Give back the room of caches whose removal was killed before it did."""
        with self._changing[hash(pack) % _STRIPES], self._opened(pack, _CHANGE) as file:
            table, status = _read_table(file), os.fstat(file)
            if table is None:
                return
            needed_bytes = UNIT_BYTES + sum(packed.end - packed.start for packed in table.caches) + _SPARE_BYTES
            if status.st_blocks * _BLOCK_COUNT_BYTES > needed_bytes:
                for start, length in table.holes(status.st_size):
                    punch_hole(file, start, length)

    @contextmanager
    def _opened(self, pack: str, flags: int) -> Iterator[int]:
        file = os.open(self._root / pack, flags)
        try:
            yield file
        finally:
            os.close(file)


def gives_room_back(file: int) -> bool:
    """Whether the file system of a file that is open for writing takes back the room of 4 KiB of it."""
    try:
        if os.fstatvfs(file).f_frsize > UNIT_BYTES:
            return False
        punch_hole(file, 0, UNIT_BYTES)
    except OSError:
        return False
    return True


def punch_hole(file: int, start: int, length: int) -> None:
    """Make a part of a file read as zeros and take no room."""
    if _fallocate is None:
        raise OSError("this system has no fallocate()")
    if _fallocate(file, _KEEP_SIZE | _PUNCH_HOLE, start, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _read_table(file: int) -> Table | None:
    return parse_table(os.pread(file, UNIT_BYTES, 0))


def _find(table: Table, name: str) -> Packed | None:
    parsed = parse_cache(name)
    return None if parsed is None else table.find(parsed)


def _there_bytes(packed: Packed, file: int) -> int:
    """Return the bytes of a cache as far as its pack has them: less if it was cut."""
    return max(0, min(packed.file_bytes, os.fstat(file).st_size - packed.start))


_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
