"""When caches of a device are moved together, whose, and how far: by word, in the background, and for a request."""

from __future__ import annotations

import math
from collections.abc import Callable

from kvpool.memory.allocation import Compaction, Movable, Place, Request
from kvpool.memory.compaction import WINDOW_PAGES
from kvpool.memory.mover import Mover
from kvpool.memory.places import Places
from kvpool.memory.ranges import RangeAllocator
from kvpool.memory.shared import SharedPages


class Compactor:
    """Lets a mover take steps, for one tenant after the other.

    Parameters
    ----------
    mover
        Plans and takes the steps.
    places
        Where a request is tried again after each.
    ranges, shared
        The pages, and what lies in those that caches share.
    owner
        Asked which caches may move, and told of those that did. None: nothing moves.
    """

    def __init__(
        self, mover: Mover, places: Places, ranges: RangeAllocator, shared: SharedPages, owner: Movable | None
    ) -> None:
        self.owner = owner
        self.allowance_bytes = math.inf
        """Bytes that requests may still copy; whoever sets it renews it. When they are used up, what would take more of
        it raises :class:`CapacityError` with ``details["compaction_left"]``."""
        self._mover = mover
        self._places = places
        self._ranges = ranges
        self._shared = shared
        page_bytes = ranges.table.page_size_bytes
        self._page_shift = page_bytes.bit_length() - 1
        self._capacity_bytes = ranges.table.capacity_pages * page_bytes

    def compact(self, budget_bytes: int | None = None) -> Compaction:
        """Move caches below a page together, so that pages come free; the tenant that wastes most comes first.

        Parameters
        ----------
        budget_bytes
            Bytes to copy at most, or one cache. What is begun goes on in the next call. Default: no bound, all is
            compacted.

        Raises
        ------
        BackendError
            If the system refuses a copy or a mapping. Nothing is lost; what was done stays done.
        """
        moved_bytes = freed_pages = 0
        owner = self.owner
        if owner is None:
            return Compaction(0, 0, False)
        left_bytes = self._capacity_bytes if budget_bytes is None else budget_bytes
        with self._ranges.change():
            for tenant in self._shared.tenants:
                done = Compaction(0, 0, True)
                while done.more:
                    if left_bytes <= 0 and budget_bytes is not None:
                        return Compaction(moved_bytes, freed_pages, True)
                    if budget_bytes is None:
                        done = self._mover.step(tenant, left_bytes, WINDOW_PAGES, owner)
                    else:
                        # For a new plan alone: to count takes as long as a step where there are thousands of pages.
                        most_pages = 1 if self._mover.begun else self._mover.within_reach(tenant)
                        done = self._mover.go_on(tenant, left_bytes, owner, None, most_pages)
                    moved_bytes += done.moved_bytes
                    freed_pages += done.freed_pages
                    if budget_bytes is not None:
                        left_bytes -= done.moved_bytes
                        if done.more and not done.moved_bytes:  # it was looked for long enough
                            return Compaction(moved_bytes, freed_pages, True)
        return Compaction(moved_bytes, freed_pages, False)

    def compact_a_little(self, budget_bytes: int) -> Compaction:
        """Take a small step of :meth:`compact`, as few pages looked at as possible, where it promises most."""
        owner = self.owner
        tenant = next(filter(self._mover.promising, self._shared.tenants), None)
        if owner is None or tenant is None:
            return Compaction(0, 0, False)
        with self._ranges.change():
            return self._mover.go_on(tenant, budget_bytes, owner, 1)

    def finish_move(self) -> None:
        """Finish the move that an error of the backend interrupted, if there is one; see :meth:`Mover.finish`.

        Raises
        ------
        BackendError
            If the system refuses again.
        """
        if self._mover.unfinished is not None:
            with self._ranges.change():
                self._mover.finish()

    def make_room(self, request: Request, promising: Callable[[str], bool]) -> Place | None:
        """Free as many pages as are missing, if so many could come free; ``None`` if that did not help."""
        if self.owner is None:
            return None
        needed = -(-request.size_bytes >> self._page_shift)
        tenants = [request.tenant, *(each for each in self._shared.tenants if each != request.tenant)]
        possible = {tenant: self._mover.possible(tenant) for tenant in tenants if promising(tenant)}
        if self._ranges.pages_for(request.tenant) + sum(possible.values()) < needed:
            return None
        for tenant in possible:
            done = Compaction(0, 0, True)
            while done.more:
                if self.allowance_bytes <= 0:
                    error = self._places.no_room(request)
                    error.details["compaction_left"] = True
                    raise error
                # Pages of another tenant that its clients map come free only later: what counts can be used now.
                missing = max(1, needed - self._ranges.pages_for(request.tenant))
                done = self._compact_for(tenant, missing, self.owner)
                if not done.moved_bytes:  # perhaps there is more elsewhere, but it was looked for long enough
                    break
                place = self._places.find(request)
                if place is not None:
                    return place
        return None

    def _compact_for(self, tenant: str, pages: int, owner: Movable) -> Compaction:
        """Compact so that so many pages come free, or as far as is allowed."""
        while self.allowance_bytes < self._capacity_bytes:
            begun = self._mover.begun
            done = self._mover.go_on(tenant, int(self.allowance_bytes), owner, None, pages)
            self.allowance_bytes -= done.moved_bytes
            if done.moved_bytes:
                return done
            if not begun:  # else nothing may be possible of that plan any more: its caches went, or were leased
                break
        done = self._mover.step(tenant, self._capacity_bytes, pages, owner)
        self.allowance_bytes -= done.moved_bytes
        return done
