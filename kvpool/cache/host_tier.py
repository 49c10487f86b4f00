"""The host tier below one device: memory for its entries."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvpool.cache.host_index import HostEntry, HostIndex, Kind
from kvpool.cache.key import BlockHash, CacheKey
from kvpool.errors import BackendError, CapacityError, InvalidSizeError
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.backend import Backend
from kvpool.memory.copying import view_at
from kvpool.sizes import MIB

logger = logging.getLogger("kvpool.host")

_MOST_WASTED = 4


class HostMemory(NamedTuple):
    """Memory for an entry that is on its way."""

    memory_id: int
    address: int
    size_bytes: int
    room_bytes: int


class HostTier:
    """An index, and memory for what is in it. Belongs to one thread, except where a method says otherwise.

    Tenants never share a page. Memory of dropped entries stays warm for the next ones, and is zeroed (released and
    created anew) before it changes its tenant.

    Parameters
    ----------
    backend
        The memory; this tier's alone.
    capacity_bytes
        Most memory to use, rounded down to whole pages.
    page_size_bytes, min_block_bytes
        As for :class:`~kvpool.memory.allocator.GPUMemoryAllocator`: entries take whole pages, smaller ones parts of
        one.
    on_drop
        Called with each entry that was dropped for room.

    Raises
    ------
    InvalidSizeError
        If the capacity is less than a page.
    ConfigError
        If page or block are no powers of two.
    SystemLimitError, BackendError
        If this system's limits do not allow so many pages, or it refuses the addresses.
    """

    def __init__(
        self,
        backend: Backend,
        capacity_bytes: int,
        page_size_bytes: int = 2 * MIB,
        min_block_bytes: int = 4096,
        on_drop: Callable[[HostEntry], None] = lambda entry: None,
    ) -> None:
        if capacity_bytes < page_size_bytes:
            raise InvalidSizeError(
                f"a host tier needs at least one page of {page_size_bytes} bytes, not {capacity_bytes}",
                asked_bytes=capacity_bytes,
                page_size_bytes=page_size_bytes,
            )
        self.on_drop = on_drop
        self.errors: Counter[str] = Counter()
        pages = capacity_bytes // page_size_bytes
        backend.probe(pages=pages, mapped_pages=pages, page_size_bytes=page_size_bytes)
        self._allocator = GPUMemoryAllocator(backend, capacity_bytes, page_size_bytes, min_block_bytes)
        self._page_bytes, self._min_block_bytes = page_size_bytes, min_block_bytes
        self._next_id = 0
        self.index = HostIndex(self.capacity_bytes)

    @property
    def capacity_bytes(self) -> int:
        """Most memory to use, whole pages."""
        return self._allocator.capacity_bytes

    def room_bytes(self, size_bytes: int) -> int:
        """What an entry of a size takes of the capacity: whole pages, or whole parts of one."""
        unit_bytes = self._page_bytes if size_bytes >= self._page_bytes else self._min_block_bytes
        return -(-size_bytes // unit_bytes) * unit_bytes

    def allocate(self, tenant: str, size_bytes: int, last: Kind) -> HostMemory | None:
        """Take memory for an entry, dropping idle ones of kinds up to ``last``, lowest kind and oldest first.

        None, and as a rule nothing dropped, if that would not make the room. Where enough bytes are free but lie
        badly, it goes on dropping, a few times the room at most.
        """
        room_bytes = self.room_bytes(size_bytes)
        if not self.index.could_fit(room_bytes, last):
            return None
        wasted_bytes, most_wasted_bytes = 0, _MOST_WASTED * max(room_bytes, self._page_bytes)
        while True:
            fits = self.index.fits(room_bytes)
            memory = self._try(tenant, size_bytes, room_bytes) if fits else None
            if memory is not None:
                self.index.claim(room_bytes)
                return memory
            victim = self.index.oldest(last)
            if victim is None or wasted_bytes > most_wasted_bytes:
                return None
            if fits:
                wasted_bytes += victim.room_bytes
            self.drop(victim)
            self.on_drop(victim)

    def enter(self, key: CacheKey, parent: BlockHash | None, memory: HostMemory, kind: Kind) -> HostEntry:
        """Let a cache be found whose bytes are in its memory, as the newest of its kind."""
        self.index.unclaim(memory.room_bytes)
        entry = HostEntry(key, parent, memory.size_bytes, memory.room_bytes, kind, memory.memory_id, memory.address)
        self.index.add(entry)
        return entry

    def give_back(self, memory: HostMemory) -> None:
        """Free memory that no entry has got."""
        self.index.unclaim(memory.room_bytes)
        self._allocator.free(memory.memory_id)

    def drop(self, entry: HostEntry) -> None:
        """Forget an entry that nobody holds, and free its memory."""
        self.index.drop(entry.key)
        self._allocator.free(entry.memory_id)

    def take_out(self, entry: HostEntry) -> HostMemory:
        """Forget an entry, held or not, and return its memory: once nobody reads it, :meth:`give_back`."""
        self.index.drop(entry.key)
        self.index.claim(entry.room_bytes)
        return HostMemory(entry.memory_id, entry.address, entry.size_bytes, entry.room_bytes)

    def wipe(self, memories: Sequence[HostMemory]) -> None:
        """Zero memory that is not given back yet. May be called in any thread: it only reads the account."""
        for memory in memories:
            self._allocator.wipe(memory.memory_id)

    def scrub(self, tenant: str, number: int, most_bytes: int) -> bool:
        """Zero what dropped entries of a tenant have left, step by step, as a device's allocator does."""
        return self._allocator.scrub(tenant, number, most_bytes)

    def view(self, entry: HostEntry) -> memoryview:
        """Return an entry's bytes, valid while it is held."""
        return view_at(entry.address, entry.size_bytes)

    def check(self) -> None:
        """Raise InvariantError unless index and memory agree. O(entries), for tests."""
        self.index.check()
        self._allocator.check()
        for entry in self.index:
            self._allocator.allocation(entry.memory_id)

    def trim(self) -> int:
        """Give memory in which nothing lies back to the system; returns its bytes."""
        return self._allocator.trim()

    def close(self) -> None:
        """Give all memory back to the system. Nobody may read it any more."""
        self._allocator.close()

    def _try(self, tenant: str, size_bytes: int, room_bytes: int) -> HostMemory | None:
        memory_id = self._next_id
        try:
            allocation = self._allocator.allocate(memory_id, size_bytes, tenant=tenant)
        except CapacityError:
            return None
        except BackendError as error:  # the system has less than was configured: what is there must do
            cause = str(error.details.get("errno", "other"))
            self.errors[cause] += 1
            if self.errors[cause] == 1:
                logger.warning("host tier: %s (more of this cause is only counted)", error)
            return None
        self._next_id += 1
        return HostMemory(memory_id, self._allocator.address + allocation.offset, size_bytes, room_bytes)
