"""What lies in each of a tenant's shared pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvpool.errors import ensure

#: A part of shared pages: the id of its cache, and its bytes, rounded to minimum blocks. (A plain tuple of integers,
#: which the garbage collector does not look at: there may be a million.)
Resident = tuple[int, int]

_NONE = -1


class _Page:
    __slots__ = ("leading", "parts", "reaching", "used_bytes")

    def __init__(self) -> None:
        #: That begin here, by offset.
        self.parts: dict[int, Resident] = {}
        #: Offset of the part that reaches into this page from those before.
        self.reaching = _NONE
        #: Offset of the part that begins here and reaches into those behind.
        self.leading = _NONE
        self.used_bytes = 0


class Residents:
    """The parts in shared pages, by page. :meth:`enter` and :meth:`leave` are on the fast path.

    Parameters
    ----------
    page_bytes
        A power of two.
    """

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._mask = -page_bytes
        self._pages: dict[int, _Page] = {}

    def enter(self, offset: int, resident: Resident) -> None:
        """Note that a part lies at ``offset`` now."""
        page = offset & self._mask
        here = self._pages.get(page)
        if here is None:
            here = self._pages[page] = _Page()
        here.parts[offset] = resident
        inside_bytes = page + self._page_bytes - offset
        if resident[1] <= inside_bytes:
            here.used_bytes += resident[1]
            return
        here.used_bytes += inside_bytes
        here.leading = offset
        for following in range(page + self._page_bytes, offset + resident[1], self._page_bytes):
            there = self._pages.setdefault(following, _Page())
            there.used_bytes += min(self._page_bytes, offset + resident[1] - following)
            there.reaching = offset

    def enter_all(self, offsets: Iterable[int], residents: Iterable[Resident]) -> list[int]:
        """Call :meth:`enter` for each, faster for those in one page; returns the offsets of those that reach over."""
        pages, mask = self._pages, self._mask
        # Of the last one's page: what lies in it, where it ends, and the bytes entered that it does not count yet.
        page = end = -self._page_bytes
        here, parts, entered_bytes = _Page(), {}, 0
        across = []
        for offset, resident in zip(offsets, residents, strict=True):
            behind = offset + resident[1]
            if not page <= offset < behind <= end:
                here.used_bytes += entered_bytes
                entered_bytes = 0
                page = offset & mask
                end = page + self._page_bytes
                found = pages.get(page)
                if found is None or behind > end:
                    self.enter(offset, resident)
                    here = pages[page]
                    parts = here.parts
                    if behind > end:
                        across.append(offset)
                    continue
                here, parts = found, found.parts
            parts[offset] = resident
            entered_bytes += resident[1]
        here.used_bytes += entered_bytes
        return across

    def enclosed(self, page: int) -> Mapping[int, Resident] | None:
        """Return what lies in a page, by offset; ``None`` if not all of it begins and ends there."""
        here = self._pages.get(page)
        if here is None:
            return {}
        return here.parts if here.leading == here.reaching == _NONE else None

    def leave_page(self, page: int) -> dict[int, Resident]:
        """Forget, and return by offset, all that begins in a page."""
        here = self._pages.pop(page)
        if here.leading != _NONE:
            self._pull_back(here.leading, here.parts[here.leading][1])
        if here.reaching != _NONE:
            rest = self._pages[page] = _Page()
            rest.reaching = here.reaching
            rest.used_bytes = min(self._page_bytes, here.reaching + self.at(here.reaching)[1] - page)
        return here.parts

    def leave(self, offset: int) -> Resident:
        """Forget, and return, the part at ``offset``."""
        page = offset & self._mask
        here = self._pages[page]
        resident = here.parts.pop(offset)
        inside_bytes = page + self._page_bytes - offset
        if resident[1] <= inside_bytes:
            here.used_bytes -= resident[1]
        else:
            here.used_bytes -= inside_bytes
            here.leading = _NONE
            self._pull_back(offset, resident[1])
        if not here.used_bytes:
            del self._pages[page]
        return resident

    def _pull_back(self, offset: int, size_bytes: int) -> None:
        """Forget of a part what lies in the pages behind the one that it begins in."""
        for following in range((offset & self._mask) + self._page_bytes, offset + size_bytes, self._page_bytes):
            there = self._pages[following]
            there.used_bytes -= min(self._page_bytes, offset + size_bytes - following)
            there.reaching = _NONE
            if not there.used_bytes:
                del self._pages[following]

    def at(self, offset: int) -> Resident:
        """Return the part at ``offset``."""
        return self._pages[offset & self._mask].parts[offset]

    def used_bytes(self, page: int) -> int:
        """Bytes of a page that parts have."""
        here = self._pages.get(page)
        return 0 if here is None else here.used_bytes

    def count(self, page: int) -> int:
        """How many parts begin in a page."""
        here = self._pages.get(page)
        return 0 if here is None else len(here.parts)

    def ids(self, page: int) -> list[int]:
        """Return the ids of the caches that lie in a page, at least in part."""
        here = self._pages.get(page)
        if here is None:
            return []
        ids = [cache_id for cache_id, _ in here.parts.values()]
        if here.reaching != _NONE:
            ids.append(self.at(here.reaching)[0])
        return ids

    def columns(self, pages: Iterable[int]) -> tuple[list[int], list[Resident], list[int]]:
        """Return what lies at least in part in ``pages``, which ascend: offsets, ascending, and parts.

        And the numbers of those parts that lie across the border of a page.
        """
        offsets: list[int] = []
        residents: list[Resident] = []
        across: list[int] = []
        for page in pages:
            here = self._pages.get(page)
            if here is None:
                continue
            if here.reaching != _NONE and not (across and offsets[across[-1]] == here.reaching):
                across.append(len(offsets))
                offsets.append(here.reaching)
                residents.append(self.at(here.reaching))
            inside = sorted(here.parts)
            offsets += inside
            residents += map(here.parts.__getitem__, inside)
            if here.leading != _NONE:
                across.append(len(offsets) - 1)
        return offsets, residents, across

    def linked(self, page: int) -> bool:
        """Whether a part lies across the border of a page and the one before it."""
        here = self._pages.get(page)
        return here is not None and here.reaching != _NONE

    def check(self, known_bytes: int) -> None:
        """Prove that the parts add up to ``known_bytes``, page by page.

        Raises
        ------
        InvariantError
            If they do not.
        """
        used = dict.fromkeys(self._pages, 0)
        for page, here in self._pages.items():
            for offset, (_, size_bytes) in here.parts.items():
                used[page] += min(size_bytes, page + self._page_bytes - offset)
                for following in range(page + self._page_bytes, offset + size_bytes, self._page_bytes):
                    used[following] += min(self._page_bytes, offset + size_bytes - following)
                    ensure(self._pages[following].reaching == offset, "who reaches over is known", page=following)
                    ensure(here.leading == offset, "who reaches over is known where it begins", page=page)
        ensure(used == {page: here.used_bytes for page, here in self._pages.items()}, "a page's bytes are counted")
        ensure(sum(used.values()) == known_bytes, "who lies in each page is known", known_bytes=known_bytes)
