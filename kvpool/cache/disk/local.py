"""A folder of this machine. Not through ``fsspec``, whose local files are neither synced nor surely renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from kvpool.cache.disk.folder import Found
from kvpool.cache.disk.names import LOCK_NAME, TEMPORARY_SUFFIX
from kvpool.errors import TierError

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_PARTS = 64


class LocalFolder:
    """Files of a local folder: private to the user, synced and renamed, read into place by the kernel.

    The folder is locked with ``flock``, which ends with the process however that dies. The folder itself is only
    created by :meth:`open`: when it vanishes later, a disk may have been unmounted, and writing to what lies below the
    mount point would fill the wrong disk.

    Parameters
    ----------
    path
        Of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self._root = Path(path)
        self.url = f"file://{self._root}"
        self._lock: int | None = None

    def open(self) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise TierError(
                f"{self.url} is in use by another process: give each device a folder of its own", cause="locked"
            ) from None
        except OSError:
            os.close(lock)
            raise
        self._lock = lock

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def list(self, path: str) -> Iterator[Found]:
        try:
            listing = os.scandir(self._root / path)
        except FileNotFoundError:
            if not path:
                raise
            return
        with listing:
            for entry in listing:
                try:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # removed since it was listed
                    continue
                yield Found(entry.name, is_folder, status.st_size, status.st_mtime)

    def size(self, path: str) -> int | None:
        try:
            return os.stat(self._root / path, follow_symlinks=False).st_size
        except FileNotFoundError:
            return None

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        final = self._root / path
        temporary = self._root / (path + TEMPORARY_SUFFIX)
        try:
            file = os.open(temporary, _NEW_FILE, 0o600)
        except FileNotFoundError:
            self._make(final.parent)
            file = os.open(temporary, _NEW_FILE, 0o600)
        try:
            try:
                _write_all(file, parts)
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(temporary, final)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to tell; the next start removes the file
                temporary.unlink()
            raise

    def read(self, path: str, parts: Sequence[bytearray | memoryview]) -> int:
        file = os.open(self._root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            size_bytes = os.fstat(file).st_size
            if size_bytes == sum(map(len, parts)) and not _read_all(file, parts):
                return os.fstat(file).st_size  # it was cut while it was read
            return size_bytes
        finally:
            os.close(file)

    def remove(self, path: str) -> None:
        (self._root / path).unlink(missing_ok=True)

    def sync(self, path: str) -> None:
        try:
            folder = os.open(self._root / path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # then no name in it can come back
            if not path:
                raise
            return
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _make(self, folder: Path) -> None:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)  # without parents: see the class
        self.sync("")


def _write_all(file: int, parts: Sequence[bytes | memoryview]) -> None:
    left = [memoryview(part).cast("B") for part in parts]
    while left:
        _advance(left, os.writev(file, list(islice(left, _MOST_PARTS))))


def _read_all(file: int, parts: Sequence[bytearray | memoryview]) -> bool:
    """Fill all parts from the file's start; False if it ends before."""
    left = [memoryview(part).cast("B") for part in parts]
    offset = 0
    while left:
        count = os.preadv(file, list(islice(left, _MOST_PARTS)), offset)
        if not count and any(map(len, left)):
            return False
        offset += count
        _advance(left, count)
    return True


def _advance(left: list[memoryview], count: int) -> None:
    """Take the first ``count`` bytes off ``left``: one call moves at most 2 GiB, or less when it is interrupted."""
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if count:
        left[0] = left[0][count:]
