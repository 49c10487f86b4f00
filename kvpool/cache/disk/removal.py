"""Removals that hold: once decided on disk, a crash half-way does not bring a file back.

The names are first written to a file of their own. From then on all of them are to go: by the caller, or by the next
start. Only when they are gone for sure does that file go, too; and before it has, nothing is written under those names.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from kvpool.cache.disk.file_names import removal_name
from kvpool.cache.disk.folder import Folder, remove_all
from kvpool.cache.disk.index import DiskEntry

_MAGIC = b"kvpool removal 1\n"
_CHECKSUM_BYTES = 16
_MOST_BYTES = 1 << 30


class Removal:
    """Caches whose files must go. Its methods block.

    Parameters
    ----------
    number
        Tells the removals of a folder apart.
    entries
        The caches.
    """

    def __init__(self, number: int, entries: Iterable[DiskEntry]) -> None:
        self.number = number
        self.entries = tuple(entries)
        self.decided = False
        """It will be completed, whatever happens."""
        self.refused: Exception | None = None
        """Why it could not be written down when that was last tried."""
        self.completed = False
        """Nothing of it is left."""

    def add(self, entries: Iterable[DiskEntry]) -> None:
        """Let other files of its keys go, too. (What was written down names the keys: the next start finds these.)"""
        self.entries = tuple(dict.fromkeys((*self.entries, *entries)))

    def decide(self, folder: Folder) -> None:
        """Write the removal down."""
        content = _MAGIC + "\n".join(entry.path for entry in self.entries).encode()
        folder.write(removal_name(self.number), (content, xxhash.xxh3_128_digest(content)))
        folder.sync("")
        self.decided = True

    def complete(self, folder: Folder) -> None:
        """Remove the files, then what was written down. Raises the first error once all have been tried."""
        paths = [entry.path for entry in self.entries]
        for error in remove_all(folder, paths).values():
            raise error
        for space in sorted({path.partition("/")[0] for path in paths}):
            folder.sync(space)
        folder.remove(removal_name(self.number))
        folder.sync("")
        self.completed = True


def read_removal(folder: Folder, number: int, size_bytes: int) -> Removal | None:
    """Return a removal that was decided in an earlier life, or None if its file is not what it should be."""
    if not len(_MAGIC) + _CHECKSUM_BYTES <= size_bytes <= _MOST_BYTES:
        return None
    content = bytearray(size_bytes)
    if folder.read(removal_name(number), (content,)) != size_bytes:
        return None
    named, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if not named.startswith(_MAGIC) or xxhash.xxh3_128_digest(named) != checksum:
        return None
    entries = [DiskEntry.at(path) for path in named[len(_MAGIC) :].decode().split("\n")]
    removal = Removal(number, (entry for entry in entries if entry is not None))
    removal.decided = True
    return removal if None not in entries else None
