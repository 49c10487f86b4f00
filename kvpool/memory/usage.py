"""The figures of one device's memory."""

from __future__ import annotations

from dataclasses import dataclass

from kvpool.memory.pages import PageTable


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Bytes of one device at one moment: ``backed + reserve + zombie + free == capacity``."""

    capacity_bytes: int
    #: Requested by the caches that live there.
    live_bytes: int
    #: Pages in which something lives, without the free parts of those in quarantine.
    backed_bytes: int
    #: Pages kept warm for their tenants.
    reserve_bytes: int
    #: Pages given up that a client may still map, and free parts of pages that a revoked one has not dropped yet.
    zombie_bytes: int
    #: Physical memory nobody has.
    free_bytes: int
    #: The largest cache that any tenant could allocate now without an eviction.
    largest_bytes: int

    @classmethod
    def of(cls, table: PageTable, live_bytes: int, withheld_bytes: int, largest_bytes: int) -> MemoryUsage:
        """Return the figures of ``table``, with what lives and is withheld in its pages, and what would fit."""
        page_bytes = table.page_size_bytes
        return cls(
            capacity_bytes=table.capacity_pages * page_bytes,
            live_bytes=live_bytes,
            backed_bytes=table.in_use_pages * page_bytes - withheld_bytes,
            reserve_bytes=table.warm_pages * page_bytes,
            zombie_bytes=table.zombie_pages * page_bytes + withheld_bytes,
            free_bytes=table.free_pages * page_bytes,
            largest_bytes=largest_bytes,
        )

    @property
    def utilization(self) -> float:
        """``live / capacity``."""
        return self.live_bytes / self.capacity_bytes

    @property
    def fragmentation(self) -> float:
        """``1 - live / backed``: what is lost inside pages; 0 when nothing is backed."""
        return 1 - self.live_bytes / self.backed_bytes if self.backed_bytes else 0.0

    @property
    def external_fragmentation(self) -> float:
        """``1 - largest / free``: what is free but not in one piece; 0 when the reserve makes up for it."""
        return max(0.0, 1 - self.largest_bytes / self.free_bytes) if self.free_bytes else 0.0
