"""Carries compaction out: moves caches below a page within their tenant's pages, so that pages come free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from kvpool.errors import BackendError, ensure
from kvpool.memory.allocation import Allocation, Compaction, Movable
from kvpool.memory.backend import Backend
from kvpool.memory.compaction import (
    NOTHING,
    Move,
    Plan,
    Snapshot,
    choose_join,
    pages_under,
    plan_evacuation,
    plan_regrouping,
    plan_slide,
    runs,
    slide,
)
from kvpool.memory.exchange import plan_exchange
from kvpool.memory.filling import plan_filling
from kvpool.memory.ranges import RangeAllocator
from kvpool.memory.scrub import Scrubber
from kvpool.memory.shared import SharedPages
from kvpool.memory.survey import Survey


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
        #: A plan that :meth:`go_on` goes on with, and whose pages it is about.
        self._begun: tuple[str, Plan] | None = None
        #: Since it began.
        self.moved_bytes = 0
        self.freed_pages = 0
        #: The same, but lower while pages are added that more will be freed by.
        self._net_pages = 0
        #: By tenant: the free bytes in its pages when no plan was found.
        self._futile: dict[str, int] = {}
        #: By tenant: bytes of caches, and pages, when holes were filled last.
        self._filled: dict[str, tuple[int, int]] = {}

    def promising(self, tenant: str) -> bool:
        """Whether a plan may be found: no page can come free of less, and much must have changed since none was."""
        free_bytes = self._shared.free_bytes(tenant)
        futile_bytes = self._futile.get(tenant, 0)
        if free_bytes < futile_bytes:
            self._futile[tenant] = futile_bytes = free_bytes
        return free_bytes >= self._page_bytes + futile_bytes + futile_bytes // 8

    def untried(self, tenant: str) -> bool:
        """Whether anything may have changed since no plan was found."""
        return self._shared.free_bytes(tenant) != self._futile.get(tenant, 0)

    def possible(self, tenant: str) -> int:
        """Most pages that could come free."""
        return self._shared.free_bytes(tenant) // self._page_bytes

    def step(self, tenant: str, budget_bytes: int, most_pages: int, owner: Movable) -> Compaction:
        """Move a tenant's caches so that pages come free: ``most_pages`` at most, copying ``budget_bytes`` or a cache.

        A step that the budget ends leaves caches where the next one goes on. ``more`` tells whether anything was done:
        then another step may do more.

        Raises
        ------
        BackendError
            If the system refuses a copy or a mapping. Every cache is whole, where its owner was told; see
            :meth:`finish` for the one that was on its way.
        """
        self.finish()
        if self._shared.free_bytes(tenant) < self._page_bytes:
            return Compaction(0, 0, False)
        plan = self._plan(Survey(self._shared, tenant, self._page_bytes, owner), budget_bytes, most_pages)
        if not plan.moves:
            self._futile[tenant] = self._shared.free_bytes(tenant)
            return Compaction(0, 0, False)
        self._futile.pop(tenant, None)
        return self._carry_out(tenant, plan.within(budget_bytes), owner)

    def go_on(self, tenant: str, budget_bytes: int, owner: Movable, looks: int | None) -> Compaction:
        """Take a small step: copy ``budget_bytes``, or a cache, of a plan for one page that lasts for several steps.

        Between two of them caches come, go and are leased. Moves that are not possible any more are left out. A plan
        is made with ``looks`` snapshots of each kind at most; None: with as many as it takes.

        Raises
        ------
        BackendError
            As :meth:`step`.
        """
        self.finish()
        if self._begun is None or not self._begun[1].moves:
            if self._shared.free_bytes(tenant) < self._page_bytes:
                return Compaction(0, 0, False)
            plan = self._plan(Survey(self._shared, tenant, self._page_bytes, owner), self._page_bytes, 1, looks)
            if not plan.moves:
                self._futile[tenant] = self._shared.free_bytes(tenant)
                return Compaction(0, 0, False)
            self._futile.pop(tenant, None)
            self._begun = (tenant, Plan(plan.moves, ()))
        tenant, rest = self._begun
        front = rest.within(budget_bytes)
        self._begun = (tenant, Plan(rest.moves[len(front.moves) :], ()))
        moved_bytes = freed_pages = 0
        for run in runs(front.moves):
            if self._is_possible(tenant, run, owner):
                done = self._carry_out(tenant, Plan(tuple(run), ()), owner)
                moved_bytes, freed_pages = moved_bytes + done.moved_bytes, freed_pages + done.freed_pages
        return Compaction(moved_bytes, freed_pages, True)

    def _is_possible(self, tenant: str, run: Sequence[Move], owner: Movable) -> bool:
        """Whether caches still lie where they did, may move, and their new place is free but for what they have."""
        for move in run:
            allocation = self._live.get(move.cache_id)
            if allocation is None or allocation.offset != move.source or not owner.may_move(move.cache_id):
                return False
        source, destination = run[0].source, run[0].destination
        size_bytes = sum(move.size_bytes for move in run)
        if self._shared.is_withheld(source, size_bytes):
            return False
        if destination < source < destination + size_bytes:
            size_bytes = source - destination
        return self._shared.is_free(tenant, destination, size_bytes)

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
            self._copy([move], done_bytes, [], owner)
            self._switch(tenant, [move], owner)
            self._shared.put_empty(tenant, pages_under(move.source, move.size_bytes, self._page_bytes))

    def _plan(self, survey: Survey, budget_bytes: int, most_pages: int, looks: int | None = None) -> Plan:
        """Plan with the first snapshots, as many as ``looks`` of each kind, or as many as it takes."""
        for snapshot in islice(survey.for_evacuation(budget_bytes, most_pages), looks):
            plan = plan_evacuation(snapshot, budget_bytes, most_pages)
            if plan.freed:
                return plan
        for snapshot in islice(survey.for_slides(most_pages), looks):
            plan = plan_slide(snapshot, budget_bytes, most_pages)
            if plan.freed:
                return plan
        for snapshot in islice(survey.for_join(), looks):
            pages = choose_join(snapshot, budget_bytes, most_pages)
            if pages:
                return self._join(survey, snapshot, pages)
        if looks is not None:
            return NOTHING
        plan = plan_exchange(survey.whole(), most_pages)
        plan = plan if plan.freed else self._fill(survey)
        return plan if plan.moves else plan_regrouping(survey.whole(), most_pages)

    def _fill(self, survey: Survey) -> Plan:
        """Plan to fill holes, but not twice without a page less: what frees pages after it may undo it."""
        snapshot = survey.for_filling()
        now = sum(part.size_bytes for part in snapshot.parts), len(snapshot.pages)
        before = self._filled.get(survey.tenant)
        if before is not None and before[0] == now[0] and before[1] <= now[1]:
            return NOTHING
        plan = plan_filling(snapshot)
        if plan.moves:
            self._filled[survey.tenant] = now
        return plan

    def _join(self, survey: Survey, snapshot: Snapshot, pages: Sequence[int]) -> Plan:
        """Map pages side by side; returns how to slide what is in them."""
        chosen = set(pages)
        mask = -self._page_bytes
        parts = [part for part in snapshot.parts if part.offset & mask in chosen]
        start = self._shared.join(survey.tenant, pages, [part.offset for part in parts])
        if start is None:
            return NOTHING
        places = {page: start + number * self._page_bytes for number, page in enumerate(pages)}
        joined = [part._replace(offset=places[part.offset & mask] + (part.offset & ~mask)) for part in parts]
        self._enter([(part.cache_id, part.offset, part.size_bytes) for part in joined], survey.owner)
        return slide(sorted(joined), list(places.values()), self._page_bytes)

    def _carry_out(self, tenant: str, plan: Plan, owner: Movable) -> Compaction:
        under = {
            page for move in plan.moves for page in pages_under(move.destination, move.size_bytes, self._page_bytes)
        }
        added = self._shared.extend(tenant, sorted(under))
        if added is None:
            return Compaction(0, 0, False)
        done: list[Move] = []
        emptied: set[int] = {*plan.freed, *added}
        freed_pages = 0
        try:
            for run in runs(plan.moves):
                self._copy(run, 0, done, owner)
        finally:  # also what came free before an error
            self._switch(tenant, done, owner)
            for move in done:
                emptied.update(pages_under(move.source, move.size_bytes, self._page_bytes))
            if self.unfinished is not None:
                move = self.unfinished[0]
                emptied.difference_update(pages_under(move.destination, move.size_bytes, self._page_bytes))
            freed_pages = self._shared.put_empty(tenant, sorted(emptied)) - len(added)
            moved_bytes = sum(move.size_bytes for move in done)
            self.moved_bytes += moved_bytes
            self._net_pages += freed_pages
            self.freed_pages = max(self.freed_pages, self._net_pages)
        return Compaction(moved_bytes, freed_pages, True)

    def _copy(self, run: list[Move], done_bytes: int, done: list[Move], owner: Movable) -> None:
        """Copy what is not copied yet of caches that lie side by side; adds those that are whole to ``done``.

        What slides over a part of its own place is copied in pieces as long as the way it goes, so that each piece is
        whole until the next one is begun.
        """
        source, destination = run[0].source, run[0].destination
        way_bytes = abs(source - destination)
        last = run[-1]
        size_bytes = last.source - source + self._live[last.cache_id].span_bytes
        ensure(way_bytes >= size_bytes or destination < source, "what slides over itself slides down", move=run[0])
        try:
            while done_bytes < size_bytes:
                piece_bytes = min(way_bytes, size_bytes - done_bytes)
                self._backend.copy(
                    self._address + destination + done_bytes, self._address + source + done_bytes, piece_bytes
                )
                done_bytes += piece_bytes
        except BackendError:
            self.unfinished = None
            for move in run:
                if done_bytes < move.size_bytes:
                    overlapping = way_bytes < self._live[move.cache_id].span_bytes
                    self.unfinished = (move, done_bytes, owner) if overlapping and done_bytes else None
                    break
                done.append(move)
                done_bytes -= move.size_bytes
            raise
        self.unfinished = None
        done += run

    def _switch(self, tenant: str, moves: Sequence[Move], owner: Movable) -> None:
        """Enter the new places of caches that are copied, and free the old ones."""
        self._shared.move(tenant, [(move.source, move.destination) for move in moves])
        if self._scrubber.busy(tenant):  # the holes may not have been reached, and now count as in use
            for move in moves:
                end = self._live[move.cache_id].span_bytes
                self._scrubber.zero(move.destination + end, move.size_bytes - end)
        self._enter([(move.cache_id, move.destination, move.size_bytes) for move in moves], owner)

    def _enter(self, places: Iterable[tuple[int, int, int]], owner: Movable) -> None:
        """Note where caches lie: (id, offset, bytes)."""
        live, refs = self._live, self._shared.refs
        for cache_id, offset, size_bytes in places:
            _, tenant, _, real_bytes, max_bytes, extents, _, shared = live[cache_id]
            live[cache_id] = moved = Allocation(
                cache_id, tenant, offset, real_bytes, max_bytes, extents, refs(offset, size_bytes), shared
            )
            owner.moved(moved)
