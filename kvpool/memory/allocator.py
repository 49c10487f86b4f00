"""One device's memory as its caches see it: room for each, made by eviction when it is full, or waited for in line."""

from __future__ import annotations

from collections.abc import Iterable

from kvpool.errors import (
    BackendError,
    CacheStateError,
    CapacityError,
    ConfigError,
    InvalidSizeError,
    ensure,
)
from kvpool.memory.allocation import (
    Allocation,
    Movable,
    Place,
    Request,
    VictimSource,
)
from kvpool.memory.backend import Backend
from kvpool.memory.compaction import pages_under
from kvpool.memory.compactor import Compactor
from kvpool.memory.extents import Extents, checked, difference, front, pages_touched, total_bytes, union
from kvpool.memory.live_caches import LiveCaches
from kvpool.memory.mover import Mover
from kvpool.memory.packing import shares_pages
from kvpool.memory.page import runs
from kvpool.memory.pages import PageTable
from kvpool.memory.places import Places
from kvpool.memory.ranges import RangeAllocator
from kvpool.memory.scrub import Scrubber
from kvpool.memory.shared import SharedPages
from kvpool.memory.tickets import Ticket
from kvpool.memory.waiting_line import WaitingLine


class GPUMemoryAllocator:
    """Allocates caches on one device. Belongs to one thread.

    Caches that do not fill pages share them with others of their tenant, see :mod:`kvpool.memory.packing`. A page is
    backed exactly while something lives in it; then it is kept warm for its tenant, as far as the reserve's bound goes.

    Parameters
    ----------
    backend
        The memory.
    capacity_bytes
        Most physical memory to use, rounded down to whole pages.
    page_size_bytes
        A power of two, and a multiple of the backend's granularity.
    min_block_bytes
        Smallest part of a page that a cache takes, a power of two.
    arena_bytes
        Addresses to reserve, whole pages. Default: eight times the capacity.
    reserve_bytes
        Most memory kept warm, over all tenants. Default: the capacity.
    victims
        Asked for caches to evict when nothing else helps. Default: nothing is evicted.
    owner
        Asked which caches may move, and told of those that did. Default: nothing moves.
    queue_limit
        Most requests that may wait.
    """

    def __init__(
        self,
        backend: Backend,
        capacity_bytes: int,
        page_size_bytes: int,
        min_block_bytes: int = 4096,
        arena_bytes: int | None = None,
        reserve_bytes: int | None = None,
        victims: VictimSource | None = None,
        owner: Movable | None = None,
        queue_limit: int = 10_000,
    ) -> None:
        if page_size_bytes < 1 or page_size_bytes & (page_size_bytes - 1):
            raise ConfigError(f"the page size must be a power of two, not {page_size_bytes}")
        self.page_size_bytes = page_size_bytes
        capacity_pages = capacity_bytes // page_size_bytes
        self.capacity_bytes = capacity_pages * page_size_bytes
        arena_pages = 8 * capacity_pages if arena_bytes is None else arena_bytes // page_size_bytes
        reserve_pages = capacity_pages if reserve_bytes is None else reserve_bytes // page_size_bytes
        self._victims = victims
        self._line = WaitingLine(queue_limit)
        self._live = LiveCaches()
        self._page_shift = page_size_bytes.bit_length() - 1
        self._table = PageTable(backend, capacity_pages, page_size_bytes, arena_pages)
        self._ranges = RangeAllocator(self._table, reserve_pages)
        self._scrubber = Scrubber(backend, self._ranges, self._live.by_id)
        try:
            self._shared = SharedPages(self._ranges, min_block_bytes)
        except ConfigError:
            self._table.close()
            raise
        self._mover = Mover(backend, self._ranges, self._shared, self._live.by_id, self._scrubber)
        self._places = Places(self._ranges, self._shared, self._live)
        self.compactor = Compactor(self._mover, self._places, self._ranges, self._shared, owner)
        # What its parts answer:
        self.compact = self.compactor.compact
        self.compact_a_little = self.compactor.compact_a_little
        self.finish_move = self.compactor.finish_move
        self.usage = self._places.usage
        self.change = self._ranges.change
        self.cancel = self._line.cancel
        self.next_deadline = self._line.next_deadline
        self.export = self._table.export
        self.take_drops = self._table.take_drops
        self.held_bytes = self._table.held_bytes

    @property
    def address(self) -> int:
        """First address of the arena in this process."""
        return self._table.address

    def allocate(
        self, cache_id: int, size_bytes: int, *, tenant: str = "default", max_size_bytes: int | None = None
    ) -> Allocation:
        """Allocate ``size_bytes`` for the cache ``cache_id``, with addresses to grow to ``max_size_bytes``.

        In this order, until it fits: a warm range of the same shape, the tenant's other warm pages, fresh pages, what
        other tenants keep warm (once no client maps it), compaction, eviction.

        Raises
        ------
        InvalidSizeError
            If a size is below 1, above the capacity or the arena, or the maximum is below the size.
        CacheStateError
            If ``cache_id`` lives, or waits.
        CapacityError
            If it does not fit, also after eviction. :class:`AddressSpaceError` if only the addresses do not suffice.
        BackendError
            If the system refuses memory that should be there.
        """
        return self._allocate(self._validated(cache_id, tenant, size_bytes, max_size_bytes))

    def request(
        self,
        cache_id: int,
        size_bytes: int,
        *,
        tenant: str = "default",
        max_size_bytes: int | None = None,
        now: float,
        deadline: float,
    ) -> Allocation | Ticket:
        """Allocate as :meth:`allocate`, or wait in line until ``deadline`` (seconds). Nobody overtakes who waits.

        Raises
        ------
        QueueFullError
            If too many wait already.
        CapacityError
            If it would have to wait and the deadline has come.
        InvalidSizeError, CacheStateError, BackendError
            As :meth:`allocate`.
        """
        request = self._validated(cache_id, tenant, size_bytes, max_size_bytes)
        if not self._line:
            try:
                return self._allocate(request)
            except CapacityError:
                if deadline <= now:
                    raise
        elif deadline <= now:
            raise self._places.full(request)
        return self._line.put(request, deadline)

    def poll(self, now: float) -> list[tuple[Ticket, Allocation | CapacityError | BackendError]]:
        """Answer those whose deadline has come, then, in line, those that fit. Call it after memory came free."""
        return self._line.poll(now, self._allocate, self._places.full)

    def allocation(self, cache_id: int) -> Allocation:
        """Return where a live cache lies.

        Raises
        ------
        DoubleReleaseError, UnknownCacheError
            As :meth:`free`.
        """
        self.finish_move()
        return self._live.get(cache_id)

    def free(self, cache_id: int) -> None:
        """Free a cache; its pages stay warm, within the reserve's bound. Then :meth:`poll`, if anyone waits.

        Raises
        ------
        DoubleReleaseError
            If it was freed or evicted. (Ids are taken to ascend: one below the highest ever seen lived once.)
        UnknownCacheError
            If it never lived here.
        """
        if self._mover.unfinished is not None:
            self.finish_move()
        allocation = self._live.pop(cache_id)
        if allocation.shared:
            self._shared.free(allocation.tenant, allocation.offset)
        else:
            self._ranges.put(allocation.offset >> self._page_shift)
        self._ranges.bound()

    def resize(self, cache_id: int, size_bytes: int) -> Allocation:
        """Let exactly the first ``size_bytes`` of a live cache be backed; its addresses and its other bytes stay.

        Pages that it no longer needs go back to the system at once. Those that it needs come as for :meth:`allocate`;
        new bytes are zero, or what the tenant had in a page that was kept warm. 0 is a size here.

        Raises
        ------
        InvalidSizeError
            If the size is above the cache's maximum, above the capacity, or negative.
        CapacityError
            If it does not fit, also after eviction. Nothing is changed then.
        BackendError
            If the system refuses memory that should be there. Nothing is changed then; if it refuses to take memory
            back, what was to be more is backed by then, and what was to be less still is.
        DoubleReleaseError, UnknownCacheError
            As :meth:`free`.
        """
        each = self.allocation(cache_id)
        if not isinstance(size_bytes, int) or not 0 <= size_bytes <= each.max_size_bytes:
            raise InvalidSizeError(
                f"cannot resize cache {cache_id} to {size_bytes} bytes: its addresses are for {each.max_size_bytes}",
                asked_bytes=size_bytes,
                max_size_bytes=each.max_size_bytes,
            )
        return self._change_extents(each, front(size_bytes))

    def back(self, cache_id: int, ranges: Iterable[tuple[int, int]]) -> Allocation:
        """Let parts of a live cache be backed, too: ``(start, end)`` in bytes from its first. As :meth:`resize`.

        Backed are the pages that they touch. Raises as :meth:`resize`; InvalidSizeError for a range that is none.
        """
        each = self.allocation(cache_id)
        return self._change_extents(each, union(each.extents, checked(ranges, each.max_size_bytes)))

    def unback(self, cache_id: int, ranges: Iterable[tuple[int, int]]) -> Allocation:
        """Let parts of a live cache no longer be backed; pages that nothing else of it touches go back to the system.

        Raises as :meth:`back`, but never for lack of room.
        """
        each = self.allocation(cache_id)
        return self._change_extents(each, difference(each.extents, checked(ranges, each.max_size_bytes)))

    def wipe(self, cache_id: int) -> None:
        """Set all bytes of a live cache's memory to zero, those that its size was rounded up by included."""
        each = self.allocation(cache_id)
        if each.shared:
            self._scrubber.zero(each.offset, self._shared.part_bytes(each.tenant, each.offset))
            return
        for first, count in runs(index for index, _ in each.pages):
            self._scrubber.zero(first << self._page_shift, count << self._page_shift)

    def scrub(self, tenant: str, number: int, most_bytes: int) -> bool:
        """Zero a part of what is left of caches that are gone; see :meth:`Scrubber.scrub`.

        Raises
        ------
        BackendError
            If the system refuses. The step may be taken again.
        """
        self.finish_move()  # of one that is under way the scrub would zero what is copied already
        return self._scrubber.scrub(tenant, number, most_bytes)

    def quarantine(self, client_id: str, cache_id: int) -> None:
        """Keep what is free, or comes free, under a live cache from everybody until ``client_id`` has unmapped it."""
        each = self.allocation(cache_id)
        held = self._table.quarantine(client_id, [index for index, _ in each.pages])
        if each.shared:
            for index in held:
                self._shared.withhold(each.tenant, index << self._page_shift)

    def dropped(self, client_id: str, serials: Iterable[int]) -> None:
        """Note that a client maps these pages nowhere any more; errors as in :meth:`PageTable.dropped`."""
        self._table.dropped(client_id, serials)
        self._lift_quarantines()

    def holder_gone(self, client_id: str) -> None:
        """Note that a client's process is dead: it maps nothing any more."""
        self._table.holder_gone(client_id)
        self._lift_quarantines()

    def _lift_quarantines(self) -> None:
        for index in self._table.take_lifted():
            self._shared.readmit(index << self._page_shift)

    def trim(self, tenant: str | None = None) -> int:
        """Give warm pages of ``tenant``, or of all, back; returns their bytes, zombies (that clients map) included."""
        return self._ranges.trim(tenant) * self.page_size_bytes

    def trim_idle(self, now: float, idle_s: float, most_bytes: int) -> int:
        """Give warm pages back to the system that nobody has used for ``idle_s``, so that other programs can have them.

        Parameters
        ----------
        now
            Seconds of the caller's clock. To be called several times in ``idle_s``.
        most_bytes
            How much to give back in this step: it takes about 0.3 ms a page. A range is given back whole.

        Returns
        -------
        int
            Bytes given back; what clients map follows when they have dropped it.
        """
        most_pages = max(1, most_bytes >> self._page_shift)
        return self._ranges.trim_idle(now, idle_s, most_pages) << self._page_shift

    @property
    def compacted(self) -> tuple[int, int]:
        """Bytes moved and pages freed by compaction so far."""
        return self._mover.moved_bytes, self._mover.freed_pages

    def check(self) -> None:
        """Prove the whole account, or raise InvariantError: addresses, pages, what lives where, and who waits."""
        self._ranges.check()
        self._line.check()
        self._live.check()
        homes: set[int] = set()
        if self._mover.unfinished is not None:  # pages were added for it
            move = self._mover.unfinished[0]
            under = pages_under(move.destination, move.size_bytes, self.page_size_bytes)
            homes.update(page >> self._page_shift for page in under)
        parts: dict[str, int] = {}
        for each in self._live.by_id.values():
            index = each.offset >> self._page_shift
            shape, home = self._ranges.in_use[index]
            homes.add(index)
            refs = home.refs
            ensure(len(each.pages) << self._page_shift >= each.size_bytes, "a cache is backed", id=each.cache_id)
            ensure(total_bytes(each.extents) == each.size_bytes, "a cache's size is what is backed", id=each.cache_id)
            if each.shared:
                range_bytes = self._shared.part_bytes(each.tenant, each.offset)
                refs = self._shared.refs(each.offset, range_bytes)
                homes.update(index for index, _ in refs)
                parts[each.tenant] = parts.get(each.tenant, 0) + range_bytes
            else:
                range_bytes = shape.range_bytes
                ensure(each.offset == index * self.page_size_bytes, "a large cache begins its range", id=each.cache_id)
                touched = {index + number for number in pages_touched(each.extents, self.page_size_bytes)}
                backed = {place for place, _ in each.pages}
                ensure(backed == touched, "a large cache has the pages that its extents touch", id=each.cache_id)
            ensure(home.tenant == each.tenant and refs == each.pages, "a cache knows its pages", id=each.cache_id)
            ensure(range_bytes >= each.max_size_bytes, "a cache has its addresses", id=each.cache_id)
        ensure(homes == set(self._ranges.in_use), "something lives in each range in use")
        self._shared.check(parts)

    def close(self) -> None:
        """Give everything back, whatever lives in it. Idempotent."""
        self._table.close()

    def _validated(self, cache_id: int, tenant: str, size_bytes: int, max_size_bytes: int | None) -> Request:
        maximum_bytes = size_bytes if max_size_bytes is None else max_size_bytes
        if not 0 < size_bytes <= maximum_bytes <= self._ranges.max_range_bytes or size_bytes > self.capacity_bytes:
            raise InvalidSizeError(
                f"asked for {size_bytes} bytes that may grow to {maximum_bytes}: give 1 to {self.capacity_bytes}, "
                f"growing to {self._ranges.max_range_bytes} at most, and no maximum below the size",
                asked_bytes=size_bytes,
                max_size_bytes=maximum_bytes,
                capacity_bytes=self.capacity_bytes,
            )
        if cache_id in self._live.by_id or cache_id in self._line:
            raise CacheStateError(f"cache {cache_id} lives or waits here: give each its own id", cache_id=cache_id)
        shared = shares_pages(size_bytes, maximum_bytes, self.page_size_bytes)
        return Request(cache_id, tenant, size_bytes, maximum_bytes, shared)

    def _allocate(self, request: Request) -> Allocation:
        cache_id, tenant, size_bytes, maximum_bytes, shared, _ = request
        offset, pages = self._find_place(request)
        allocation = Allocation(cache_id, tenant, offset, size_bytes, maximum_bytes, ((0, size_bytes),), pages, shared)
        self._live.add(allocation)
        if self._scrubber.busy(tenant):
            try:
                self.wipe(cache_id)
            except BaseException:  # it was told to nobody yet
                self.free(cache_id)
                raise
        return allocation

    def _change_extents(self, each: Allocation, extents: Extents) -> Allocation:
        size_bytes = total_bytes(extents)
        if size_bytes > self.capacity_bytes:
            raise InvalidSizeError(
                f"asked for {size_bytes} bytes of cache {each.cache_id} to be backed: the device has "
                f"{self.capacity_bytes}",
                asked_bytes=size_bytes,
                capacity_bytes=self.capacity_bytes,
            )
        pages, first = each.pages, each.offset >> self._page_shift
        unwanted: set[int] = set()
        wanted: tuple[int, ...] = ()
        if not each.shared:  # another one has all of its part of shared pages, always
            needed = {first + number for number in pages_touched(extents, self.page_size_bytes)}
            there = {index for index, _ in pages}
            unwanted = there - needed
            # First what may be refused, so that nothing has changed then.
            wanted = tuple(sorted(needed - there))
            if wanted:
                missing_bytes = len(wanted) << self._page_shift
                request = Request(each.cache_id, each.tenant, missing_bytes, missing_bytes, shared=False, wanted=wanted)
                pages = self._find_place(request)[1]
                # Entered at once: what follows may be refused, too, and these pages are the cache's by now.
                self._live.change(each.cache_id, union(each.extents, extents), pages)
        if self._scrubber.busy(each.tenant):
            try:
                for start, end in difference(extents, each.extents):
                    self._scrubber.zero(each.offset + start, end - start)
            except BaseException:
                if wanted:
                    self._live.change(each.cache_id, each.extents, self._ranges.unback(first, set(wanted)).refs)
                raise
        if unwanted:
            pages = self._ranges.unback(first, unwanted).refs
        return self._live.change(each.cache_id, extents, pages)

    def _find_place(self, request: Request) -> Place:
        if self._mover.unfinished is not None:
            self.finish_move()
        place = self._places.find(request)
        if place is None:
            with self._ranges.change():
                make_room = self.compactor.make_room
                place = make_room(request, self._mover.promising) or self._place_by_eviction(request)
        return place

    def _place_by_eviction(self, request: Request) -> Place:
        while self._victims is not None and (victim := self._victims.next_victim()) is not None:
            self.free(victim)
            place = self._places.find(request)
            place = place or self.compactor.make_room(request, self._mover.promising)
            if place is not None:
                return place
        place = self.compactor.make_room(request, self._mover.untried)
        if place is None:
            raise self._places.full(request)
        return place
