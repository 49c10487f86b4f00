"""Which of a tenant's pages a plan of compaction looks at, so that a small step looks at few."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from kvpool.memory.allocation import Movable
from kvpool.memory.compaction import WINDOW_PAGES, Parts, Snapshot, pages_under
from kvpool.memory.residents import Resident
from kvpool.memory.shared import SharedPages
from kvpool.memory.shelves import MOST_KEPT

_TARGET_FACTOR = 1.5
"""Free bytes looked at for each byte that is to be placed in them: not every hole fits."""

_MANY = 64
"""Caches of a page."""


class Survey:
    """Looks at the pages of one tenant, the likeliest first, then at all.

    Parameters
    ----------
    shared
        The pages.
    tenant
        Whose.
    page_bytes
        Size of a page.
    owner
        Asked which caches may move.
    pages
        Those that are looked at, ascending. Default: all of the tenant's.
    """

    def __init__(
        self,
        shared: SharedPages,
        tenant: str,
        page_bytes: int,
        owner: Movable,
        pages: Sequence[int] | None = None,
    ) -> None:
        self.tenant = tenant
        self._shared = shared
        self.owner = owner
        self._page_bytes = page_bytes
        self._residents = shared.residents(tenant)
        self.pages = shared.pages(tenant) if pages is None else pages
        #: Several ways look at all pages, one after the other.
        self._latest: Snapshot | None = None
        self._order: list[int] | None = None
        self._free_bytes = {page: page_bytes - self._residents.used_bytes(page) for page in self.pages}

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of caches, and pages, that are looked at."""
        return len(self.pages) * self._page_bytes - sum(self._free_bytes.values()), len(self.pages)

    def parcels(self, most_caches: int) -> list[Survey]:
        """Return surveys of pages side by side with so many caches, or a few more; first where most is free.

        What a cache lies across is in one of them, but where a parcel would become twice as large.
        """
        found: list[list[int]] = [[]]
        count = 0
        for page in self.pages:
            if count >= (2 * most_caches if self._residents.linked(page) else most_caches):
                found.append([])
                count = 0
            found[-1].append(page)
            count += self._residents.count(page) + 1
        if len(found) == 1:
            return [self]
        found.sort(key=self._free, reverse=True)
        return [Survey(self._shared, self.tenant, self._page_bytes, self.owner, pages) for pages in found]

    def emptiest(self, budget_bytes: int, most_pages: int) -> list[int]:
        """Return the emptiest pages in which all may move, with ``budget_bytes`` in them at most, or one."""
        sources: list[int] = []
        moved_bytes = 0
        for page in self._emptiest_first():
            if len(sources) >= most_pages or (sources and moved_bytes >= budget_bytes):
                break
            if all(map(self.owner.may_move, self._residents.ids(page))):
                sources.append(page)
                moved_bytes += self._page_bytes - self._free_bytes[page]
        return sources

    def enclosed(self, page: int) -> Mapping[int, Resident] | None:
        """Return what lies in a page, by offset; ``None`` if not all of it begins and ends there."""
        return self._residents.enclosed(page)

    def for_evacuation(self, sources: Sequence[int]) -> Iterator[Snapshot]:
        """Yield the :meth:`emptiest` pages together with holes for what is in them; then all pages."""
        emptiest = self._emptiest_first()
        chosen = set(sources)
        moved_bytes = sum(self._page_bytes - self._free_bytes[page] for page in sources)
        hole_bytes = 0
        # The fullest pages are the best place, but where caches are small much is looked at there for a few holes.
        many = sum(map(self._residents.count, sources)) > _MANY * len(sources)
        for page in emptiest if many else reversed(emptiest):
            if hole_bytes >= _TARGET_FACTOR * moved_bytes:
                break
            if page not in chosen and self._free_bytes[page]:
                chosen.add(page)
                hole_bytes += self._free_bytes[page]
        if not sources:
            return
        yield self._snapshot(sorted(chosen))
        if len(chosen) < len(self.pages):
            yield self.whole()

    def for_slides(self, most_pages: int) -> Iterator[Snapshot]:
        """Yield windows of pages that lie side by side, those first in which least is moved for a page.

        First windows no larger than it takes for ``most_pages`` and what is lost at the end, then the largest.
        """
        for enough_bytes in ((most_pages + 1) * self._page_bytes, WINDOW_PAGES * self._page_bytes):
            windows = [each for each in self._windows(enough_bytes) if self._free(each) >= self._page_bytes]
            windows.sort(key=lambda window: -self._free(window) / len(window))
            for window in windows:
                yield self._snapshot(window)

    def for_join(self) -> Iterator[Snapshot]:
        """Yield the emptiest pages, with those that a cache lies across; then all. But none that must stay."""
        known = set(self.pages)
        chosen: set[int] = set()
        for page in sorted(self.pages, key=lambda page: -self._free_bytes[page])[: 2 * WINDOW_PAGES]:
            first = page
            while self._residents.linked(first) and first - self._page_bytes in known:
                first -= self._page_bytes
            chosen.add(first)
            while self._residents.linked(first + self._page_bytes) and first + self._page_bytes in known:
                first += self._page_bytes
                chosen.add(first)
        yield self._snapshot(self._open(sorted(chosen)))
        if len(chosen) < len(self.pages):
            yield self._snapshot(self._open(self.pages))

    def _open(self, pages: Iterable[int]) -> list[int]:
        """Return those of some pages in which all may move."""
        may_move, ids = self.owner.may_move, self._residents.ids
        return [page for page in pages if all(map(may_move, ids(page)))]

    def emptier(self, most_caches: int) -> Snapshot:
        """Return the emptiest pages, with so many caches or a few more."""
        chosen = []
        for page in self._emptiest_first():
            if most_caches <= 0:
                break
            chosen.append(page)
            most_caches -= self._residents.count(page)
        return self._snapshot(sorted(chosen))

    def whole(self) -> Snapshot:
        """Return all pages."""
        return self._snapshot(self.pages)

    def _emptiest_first(self) -> list[int]:
        if self._order is None:
            pages = sorted(self.pages, reverse=True)
            self._order = sorted(pages, key=self._free_bytes.__getitem__, reverse=True)
        return self._order

    def for_filling(self) -> Snapshot:
        """Return all pages, and where some could be added near them."""
        known = set(self.pages)
        room: set[int] = set()
        for page in self.pages:
            for way, most in ((-self._page_bytes, MOST_KEPT), (self._page_bytes, 2 * MOST_KEPT)):
                near = page + way
                while near not in known and abs(near - page) <= most * self._page_bytes:
                    if not self._shared.is_open(self.tenant, near):
                        break
                    room.add(near)
                    near += way
        return self.whole()._replace(room=frozenset(room), spare_pages=self._shared.spare_pages(self.tenant))

    def _snapshot(self, pages: Iterable[int]) -> Snapshot:
        pages = tuple(pages)
        if self._latest is not None and self._latest.pages == pages:
            return self._latest
        offsets, residents, across = self._residents.columns(pages)
        ids, sizes_bytes = zip(*residents, strict=True) if residents else ((), ())
        movable = list(map(self.owner.may_move, ids))
        known = set(pages)
        for number in across:
            if not known.issuperset(pages_under(offsets[number], sizes_bytes[number], self._page_bytes)):
                movable[number] = False
        self._latest = Snapshot(self._page_bytes, pages, Parts(offsets, sizes_bytes, ids, movable))
        return self._latest

    def _free(self, pages: Iterable[int]) -> int:
        return sum(map(self._free_bytes.__getitem__, pages))

    def _windows(self, enough_bytes: int) -> Iterator[list[int]]:
        """Yield pages that lie side by side, until so many bytes are free in them, or there are too many."""
        window: list[int] = []
        free_bytes = 0
        for page in self.pages:
            apart = window and page != window[-1] + self._page_bytes
            enough = free_bytes >= enough_bytes or len(window) >= WINDOW_PAGES
            # A cache that lies across the end of the window would stay where it is.
            if apart or (enough and not self._residents.linked(page)) or len(window) == 2 * WINDOW_PAGES:
                yield window
                window, free_bytes = [], 0
            window.append(page)
            free_bytes += self._free_bytes[page]
        if window:
            yield window
