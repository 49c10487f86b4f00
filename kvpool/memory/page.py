"""One page of physical memory, and several side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: The index of a page that is mapped nowhere.
UNMAPPED = -1


class Page:
    """One page of physical memory. Its serial is unique and ascending, also over pages long gone."""

    __slots__ = ("handle", "holders", "index", "quarantine", "scrubbed", "serial", "tenant", "warm")

    def __init__(self, serial: int, handle: int, tenant: str) -> None:
        self.serial = serial
        self.handle = handle
        self.tenant = tenant
        #: Where it is mapped, in pages from the arena's start.
        self.index = UNMAPPED
        self.warm = False
        #: Clients that were given its descriptor and have not said that they dropped it.
        self.holders: set[str] = set()
        #: Those of them whose leases here were revoked: they may still write to what they had.
        self.quarantine: set[str] = set()
        #: Number of the last scrub that zeroed it.
        self.scrubbed = 0


class PageRange:
    """Pages of one tenant in the range of addresses from ``index`` on: side by side, or with gaps where it can grow."""

    __slots__ = ("index", "pages", "refs", "tenant")

    def __init__(self, tenant: str, index: int, pages: Sequence[Page]) -> None:
        self.tenant = tenant
        self.index = index
        self.pages = tuple(pages)
        #: ``(index, serial)`` of each page: how clients name pages.
        self.refs = tuple((page.index, page.serial) for page in self.pages)

    @property
    def held(self) -> bool:
        """Whether a client may map any of the pages."""
        return any(page.holders for page in self.pages)


def runs(indexes: Iterable[int]) -> list[tuple[int, int]]:
    """Return ``(first, count)`` of each run of consecutive numbers in an ascending sequence."""
    found: list[tuple[int, int]] = []
    for index in indexes:
        if found and sum(found[-1]) == index:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((index, 1))
    return found
