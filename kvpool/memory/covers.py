"""Parts of a client's arena that read as zeros where no page is mapped."""

from __future__ import annotations

import threading
from collections import deque

from kvpool.memory.backend import Access, Backend


class Covers:
    """Shows zeros in ranges of indexes, until they are ended. Safe to use from several threads, and from finalizers.

    A lease may die by garbage collection in any thread, also in the middle of :meth:`show` there, and ends its cover.
    So an end never waits: it is noted, and carried out by whoever has the lock, at the latest when he lets go of it.

    Parameters
    ----------
    backend
        Memory of this process.
    page_size_bytes
        Size of a page.
    """

    def __init__(self, backend: Backend, page_size_bytes: int) -> None:
        self._backend = backend
        self._page_size_bytes = page_size_bytes
        self._lock = threading.Lock()
        #: By view, the address of each range (first, count).
        self._covered: dict[Access, dict[tuple[int, int], int]] = {Access.READ: {}, Access.READ_WRITE: {}}
        self._ended: deque[tuple[int, int]] = deque()
        self._closed = False

    def show(self, base: int, first: int, count: int, access: Access) -> None:
        """Let a range of indexes of the view at ``base`` read as zeros where no page is mapped. Idempotent.

        What it overlaps goes: addresses are one cache's at a time, so that is of one that is gone.
        """
        try:
            with self._lock:
                self._carry_out()
                covered, end = self._covered[access], first + count
                if self._closed or (first, count) in covered:
                    return
                for other in [(start, size) for start, size in covered if start < end and first < start + size]:
                    self._hide(covered, other)
                address = base + first * self._page_size_bytes
                self._backend.show_zeros(address, count * self._page_size_bytes)
                covered[first, count] = address
        finally:
            self._settle()

    def end(self, first: int, count: int) -> None:
        """End :meth:`show` in all views, now or once whoever has the lock lets go of it."""
        self._ended.append((first, count))
        self._settle()

    def close(self) -> None:
        """Forget all, for good: the addresses are about to go, and what reads as zeros with them."""
        with self._lock:
            self._closed = True
            for covered in self._covered.values():
                covered.clear()

    def ranges(self, access: Access) -> list[tuple[int, int]]:
        """Return the ranges of a view that read as zeros: (first, count)."""
        return sorted(self._covered[access])

    def _settle(self) -> None:
        # Looked at again after each release: what was noted meanwhile found the lock taken.
        while self._ended and self._lock.acquire(blocking=False):
            try:
                self._carry_out()
            finally:
                self._lock.release()

    def _carry_out(self) -> None:
        while self._ended:
            part = self._ended.popleft()
            for covered in self._covered.values():
                if part in covered:
                    self._hide(covered, part)

    def _hide(self, covered: dict[tuple[int, int], int], part: tuple[int, int]) -> None:
        self._backend.hide_zeros(covered.pop(part), part[1] * self._page_size_bytes)
