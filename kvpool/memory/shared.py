"""Caches that do not fill pages: several of one tenant share its pages.

A part whose size is a power of two comes to lie in a page, aligned as the buddy allocator does it. One of another size
begins where another such one ended, or one was freed, in the smallest hole that is large enough, and lies across the
border of its page if the one behind can be had: aligned, caches a little larger than half a page would fill half of
each page, and while they are leased nothing can move them together. A part of many pages begins at one. Compaction puts
all anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from operator import itemgetter

from kvpool.errors import AddressSpaceError, ensure
from kvpool.memory.allocation import Place
from kvpool.memory.buddy import BuddyAllocator
from kvpool.memory.holes import Holes
from kvpool.memory.ranges import RangeAllocator
from kvpool.memory.reserve import Shape
from kvpool.memory.residents import Resident, Residents
from kvpool.sizes import round_up

_MOST_LOOKS = 16
"""How many holes are looked at for one that is as it was noted: others are noted anew, or forgotten."""

_MOST_REACHED_PAGES = 8
"""Caches of more pages begin at one: the pages of a range come at once, those behind a hole one by one."""

_SEARCH_SHARE = 32
"""All holes are searched once more when this part of a tenant's pages was freed since there was none large enough."""


class SharedPages:
    """Parts of pages. A page is taken from the ranges when its tenant's others are full, and put back when empty.

    Parameters
    ----------
    ranges
        Where the pages come from.
    min_block_bytes
        Smallest part, a power of two.

    Raises
    ------
    ConfigError
        If ``min_block_bytes`` is no power of two, or above the page size.
    """

    def __init__(self, ranges: RangeAllocator, min_block_bytes: int) -> None:
        self._ranges = ranges
        self._min_block_bytes = min_block_bytes
        self._page_bytes = ranges.table.page_size_bytes
        self._one_page = Shape(self._page_bytes, 1)
        #: By tenant. The default's is made now, so that an impossible size shows now.
        self._parts = {"default": BuddyAllocator(0, min_block_bytes, self._page_bytes)}
        #: By tenant: which caches have these parts.
        self._residents = {"default": Residents(self._page_bytes)}
        #: By offset: the pieces of a part that lies across borders of pages.
        self._pieces: dict[int, tuple[int, ...]] = {}
        #: By tenant: where parts of sizes that are no powers of two may begin.
        self._holes = {"default": Holes(min_block_bytes)}
        #: By tenant: bytes freed since a search found no hole that is large enough.
        self._freed_bytes: dict[str, int] = {}
        #: By offset of a page in quarantine: its tenant, and the parts of it that are free and yet for nobody.
        self._withheld: dict[int, tuple[str, list[int]]] = {}
        #: Bytes of these parts.
        self.withheld_bytes = 0

    def allocate(self, cache_id: int, tenant: str, size_bytes: int, max_size_bytes: int | None) -> Place | None:
        """Return offset and page of a part, or ``None`` if it needs a page and there is none."""
        parts = self._parts.get(tenant)
        if parts is None:
            parts = self._parts[tenant] = BuddyAllocator(0, self._min_block_bytes, self._page_bytes)
            self._residents[tenant] = Residents(self._page_bytes)
            self._holes[tenant] = Holes(self._min_block_bytes)
        if size_bytes > self._page_bytes:
            return self._allocate_pages(cache_id, tenant, size_bytes)
        if max_size_bytes is None and size_bytes & (size_bytes - 1):
            part_bytes = round_up(size_bytes, self._min_block_bytes)
            if part_bytes & (part_bytes - 1):
                return self._pack(cache_id, tenant, part_bytes)
        try:
            offset = parts.allocate(size_bytes, max_size_bytes)
        except AddressSpaceError:  # no hole is large enough: one page more
            page = self._ranges.take(tenant, self._one_page)
            if page is None:
                return self._fill_hole(cache_id, tenant, round_up(size_bytes, self._min_block_bytes), max_size_bytes)
            parts.add(page.index * self._page_bytes)
            offset = parts.allocate(size_bytes, max_size_bytes)
        self._residents[tenant].enter(offset, (cache_id, parts.allocation_size(offset)))
        return offset, self._ranges.in_use[offset // self._page_bytes][1].refs

    def _fill_hole(self, cache_id: int, tenant: str, part_bytes: int, max_size_bytes: int | None) -> Place | None:
        """Return offset and pages of a part that is not aligned, because there is no other room."""
        parts = self._parts[tenant]
        if max_size_bytes is not None:
            return None
        offset = self._find_hole(parts, self._holes[tenant], part_bytes)
        if offset is None:
            offset = self._search(tenant, part_bytes)
        if offset is None:
            return None
        self._carve(parts, offset, part_bytes)
        return self._entered(cache_id, tenant, offset, part_bytes)

    def _entered(self, cache_id: int, tenant: str, offset: int, part_bytes: int) -> Place:
        self._holes[tenant].forget(offset)
        self._note_hole(tenant, offset + part_bytes)
        self._residents[tenant].enter(offset, (cache_id, part_bytes))
        return offset, self.refs(offset, part_bytes)

    def _pack(self, cache_id: int, tenant: str, part_bytes: int) -> Place | None:
        """Return offset and pages of a part whose size is no power of two."""
        parts, holes = self._parts[tenant], self._holes[tenant]
        offset = self._find_hole(parts, holes, part_bytes)
        if offset is None:
            try:
                offset = parts.allocate(part_bytes)
            except AddressSpaceError:
                offset = self._reach_over(tenant, parts, holes, part_bytes)
                if offset is None:
                    page = self._ranges.take(tenant, self._one_page)
                    if page is not None:
                        offset = page.index * self._page_bytes
                        parts.add(offset)
                    else:
                        offset = self._search(tenant, part_bytes)
                        if offset is None:
                            return None
                self._carve(parts, offset, part_bytes)
        else:
            self._carve(parts, offset, part_bytes)
        return self._entered(cache_id, tenant, offset, part_bytes)

    def _search(self, tenant: str, part_bytes: int) -> int | None:
        """Look at all holes, and remember those that are large enough; unless little was freed since there was none."""
        parts = self._parts[tenant]
        freed_bytes = self._freed_bytes.get(tenant)
        if freed_bytes is not None and freed_bytes * _SEARCH_SHARE < parts.total_bytes:
            return None
        found = [run for run in parts.free_runs() if run[1] >= part_bytes]
        for run in reversed(found):
            self._holes[tenant].note(*run)
        if found:
            return min(found, key=itemgetter(1))[0]
        self._freed_bytes[tenant] = 0
        return None

    def _find_hole(self, parts: BuddyAllocator, holes: Holes, part_bytes: int) -> int | None:
        """Return where the smallest hole that is large enough begins, as far as is known."""
        for _ in range(_MOST_LOOKS):
            found = holes.smallest(part_bytes)
            if found is None:
                return None
            offset, noted_bytes = found
            free_bytes = parts.free_run_bytes(offset)
            if free_bytes == noted_bytes:
                return offset
            holes.forget(offset)
            if not free_bytes:
                end = parts.end_of(offset)  # of a small part that was put there since: the hole may go on behind it
                if end is None:
                    continue
                offset, free_bytes = end, parts.free_run_bytes(end)
            if free_bytes:
                holes.note(offset, free_bytes)
        return next((offset for offset in holes.latest() if parts.is_free(offset, part_bytes)), None)

    def _reach_over(self, tenant: str, parts: BuddyAllocator, holes: Holes, part_bytes: int) -> int | None:
        """Take the pages behind one whose end is free, and return where that end begins."""
        for offset in holes.latest():
            border = (offset | (self._page_bytes - 1)) + 1
            if offset + part_bytes <= border or not parts.is_free(offset, border - offset):
                continue
            if not self.is_free(tenant, border, offset + part_bytes - border):
                continue
            if self.extend(tenant, range(border, offset + part_bytes, self._page_bytes)) is not None:
                return offset
        return None

    def _allocate_pages(self, cache_id: int, tenant: str, size_bytes: int) -> Place | None:
        """Return offset and pages of a part larger than a page, the end of whose last one is left to others.

        One of few pages begins where another ended, as smaller ones do: else it would waste nearly a page.
        """
        parts, holes = self._parts[tenant], self._holes[tenant]
        pages = -(-size_bytes // self._page_bytes)
        part_bytes = round_up(size_bytes, self._min_block_bytes)
        offset = None
        if pages <= _MOST_REACHED_PAGES:
            offset = self._find_hole(parts, holes, part_bytes)
            if offset is None and self._ranges.pages_for(tenant) >= pages:
                # (Not with fewer pages: whether there is room would hang on which holes are looked at.)
                offset = self._reach_over(tenant, parts, holes, part_bytes)
        if offset is None:
            taken = self._ranges.take(tenant, Shape(pages * self._page_bytes, pages))
            if taken is not None:
                self._ranges.split(taken.index)
                offset = taken.index * self._page_bytes
                for page in range(offset, offset + pages * self._page_bytes, self._page_bytes):
                    parts.add(page)
            else:
                offset = self._search(tenant, part_bytes)
                if offset is None and self._ranges.pages_for(tenant) == pages - 1 < _MOST_REACHED_PAGES:
                    offset = self._reach_over_any(tenant, part_bytes)
                if offset is None:
                    return None
        self._carve(parts, offset, part_bytes)
        return self._entered(cache_id, tenant, offset, part_bytes)

    def _reach_over_any(self, tenant: str, part_bytes: int) -> int | None:
        """As :meth:`_reach_over`, but look at all holes: it is one page that is missing."""
        least_bytes = part_bytes % self._page_bytes
        for offset, size_bytes in self._parts[tenant].free_runs():
            end = offset + size_bytes
            if end % self._page_bytes or size_bytes < least_bytes:
                continue
            start = max(offset, end - self._page_bytes)
            if self.is_free(tenant, end, start + part_bytes - end):
                behind = range(end, start + part_bytes, self._page_bytes)
                return None if self.extend(tenant, behind) is None else start
        return None

    def free(self, tenant: str, offset: int) -> None:
        """Take the part at ``offset`` back, and give its page to the arena when nothing else lives in it."""
        _, part_bytes = self._residents[tenant].leave(offset)
        if tenant in self._freed_bytes:
            self._freed_bytes[tenant] += part_bytes
        pieces = self._pieces.pop(offset, None)
        if pieces is None:
            self._free_piece(tenant, offset)
            if self._parts[tenant].is_free_block(offset & -self._page_bytes):
                self.put_empty(tenant, (offset & -self._page_bytes,))
        else:
            for piece in pieces:
                self._free_piece(tenant, piece)
            self.put_empty(tenant, [piece & -self._page_bytes for piece in pieces])
        if part_bytes & (part_bytes - 1):
            self._holes[tenant].forget(offset + part_bytes)  # it is one with this one now
            self._note_hole(tenant, offset)

    def _note_hole(self, tenant: str, offset: int) -> None:
        """Note how much is free from there on, if anything is."""
        free_bytes = self._parts[tenant].free_run_bytes(offset)
        if free_bytes:
            self._holes[tenant].note(offset, free_bytes)

    def _free_piece(self, tenant: str, offset: int) -> None:
        parts = self._parts[tenant]
        parts.free(offset)
        page = offset & -self._page_bytes
        if page in self._withheld:
            self.withhold(tenant, page)
            if sum(map(parts.allocation_size, self._withheld[page][1])) == self._page_bytes:
                self.readmit(page)

    def move(self, tenant: str, sources: Sequence[int], destinations: Sequence[int]) -> set[int]:
        """Enter that parts lie elsewhere, together: perhaps where others of them lay, or over where they lay.

        Returns the pages that they left, at least in part. Those that are empty by that stay until :meth:`put_empty`:
        what moves next may go there.
        """
        parts = self._parts[tenant]
        moved, left = self._leave(tenant, sources)
        across = self._residents[tenant].enter_all(destinations, moved)
        sizes_bytes = [size_bytes for _, size_bytes in moved]
        if not across:
            parts.carve_all(destinations, sizes_bytes)
            return left
        known = set(across)
        inside = [offset not in known for offset in destinations]
        parts.carve_all(compress(destinations, inside), compress(sizes_bytes, inside))
        for offset in across:
            pieces = self._cut(offset, self._residents[tenant].at(offset)[1])
            parts.carve_all([start for start, _ in pieces], [piece_bytes for _, piece_bytes in pieces])
        return left

    def _leave(self, tenant: str, offsets: Sequence[int]) -> tuple[list[Resident], set[int]]:
        """Free parts, those at once that are all that lies in a page; returns what they were, and all their pages."""
        parts, residents, pieces = self._parts[tenant], self._residents[tenant], self._pieces
        pages = list(map((-self._page_bytes).__and__, offsets))
        gone: list[Resident] = []
        left: dict[int, list[int]] = {}  # where pieces begin, by page
        first = 0
        while first < len(offsets):
            page = pages[first]
            count = residents.count(page)
            last = first + count
            if pages[first:last].count(page) == count:
                starts = offsets[first:last]
                inside = residents.leave_page(page)
                gone += map(inside.__getitem__, starts)
            else:
                last = first + 1
                starts = offsets[first:last]
                gone.append(residents.leave(starts[0]))
            left.setdefault(page, []).extend(starts)
            if pieces:
                for piece in pieces.pop(max(starts), ())[1:]:
                    left.setdefault(piece, []).append(piece)
            first = last
        for page, starts in left.items():
            if residents.used_bytes(page) or page in self._withheld:
                for start in starts:
                    parts.free(start)
            else:
                parts.clear(page, sorted(starts))
        return gone, set(left)

    def is_free(self, tenant: str, offset: int, size_bytes: int) -> bool:
        """Whether nothing lies in a part of this tenant's pages, or of those that could be added."""
        parts, end = self._parts[tenant], offset + size_bytes
        while offset < end:
            page = offset & -self._page_bytes
            stop = min(end, page + self._page_bytes)
            if not (parts.is_free(offset, stop - offset) if parts.manages(page) else self.is_open(tenant, page)):
                return False
            offset = stop
        return True

    def is_open(self, tenant: str, page: int) -> bool:
        """Whether a page could be added at this offset."""
        return self._ranges.is_open_at(tenant, page // self._page_bytes)

    def spare_pages(self, tenant: str) -> int:
        """How many pages could be added."""
        return self._ranges.pages_for(tenant)

    def extend(self, tenant: str, pages: Iterable[int]) -> list[int] | None:
        """Add those of these pages (offsets) that the tenant does not have; returns which. ``None``: it cannot be.

        Raises
        ------
        BackendError
            If the system refuses. None is added then.
        """
        parts = self._parts[tenant]
        added: list[int] = []
        try:
            for page in pages:
                if parts.manages(page):
                    continue
                if self._ranges.take_at(tenant, page // self._page_bytes) is None:
                    self.put_empty(tenant, added)
                    return None
                parts.add(page)
                added.append(page)
        except BaseException:  # an interrupt, too: nobody would give them back
            self.put_empty(tenant, added)
            raise
        return added

    def free_blocks(self, tenant: str) -> Mapping[int, Iterable[int]]:
        """Free blocks of this tenant's pages: their offsets by size, see :attr:`BuddyAllocator.free_blocks`."""
        return self._parts[tenant].free_blocks

    def is_withheld(self, offset: int, size_bytes: int) -> bool:
        """Whether one of the pages under a part is in quarantine."""
        mask = -self._page_bytes
        return any(page in self._withheld for page in range(offset & mask, offset + size_bytes, self._page_bytes))

    def join(self, tenant: str, pages: Sequence[int], offsets: Sequence[int]) -> int | None:
        """Map pages (offsets) side by side, with the parts at ``offsets``, all that begin in them.

        No part may lie across the border of one of them and another page. Returns the first page's new offset;
        ``None`` if there are no addresses.

        Raises
        ------
        BackendError
            If the system refuses. Then nothing is changed.
        """
        first = self._ranges.join([page // self._page_bytes for page in pages])
        if first is None:
            return None
        parts = self._parts[tenant]
        moved = {page: (first + number) * self._page_bytes for number, page in enumerate(pages)}
        for page in moved.values():
            parts.add(page)
        mask = -self._page_bytes
        self.move(tenant, offsets, [moved[offset & mask] + (offset & ~mask) for offset in offsets])
        for page in moved:
            parts.take(page)
        return first * self._page_bytes

    def put_empty(self, tenant: str, pages: Iterable[int]) -> int:
        """Give those of these pages (offsets) back to the arena in which nothing lives; returns how many."""
        parts = self._parts[tenant]
        empty = [page for page in pages if parts.is_free_block(page)]
        start = 0
        for number, page in enumerate(empty, 1):
            parts.take(page)
            if number == len(empty) or empty[number] != page + self._page_bytes:  # those side by side stay together
                index, count = empty[start] // self._page_bytes, number - start
                if count > 1:
                    self._ranges.unite(index, count)
                self._ranges.put(index)
                start = number
        return len(empty)

    def _carve(self, parts: BuddyAllocator, offset: int, size_bytes: int) -> None:
        for start, piece_bytes in self._cut(offset, size_bytes):
            parts.carve(start, piece_bytes)

    def _cut(self, offset: int, size_bytes: int) -> list[tuple[int, int]]:
        """Return offset and bytes of each piece of a part, and note them if it lies across borders of pages."""
        end = offset + size_bytes
        borders = range((offset | (self._page_bytes - 1)) + 1, end, self._page_bytes)
        pieces = (offset, *borders)
        if borders:
            self._pieces[offset] = pieces
        return [(start, stop - start) for start, stop in zip(pieces, (*borders, end), strict=True)]

    def refs(self, offset: int, size_bytes: int) -> tuple[tuple[int, int], ...]:
        """Return (index, serial) of each page under a part."""
        first, last = offset // self._page_bytes, (offset + size_bytes - 1) // self._page_bytes
        if first == last:
            return self._ranges.in_use[first][1].refs
        return tuple(ref for index in range(first, last + 1) for ref in self._ranges.in_use[index][1].refs)

    @property
    def tenants(self) -> list[str]:
        """Those that have pages here, the one with the most free bytes in them first."""
        return sorted(filter(self.free_bytes, self._parts), key=self.free_bytes, reverse=True)

    def free_bytes(self, tenant: str) -> int:
        """Bytes of this tenant's pages that are free for its caches."""
        parts = self._parts.get(tenant)
        return 0 if parts is None else parts.free_bytes

    def pages(self, tenant: str) -> list[int]:
        """Offsets of this tenant's pages, ascending, without those in quarantine."""
        return [page for page in self._parts[tenant].blocks if page not in self._withheld]

    def withhold(self, tenant: str, page: int) -> None:
        """Give no more parts of the page at offset ``page`` out, neither those that are free nor those that will be."""
        parts = self._parts[tenant]
        withheld = parts.withhold(page)
        self._withheld.setdefault(page, (tenant, []))[1].extend(withheld)
        self.withheld_bytes += sum(map(parts.allocation_size, withheld))

    def readmit(self, page: int) -> None:
        """End :meth:`withhold` for a page, if it was called; an empty page goes back to the arena."""
        tenant, withheld = self._withheld.pop(page, ("", []))
        for offset in withheld:
            self.withheld_bytes -= self._parts[tenant].allocation_size(offset)
            self._parts[tenant].free(offset)
        if withheld and self._parts[tenant].is_free_block(page):
            self._parts[tenant].take(page)
            self._ranges.put(page // self._page_bytes)

    def part_bytes(self, tenant: str, offset: int) -> int:
        """Bytes of the part at ``offset``, rounded as it was when allocated."""
        return self._residents[tenant].at(offset)[1]

    def residents(self, tenant: str) -> Residents:
        """What lies in this tenant's pages."""
        return self._residents[tenant]

    def largest_hole_bytes(self, tenant: str | None) -> int:
        """The largest part that ``tenant``, or any (of aligned ones), could still get from pages that are in use."""
        if tenant is None:
            return max(each.largest_free_bytes for each in self._parts.values())
        parts = self._parts.get(tenant)
        if parts is None:
            return 0
        runs = map(parts.free_run_bytes, self._holes[tenant].latest())
        return max(parts.largest_free_bytes, min(max(runs, default=0), self._page_bytes))

    def check(self, used_bytes: dict[str, int]) -> None:
        """Prove that the parts of each tenant are sound, and those in use add up to ``used_bytes``.

        Raises
        ------
        InvariantError
            If not.
        """
        all_withheld_bytes = 0
        for tenant, parts in self._parts.items():
            parts.check()
            withheld = [part for owner, kept in self._withheld.values() if owner == tenant for part in kept]
            withheld_bytes = sum(map(parts.allocation_size, withheld))
            all_withheld_bytes += withheld_bytes
            known_bytes = used_bytes.get(tenant, 0) + withheld_bytes
            ensure(parts.used_bytes == known_bytes, "no part of a page is lost", tenant=tenant)
            self._residents[tenant].check(known_bytes - withheld_bytes)
            self._holes[tenant].check()
        ensure(self.withheld_bytes == all_withheld_bytes, "withheld bytes are counted", counted=self.withheld_bytes)
