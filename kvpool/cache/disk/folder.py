"""Where the tier's files lie: what it asks of any store, and which store a URL means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from kvpool.cache.disk.file_names import CacheName, packed_path, split_pack
from kvpool.errors import ConfigError


class Found(NamedTuple):
    """An entry of a folder."""

    name: str
    is_folder: bool
    size_bytes: int
    modified_s: float
    """When it was last written, seconds of the store's clock; 0 where the store does not tell."""


PackRead = tuple[CacheName, Sequence[bytearray | memoryview]]
"""A cache, named without its pack, and what its header and payload are read into."""


NewFile = tuple[str, Iterable[bytes | memoryview]]
"""A file to be written: its path, and its parts, which are of single bytes."""


class Folder(Protocol):
    """A folder of files, in which names have at most one ``/``. All calls block and may raise anything an I/O can.

    A cache in a pack (:mod:`~kvpool.cache.disk.pack`) is listed, measured and removed by a path of its own, as a file
    is (:func:`~kvpool.cache.disk.file_names.split_pack`). Used by several threads at once, but never for one file, or
    one cache of a pack, at the same time.
    """

    url: str

    @property
    def takes_packs(self) -> bool:
        """Whether packs may be written: told once the folder is open."""
        ...

    def open(self) -> None:
        """Create the folder where there is none, and take it for this process alone where the store can do that.

        Raises
        ------
        TierError
            If another process has it.
        """
        ...

    def close(self) -> None:
        """Let others have the folder."""
        ...

    def list(self, path: str) -> Iterator[Found]:
        """Yield what lies in the folder itself (``""``) or in one of its folders, if that exists.

        For a pack its caches are told, or the pack itself where its table is no good.
        """
        ...

    def size(self, path: str) -> int | None:
        """Return the bytes of a file, or of a cache in a pack, or None if there is none."""
        ...

    def write(self, path: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file: whole or not at all, its bytes on disk before its name is there. Parts are of single bytes."""
        ...

    def write_together(self, files: Sequence[NewFile]) -> None:
        """Write several files, each as :meth:`write` does, at once where that is faster; with an error some are there.

        Asked for only where packs may be written.
        """
        ...

    def read(self, path: str, parts: Sequence[bytearray | memoryview]) -> int:
        """Fill ``parts`` with a file's bytes if it has as many as they take; returns its size in any case."""
        ...

    def read_packed(self, pack: str, reads: Sequence[PackRead]) -> Sequence[int | None]:
        """Do so with caches of the pack at a path; None for each that is not there, also where the pack is not."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, or a cache from its pack. None of that name is no error."""
        ...

    def remove_packed(self, pack: str, names: Sequence[str]) -> None:
        """Remove caches from the pack at a path: all, or, with an error, none. What is not there is no error."""
        ...

    def sync(self, path: str) -> None:
        """Return when the names written and removed in a folder so far survive a failure of power."""
        ...


def remove_all(folder: Folder, paths: Iterable[str]) -> dict[str, Exception]:
    """Remove files, and caches from their packs; returns the errors of those that stay."""
    errors: dict[str, Exception] = {}
    packs: dict[str, list[str]] = {}
    for path in paths:
        packed = split_pack(path)
        if packed is not None:
            packs.setdefault(packed[0], []).append(packed[1])
            continue
        try:
            folder.remove(path)
        except Exception as error:  # noqa: BLE001  drivers raise what they like; the caller counts it
            errors[path] = error
    for pack, names in packs.items():
        try:
            folder.remove_packed(pack, names)
        except Exception as error:  # noqa: BLE001  as above
            errors.update(dict.fromkeys((packed_path(pack, name) for name in names), error))
    return errors


def folder_at(url: str) -> Folder:
    """Return the folder that an ``fsspec`` URL means; a plain path is a local folder. Touches nothing yet.

    Raises
    ------
    ConfigError
        If the URL's scheme is unknown or its driver is not installed.
    """
    from kvpool.cache.disk.local import LocalFolder
    from kvpool.cache.disk.remote import RemoteFolder

    try:
        filesystem, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"disk tier at {url!r}: {error}", asked=url) from None
    if not path.strip("/"):
        raise ConfigError(f"disk tier at {url!r}: name a folder in that store, not all of it", asked=url)
    if type(filesystem) is LocalFileSystem:
        return LocalFolder(path)
    return RemoteFolder(filesystem, path)
