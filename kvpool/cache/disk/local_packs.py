"""Packs of a local folder: reading a cache, listing, and removing one so that the file system has its room again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvpool.cache.disk.file_names import cache_name, parse_cache
from kvpool.cache.disk.folder import Found, PackRead
from kvpool.cache.disk.pack import (
    MOST_TABLE_BYTES,
    PLACE_BYTES,
    UNIT_BYTES,
    BadTableError,
    Packed,
    find_packed,
    has_others,
    parse_table,
    rounded_up,
)
from kvpool.cache.disk.parts import read_all

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHANGE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_STRIPES = 16
_SYNCS_AT_ONCE = 4
_BLOCK_COUNT_BYTES = 512  # what st_blocks counts in
_BETWEEN = memoryview(bytearray(UNIT_BYTES))
"""Where all threads read what stands between caches: nobody looks at it."""
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

    def read(self, pack: str, reads: Sequence[PackRead]) -> list[int | None]:
        """Fill the parts of each cache with its header and payload if it has as many bytes.

        Returns
        -------
        list[int | None]
            For each how many bytes it has, None if it is not there. Nothing can be told, 0, if the table is no good.
        """
        with self._opened(pack, _READ) as file:
            table = os.pread(file, MOST_TABLE_BYTES, 0)
            try:
                found = [find_packed(table, name) for name, _ in reads]
            except BadTableError:
                return [0] * len(reads)
            wanted = [
                (packed, parts)
                for packed, (_, parts) in zip(found, reads, strict=True)
                if packed is not None and packed.file_bytes == sum(map(len, parts))
            ]
            for start, run in _neighbours(wanted):
                read_all(file, run, start)  # what was cut is told by its size
            size_bytes = os.fstat(file).st_size
            return [None if packed is None else _there_bytes(packed, size_bytes) for packed in found]

    def size(self, pack: str, name: str) -> int | None:
        """Return the bytes of a cache, header included, or None if it is not there."""
        with self._opened(pack, _READ) as file:
            try:
                packed = _find(os.pread(file, MOST_TABLE_BYTES, 0), name)
            except BadTableError:
                return None
            return None if packed is None else _there_bytes(packed, os.fstat(file).st_size)

    def list(self, folder: str, pack: str, modified_s: float) -> Iterator[Found]:
        """Yield the caches of a pack, or the pack itself if its table is no good."""
        path = f"{folder}/{pack}"
        with self._changing[hash(path) % _STRIPES], self._opened(path, _READ) as file:  # not half of a removal
            table = parse_table(os.pread(file, MOST_TABLE_BYTES, 0))
            size_bytes = os.fstat(file).st_size
        if table is None:
            yield Found(pack, False, size_bytes, modified_s)
            return
        for packed in table.caches:
            name = cache_name(packed.name._replace(pack=pack))
            # Not the time of the file: a removal changes that.
            yield Found(name, False, _there_bytes(packed, size_bytes), table.written_ns / 1e9)
        if table.removed_places:
            self._note_change(path, ())  # an earlier life may not have synced it

    def take_over(self, pack: str) -> None:
        """Make good what an earlier life did by halves in a pack that was listed: zeros not synced, holes not made."""
        with self._changed_lock:
            if pack not in self._changed:
                return
        with self._changing[hash(pack) % _STRIPES], self._opened(pack, _CHANGE) as file:
            table, status = parse_table(os.pread(file, MOST_TABLE_BYTES, 0)), os.fstat(file)
            if table is None or not table.removed_places:
                return
            self._note_change(pack, table.removed_places)
            needed_bytes = table.end + sum(packed.end - packed.start for packed in table.caches) + _SPARE_BYTES
            if status.st_blocks * _BLOCK_COUNT_BYTES > needed_bytes:
                with contextlib.suppress(OSError):  # the next start tries again
                    for start, length in table.holes(status.st_size):
                        punch_hole(file, start, length)

    def remove(self, pack: str, names: Sequence[str]) -> None:
        """Remove caches; the pack with them if no other is in it, or if nothing can be told from its table.

        Several at a time: a hole takes 2 to 4 ms, because the zeros that stand in the same pages are written before it.
        """
        with self._changing[hash(pack) % _STRIPES], self._opened(pack, _CHANGE) as file:
            table = os.pread(file, MOST_TABLE_BYTES, 0)
            try:
                gone = [packed for name in names if (packed := _find(table, name)) is not None]
                stays = has_others(table, [packed.place for packed in gone])
            except BadTableError:
                stays = False
            if not stays:
                os.unlink(self._root / pack)
                with self._changed_lock:
                    self._changed.pop(pack, None)
                return
            try:
                for packed in gone:
                    os.pwrite(file, bytes(PLACE_BYTES), packed.place)
                for start, length in _runs(gone):
                    punch_hole(file, start, length)
            except OSError:
                self._note_change(pack, ())  # of what cannot be written back the zeros must come to the disk
                for packed in gone:  # they take room still, so they are still there
                    os.pwrite(file, table[packed.place : packed.place + PLACE_BYTES], packed.place)
                raise
            self._note_change(pack, [packed.place for packed in gone])

    def sync(self, folder: str) -> None:
        """Return when no cache that was removed from a pack of a folder so far comes back after a failure of power."""
        with self._syncing:  # who finds nothing to do must wait for who has taken it
            with self._changed_lock:
                packs = [pack for pack in self._changed if pack.startswith(f"{folder}/")]
                changed = {pack: self._changed.pop(pack) for pack in packs}
            if not packs:
                return
            # At once: 2 ms each one by one, 0.2 by four threads, for which the journal commits together. After a start,
            # or many evictions, there may be thousands.
            with ThreadPoolExecutor(min(len(packs), _SYNCS_AT_ONCE), "kvpool-disk-pack") as threads:
                errors = list(threads.map(self._sync_or_keep, packs, changed.values()))
            for error in filter(None, errors):
                raise error

    def _sync_or_keep(self, pack: str, places: set[int]) -> Exception | None:
        """Sync a pack; where that fails it is to be synced still."""
        try:
            self._sync(pack, places)
        except Exception as error:  # noqa: BLE001  raised once all have been tried
            self._note_change(pack, places)
            return error
        return None

    def _sync(self, pack: str, places: set[int]) -> None:
        try:
            with self._opened(pack, _CHANGE) as file:
                for place in places:  # again: what a sync before has failed to write is not written by the next
                    os.pwrite(file, bytes(PLACE_BYTES), place)
                os.fsync(file)
        except FileNotFoundError:  # it went as a whole, and the folder's sync is what tells that
            return

    def _note_change(self, pack: str, places: Iterable[int]) -> None:
        with self._changed_lock:
            self._changed.setdefault(pack, set()).update(places)

    @contextlib.contextmanager
    def _opened(self, pack: str, flags: int) -> Iterator[int]:
        file = os.open(self._root / pack, flags)
        try:
            yield file
        finally:
            os.close(file)


def gives_room_back(file: int) -> bool:
    """Whether the file system of a file that is empty and open for writing takes back the room of 4 KiB of it."""
    try:
        if os.fstatvfs(file).f_frsize > UNIT_BYTES:
            return False
        try:
            os.pwrite(file, b"\1" * 3 * UNIT_BYTES, 0)
            os.fsync(file)  # before that none may have been given
            before = os.fstat(file).st_blocks
            punch_hole(file, UNIT_BYTES, UNIT_BYTES)
            return (before - os.fstat(file).st_blocks) * _BLOCK_COUNT_BYTES >= UNIT_BYTES
        finally:
            os.ftruncate(file, 0)
    except OSError:
        return False


def punch_hole(file: int, start: int, length: int) -> None:
    """Make a part of a file read as zeros and take no room."""
    if _fallocate is None:
        raise OSError("this system has no fallocate()")
    if _fallocate(file, _KEEP_SIZE | _PUNCH_HOLE, start, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _find(block: bytes, name: str) -> Packed | None:
    parsed = parse_cache(name)
    return None if parsed is None else find_packed(block, parsed)


def _neighbours(
    wanted: Iterable[tuple[Packed, Sequence[bytearray | memoryview]]],
) -> Iterator[tuple[int, list[bytearray | memoryview]]]:
    """Yield from where to read into what, caches that lie one behind the other in one go: a call costs 10 to 40 µs."""
    start = end = 0
    run: list[bytearray | memoryview] = []
    for packed, parts in sorted(wanted, key=lambda item: item[0].start):
        if run and packed.start == rounded_up(end):
            run.append(_BETWEEN[: packed.start - end])
        else:
            if run:
                yield start, run
            start, run = packed.start, []
        run += parts
        end = packed.start + packed.file_bytes
    if run:
        yield start, run


def _runs(caches: Iterable[Packed]) -> Iterator[tuple[int, int]]:
    """Yield the room of caches as start and length, that of neighbours in one."""
    start = end = 0
    for packed in sorted(caches, key=lambda packed: packed.start):
        if packed.start != end:
            if end:
                yield start, end - start
            start = packed.start
        end = packed.end
    if end:
        yield start, end - start


def _there_bytes(packed: Packed, pack_bytes: int) -> int:
    """Return the bytes of a cache as far as its pack has them: less if it was cut."""
    return max(0, min(packed.file_bytes, pack_bytes - packed.start))


_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
