"""The page table: the physical pages under an arena, and who may still map them.

::

    free --create, map--> in use <--rest, wake--> warm
      ^                      |                      |
      |                      +-------release--------+
      |                                 |
      +---- no holder ------------------+---- held ----> zombie --dropped, holder_gone--> free

*In use*: something lives in it. *Warm*: kept for its tenant, nothing in it, still mapped at its address. *Zombie*:
given up by the owner, but a client may still map it, so its memory is not there for anyone. At all times
``in use + warm + zombie + free == capacity``.

A page in use may be *quarantined*: a client whose leases were revoked still maps it. Nothing new is placed in it, and
it never becomes warm, until that client has dropped it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kvpool.errors import ConfigError, InvalidSizeError, StaleCacheError, UnknownCacheError, ensure
from kvpool.memory.backend import Access, Backend
from kvpool.memory.page import UNMAPPED, Page, PageRange, runs

_MAPPED_TWICE = 64
"""Most pages that are mapped in two places at a time as they move: together they are unmapped in fewer calls, but each
counts as two mappings until then."""


class PageTable:
    """Creates, maps, moves, exports and gives back the pages of one device, and keeps their account.

    Parameters
    ----------
    backend
        The memory. The table reserves the arena in it.
    capacity_pages
        Most pages that may exist, zombies included.
    page_size_bytes
        A multiple of the backend's granularity.
    arena_pages
        Addresses, in pages.
    """

    def __init__(self, backend: Backend, capacity_pages: int, page_size_bytes: int, arena_pages: int) -> None:
        if page_size_bytes <= 0 or page_size_bytes % backend.granularity():
            raise ConfigError(f"a page must be a multiple of {backend.granularity()} bytes, not {page_size_bytes}")
        if not 0 < capacity_pages <= arena_pages:
            raise InvalidSizeError(
                f"{capacity_pages} pages do not fit an arena of {arena_pages}: give at least 1, and an arena no smaller"
            )
        self._backend = backend
        self.capacity_pages = capacity_pages
        self.page_size_bytes = page_size_bytes
        self.arena_pages = arena_pages
        #: First address of the arena in this process.
        self.address = backend.reserve(arena_pages * page_size_bytes, page_size_bytes)
        self.warm_pages = 0
        #: Of them, by tenant, those that clients map: given back, they would be zombies first.
        self.warm_held_pages: dict[str, int] = {}
        self._next_serial = 1
        #: By serial: every page that takes memory.
        self._pages: dict[int, Page] = {}
        #: By index: those that the owner maps.
        self._mapped: dict[int, Page] = {}
        self._zombies: dict[int, Page] = {}
        #: By client: what it may map, and what it is still to be asked to drop (serials).
        self._held: dict[str, set[int]] = {}
        self._drops: dict[str, list[int]] = {}
        self._lifted: list[Page] = []
        self._closed = False

    @property
    def zombie_pages(self) -> int:
        """Pages given up that some client may still map."""
        return len(self._zombies)

    @property
    def in_use_pages(self) -> int:
        """Pages in which something lives."""
        return len(self._pages) - len(self._zombies) - self.warm_pages

    @property
    def free_pages(self) -> int:
        """Pages that may be created."""
        return self.capacity_pages - len(self._pages)

    def create(self, tenant: str, count: int) -> list[Page]:
        """Return ``count`` fresh pages, zeroed and not mapped yet; all of them or, on an error, none.

        Raises
        ------
        BackendError
            If the system refuses one.
        """
        ensure(0 <= count <= self.free_pages, "no more pages are created than are free", count=count)
        fresh: list[Page] = []
        try:
            for _ in range(count):
                page = Page(self._next_serial, self._backend.create(self.page_size_bytes), tenant)
                self._next_serial += 1
                self._pages[page.serial] = page
                fresh.append(page)
        except BaseException:
            self.release(fresh)
            raise
        return fresh

    def map(self, tenant: str, index: int, pages: Sequence[Page]) -> PageRange:
        """Map ``pages`` from ``index`` on, in use. Those mapped elsewhere move here, with their serials and holders.

        Raises
        ------
        BackendError
            If the system refuses. Then nothing is mapped here, and all of ``pages`` went back to the system: they held
            nothing, and pages half-way between two addresses are no use to anyone.
        """
        ensure(all(page.tenant == tenant for page in pages), "pages stay with their tenant", tenant=tenant)
        mapped = 0
        try:
            for start in range(0, len(pages), _MAPPED_TWICE):
                some = pages[start : start + _MAPPED_TWICE]
                for page in some:
                    address = self._address(index + mapped)
                    if page.index == UNMAPPED:
                        self._backend.map(address, page.handle)
                    else:
                        self._backend.remap(address, page.handle, self._address(page.index))
                    mapped += 1
                self._unmap(some)
            self._backend.set_access(self._address(index), mapped * self.page_size_bytes, Access.READ_WRITE)
        except BaseException:
            if mapped:
                self._backend.unmap(self._address(index), mapped * self.page_size_bytes)
            self.release(pages)
            raise
        for position, page in enumerate(pages, index):
            page.index = position
            self._mapped[position] = page
        self.wake([page for page in pages if page.warm])
        return PageRange(tenant, index, pages)

    def relocate(self, pages: Sequence[Page], index: int) -> PageRange:
        """Map pages in use, with what is in them, side by side from ``index`` on instead of where they are.

        Raises
        ------
        BackendError
            If the system refuses. Then all are where they were.
        """
        mapped = 0
        try:
            for page in pages:
                self._backend.remap(self._address(index + mapped), page.handle, self._address(page.index))
                mapped += 1
        except BaseException:
            if mapped:
                self._backend.unmap(self._address(index), mapped * self.page_size_bytes)
            raise
        self._unmap(pages)
        for position, page in enumerate(pages, index):
            page.index = position
            self._mapped[position] = page
        return PageRange(pages[0].tenant, index, pages)

    def rest(self, pages: Sequence[Page]) -> None:
        """Mark pages in use as warm: nothing lives in them any more."""
        for page in pages:
            page.warm = True
            if page.holders:
                self._count_warm_held(page, 1)
        self.warm_pages += len(pages)

    def wake(self, pages: Sequence[Page]) -> None:
        """Mark warm pages as in use."""
        for page in pages:
            page.warm = False
            if page.holders:
                self._count_warm_held(page, -1)
        self.warm_pages -= len(pages)

    def release(self, pages: Sequence[Page]) -> None:
        """Give pages back to the system. Those that a client holds become zombies, and it is asked to drop them."""
        self._unmap(pages)
        self.wake([page for page in pages if page.warm])
        for page in pages:
            self._backend.release(page.handle)
            if page.holders:
                self._zombies[page.serial] = page
                for client_id in page.holders:
                    self._drops.setdefault(client_id, []).append(page.serial)
            else:
                del self._pages[page.serial]

    def export(self, client_id: str, tenant: str, index: int, serial: int) -> int:
        """Return a descriptor of the page for ``client_id``, which holds it from now on. The caller closes it.

        Raises
        ------
        StaleCacheError
            If that page is not in use there any more.
        UnknownCacheError
            If it never was, or is another tenant's.
        """
        page = self._mapped.get(index)
        if page is not None and page.serial == serial and page.tenant == tenant and not page.warm:
            descriptor = self._backend.export(page.handle)
            page.holders.add(client_id)
            self._held.setdefault(client_id, set()).add(serial)
            return descriptor
        foreign = page is not None and page.serial == serial and page.tenant != tenant
        if foreign or not 0 < serial < self._next_serial:
            raise UnknownCacheError(
                f"tenant {tenant!r} has no page {serial} at index {index}", index=index, serial=serial
            )
        raise StaleCacheError(
            f"page {serial} is not in use at index {index} any more: ask for the cache's pages again",
            index=index,
            serial=serial,
        )

    def quarantine(self, client_id: str, indexes: Iterable[int]) -> list[int]:
        """Quarantine those of the mapped pages at ``indexes`` that ``client_id`` may map; returns their indexes."""
        held = [index for index in indexes if client_id in self._mapped[index].holders]
        for index in held:
            self._mapped[index].quarantine.add(client_id)
        return held

    def take_lifted(self) -> list[int]:
        """Return, and forget, the indexes of the mapped pages whose quarantine has ended."""
        lifted, self._lifted = self._lifted, []
        return [page.index for page in lifted if page.index != UNMAPPED and not page.quarantine]

    def held_bytes(self, client_id: str) -> int:
        """Return the bytes of the pages that a client may map."""
        return len(self._held.get(client_id, ())) * self.page_size_bytes

    def take_drops(self) -> dict[str, list[int]]:
        """Return, and forget, which pages (serials) each client is to drop and then acknowledge by :meth:`dropped`."""
        drops, self._drops = self._drops, {}
        return drops

    def dropped(self, client_id: str, serials: Iterable[int]) -> None:
        """Note that ``client_id`` maps these pages nowhere any more. An acknowledgement may be sent twice.

        Raises
        ------
        UnknownCacheError
            If a serial was never given to a page. Nothing is changed then.
        """
        serials = list(serials)
        unknown = [serial for serial in serials if not 0 < serial < self._next_serial]
        if unknown:
            raise UnknownCacheError(
                f"client {client_id!r} dropped pages that never existed: {unknown}", serials=unknown
            )
        for serial in self._held.get(client_id, set()).intersection(serials):
            self._let_go(client_id, serial)

    def holder_gone(self, client_id: str) -> None:
        """Note that the client's process is dead: it maps nothing any more."""
        for serial in list(self._held.get(client_id, ())):
            self._let_go(client_id, serial)
        self._drops.pop(client_id, None)

    def check(self) -> None:
        """Prove the account, and that holders, mappings and zombies agree with each other.

        Raises
        ------
        InvariantError
            If one of these does not hold.
        """
        pages = self._pages.values()
        total = self.in_use_pages + self.warm_pages + self.zombie_pages + self.free_pages
        ensure(total == self.capacity_pages, "the states of all pages add up to the capacity", total=total)
        ensure(self.free_pages >= 0, "no more pages exist than may", pages=len(self._pages))
        ensure(self.warm_pages == sum(page.warm for page in pages), "warm pages are counted")
        warm_held = Counter(page.tenant for page in pages if page.warm and page.holders)
        ensure(self.warm_held_pages == warm_held, "warm pages that clients map are counted")
        ensure(len(self._mapped) + len(self._zombies) == len(self._pages), "a page is mapped or a zombie")
        for index, page in self._mapped.items():
            ensure(page.index == index and page.serial in self._pages, "a mapped page knows its place", index=index)
            ensure(page.serial not in self._zombies, "a mapped page is no zombie", serial=page.serial)
        for page in self._zombies.values():
            ensure(page.holders and page.index == UNMAPPED and not page.warm, "a zombie is held", serial=page.serial)
        held = {(client, serial) for client, serials in self._held.items() for serial in serials}
        holders = {(client, page.serial) for page in pages for client in page.holders}
        ensure(held == holders, "holders are the same from both sides", differing=sorted(held ^ holders))
        ensure(all(self._held.values()), "a client that holds nothing is forgotten")
        for page in pages:
            ensure(page.quarantine <= page.holders, "who is in quarantine holds the page", serial=page.serial)
            ensure(not (page.quarantine and page.warm), "a page in quarantine is not warm", serial=page.serial)

    def close(self) -> None:
        """Unmap and release every page, and give the addresses back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.release(list(self._mapped.values()))
        self._backend.unreserve(self.address)

    def _let_go(self, client_id: str, serial: int) -> None:
        page = self._pages[serial]
        page.holders.discard(client_id)
        held = self._held[client_id]
        held.discard(serial)
        if not held:
            del self._held[client_id]
        if client_id in page.quarantine:
            page.quarantine.discard(client_id)
            self._lifted.append(page)
        if not page.holders:
            if page.warm:
                self._count_warm_held(page, -1)
            elif self._zombies.pop(serial, None) is not None:
                del self._pages[serial]

    def _count_warm_held(self, page: Page, change: int) -> None:
        count = self.warm_held_pages.pop(page.tenant, 0) + change
        if count:
            self.warm_held_pages[page.tenant] = count

    def _address(self, index: int) -> int:
        return self.address + index * self.page_size_bytes

    def _unmap(self, pages: Iterable[Page]) -> None:
        """Unmap those that are mapped, one call for each contiguous run."""
        for first, count in runs(sorted(page.index for page in pages if page.index != UNMAPPED)):
            self._backend.unmap(self._address(first), count * self.page_size_bytes)
            for index in range(first, first + count):
                self._mapped.pop(index).index = UNMAPPED
