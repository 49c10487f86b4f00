"""Ranges of the arena with pages under them, in use or kept warm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from kvpool.errors import AddressSpaceError, ensure
from kvpool.memory.buddy import BuddyAllocator
from kvpool.memory.idle import IdleMarks
from kvpool.memory.page import UNMAPPED, Page, PageRange, runs
from kvpool.memory.pages import PageTable
from kvpool.memory.reserve import Shape, WarmReserve


class RangeAllocator:
    """Hands out ranges backed by pages, and takes them back into the warm reserve.

    Parameters
    ----------
    table
        The pages, and the addresses they are mapped in.
    reserve_pages
        Most pages kept warm, over all tenants.
    """

    def __init__(self, table: PageTable, reserve_pages: int) -> None:
        self.table = table
        self.reserve_pages = reserve_pages
        self._page_bytes = table.page_size_bytes
        self._addresses = BuddyAllocator(table.arena_pages * self._page_bytes, self._page_bytes)
        self._reserve = WarmReserve()
        self._idle = IdleMarks()
        self._changes = 0  # blocks of change() under way
        #: Ranges in which something lives, by first index.
        self.in_use: dict[int, tuple[Shape, PageRange]] = {}

    @property
    def max_range_bytes(self) -> int:
        """The largest range there could ever be."""
        return self._addresses.max_block_bytes

    def take(self, tenant: str, shape: Shape) -> PageRange | None:
        """Return a range of this shape, in use by ``tenant`` from now on, or ``None`` if there is no room for it.

        A warm one of the same shape; else one made of the tenant's other warm pages, of fresh ones, and of what other
        tenants keep warm, which leaves them first.

        Raises
        ------
        BackendError
            If the system refuses. Warm pages that were on their way here are lost to the reserve, nothing else.
        """
        taken = self._reserve.take(tenant, shape)
        if taken is not None:
            self.table.wake(taken.pages)
        else:
            taken = self._make(tenant, shape)
            if taken is None:
                return None
        self.in_use[taken.index] = (shape, taken)
        return taken

    def take_at(self, tenant: str, index: int) -> PageRange | None:
        """Return a range of one page at ``index``, in use by ``tenant`` from now on; ``None`` if it cannot be there.

        If one of the tenant's warm pages is there, it is that one.

        Raises
        ------
        BackendError
            As :meth:`take`.
        """
        start, shape = index * self._page_bytes, Shape(self._page_bytes, 1)
        warm = self._warm_at(tenant, index)
        if warm is not None:
            taken: PageRange | None = self._take_out(warm, index)
        elif self._addresses.is_free(start, self._page_bytes):
            self._addresses.carve(start, self._page_bytes)
            taken = self._back_new(tenant, start, shape)
        else:
            return None
        if taken is not None:
            self.in_use[index] = (shape, taken)
        return taken

    def is_open_at(self, tenant: str, index: int) -> bool:
        """Whether :meth:`take_at` would find the addresses there; there may be no page for them."""
        start = index * self._page_bytes
        if not 0 <= index < self.table.arena_pages:
            return False
        return self._addresses.is_free(start, self._page_bytes) or self._warm_at(tenant, index) is not None

    def _warm_at(self, tenant: str, index: int) -> PageRange | None:
        """Return the tenant's warm range that has a page at ``index``, if it has no more addresses than pages."""
        found = self._reserve.find(tenant, index)
        return found[1] if found is not None and found[0].range_bytes == found[0].pages * self._page_bytes else None

    def _take_out(self, warm: PageRange, index: int) -> PageRange:
        """Take one page out of a warm range; what lies before and behind it stays warm."""
        self._reserve.remove(warm)
        self._addresses.split(warm.index * self._page_bytes)
        middle = index - warm.index
        for start, pages in ((warm.index, warm.pages[:middle]), (index + 1, warm.pages[middle + 1 :])):
            if pages:
                shape = Shape(len(pages) * self._page_bytes, len(pages))
                self._addresses.unite(start * self._page_bytes, shape.range_bytes)
                self._reserve.put(shape, PageRange(warm.tenant, start, pages))
        taken = PageRange(warm.tenant, index, warm.pages[middle : middle + 1])
        self.table.wake(taken.pages)
        return taken

    def put(self, index: int) -> None:
        """Take the range at ``index`` back: nothing lives in it any more. It stays warm, see :meth:`bound`.

        Pages in quarantine go back to the system instead, when their clients have dropped them. So do those of a range
        that is not backed from its front on: no request is for its shape.
        """
        shape, unused = self.in_use.pop(index)
        pages = unused.pages
        scattered = not pages or pages[0].index != index or pages[-1].index != index + len(pages) - 1
        if scattered or any(page.quarantine for page in pages):
            self._give_back(unused)
            return
        self.table.rest(unused.pages)
        self._reserve.put(shape, unused)

    def back(self, index: int, wanted: Sequence[int]) -> PageRange | None:
        """Put pages under more of a range in use, at the indexes ``wanted`` (ascending), found as by :meth:`take`.

        Returns the range, or ``None`` if there is no room for all of them.

        Raises
        ------
        BackendError
            If the system refuses. The range is what it was; see :meth:`take`.
        """
        shape, each = self.in_use[index]
        pages = self._collect(each.tenant, len(wanted))
        if pages is None:
            return None
        placed = 0
        for first, count in runs(wanted):
            try:
                self.table.map(each.tenant, first, pages[placed : placed + count])
            except BaseException:
                self.table.release(pages[:placed] + pages[placed + count :])
                raise
            placed += count
        return self._change(shape, index, each.tenant, [*each.pages, *pages])

    def unback(self, index: int, unwanted: set[int]) -> PageRange:
        """Give the pages at some indexes of a range in use back to the system, and return the range.

        (Not to the reserve: whoever shrinks has memory to spare, and others are to have it at once.)
        """
        shape, each = self.in_use[index]
        self.table.release([page for page in each.pages if page.index in unwanted])
        return self._change(shape, index, each.tenant, [page for page in each.pages if page.index != UNMAPPED])

    def _change(self, shape: Shape, index: int, tenant: str, pages: list[Page]) -> PageRange:
        pages.sort(key=lambda page: page.index)
        changed = PageRange(tenant, index, pages)
        self.in_use[index] = Shape(shape.range_bytes, len(pages)), changed
        return changed

    def join(self, indexes: Sequence[int]) -> int | None:
        """Map ranges of one page each, in use by one tenant, side by side; they stay ranges of their own.

        Returns the first index of the new place, or ``None`` if there are no addresses for it.

        Raises
        ------
        BackendError
            If the system refuses. Then all are where they were.
        """
        start = self._take_addresses(len(indexes) * self._page_bytes)
        if start is None:
            return None
        first = start // self._page_bytes
        pages = [page for index in indexes for page in self.in_use[index][1].pages]
        try:
            self.table.relocate(pages, first)
        except BaseException:
            self._addresses.free(start)
            raise
        self._addresses.split(start)
        shape = Shape(self._page_bytes, 1)
        for index in indexes:
            del self.in_use[index]
            self._addresses.free(index * self._page_bytes)
        for page in pages:
            self.in_use[page.index] = (shape, PageRange(page.tenant, page.index, (page,)))
        return first

    def split(self, index: int) -> None:
        """Make a range in use as many ranges of one page."""
        shape, whole = self.in_use.pop(index)
        ensure(shape.range_bytes == shape.pages * self._page_bytes, "only what does not grow is split", index=index)
        self._addresses.split(index * self._page_bytes)
        for page in whole.pages:
            self.in_use[page.index] = (Shape(self._page_bytes, 1), PageRange(page.tenant, page.index, (page,)))

    def unite(self, index: int, count: int) -> None:
        """Make ranges of one page in use, that lie side by side from ``index`` on, one range."""
        pages = [self.in_use.pop(each)[1].pages[0] for each in range(index, index + count)]
        self._addresses.unite(index * self._page_bytes, count * self._page_bytes)
        self.in_use[index] = (Shape(count * self._page_bytes, count), PageRange(pages[0].tenant, index, pages))

    @contextmanager
    def change(self) -> Iterator[None]:
        """Hold the reserve to its bound only at the end of the block: what is freed in it is warm for who comes next.

        (Else evicting more than the bound for one large allocation would first give the memory back to the system,
        and wait for all clients to unmap it.)
        """
        self._changes += 1
        try:
            yield
        finally:
            self._changes -= 1
            self.bound()

    def bound(self) -> None:
        """Give the oldest warm ranges back to the system, as far as they are above the reserve's bound."""
        if self._changes:
            return
        while self._reserve.pages > self.reserve_pages:
            self._trim_oldest(None)

    def trim(self, tenant: str | None) -> int:
        """Give the warm pages of ``tenant``, or of all, back to the system; returns how many, zombies included."""
        warm_pages = self.table.warm_pages
        while self._trim_oldest(tenant):
            pass
        return warm_pages - self.table.warm_pages

    def trim_idle(self, now: float, idle_s: float, most_pages: int) -> int:
        """Give warm ranges back that were put away ``idle_s`` ago, until ``most_pages`` are gone; returns how many.

        Counted from the last call that was as long ago, so it is to be called several times in ``idle_s``.
        """
        idle = self._idle.pass_time(self._reserve.newest, now, idle_s)
        pages = 0
        while pages < most_pages and (entry := self._reserve.take_oldest(None, idle)) is not None:
            self._give_back(entry[1])
            pages += entry[0].pages
        return pages

    def warm_pages(self, tenant: str) -> list[Page]:
        """Return the pages that are kept warm for ``tenant``."""
        return [page for _, kept in self._reserve.ranges() if kept.tenant == tenant for page in kept.pages]

    def pages_for(self, tenant: str | None) -> int:
        """Pages that :meth:`take` could use now for ``tenant``, or for whom there are most.

        Free ones, the tenant's own warm ones, and those of others that no client maps.
        """
        held = self.table.warm_held_pages
        own = max(held.values(), default=0) if tenant is None else held.get(tenant, 0)
        return self.table.free_pages + self.table.warm_pages - sum(held.values()) + own

    @property
    def addresses(self) -> tuple[int, int]:
        """Bytes of addresses in use, and of all. Those under warm pages count as free: they are given up for others."""
        used_bytes = sum(shape.range_bytes for shape, _ in self.in_use.values())
        return used_bytes, self._addresses.total_bytes

    def largest_range_bytes(self) -> int:
        """The largest range of addresses that is free or under warm pages."""
        return max(self._addresses.largest_free_bytes, self._reserve.largest_range_bytes())

    def check(self) -> None:
        """Prove that addresses, pages and reserve agree.

        Raises
        ------
        InvariantError
            If they do not.
        """
        self._addresses.check()
        self._reserve.check()
        self.table.check()
        warm = self._reserve.ranges()
        ensure(
            self.table.warm_pages == self._reserve.pages <= self.reserve_pages, "warm pages are those of the reserve"
        )
        for shape, each in [*self.in_use.values(), *warm]:
            range_bytes = self._addresses.allocation_size(each.index * self._page_bytes)
            ensure(range_bytes == shape.range_bytes, "a range has its addresses", index=each.index)
            ensure(len(each.pages) == shape.pages, "a range has its pages", index=each.index)
            refs = tuple((page.index, page.serial) for page in each.pages)
            ensure(refs == each.refs, "a range knows its pages", index=each.index)
            last = each.index + shape.range_bytes // self._page_bytes - 1
            places = [each.index - 1, *(page.index for page in each.pages), last + 1]
            ensure(all(a < b for a, b in pairwise(places)), "pages lie in their range, in order", index=each.index)
            ensure(all(page.tenant == each.tenant for page in each.pages), "a range is of one tenant", index=each.index)
        ensure(
            all(
                kept.refs[0][0] == kept.index and kept.refs[-1][0] == kept.index + shape.pages - 1
                for shape, kept in warm
            ),
            "warm ranges are backed from their front on, without a gap",
        )
        ensure(
            not any(page.warm for _, each in self.in_use.values() for page in each.pages), "pages in use are not warm"
        )
        used_pages = sum(shape.pages for shape, _ in self.in_use.values())
        ensure(self.table.in_use_pages == used_pages, "pages in use are under ranges in use", pages=used_pages)
        range_bytes = sum(shape.range_bytes for shape, _ in [*self.in_use.values(), *warm])
        ensure(
            self._addresses.used_bytes == range_bytes, "no addresses are lost", used_bytes=self._addresses.used_bytes
        )

    def _make(self, tenant: str, shape: Shape) -> PageRange | None:
        start = self._take_addresses(shape.range_bytes)
        return None if start is None else self._back_new(tenant, start, shape)

    def _back_new(self, tenant: str, start: int, shape: Shape) -> PageRange | None:
        """Put pages under the front of addresses that were taken for a range; they are free again if there are none."""
        try:
            pages = self._collect(tenant, shape.pages)
            if pages is not None:
                return self.table.map(tenant, start // self._page_bytes, pages)
        except BaseException:
            self._addresses.free(start)
            raise
        self._addresses.free(start)
        return None

    def _collect(self, tenant: str, count: int) -> list[Page] | None:
        """Return pages to be mapped: the tenant's warm ones, fresh ones, and others' that were kept warm."""
        own = min(self._reserve.pages_of(tenant), count)
        for kept in self._reserve.take_foreign(tenant, count - own - self.table.free_pages):
            self._give_back(kept)
        if own + self.table.free_pages < count:
            return None
        # Moving a page costs a twentieth of creating one, so the tenant's warm pages come first.
        fresh = self.table.create(tenant, count - own)
        return self._strip(tenant, own) + fresh

    def _take_addresses(self, range_bytes: int) -> int | None:
        while True:
            try:
                return self._addresses.allocate(range_bytes)
            except AddressSpaceError:
                if not self._trim_oldest(None):
                    return None

    def _strip(self, tenant: str, count: int) -> list[Page]:
        """Take ``count`` pages out of the tenant's oldest warm ranges, from their ends."""
        pages: list[Page] = []
        while len(pages) < count and (oldest := self._reserve.take_oldest(tenant)) is not None:
            shape, kept = oldest
            remaining = max(0, shape.pages - (count - len(pages)))
            start = kept.index * self._page_bytes
            if remaining:
                self._addresses.shrink(start, remaining * self._page_bytes)
                front = PageRange(tenant, kept.index, kept.pages[:remaining])
                self._reserve.put(Shape(remaining * self._page_bytes, remaining), front)
            else:
                self._addresses.free(start)
            pages.extend(kept.pages[remaining:])
        ensure(len(pages) == count, "the reserve has the pages it counts", tenant=tenant, count=count)
        return pages

    def _trim_oldest(self, tenant: str | None) -> bool:
        entry = self._reserve.take_oldest(tenant)
        if entry is not None:
            self._give_back(entry[1])
        return entry is not None

    def _give_back(self, kept: PageRange) -> None:
        self.table.release(kept.pages)
        self._addresses.free(kept.index * self._page_bytes)
