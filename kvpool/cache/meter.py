"""Who is told of the bytes that caches take, while somebody counts them."""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """Counts bytes by partition, that is by device and account. Every change of a cache's bytes goes through it."""

    def charge(self, partition: int, held_bytes: int, evictable_bytes: int) -> None:
        """Add to what a partition's caches take, and to the part of it that nobody holds; negative when it shrinks."""
        ...
