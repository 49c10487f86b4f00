"""Carries compaction out: moves caches below a page within their tenant's pages, so that pages come free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

from kvpool.memory.allocation import Allocation, Compaction, Movable
from kvpool.memory.backend import Backend
from kvpool.memory.compaction import (
    NOTHING,
    Plan,
    Snapshot,
    choose_join,
    pages_of,
    pages_under,
    plan_slide,
    slide,
)
from kvpool.memory.evacuation import plan_evacuation, plan_regrouping
from kvpool.memory.exchange import plan_exchange
from kvpool.memory.filling import plan_filling
from kvpool.memory.fitting import Blocks, plan_fit
from kvpool.memory.move_copies import copied, copies_of, count_complete, rest_of
from kvpool.memory.moves import Move, Moves, count_within, runs
from kvpool.memory.ranges import RangeAllocator
from kvpool.memory.scrub import Scrubber
from kvpool.memory.shared import SharedPages
from kvpool.memory.survey import Survey

_BATCH_MOVES = 512
"""Moves of a plan that are copied and switched together: what is known of them stays in the processor's cache."""

_MOST_CACHES = 2048
"""Caches that one plan looks at where all would take longer than others can wait."""


_NEARLY = 32
"""The part of all pages that may be missing of what a filling promised, where no number of pages is needed: to look for
the last one takes as long as to find ten before it."""


