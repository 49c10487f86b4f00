"""A folder of this machine. Not through ``fsspec``, whose local files are neither synced nor surely renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kvpool.cache.disk.file_names import LOCK_NAME, TEMPORARY_SUFFIX, is_pack, split_pack
from kvpool.cache.disk.folder import Found, NewFile, PackRead
from kvpool.cache.disk.local_packs import LocalPacks, gives_room_back
from kvpool.cache.disk.parts import begin_to_write_out, read_all, write_all
from kvpool.errors import TierError

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC

_LOOK_S = 0.001
"""How long to leave others who look whether a folder is in use, which takes microseconds."""


class FolderLostError(OSError):
    """The folder that was taken does not lie at its place any more: what is missing there may come back with it."""


class LocalFolder:
    """Files of a local folder: private to the user, synced and renamed, read into place by the kernel.

    The folder is locked with ``flock``, which ends with the process however that dies. The folder itself is only
    created by :meth:`open`: when it vanishes later, a disk may have been unmounted, and writing to what lies below the
    mount point would fill the wrong disk. Nor does a file that is not there mean anything then: it comes back with the
    folder. So whatever relies on a missing name, or makes one, first makes sure that the folder is the one that was
    locked; ``FolderLostError`` if not.

    Parameters
    ----------
    path
        Of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self._root = Path(path)
        self.url = f"file://{self._root}"
        self._lock: int | None = None
        self._packs = LocalPacks(self._root)
        self._durable: set[str] = set()  # folders whose own names are on disk
        self.takes_packs = False

    def open(self) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if not _take(lock):
                raise TierError(
                    f"{self.url} is in use by another process: give each device a folder of its own (a pool of the "
                    "same name in another cluster has the same folder: name one of them differently)",
                    cause="locked",
                )
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        # Else what is removed from a pack would keep its room until all have gone.
        self.takes_packs = gives_room_back(lock)

    def is_in_use(self) -> bool:
        """Whether a process has the folder; none is told where locks do not reach the machine on which it runs."""
        try:
            lock = os.open(self._root / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def list(self, path: str) -> Iterator[Found]:
        try:
            with _too_long_is_missing():
                listing = os.scandir(self._root / path)
        except FileNotFoundError:
            self._check()
            if not path:
                raise
            return
        unread: OSError | None = None
        with listing:
            for entry in listing:
                try:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # removed since it was listed
                    continue
                if path and is_pack(entry.name) and stat.S_ISREG(status.st_mode):
                    try:
                        yield from self._packs.list(path, entry.name, status.st_mtime)
                        if self._lock is not None:  # else another process may be at it
                            self._packs.take_over(f"{path}/{entry.name}")
                    except FileNotFoundError:  # removed since it was listed
                        continue
                    except OSError as error:  # one that cannot be read does not hide the others
                        unread = error
                else:
                    yield Found(entry.name, is_folder, status.st_size, status.st_mtime)
        if unread is not None:
            raise unread

    def size(self, path: str) -> int | None:
        packed = split_pack(path)
        try:
            if packed is not None:
                return self._packs.size(*packed)
            return os.stat(self._root / path, follow_symlinks=False).st_size
        except FileNotFoundError:
            self._check()
            return None

    def write(self, path: str, parts: Iterable[bytes | memoryview]) -> None:
        self.write_together(((path, parts),))

    def write_together(self, files: Sequence[NewFile]) -> None:
        self._check()
        finals: dict[Path, Path] = {}
        try:
            with contextlib.ExitStack() as opened:
                unsynced: list[int] = []
                for path, parts in files:
                    temporary, final = self._root / (path + TEMPORARY_SUFFIX), self._root / path
                    file = self._open_new(temporary)
                    opened.callback(os.close, file)
                    finals[temporary] = final
                    write_all(file, parts)
                    begin_to_write_out(file)  # the disk is at it while the next is copied
                    unsynced.append(file)
                for file in unsynced:
                    os.fsync(file)
            while finals:
                temporary, final = next(iter(finals.items()))
                os.replace(temporary, final)
                del finals[temporary]
        except Exception:
            for temporary in finals:
                # The first error is the one to tell; the next start removes the file.
                with contextlib.suppress(OSError):
                    temporary.unlink()
            raise

    def _open_new(self, temporary: Path) -> int:
        try:
            return os.open(temporary, _NEW_FILE, 0o600)
        except FileNotFoundError:
            self._make(temporary.parent)
            return os.open(temporary, _NEW_FILE, 0o600)

    def read(self, path: str, parts: Sequence[bytearray | memoryview]) -> int:
        try:
            file = os.open(self._root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            self._check()
            raise
        try:
            size_bytes = os.fstat(file).st_size
            if size_bytes == sum(map(len, parts)) and not read_all(file, parts):
                return os.fstat(file).st_size  # it was cut while it was read
            return size_bytes
        finally:
            os.close(file)

    def read_packed(self, pack: str, reads: Sequence[PackRead]) -> Sequence[int | None]:
        there: Sequence[int | None]
        try:
            there = self._packs.read(pack, reads)
        except FileNotFoundError:
            there = [None] * len(reads)
        if None in there:
            self._check()
        return there

    def remove(self, path: str) -> None:
        packed = split_pack(path)
        if packed is not None:
            self.remove_packed(packed[0], (packed[1],))
            return
        try:
            with _too_long_is_missing():
                (self._root / path).unlink()
        except FileNotFoundError:
            self._check()

    def remove_packed(self, pack: str, names: Sequence[str]) -> None:
        try:
            self._packs.remove(pack, names)
        except FileNotFoundError:
            self._check()

    def sync(self, path: str) -> None:
        self._check()  # what is removed or durable is acknowledged by this, and it must be so in the right folder
        if path:
            self._packs.sync(path)
        if not self._sync_names(path):
            if not path:
                raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(self._root))
            return
        if path and path not in self._durable:  # made by this life, or by one that was killed before this
            self._sync_names("")
            self._durable.add(path)

    def _sync_names(self, path: str) -> bool:
        """Sync what a folder lists; False if there is none: then no name in it can come back."""
        try:
            with _too_long_is_missing():
                folder = os.open(self._root / path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._check()
            return False
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return True

    def _check(self) -> None:
        """Raise unless the folder is the one that was locked. (While that is open, its inode is not given anew.)"""
        if self._lock is None:
            return
        try:
            there = os.stat(self._root / LOCK_NAME, follow_symlinks=False)
            mine = os.path.samestat(there, os.fstat(self._lock))
        except FileNotFoundError:
            mine = False
        if not mine:
            raise FolderLostError(
                errno.ESTALE,
                f"{self._root} is not the folder that was opened any more (its {LOCK_NAME} is missing or another): was "
                "its disk unmounted, or the folder moved or removed? It is used again when it is back",
            )

    def _make(self, folder: Path) -> None:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)  # without parents: see the class
            self._durable.discard(folder.name)  # somebody has removed the one before


def _take(lock: int) -> bool:
    """Lock a file for this process alone; False if another one has it."""
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Others only look, as devices that start do at each other's folders: see LocalFolder.is_in_use.
        fcntl.flock(lock, fcntl.LOCK_UN)
        time.sleep(_LOOK_S)


@contextlib.contextmanager
def _too_long_is_missing() -> Iterator[None]:
    """A name that the file system refuses as too long names nothing there: else it could never be removed for sure."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise FileNotFoundError(errno.ENOENT, str(error)) from error
