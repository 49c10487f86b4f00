"""A cache as the device that holds it knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class CacheBlock(NamedTuple):
    """A power-of-two range of an arena, as the buddy allocator hands it out."""

    offset: int
    size_bytes: int


def blocks_of(offset: int, size_bytes: int, min_block_bytes: int) -> tuple[CacheBlock, ...]:
    """Return the power-of-two blocks that make up ``[offset, offset + size_bytes)``, largest first.

    The buddy allocator gives the tail of a rounded-up block back, so a range of ``n`` minimum blocks is made of the
    powers of two in ``n``.
    """
    blocks = []
    left = -(-size_bytes // min_block_bytes)
    while left:
        count = 1 << (left.bit_length() - 1)
        blocks.append(CacheBlock(offset, count * min_block_bytes))
        offset += count * min_block_bytes
        left -= count
    return tuple(blocks)


@dataclass(slots=True)
class CacheRecord:
    """One cache on one device: the truth about its place, its leases and whether it may change."""

    id: int
    generation: int
    tenant: str
    size_bytes: int
    max_size_bytes: int
    offset: int
    pages: tuple[tuple[int, int], ...]
    leases: int = 0
    sealed: bool = False
    key: bytes | None = None
    doomed: bool = False
    """Told to go while leased: nobody finds it any more, so it is freed with its last lease."""
    void: bool = False
    """Its content is void: its memory is zeroed when it is freed."""
