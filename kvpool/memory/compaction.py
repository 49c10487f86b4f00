"""What to move so that pages come free: a plan over integers, made of one tenant's shared pages.

Only caches smaller than a page are moved. A larger one owns its pages, which need not lie anywhere in particular: what
it wastes is the end of its last page, and no move would change that.

There are five ways, tried in this order where the blocks of :mod:`kvpool.memory.fitting` do not help (if all pages that
could come free are wanted, those after the first are tried from the one that frees most at once on):

*Evacuate* (:mod:`kvpool.memory.evacuation`): the emptiest pages that hold nothing unmovable are emptied into the holes
of the others. At most a page is copied for a page that comes free.

*Slide*: within pages that lie side by side every cache moves down to where the one before it ends, or into an earlier
hole between two that stay. Nothing is lost between caches then, whatever their sizes, not even at the borders of pages.
It needs no free memory: a cache may move over a part of its own place.

*Join*: pages that lie scattered and hold nothing unmovable are mapped side by side, which copies nothing. Then they
slide.

*Exchange* (:mod:`kvpool.memory.exchange`) and *fill* (:mod:`kvpool.memory.filling`), where leased caches are in the
way: smaller ones make room for larger ones, and holes get caches that fit, across the borders of added pages if needed.

What is unmovable stays where it is and the holes around it are used. A plan that frees no page is not made, so that
compaction comes to an end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, overload

from kvpool.memory.moves import Move, Moves

WINDOW_PAGES = 64
"""Most pages that slide together. The more, the less is lost at their end, and the more is copied for each page."""


class Part(NamedTuple):
    """The place of one cache in shared pages."""

    offset: int
    #: Rounded to minimum blocks.
    size_bytes: int
    cache_id: int
    #: False: it is leased or pinned.
    movable: bool

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.offset + self.size_bytes


class Parts(Sequence[Part]):
    """Parts as columns, which are as long as each other and not to be changed."""

    __slots__ = ("_rows", "ids", "movable", "offsets", "sizes_bytes")

    def __init__(
        self, offsets: Sequence[int], sizes_bytes: Sequence[int], ids: Sequence[int], movable: Sequence[bool]
    ) -> None:
        self.offsets = offsets
        self.sizes_bytes = sizes_bytes
        self.ids = ids
        self.movable = movable
        self._rows: tuple[Part, ...] | None = None

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Parts:
        """Return the columns of parts."""
        if isinstance(parts, Parts):
            return parts
        return cls(*zip(*parts, strict=True)) if parts else cls((), (), (), ())

    def by_page(self, pages: Iterable[int], page_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Yield pages with the number of the first part that lies in each, at least in part, and of the first behind.

        Parts and pages ascend.
        """
        offsets, sizes_bytes = self.offsets, self.sizes_bytes
        last = 0
        for page in pages:
            first = bisect_left(offsets, page, last)
            last = bisect_left(offsets, page + page_bytes, first)
            if first and offsets[first - 1] + sizes_bytes[first - 1] > page:
                first -= 1
            yield page, first, last

    def bytes_in(self, page: int, page_bytes: int, first: int, last: int) -> int:
        """Return the bytes of a page that parts ``first`` to before ``last`` have, those that lie in it."""
        if first == last:
            return 0
        used_bytes = sum(self.sizes_bytes[first:last])
        before_bytes = page - self.offsets[first]
        if before_bytes > 0:
            used_bytes -= before_bytes
        behind_bytes = self.offsets[last - 1] + self.sizes_bytes[last - 1] - page - page_bytes
        return used_bytes - behind_bytes if behind_bytes > 0 else used_bytes

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[Part]:
        return iter(self._all())

    @overload
    def __getitem__(self, which: int) -> Part: ...

    @overload
    def __getitem__(self, which: slice) -> tuple[Part, ...]: ...

    def __getitem__(self, which: int | slice) -> Part | tuple[Part, ...]:
        return self._all()[which]

    def _all(self) -> tuple[Part, ...]:
        if self._rows is None:  # several ways look at them, one after the other; the first ones at the columns alone
            self._rows = tuple(map(Part, self.offsets, self.sizes_bytes, self.ids, self.movable))
        return self._rows


