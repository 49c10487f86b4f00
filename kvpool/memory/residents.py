"""What lies in each of a tenant's shared pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kvpool.errors import ensure

#: A part of shared pages: the id of its cache, and its bytes, rounded to minimum blocks. (A plain tuple of integers,
#: which the garbage collector does not look at: there may be a million.)
Resident = tuple[int, int]

_NONE = -1


class _Page:
    __slots__ = ("parts", "reaching", "used_bytes")

    def __init__(self) -> None:
        #: That begin here, by offset.
        self.parts: dict[int, Resident] = {}
        #: Offset of the part that reaches into this page from those before.
        self.reaching = _NONE
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
        for following in range(page + self._page_bytes, offset + resident[1], self._page_bytes):
            there = self._pages.setdefault(following, _Page())
            there.used_bytes += min(self._page_bytes, offset + resident[1] - following)
            there.reaching = offset

    def enter_all(self, offsets: Iterable[int], residents: Iterable[Resident]) -> None:
        """Call :meth:`enter` for each; faster for those that lie in one page."""
        mask, page_bytes, pages = self._mask, self._page_bytes, self._pages
        for offset, resident in zip(offsets, residents, strict=True):
            page = offset & mask
            here = pages.get(page)
            if here is None or offset - page + resident[1] > page_bytes:
                self.enter(offset, resident)
            else:
                here.parts[offset] = resident
                here.used_bytes += resident[1]

    def enclosed(self, page: int) -> Mapping[int, Resident] | None:
        """Return what lies in a page, by offset; ``None`` if not all of it begins and ends there."""
        here = self._pages.get(page)
        if here is None:
            return {}
        whole = sum([size_bytes for _, size_bytes in here.parts.values()]) == here.used_bytes
        return here.parts if whole and here.reaching == _NONE else None

    def leave_page(self, page: int) -> None:
        """Forget all in a page of which all is :meth:`enclosed`."""
        del self._pages[page]

    def leave(self, offset: int) -> Resident:
        """Forget, and return, the part at ``offset``."""
        page = offset & self._mask
        here = self._pages[page]
        resident = here.parts.pop(offset)
        inside_bytes = page + self._page_bytes - offset
        if resident[1] <= inside_bytes:
            here.used_bytes -= resident[1]
            if not here.used_bytes:
                del self._pages[page]
            return resident
        here.used_bytes -= inside_bytes
        for following in range(page + self._page_bytes, offset + resident[1], self._page_bytes):
            there = self._pages[following]
            there.used_bytes -= min(self._page_bytes, offset + resident[1] - following)
            there.reaching = _NONE
            if not there.used_bytes:
                del self._pages[following]
        if not here.used_bytes:
            del self._pages[page]
        return resident

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

    def ids(self, page: int) -> Iterator[int]:
        """Yield the ids of the caches that lie in a page, at least in part."""
        here = self._pages.get(page)
        if here is None:
            return
        for cache_id, _ in here.parts.values():
            yield cache_id
        if here.reaching != _NONE:
            yield self.at(here.reaching)[0]

    def within(self, pages: Iterable[int]) -> list[tuple[int, Resident]]:
        """Return (offset, part) of all that lie at least in part in ``pages``, ascending."""
        found: dict[int, Resident] = {}
        for page in pages:
            here = self._pages.get(page)
            if here is not None:
                found.update(here.parts)
                if here.reaching != _NONE:
                    found[here.reaching] = self.at(here.reaching)
        return sorted(found.items())

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
        ensure(used == {page: here.used_bytes for page, here in self._pages.items()}, "a page's bytes are counted")
        ensure(sum(used.values()) == known_bytes, "who lies in each page is known", known_bytes=known_bytes)
