"""Carries compaction out: moves caches below a page within their tenant's pages, so that pages come free."""

from __future__ import annotations

from kvpool.errors import BackendError, ensure
from kvpool.memory.allocation import Allocation, Compaction, Movable
from kvpool.memory.backend import Backend
from kvpool.memory.compaction import (
    Move,
    Part,
    Plan,
    Snapshot,
    choose_join,
    pages_under,
    plan_evacuation,
    plan_slide,
    slide,
)
from kvpool.memory.ranges import RangeAllocator
from kvpool.memory.scrub import Scrubber
from kvpool.memory.shared import SharedPages


class Mover:
    """Plans and moves. Nothing is kept from one step to the next, so a step that fails leaves nothing to repair.

    A move is: copy, then enter the new place, tell the owner, and free the old one. Up to the switch the old place is
    whole and the cache is there. Only where a cache slides over a part of its own place this cannot be: such a move,
    once begun, is finished (:meth:`finish`) before anything else is done.

    The bytes that a cache leaves behind stay until something is written over them, as those of a cache that is freed
    do: they are in pages of its tenant, none of which leaves the tenant unzeroed, and a scrub reaches them there.

    Parameters
    ----------
    backend
        The memory.
    ranges, shared
        The pages, and what lies in those that caches share.
    live
        The caches, by id; brought up to date here.
    scrubber
        Told to clean behind a cache while the tenant's memory is scrubbed.
    """

    def __init__(
        self,
        backend: Backend,
        ranges: RangeAllocator,
        shared: SharedPages,
        live: dict[int, Allocation],
        scrubber: Scrubber,
    ) -> None:
        self._backend = backend
        self._shared = shared
        self._live = live
        self._scrubber = scrubber
        self._address = ranges.table.address
        self._page_bytes = ranges.table.page_size_bytes
        #: A move over a part of the cache's own place that the backend interrupted, the bytes copied, and whom to tell.
        self.unfinished: tuple[Move, int, Movable] | None = None
        #: By tenant: the free bytes in its pages when no plan was found.
        self._futile: dict[str, int] = {}

    def promising(self, tenant: str) -> bool:
        """Whether a plan may be found: no page can come free of less, and much must have changed since none was."""
        free_bytes = self._shared.free_bytes(tenant)
        return free_bytes >= self._page_bytes + self._futile.get(tenant, 0)

    def possible(self, tenant: str) -> int:
        """Most pages that could come free."""
        return self._shared.free_bytes(tenant) // self._page_bytes

    def step(self, tenant: str, budget_bytes: int, most_pages: int, owner: Movable) -> Compaction:
        """Free pages of a tenant: ``most_pages`` at most, copying ``budget_bytes``, or what the cheapest page takes.

        ``more`` tells whether anything came free: then another step may find more.

        Raises
        ------
        BackendError
            If the system refuses a copy or a mapping. Every cache is whole, where its owner was told; see
            :meth:`finish` for the one that was on its way.
        """
        self.finish()
        if self._shared.free_bytes(tenant) < self._page_bytes:
            return Compaction(0, 0, False)
        snapshot = self._snapshot(tenant, owner)
        plan = plan_evacuation(snapshot, budget_bytes, most_pages)
        if not plan.freed:
            plan = plan_slide(snapshot, budget_bytes, most_pages)
        if not plan.freed:
            plan = self._join(tenant, snapshot, budget_bytes, most_pages, owner)
        if not plan.freed:
            self._futile[tenant] = self._shared.free_bytes(tenant)
            return Compaction(0, 0, False)
        freed_pages = self._carry_out(tenant, plan, owner)
        self._futile.pop(tenant, None)
        return Compaction(plan.moved_bytes, freed_pages, True)

    def finish(self) -> None:
        """Finish the move that an error of the backend interrupted, if there is one.

        Raises
        ------
        BackendError
            If the system refuses again.
        """
        if self.unfinished is not None:
            move, done_bytes, owner = self.unfinished
            tenant = self._live[move.cache_id].tenant
            self._copy(move, done_bytes, owner)
            self._shared.put_empty(tenant, pages_under(move.source, move.size_bytes, self._page_bytes))

    def _snapshot(self, tenant: str, owner: Movable) -> Snapshot:
        pages = tuple(self._shared.pages(tenant))
        known = set(pages)
        parts = []
        for each in self._live.values():
            if each.max_size_bytes >= self._page_bytes or each.tenant != tenant:
                continue
            inside = [index * self._page_bytes in known for index, _ in each.pages]
            if any(inside):
                size_bytes = self._shared.part_bytes(tenant, each.offset)
                movable = all(inside) and owner.may_move(each.cache_id)
                parts.append(Part(each.offset, size_bytes, each.cache_id, movable))
        parts.sort()
        return Snapshot(self._page_bytes, pages, tuple(parts))

    def _join(self, tenant: str, snapshot: Snapshot, budget_bytes: int, most_pages: int, owner: Movable) -> Plan:
        """Map pages side by side; returns how to slide what is in them."""
        pages = choose_join(snapshot, budget_bytes, most_pages)
        chosen = set(pages)
        parts = [part for part in snapshot.parts if part.offset - part.offset % self._page_bytes in chosen]
        start = self._shared.join(tenant, pages, [part.offset for part in parts]) if pages else None
        if start is None:
            return Plan((), ())
        places = {page: start + number * self._page_bytes for number, page in enumerate(pages)}
        joined = []
        for part in parts:
            page = part.offset - part.offset % self._page_bytes
            joined.append(part._replace(offset=places[page] + part.offset - page))
            self._enter(joined[-1].cache_id, joined[-1].offset, owner)
        return slide(sorted(joined), list(places.values()), self._page_bytes)

    def _carry_out(self, tenant: str, plan: Plan, owner: Movable) -> int:
        emptied = set(plan.freed)
        try:
            for move in plan.moves:
                emptied.update(pages_under(move.source, move.size_bytes, self._page_bytes))
                self._copy(move, 0, owner)
        finally:  # also what came free before an error
            if self.unfinished is not None:
                move = self.unfinished[0]
                emptied.difference_update(pages_under(move.destination, move.size_bytes, self._page_bytes))
            freed_pages = self._shared.put_empty(tenant, sorted(emptied))
        return freed_pages

    def _copy(self, move: Move, done_bytes: int, owner: Movable) -> None:
        """Copy what is not copied yet, and switch.

        Over a part of its own place a cache slides in pieces as long as the way it goes, so that each piece is whole
        until the next one is begun.
        """
        way_bytes = abs(move.source - move.destination)
        size_bytes = self._live[move.cache_id].span_bytes
        overlapping = way_bytes < size_bytes
        ensure(not overlapping or move.destination < move.source, "what slides over itself slides down", move=move)
        try:
            while done_bytes < size_bytes:
                piece_bytes = min(way_bytes, size_bytes - done_bytes)
                source, destination = move.source + done_bytes, move.destination + done_bytes
                self._backend.copy(self._address + destination, self._address + source, piece_bytes)
                done_bytes += piece_bytes
        except BackendError:
            self.unfinished = (move, done_bytes, owner) if overlapping and done_bytes else None
            raise
        self.unfinished = None
        self._switch(move, owner)

    def _switch(self, move: Move, owner: Movable) -> None:
        allocation = self._live[move.cache_id]
        self._shared.move(allocation.tenant, move.source, move.destination)
        if self._scrubber.busy(allocation.tenant):  # the hole may not have been reached, and now counts as in use
            end = allocation.span_bytes
            self._scrubber.zero(move.destination + end, move.size_bytes - end)
        self._enter(move.cache_id, move.destination, owner)

    def _enter(self, cache_id: int, offset: int, owner: Movable) -> None:
        allocation = self._live[cache_id]
        pages = self._shared.refs(offset, self._shared.part_bytes(allocation.tenant, offset))
        self._live[cache_id] = moved = allocation._replace(offset=offset, pages=pages)
        owner.moved(moved)
