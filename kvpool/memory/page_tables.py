"""What is known to be in this process's page tables, so that what is not is entered before it is written.

Page tables fill when memory is touched. Of pages that another process wrote, the kernel enters one (4 KiB) at a write
here, but at a read all that are there of the 64 KiB around it, and in shared memory these may be written from then on.
So a byte of what is to be written is read first: to write 2 MiB takes 210 us then instead of 740, and if nobody had
written it before as long as else (890: that byte is a fault that the write does not have any more). MADV_POPULATE_READ
fills in as many at a time, but whole pages of which perhaps little is written (330 us, or 60 for nothing),
MADV_POPULATE_WRITE one at a time. What is only read needs nothing.
"""

from __future__ import annotations

from kvpool.memory import mman

WINDOW_BITS = 16
"""Of the number of bytes that the kernel enters around a read (``fault_around_bytes``, if nobody has changed it)."""
_MOST_WINDOWS = 1 << 16
"""So many (4 GiB) are known to be entered, in 4 MiB; then it begins anew."""


class PageTables:
    """Windows of addresses that were entered since they were mapped. Safe to use from several threads.

    To look here takes less than to read a byte in vain (0.3 us). Where it is wrong (a window of two pages, or written
    in part, or memory that no backend maps) that costs time alone.
    """

    def __init__(self) -> None:
        self.entered: set[int] = set()
        """Numbers of windows. A loop in which calls of :meth:`enter` are too slow may read and add by itself, after
        :meth:`limit`."""

    def enter(self, address: int, size_bytes: int) -> None:
        """Read a byte of each window that is about to be written, unless that was done since it was mapped."""
        entered, view = self.entered, mman.ADDRESSES
        first, last = address >> WINDOW_BITS, address + size_bytes - 1 >> WINDOW_BITS
        if first not in entered:
            self.limit()
            _ = view[address]
            entered.add(first)
        elif first == last or entered.issuperset(range(first + 1, last + 1)):
            return
        for window in range(first + 1, last + 1):
            if window not in entered:
                _ = view[window << WINDOW_BITS]
                entered.add(window)

    def limit(self) -> None:
        """Begin anew if too many windows are known."""
        if len(self.entered) > _MOST_WINDOWS:
            self.entered.clear()

    def forget(self, address: int, size_bytes: int) -> None:
        """Take note that something is mapped at these addresses from now on.

        (Not when it is unmapped: other memory of this process may lie, and be entered, there in between.)
        """
        last = address + size_bytes - 1 >> WINDOW_BITS
        self.entered.difference_update(range(address >> WINDOW_BITS, last + 1))

    def forget_all(self) -> None:
        """Take note that nothing is mapped, as in a forked child."""
        self.entered.clear()


PAGE_TABLES = PageTables()
"""Those of this process."""