class Mover:
    """Plans and moves. Kept from one step to the next is only where to look, so a failure leaves nothing to repair.

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
        #: What is left of a plan that :meth:`go_on` goes on with, and whose pages it is about.
        self._begun: tuple[str, Moves] | None = None
        #: Since it began.
        self.moved_bytes = 0
        self.freed_pages = 0
        #: The same, but lower while pages are added that more will be freed by.
        self.net_pages = 0
        #: By tenant: the free bytes in its pages when no plan was found.
        self._futile: dict[str, int] = {}
        #: By tenant, when holes were filled last: bytes of caches, pages, and how many no plan goes below.
        self._filled: dict[str, tuple[int, int, int]] = {}
        #: Tenants whose holes were filled by the last plan: pages come free when the rest slides together.
        self._loose: set[str] = set()
        #: By tenant: in how many parcels of its pages no plan was found, one after the other.
        self._searched: dict[str, int] = {}

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

    def within_reach(self, tenant: str) -> int:
        """How many pages one plan may free that others can wait for: all that there are, if caches are few.

        One plan for all copies less than one after the other: what moves for a page moves again for the next.
        """
        residents = self._shared.residents(tenant)
        caches = sum(map(residents.count, self._shared.pages(tenant)))
        return max(1, len(self._shared.pages(tenant)) * _MOST_CACHES // max(caches, _MOST_CACHES))

    @property
    def begun(self) -> bool:
        """Whether :meth:`go_on` has a plan to go on with."""
        return self._begun is not None

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
            return Compaction(0, 0, tenant in self._searched)
        # (All of it: a plan that is left half-way might undo by turns what another one did.)
        return self._carry_out(tenant, plan, owner)

    def go_on(
        self, tenant: str, budget_bytes: int, owner: Movable, looks: int | None, most_pages: int = 1
    ) -> Compaction:
        """Take a small step: copy ``budget_bytes``, or a cache, of a plan for some pages that lasts for several steps.

        Between two of them caches come, go and are leased. Moves that are not possible any more are left out. A plan
        is made with ``looks`` snapshots of each kind at most; None: with as many as it takes.

        Raises
        ------
        BackendError
            As :meth:`step`.
        """
        self.finish()
        batches: Iterable[Plan]
        if self._begun is None:
            if self._shared.free_bytes(tenant) < self._page_bytes:
                return Compaction(0, 0, False)
            survey = Survey(self._shared, tenant, self._page_bytes, owner)
            plan = self._plan(survey, most_pages * self._page_bytes, most_pages, looks)
            if not plan.moves:
                return Compaction(0, 0, looks is None and tenant in self._searched)
            moves = plan.moves
            count = count_within(moves, budget_bytes)
            batches = (Plan(moves[:count], (), plan.added),)  # nothing has changed since they were planned
        else:
            tenant, moves = self._begun
            count = count_within(moves, budget_bytes)
            batches = self._possible(tenant, moves[:count], owner)
        self._begun = (tenant, moves[count:]) if count < len(moves) else None
        moved_bytes = freed_pages = 0
        for batch in batches:
            done = self._carry_out(tenant, batch, owner)
            moved_bytes, freed_pages = moved_bytes + done.moved_bytes, freed_pages + done.freed_pages
            if done.more:
                count -= len(batch.moves)
        if count:  # moves were left out, perhaps those that pages were added for: these are not to stay for them
            self._filled.pop(tenant, None)
            self._futile.pop(tenant, None)
        return Compaction(moved_bytes, freed_pages, True)

    def _possible(self, tenant: str, moves: Moves, owner: Movable) -> Iterator[Plan]:
        """Yield the moves that are still possible, together as many as do not wait for those before them.

        Each batch is to be carried out before the next one is asked for.
        """
        batch: list[Move] = []
        for run in runs(moves):
            possible = self._is_possible(tenant, run, owner)
            if not possible and batch:  # perhaps it is when these are done
                yield self._again(batch)
                batch = []
                possible = self._is_possible(tenant, run, owner)
            if possible:
                batch += run
        if batch:
            yield self._again(batch)

    def _again(self, batch: Sequence[Move]) -> Plan:
        """Return what is left of a plan that may be old: pages that it goes to may have come free meanwhile."""
        moves = Moves.of(batch)
        return Plan(moves, (), tuple(pages_of(moves.destinations, moves.sizes_bytes, self._page_bytes)))

    def _is_possible(self, tenant: str, run: Sequence[Move], owner: Movable) -> bool:
        """Whether caches still lie where they did, may move, and their new place is free but for what they have."""
        size_bytes = 0
        for cache_id, source, _, part_bytes in run:
            allocation = self._live.get(cache_id)
            if allocation is None or allocation.offset != source or not owner.may_move(cache_id):
                return False
            size_bytes += part_bytes
        _, source, destination, _ = run[0]
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
            copies = rest_of(move, done_bytes, self._address)
            under_way = iter(copies)
            try:
                self._backend.copy(under_way)
            except BaseException:
                done = copies[: count_complete(copies, under_way)]
                self.unfinished = move, done_bytes + sum(size_bytes for _, _, size_bytes in done), owner
                raise
            self.unfinished = None
            tenant = self._live[move.cache_id].tenant
            moves = Moves.of([move])
            left = self._switch(tenant, moves, owner)
            self._count([moves], self._shared.put_empty(tenant, sorted(left)))
            self._clean(tenant, [moves])

    def _plan(self, survey: Survey, budget_bytes: int, most_pages: int, looks: int | None = None) -> Plan:
        """Plan with the first snapshots, as many as ``looks`` of each kind, or as many as it takes."""
        any_number = most_pages > self.possible(survey.tenant) and survey.tenant not in self._loose
        if any_number and self._is_settled(survey, len(survey.pages) // _NEARLY):
            return NOTHING  # not that it is futile: who needs one page more searches for it
        plan = self._plan_emptying(survey, budget_bytes, most_pages, looks)
        tenant = survey.tenant
        if plan.moves:
            self._futile.pop(tenant, None)
            self._searched.pop(tenant, None)
        else:
            self._futile[tenant] = self._shared.free_bytes(tenant)
        return plan

    def _plan_emptying(self, survey: Survey, budget_bytes: int, most_pages: int, looks: int | None) -> Plan:
        """Plan to empty the emptiest of all pages; else what is possible where there are not too many caches."""
        if survey.tenant in self._loose:
            self._loose.remove(survey.tenant)
            if looks is None:  # before anything else moves what the filling left so
                everything = len(survey.pages) * self._page_bytes
                plan = self._plan_join(survey, islice(survey.for_join(), 1), everything, len(survey.pages))
                if plan.moves:
                    return plan
        if self._is_settled(survey, 0):
            return NOTHING
        sources = survey.emptiest(budget_bytes, most_pages)
        # No more pages than could come free: the others are those that these are emptied into.
        fitting = sources[: self.possible(survey.tenant)]
        blocks = Blocks(self._shared.free_blocks(survey.tenant), set(fitting), self._page_bytes)
        plan = plan_fit(((page, survey.enclosed(page)) for page in fitting), blocks)
        if plan.freed:
            return plan
        again = survey.tenant in self._searched
        parcel = survey if looks is not None else self._next_parcel(survey)
        for snapshot in islice(survey.for_evacuation(sources), looks if parcel is survey else 1):
            plan = plan_evacuation(snapshot, budget_bytes, most_pages)
            if plan.freed:
                return plan
        if parcel is not survey and not again:
            plan = plan_evacuation(survey.emptier(8 * _MOST_CACHES), budget_bytes, most_pages)
            if plan.freed:
                return plan
        ways = self._ways(survey, parcel, budget_bytes, most_pages, looks)
        return next((plan for plan in ways if plan.moves), NOTHING)

    def _is_settled(self, survey: Survey, missing_pages: int) -> bool:
        """Whether all that a filling promised came free, but so many pages: then no more is searched for.

        (Once: leases end.)
        """
        held_bytes, pages, least_pages = self._filled.get(survey.tenant, (0, 0, 0))
        if not least_pages or survey.held[0] != held_bytes or survey.held[1] > least_pages + missing_pages:
            return False
        self._filled[survey.tenant] = held_bytes, pages, 0
        return True

    def _ways(
        self, survey: Survey, parcel: Survey, budget_bytes: int, most_pages: int, looks: int | None
    ) -> Iterator[Plan]:
        """Yield what else is possible, that first which costs least for what is wanted.

        Where one page is wanted, this is what frees one page after the other. Where all that can come free are, filling
        frees most of them at once, and moves less than all of the other ways together.
        """
        all_wanted = looks is None and most_pages >= self.possible(survey.tenant)
        if all_wanted:
            yield self._fill(survey, parcel)
        else:
            yield self._slide(parcel, budget_bytes, most_pages, looks)
        snapshots = islice(survey.for_join(), looks if parcel is survey else 1)
        yield self._plan_join(survey, snapshots, budget_bytes, most_pages)
        if all_wanted:
            yield self._slide(parcel, budget_bytes, most_pages, looks)
        if looks is None:
            yield plan_exchange(parcel.whole(), most_pages)
            if not all_wanted:
                yield self._fill(survey, parcel)
            yield plan_regrouping(parcel.whole(), most_pages)

    def _slide(self, parcel: Survey, budget_bytes: int, most_pages: int, looks: int | None) -> Plan:
        for snapshot in islice(parcel.for_slides(most_pages), looks):
            plan = plan_slide(snapshot, budget_bytes, most_pages)
            if plan.freed:
                return plan
        return NOTHING

    def _next_parcel(self, survey: Survey) -> Survey:
        """Return where to look this time: the pages that come after those that were looked at last in vain.

        Nobody is served while a plan is made, and with 100,000 caches it takes seconds to look at all.
        """
        parcels = survey.parcels(_MOST_CACHES)
        number = self._searched.pop(survey.tenant, 0)
        if number + 1 < len(parcels):
            self._searched[survey.tenant] = number + 1
        return parcels[min(number, len(parcels) - 1)] if len(parcels) > 1 else survey

    def _fill(self, survey: Survey, parcel: Survey) -> Plan:
        """Plan to fill holes, but not twice without a page less: what frees pages after it may undo it."""
        before = self._filled.get(survey.tenant)
        if before is not None and before[0] == survey.held[0] and before[1] <= survey.held[1]:
            return NOTHING
        plan = plan_filling(parcel.for_filling())
        if plan.moves:
            self._filled[survey.tenant] = (*survey.held, plan.least_pages if parcel is survey else 0)
            self._loose.add(survey.tenant)
        return plan

    def _plan_join(self, survey: Survey, snapshots: Iterable[Snapshot], budget_bytes: int, most_pages: int) -> Plan:
        """Join pages of the first snapshot in which one could come free by it."""
        for snapshot in snapshots:
            pages = choose_join(snapshot, budget_bytes, most_pages)
            if pages:
                return self._join(survey, snapshot, pages)
        return NOTHING

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
        offsets, sizes_bytes, ids, _ = zip(*joined, strict=True)
        self._enter(ids, offsets, sizes_bytes, survey.owner)
        return slide(sorted(joined), list(places.values()), self._page_bytes)

    def _carry_out(self, tenant: str, plan: Plan, owner: Movable) -> Compaction:
        """Move batch by batch, then give back the pages that are empty: not before, a later batch may go there."""
        moves = plan.moves
        filled = self._filled.pop(tenant, None)  # an error undoes that: pages that were added are not to stay for it
        added = self._shared.extend(tenant, sorted(plan.added))
        if added is None:
            return Compaction(0, 0, False)
        emptied = {*plan.freed, *added}
        done: list[Moves] = []
        freed_pages = 0
        try:
            for start in range(0, len(moves), _BATCH_MOVES):
                self._move(tenant, moves[start : start + _BATCH_MOVES], emptied, done, owner)
        finally:  # also what came free before an error
            if self.unfinished is not None:
                move = self.unfinished[0]
                emptied.difference_update(pages_under(move.destination, move.size_bytes, self._page_bytes))
            self._revisit(tenant, moves, done)
            freed_pages = self._shared.put_empty(tenant, sorted(emptied)) - len(added)
            moved_bytes = self._count(done, freed_pages)
            self._clean(tenant, done)
        if filled is not None:
            self._filled[tenant] = filled
        return Compaction(moved_bytes, freed_pages, True)

    def _count(self, done: Iterable[Moves], freed_pages: int) -> int:
        """Count what was done; returns the bytes moved."""
        moved_bytes = sum(moves.moved_bytes for moves in done)
        self.moved_bytes += moved_bytes
        self.net_pages += freed_pages
        self.freed_pages = max(self.freed_pages, self.net_pages)
        return moved_bytes

    def _move(self, tenant: str, moves: Moves, left: set[int], done: list[Moves], owner: Movable) -> None:
        """Copy, then switch, together; adds the pages that were left, and the moves that are done."""
        copies = copies_of(moves, self._address)
        under_way = iter(copies)
        try:
            self._backend.copy(under_way)
        except BaseException:  # whatever it is, the bytes are where they are
            moves, unfinished = copied(moves, count_complete(copies, under_way))
            self.unfinished = None if unfinished is None else (*unfinished, owner)
            raise
        finally:
            left |= self._switch(tenant, moves, owner)
            done.append(moves)

    def _switch(self, tenant: str, moves: Moves, owner: Movable) -> set[int]:
        """Enter the new places of caches that are copied, and free the old ones; returns the pages they left."""
        left: set[int] = set()
        for batch in _each_once(moves):
            left |= self._shared.move(tenant, batch.sources, batch.destinations)
            self._enter(batch.ids, batch.destinations, batch.sizes_bytes, owner)
        return left

    def _clean(self, tenant: str, done: Sequence[Moves]) -> None:
        """Zero, while a scrub is under way, the holes that it may not have reached and that now count as in use.

        For the end: it may be refused.
        """
        if not self._scrubber.busy(tenant):
            return
        try:
            for cache_id, size_bytes in {move.cache_id: move.size_bytes for move in chain(*done)}.items():
                allocation = self._live[cache_id]  # where it is now: it may have moved twice
                end = allocation.span_bytes
                self._scrubber.zero(allocation.offset + end, size_bytes - end)
        except BaseException:
            for move in chain(*done):
                self._scrubber.revisit(self._live[move.cache_id].offset, move.size_bytes)
            raise

    def _revisit(self, tenant: str, moves: Moves, done: Sequence[Moves]) -> None:
        """Let a scrub that is under way come again to places that caches have left since, or were copied to in part.

        The hole at the end of what was copied there may have come from a page that the scrub had not reached.
        """
        if self._scrubber.busy(tenant):
            last = {move.cache_id: move for move in chain(*done)}
            for move in moves:
                if last.get(move.cache_id) != move:
                    self._scrubber.revisit(move.destination, move.size_bytes)

    def _enter(self, ids: Iterable[int], offsets: Iterable[int], sizes_bytes: Iterable[int], owner: Movable) -> None:
        """Note where caches lie."""
        live, moved, new, page_bytes = self._live, owner.moved, tuple.__new__, self._page_bytes
        page = end = -page_bytes  # the last one that a cache lies in alone
        inside: tuple[tuple[int, int], ...] = ()  # how a cache in it names it
        for cache_id, offset, size_bytes in zip(ids, offsets, sizes_bytes, strict=True):
            if page <= offset <= end - size_bytes:
                pages = inside
            else:
                pages = self._shared.refs(offset, size_bytes)
                if len(pages) == 1:
                    inside = pages
                    page = offset & -page_bytes
                    end = page + page_bytes
            _, tenant, _, real_bytes, max_bytes, extents, _, shared = live[cache_id]
            live[cache_id] = allocation = new(  # as Allocation(...), in a third of the time
                Allocation, (cache_id, tenant, offset, real_bytes, max_bytes, extents, pages, shared)
            )
            moved(allocation)


def _each_once(moves: Moves) -> Iterator[Moves]:
    """Yield moves in parts in none of which a cache moves twice."""
    if len(set(moves.ids)) == len(moves):
        yield from (moves,) if moves else ()
        return
    start = 0
    seen: set[int] = set()
    for number, cache_id in enumerate(moves.ids):
        if cache_id in seen:
            yield moves[start:number]
            start = number
            seen.clear()
        seen.add(cache_id)
    yield moves[start:]
