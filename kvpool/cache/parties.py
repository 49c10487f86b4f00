"""Small caches that go to the disk, or come from it, together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from kvpool.cache.disk.packing import MOST_PACKED_BYTES

_Item = TypeVar("_Item")


def is_small(size_bytes: int) -> bool:
    """Whether a cache may lie on disk together with others."""
    return size_bytes <= MOST_PACKED_BYTES


def parties(
    items: Iterable[_Item], size_bytes_of: Callable[[_Item], int], most_caches: int, most_bytes: int
) -> Iterator[list[_Item]]:
    """Yield small caches in parties of so many, and so many bytes, at most, in order, and each large one by itself."""
    party: list[_Item] = []
    party_bytes = 0
    for item in items:
        size_bytes = size_bytes_of(item)
        if not is_small(size_bytes):
            yield [item]
            continue
        if party and (len(party) == most_caches or party_bytes + size_bytes > most_bytes):
            yield party
            party, party_bytes = [], 0
        party.append(item)
        party_bytes += size_bytes
    if party:
        yield party
