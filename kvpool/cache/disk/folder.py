"""Where the tier's files lie: what it asks of any store, and which store a URL means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from kvpool.errors import ConfigError


class Found(NamedTuple):
    """An entry of a folder."""

    name: str
    is_folder: bool
    size_bytes: int
    modified_s: float
    """When it was last written, seconds of the store's clock; 0 where the store does not tell."""


class Folder(Protocol):
    """A folder of files, in which names have at most one ``/``. All calls block and may raise anything an I/O can.

    A cache in a pack (:mod:`~kvpool.cache.disk.pack`) is listed, measured, read and removed by a path of its own, as a
    file is (:func:`~kvpool.cache.disk.names.split_pack`). Used by several threads at once, but never for one file, or
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

    def write(self, path: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file: whole or not at all, its bytes on disk before its name is there."""
        ...

    def read(self, path: str, parts: Sequence[bytearray | memoryview]) -> int:
        """Fill ``parts`` with a file's bytes if it has as many as they take; returns its size in any case."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, or a cache from its pack. None of that name is no error."""
        ...

    def sync(self, path: str) -> None:
        """Return when the names written and removed in a folder so far survive a failure of power."""
        ...


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
