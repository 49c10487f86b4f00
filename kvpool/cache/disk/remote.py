"""A folder of any other store that ``fsspec`` reaches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from kvpool.cache.disk.file_names import TEMPORARY_SUFFIX, packed_path
from kvpool.cache.disk.folder import Found, NewFile, PackRead

# Stores in which a put is seen whole or not at all: a temporary name would only cost a second copy.
_ATOMIC_PUT = frozenset({"memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "r2"})
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


class RemoteFolder:
    """Files of a store that takes and gives whole files; what it has confirmed it keeps.

    No lock: such stores have none. One pool alone may use the folder, each of its devices a folder of its own below it.

    Parameters
    ----------
    filesystem
        An ``fsspec`` file system.
    path
        Of the folder, without the scheme.
    """

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem = filesystem
        self._root = path.rstrip("/")
        protocol = filesystem.protocol
        protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        self._atomic_put = not _ATOMIC_PUT.isdisjoint(protocols)
        self.url = f"{protocols[0]}://{self._root.lstrip('/')}"

    @property
    def takes_packs(self) -> bool:
        return False  # no such store lets a part of a file go

    def open(self) -> None:
        self._filesystem.invalidate_cache()
        self._filesystem.makedirs(self._root, exist_ok=True)

    def close(self) -> None:
        pass

    def list(self, path: str) -> Iterator[Found]:
        folder = self._path(path)
        try:
            entries = self._filesystem.ls(folder, detail=True)
        except FileNotFoundError:  # in an object store an empty folder does not exist
            return
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if name and entry["name"].rstrip("/") != folder:
                yield Found(name, entry["type"] == "directory", int(entry.get("size") or 0), _modified_s(entry))

    def size(self, path: str) -> int | None:
        self._filesystem.invalidate_cache(self._path(path.rpartition("/")[0]))
        try:
            return int(self._filesystem.info(self._path(path))["size"])
        except FileNotFoundError:
            return None

    def write(self, path: str, parts: Iterable[bytes | memoryview]) -> None:
        final = self._path(path)
        content = b"".join(parts)  # the one copy: drivers take a whole file as bytes
        if self._atomic_put:
            self._filesystem.pipe_file(final, content)
            return
        folder = self._path(path.rpartition("/")[0])
        if folder != self._root:
            self._filesystem.makedirs(folder, exist_ok=True)
        temporary = final + TEMPORARY_SUFFIX
        try:
            self._filesystem.pipe_file(temporary, content)
            self._rename(temporary, final)
        except Exception:
            with contextlib.suppress(Exception):  # the first error is the one to tell; the next start removes the file
                self._filesystem.rm_file(temporary)
            raise

    def _rename(self, temporary: str, final: str) -> None:
        try:
            self._filesystem.mv(temporary, final)
        except Exception:
            # Some drivers rename to no name that is taken, as that of the models that content is of may be.
            if not self._filesystem.exists(final):
                raise
            self._filesystem.rm_file(final)
            self._filesystem.mv(temporary, final)

    def write_together(self, files: Sequence[NewFile]) -> None:
        for path, parts in files:
            self.write(path, parts)

    def read(self, path: str, parts: Sequence[bytearray | memoryview]) -> int:
        content = memoryview(self._filesystem.cat_file(self._path(path)))
        if len(content) == sum(map(len, parts)):
            start = 0
            for part in parts:
                part[:] = content[start : start + len(part)]
                start += len(part)
        return len(content)

    def read_packed(self, pack: str, reads: Sequence[PackRead]) -> Sequence[int | None]:
        return [None] * len(reads)  # see takes_packs

    def remove(self, path: str) -> None:
        try:
            self._filesystem.rm_file(self._path(path))
        except FileNotFoundError:
            return

    def remove_packed(self, pack: str, names: Sequence[str]) -> None:
        for name in names:  # there are none, but for names that somebody made by hand
            self.remove(packed_path(pack, name))

    def sync(self, path: str) -> None:
        pass

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


def _modified_s(entry: dict[str, Any]) -> float:
    for name in _TIMES:
        value = entry.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