class Snapshot(NamedTuple):
    """One tenant's shared pages."""

    page_bytes: int
    #: Offsets, ascending. Pages in quarantine are left out.
    pages: tuple[int, ...]
    #: All that lie at least in part in these pages, ascending. Those that lie elsewhere too are unmovable.
    parts: Sequence[Part]
    #: Where pages could be added: those of the addresses near these pages that are free, as offsets.
    room: frozenset[int] = frozenset()
    #: How many pages could be added.
    spare_pages: int = 0


class Plan(NamedTuple):
    """Moves, each possible when those before it are done."""

    moves: Moves
    #: Pages in which nothing lives then.
    freed: tuple[int, ...]
    #: Pages that moves go to, and that are to be added first if they are not there.
    added: tuple[int, ...] = ()
    #: How many of the pages that were looked at, and added, no plan goes below, as far as it is known.
    least_pages: int = 0


NOTHING = Plan(Moves(), ())


def plan_slide(snapshot: Snapshot, budget_bytes: int, most_pages: int) -> Plan:
    """Slide caches together within windows of pages that lie side by side, the cheapest windows first.

    Windows are slid as far as a page comes free by it. ``budget_bytes`` and ``most_pages`` as in
    :func:`~kvpool.memory.evacuation.plan_evacuation`; what one window holds may be more, and is copied.
    """
    plans = [plan for plan in _slides(snapshot) if plan.freed]
    plans.sort(key=lambda plan: plan.moves.moved_bytes / len(plan.freed))
    moves: list[Move] = []
    freed: list[int] = []
    moved_bytes = 0
    for plan in plans:
        if (moves and moved_bytes + plan.moves.moved_bytes > budget_bytes) or len(freed) >= most_pages:
            break
        moves += plan.moves
        freed += plan.freed
        moved_bytes += plan.moves.moved_bytes
    return Plan(Moves.of(moves), tuple(freed))


def regrouping(snapshot: Snapshot) -> tuple[Move, ...]:
    """Return how all slide everywhere."""
    return tuple(move for plan in _slides(snapshot) for move in plan.moves)


def moved(snapshot: Snapshot, moves: Iterable[Move]) -> Snapshot:
    """Return what is in these pages when the moves are done."""
    places = {cache_id: destination for cache_id, _, destination, _ in moves}
    parts = Parts.of(snapshot.parts)
    offsets = [places.get(cache_id, offset) for cache_id, offset in zip(parts.ids, parts.offsets, strict=True)]
    order = sorted(range(len(offsets)), key=offsets.__getitem__)
    after = Parts(
        [offsets[each] for each in order],
        [parts.sizes_bytes[each] for each in order],
        [parts.ids[each] for each in order],
        [parts.movable[each] for each in order],
    )
    return snapshot._replace(parts=after)


def _slides(snapshot: Snapshot) -> Iterator[Plan]:
    """Yield for each window in which a page's worth is free, or something moves, how its caches slide together."""
    parts = iter(snapshot.parts)
    part = next(parts, None)
    for pages in _windows(snapshot):
        start, end = pages[0], pages[-1] + snapshot.page_bytes
        inside = []
        while part is not None and part.offset < end:
            # One that reaches into the window stays: its place is the business of the window before.
            inside.append(part if part.offset >= start else part._replace(movable=False))
            if part.end > end:
                break
            part = next(parts, None)
        yield slide(inside, pages, snapshot.page_bytes)


def slide(parts: Sequence[Part], pages: Sequence[int], page_bytes: int) -> Plan:
    """Slide ``parts`` together in ``pages``, which lie side by side; both ascend."""
    cursor = pages[0]
    holes: list[list[int]] = []  # start, bytes: between parts that stay
    moves: list[Move] = []
    occupied: list[int] = []
    for offset, size_bytes, cache_id, movable in parts:
        destination = offset
        if not movable:
            if offset > cursor:
                holes.append([cursor, offset - cursor])
            cursor = max(cursor, offset + size_bytes)
        else:
            hole = next((hole for hole in holes if hole[1] >= size_bytes), None) if holes else None
            if hole is not None:
                destination = hole[0]
                hole[0] += size_bytes
                hole[1] -= size_bytes
            else:
                destination = cursor
                cursor += size_bytes
            if destination != offset:
                moves.append(Move(cache_id, offset, destination, size_bytes))
        occupied.append(destination)
    under = pages_of(occupied, [size_bytes for _, size_bytes, _, _ in parts], page_bytes)
    return Plan(Moves.of(moves), tuple(page for page in pages if page not in under))


