"""A device, as the pool sees it."""

from __future__ import annotations

from dataclasses import dataclass

from kvpool.memory.packing import shares_pages
from kvpool.sizes import round_up


@dataclass(slots=True)
class Device:
    """One device, as the pool sees it."""

    number: int
    name: str
    host: str
    capacity_bytes: int
    page_bytes: int
    min_block_bytes: int
    arena_bytes: int
    zombie_bytes: int = 0
    stamp: int = 0
    """Its count of what it answers and tells, by what was taken in last: answers and events overtake each other."""
    lost: str | None = None
    evictions: int = 0
    has_lower: bool = False
    """Whether there are tiers below it."""
    disk_url: str | None = None
    """Where its disk tier keeps its files, also after the device is lost; None: it has none."""

    def footprint_bytes(self, size_bytes: int, max_size_bytes: int) -> int:
        """Return what a cache takes here: whole pages, unless it is small enough to share one.

        A small one that may grow takes its whole range at once: in shared pages addresses are memory.
        """
        if not shares_pages(size_bytes, max_size_bytes, self.page_bytes):
            return round_up(size_bytes, self.page_bytes)
        if max_size_bytes > size_bytes:
            return max(self.min_block_bytes, 1 << (max_size_bytes - 1).bit_length())
        return round_up(size_bytes, self.min_block_bytes)

    def can_grow_to(self, size_bytes: int, max_size_bytes: int) -> bool:
        """Whether the addresses for ``max_size_bytes`` exist: a growing cache takes a power of two of them."""
        if max_size_bytes == size_bytes:
            return size_bytes <= self.capacity_bytes
        return 1 << (max_size_bytes - 1).bit_length() <= 1 << (self.arena_bytes.bit_length() - 1)

    def note_zombies(self, zombies: tuple[int, int]) -> None:
        """Take in ``(stamp, zombie bytes)`` unless a newer figure has come already."""
        if zombies[0] > self.stamp:
            self.stamp, self.zombie_bytes = zombies
