"""Host memory below a device: the index of what lies there, over an allocator of its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from kvpool.cache.host_index import HostEntry, HostIndex, Kind
from kvpool.cache.key import BlockHash, CacheKey
from kvpool.errors import BackendError, CapacityError
from kvpool.memory.allocator import GPUMemoryAllocator


class HostTier:
    """Caches in host memory. No client maps it; only this process reads and writes it.

    Parameters
    ----------
    allocator
        The memory. The tier is its only user.
    """

    def __init__(self, allocator: GPUMemoryAllocator) -> None:
        self._allocator = allocator
        self.index = HostIndex(allocator.capacity_bytes)
        self._handles = count()

    def address(self, handle: int) -> int:
        """Return where memory begins that was taken by :meth:`take`."""
        return self._allocator.address + self._allocator.allocation(handle).offset

    def take(
        self, key: CacheKey, size_bytes: int, kinds: tuple[Kind, ...], dropped: Callable[[HostEntry], None]
    ) -> int | None:
        """Return a handle on memory for a cache, made by dropping entries of these kinds; None if that is not enough.

        ``dropped`` is told of each that goes.
        """
        if size_bytes > self.index.budget_bytes:
            return None
        while True:
            handle = next(self._handles)
            try:
                self._allocator.allocate(handle, size_bytes, tenant=key.tenant)
            except (CapacityError, BackendError):  # full, or its holes are too small, or the system has none to give
                pass
            else:
                return handle
            entry = self.index.first_to_go(*kinds)
            if entry is None:
                return None
            self.drop(entry)
            dropped(entry)

    def enter(self, key: CacheKey, parent: BlockHash | None, size_bytes: int, kind: Kind, handle: int) -> None:
        """Make taken memory a cache."""
        self.index.add(HostEntry(key, parent, size_bytes, kind, handle))

    def drop(self, entry: HostEntry) -> None:
        """Let a cache go, and its memory."""
        self.index.remove(entry)
        self._allocator.free(entry.handle)

    def give_back(self, handle: int) -> None:
        """Free memory in which no cache was entered."""
        self._allocator.free(handle)

    def wipe(self, handle: int) -> None:
        """Zero memory and free it."""
        self._allocator.wipe(handle)
        self._allocator.free(handle)

    def trim(self) -> int:
        """Give memory in which nothing lies back to the system; returns its bytes."""
        return self._allocator.trim()

    def close(self) -> None:
        """Give all memory back."""
        self._allocator.close()
