"""A cache in memory of this process: what is brought down, and where it is brought up to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvpool.cache.key import BlockHash, CacheKey, check_hash
from kvpool.errors import InvalidRequestError, InvalidSizeError
from kvpool.memory.copying import view_at


class Source(NamedTuple):
    """A sealed cache, and the memory that holds its bytes or is to hold them.

    An address says nothing of who lies there: whoever makes one keeps the cache in its place until it is used, by a
    lease, a hold (:meth:`kvpool.cache.store.DeviceStore.hold`) or that of a host entry.
    """

    key: CacheKey
    parent: BlockHash | None
    address: int
    """In this process's memory."""
    size_bytes: int

    def view(self) -> memoryview:
        """Return the memory; it keeps nothing alive."""
        return view_at(self.address, self.size_bytes)


def check_sources(sources: Iterable[Source]) -> list[Source]:
    """Return the sources when each can be one.

    Raises
    ------
    InvalidSizeError
        If one has no bytes.
    InvalidRequestError
        If one has no address, or a hash that is none.
    """
    checked = list(sources)
    for source in checked:
        check_hash(source.key.block_hash)
        if source.parent is not None:
            check_hash(source.parent)
        if source.size_bytes < 1:
            raise InvalidSizeError(
                f"a cache has at least 1 byte, not {source.size_bytes}", asked_bytes=source.size_bytes
            )
        if source.address < 1:
            raise InvalidRequestError(f"a cache lies at an address, not at {source.address}", address=source.address)
    return checked