def choose_join(snapshot: Snapshot, budget_bytes: int, most_pages: int) -> tuple[int, ...]:
    """Return pages that are to lie side by side, in that order, so that a slide frees at least one; else none.

    The emptiest are taken, and come last, so that least is copied. Pages that a cache lies across stay together.
    """
    used = bytes_in_use(snapshot)
    groups = sorted(_groups(snapshot), key=lambda group: sum(used[page] for page in group) / len(group))
    chosen: list[list[int]] = []
    pages = used_bytes = best = most = 0
    for group in groups:
        group_bytes = sum(used[page] for page in group)
        if pages + len(group) > WINDOW_PAGES:
            break
        if (most and used_bytes + group_bytes > budget_bytes) or most >= most_pages:
            break
        chosen.append(group)
        pages += len(group)
        used_bytes += group_bytes
        freed = pages - -(-used_bytes // snapshot.page_bytes)
        if freed > most:
            most, best = freed, len(chosen)
    return tuple(page for group in reversed(chosen[:best]) for page in group)


def pages_under(offset: int, size_bytes: int, page_bytes: int) -> range:
    """Return the offsets of the pages that a part lies in."""
    return range(offset - offset % page_bytes, offset + size_bytes, page_bytes)


def pages_of(offsets: Sequence[int], sizes_bytes: Sequence[int], page_bytes: int) -> set[int]:
    """Return the offsets of the pages that parts lie in."""
    if max(sizes_bytes, default=0) > page_bytes:
        parts = zip(offsets, sizes_bytes, strict=True)
        return set(chain.from_iterable(pages_under(offset, size_bytes, page_bytes) for offset, size_bytes in parts))
    mask = -page_bytes
    pages = set(map(mask.__and__, offsets))
    pages.update({offset + size_bytes - 1 & mask for offset, size_bytes in zip(offsets, sizes_bytes, strict=True)})
    return pages


def bytes_in_use(snapshot: Snapshot) -> dict[int, int]:
    """Return the bytes in use of each page."""
    page_bytes, parts = snapshot.page_bytes, Parts.of(snapshot.parts)
    return {
        page: parts.bytes_in(page, page_bytes, first, last)
        for page, first, last in parts.by_page(snapshot.pages, page_bytes)
    }


def _regions(snapshot: Snapshot) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of pages that lie side by side, as many as do."""
    start = end = -1
    for page in snapshot.pages:
        if page != end:
            if end >= 0:
                yield start, end
            start = page
        end = page + snapshot.page_bytes
    if end >= 0:
        yield start, end


def _windows(snapshot: Snapshot) -> Iterator[range]:
    """Yield pages that lie side by side, at most ``WINDOW_PAGES``."""
    window_bytes = WINDOW_PAGES * snapshot.page_bytes
    for start, end in _regions(snapshot):
        for first in range(start, end, window_bytes):
            yield range(first, min(first + window_bytes, end), snapshot.page_bytes)


def _groups(snapshot: Snapshot) -> Iterator[list[int]]:
    """Yield pages without anything unmovable; those that a cache lies across in one group."""
    fixed, together = linked_pages(snapshot)
    return filter(fixed.isdisjoint, together)


def linked_pages(snapshot: Snapshot) -> tuple[set[int], list[list[int]]]:
    """Return the pages under what is unmovable, and all pages, those that a cache lies across in one list."""
    fixed: set[int] = set()
    linked: set[int] = set()  # with the page before
    parts = Parts.of(snapshot.parts)
    for page, first, last in parts.by_page(snapshot.pages, snapshot.page_bytes):
        if not all(parts.movable[first:last]):
            fixed.add(page)
        if first < last and parts.offsets[first] < page:
            linked.add(page)
    together: list[list[int]] = []
    for page in snapshot.pages:
        if page in linked and together and together[-1][-1] == page - snapshot.page_bytes:
            together[-1].append(page)
        else:
            together.append([page])
    return fixed, together
