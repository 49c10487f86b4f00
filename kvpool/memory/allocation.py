"""What is asked of a device's memory, what is answered, and who names what may go."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from kvpool.errors import AddressSpaceError, CapacityError
from kvpool.memory.extents import Extents
from kvpool.memory.usage import MemoryUsage
from kvpool.sizes import format_size

#: Offset, and (index, serial) of each page.
Place = tuple[int, tuple[tuple[int, int], ...]]


class Request(NamedTuple):
    """A cache that is asked for, or more pages of one."""

    cache_id: int
    tenant: str
    size_bytes: int
    #: What it may grow to in place; ``size_bytes`` if it never grows.
    max_size_bytes: int
    #: Whether it is to lie in pages that others lie in, too.
    shared: bool
    #: If it is for more pages of a cache that lives already: where they go, as indexes of the arena.
    wanted: tuple[int, ...] = ()


class Allocation(NamedTuple):
    """Where a cache lies."""

    cache_id: int
    tenant: str
    #: Bytes from the arena's start; the same in every process.
    offset: int
    size_bytes: int
    max_size_bytes: int
    #: Backed parts as (start, end), bytes from ``offset``; ``size_bytes`` is what they have together.
    extents: Extents
    #: (index, serial) of each page under it; an index counts pages from the arena's start.
    pages: tuple[tuple[int, int], ...]
    #: Whether it lies in pages that others lie in, too: decided by what was asked for first, whatever it is resized to.
    shared: bool

    @property
    def span_bytes(self) -> int:
        """Bytes from ``offset`` to the end of the last backed part."""
        return self.extents[-1][1] if self.extents else 0


class VictimSource(Protocol):
    """Knows which caches may go, and which of them is worth least."""

    def next_victim(self) -> int | None:
        """Return, and forget, the id of the live cache worth least of those that may go; ``None`` if none may."""
        ...


class Movable(Protocol):
    """Knows which caches may move, and is told of those that did."""

    def may_move(self, cache_id: int) -> bool:
        """Whether nobody reads or writes a live cache now: it is neither leased nor pinned."""
        ...

    def moved(self, allocation: Allocation) -> None:
        """Note that a cache lies elsewhere. Called before its old place is given to anyone."""
        ...


class Compaction(NamedTuple):
    """What steps of compaction did."""

    moved_bytes: int
    #: Less those that were added to lie across their borders: a small step may have a negative number.
    freed_pages: int
    #: Whether another step may free more; perhaps nothing was found yet, and it looks elsewhere.
    more: bool


def no_room(kind: type[CapacityError], request: Request, usage: MemoryUsage, largest_bytes: int) -> CapacityError:
    """Return the error that says what was asked, what there is, and the largest size that would have fitted."""
    return kind(
        f"no room for {format_size(request.size_bytes)} (addresses for {format_size(request.max_size_bytes)}): "
        f"{format_size(usage.free_bytes)} are free, {format_size(usage.reserve_bytes)} kept warm, "
        f"{format_size(usage.live_bytes)} live, {format_size(usage.zombie_bytes)} wait for clients to drop them; "
        f"{format_size(largest_bytes)} would fit: release something, ask for less, or wait",
        asked_bytes=request.size_bytes,
        max_size_bytes=request.max_size_bytes,
        free_bytes=usage.free_bytes,
        reserve_bytes=usage.reserve_bytes,
        live_bytes=usage.live_bytes,
        zombie_bytes=usage.zombie_bytes,
        largest_bytes=largest_bytes,
    )


def no_addresses(
    request: Request, usage: MemoryUsage, range_bytes: int, used_bytes: int, arena_bytes: int, largest_bytes: int
) -> AddressSpaceError:
    """Return the error of a cache for which there is memory, and no range of addresses."""
    return AddressSpaceError(
        f"no addresses for a cache of {format_size(request.size_bytes)} that may grow to "
        f"{format_size(request.max_size_bytes)}: it takes {format_size(range_bytes)} of them (what may grow takes a "
        f"power of two); {format_size(used_bytes)} of {format_size(arena_bytes)} are in use, "
        f"{format_size(arena_bytes - used_bytes)} free, the largest free range has {format_size(largest_bytes)}. "
        f"Memory is not short ({format_size(usage.free_bytes)} free): choose a smaller max_size, release caches that "
        "may grow, or raise arena_factor",
        asked_bytes=request.size_bytes,
        max_size_bytes=request.max_size_bytes,
        range_bytes=range_bytes,
        used_addresses_bytes=used_bytes,
        free_addresses_bytes=arena_bytes - used_bytes,
        arena_bytes=arena_bytes,
        free_bytes=usage.free_bytes,
        largest_bytes=largest_bytes,
    )
