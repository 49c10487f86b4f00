"""Which caches go into shelves.

The largest come first, class by class: of each class what lies in a shelf already stays in it, if there is room, and
slides together; what is left is made of caches from elsewhere whose sizes add up to it (:mod:`kvpool.memory.subset`),
first of those that lie in the way, then of those in the emptiest pages. So small caches, which may be scarce, are not
used up where large ones would have done.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from kvpool.memory.compaction import Part, Snapshot, bytes_in_use, linked_pages, pages_under
from kvpool.memory.shelves import Shelf, unit_of
from kvpool.memory.subset import SubsetSums, evenly

_LEAST_SHARE = 256
"""No shelf is filled better in which less than this part of a page is free: hundreds of them waste a page or two."""

_CLASSES = 9
"""Classes of sizes: each goes down to two thirds of where the one before it ends, the last one to nothing."""


class Assignment:
    """Where each cache is to lie.

    Parameters
    ----------
    snapshot
        What lies where now.
    kept
        Pages that stay.
    shelves
        Room in these; they do not overlap.
    """

    def __init__(self, snapshot: Snapshot, kept: set[int], shelves: Iterable[Shelf]) -> None:
        self._page_bytes = snapshot.page_bytes
        self._unit_bytes = unit_of(snapshot)
        self._kept = kept
        self._inside: dict[Shelf, list[Part]] = {shelf: [] for shelf in sorted(shelves)}
        #: In no shelf at first.
        self._loose: list[Part] = []
        #: In shelves at first, and it is not said yet whether they stay.
        self._open: dict[Shelf, list[Part]] = {}
        left = iter(self._inside)
        shelf = next(left, None)
        for part in snapshot.parts:
            if not part.movable:
                continue
            while shelf is not None and shelf.end <= part.offset:
                shelf = next(left, None)
            if shelf is not None and shelf.start <= part.offset and part.end <= shelf.end:
                self._open.setdefault(shelf, []).append(part)
            else:
                self._loose.append(part)
        #: Bytes for which a shelf has room.
        self._room_bytes = {shelf: shelf.size_bytes for shelf in self._inside}
        #: Caches that may be taken, by size in units.
        self._stock: dict[int, deque[Part]] = {}
        #: These sizes, ascending.
        self._sizes: list[int] = []
        rank = self._ranks(snapshot)
        for part in sorted(self._loose, key=lambda part: rank.get(part.offset & -self._page_bytes, 0)):
            self._put(part)

    def goals(self) -> dict[int, int]:
        """Return where caches are to lie, by id; those that are not in it may lie anywhere else."""
        for parts in self._open.values():
            parts.sort(key=lambda part: part.size_bytes)
        for least in self._classes():
            for shelf, parts in self._open.items():
                while parts and parts[-1].size_bytes >= least * self._unit_bytes:
                    part = parts.pop()
                    if part.size_bytes <= self._room_bytes[shelf]:
                        self._enter(shelf, part)
                    else:
                        self._put(part)
            for shelf in self._roomiest_first():
                if not self._fill(shelf, least):
                    break
        for shelf in self._roomiest_first():
            if self._room_bytes[shelf] * _LEAST_SHARE < self._page_bytes:
                break
            self._exchange(shelf)
        return {cache_id: offset for shelf, parts in self._inside.items() for cache_id, offset in _places(shelf, parts)}

    def _classes(self) -> Iterator[int]:
        """Yield the smallest size of each class, in units."""
        sizes_bytes = [self._sizes[-1] * self._unit_bytes] if self._sizes else []
        sizes_bytes += (parts[-1].size_bytes for parts in self._open.values())
        largest = max(sizes_bytes, default=0) // self._unit_bytes
        for number in range(1, _CLASSES):
            yield largest * 2**number // 3**number
        yield 0

    def in_the_way(self) -> Iterable[Part]:
        """Return what was in no shelf and cannot stay: in a shelf in part, or across the border of pages that do."""
        return filter(self._is_in_the_way, self._loose)

    def _is_in_the_way(self, part: Part) -> bool:
        pages = pages_under(part.offset, part.size_bytes, self._page_bytes)
        if self._kept.isdisjoint(pages):
            return False
        across = not self._kept.issuperset(pages)
        return across or any(shelf.start < part.end and part.offset < shelf.end for shelf in self._inside)

    def _roomiest_first(self) -> list[Shelf]:
        return sorted(self._inside, key=self._room_bytes.__getitem__, reverse=True)

    def _enter(self, shelf: Shelf, part: Part) -> None:
        self._inside[shelf].append(part)
        self._room_bytes[shelf] -= part.size_bytes

    def _fill(self, shelf: Shelf, least: int) -> bool:
        """Put caches of at least so many units into a shelf, as fill it best; whether there are any that fit."""
        room = self._room_bytes[shelf] // self._unit_bytes
        counts = self._counts(room, least)
        if not counts:
            return False
        sums = SubsetSums(counts, room)
        for part in self._take(sums, sums.at_most(room)):
            self._enter(shelf, part)
        return True

    def _exchange(self, shelf: Shelf) -> None:
        """Put others in the place of one cache, if they fill the shelf better."""
        inside = self._inside[shelf]
        if not inside:
            return
        room = self._room_bytes[shelf] // self._unit_bytes
        sizes = [part.size_bytes // self._unit_bytes for part in inside]
        most = room + max(sizes)
        sums = SubsetSums(self._counts(most, 0), most)
        gains = [sums.at_most(room + size) - size for size in sizes]
        gain = max(gains)
        if gain > 0:
            number = gains.index(gain)
            leaving = inside.pop(number)
            self._room_bytes[shelf] += leaving.size_bytes
            for part in self._take(sums, sizes[number] + gain):
                self._enter(shelf, part)
            self._put(leaving)

    def _counts(self, most: int, least: int) -> dict[int, int]:
        """Return how many there are in stock of sizes from ``least`` to ``most`` units, not of too many sizes."""
        sizes = evenly(self._sizes[bisect_left(self._sizes, least) : bisect_right(self._sizes, most)])
        return {size: len(self._stock[size]) for size in sizes}

    def _take(self, sums: SubsetSums, total: int) -> list[Part]:
        """Take caches of so many units together out of the stock."""
        taken = []
        for size in sums.parts(total):
            parts = self._stock[size]
            taken.append(parts.popleft())
            if not parts:
                del self._stock[size], self._sizes[bisect_left(self._sizes, size)]
        return taken

    def _put(self, part: Part) -> None:
        size = part.size_bytes // self._unit_bytes
        if size not in self._stock:
            self._stock[size] = deque()
            insort(self._sizes, size)
        self._stock[size].append(part)

    def _ranks(self, snapshot: Snapshot) -> dict[int, int]:
        """Return numbers of pages from which caches are taken first: of the emptiest groups, each from its end on."""
        used = bytes_in_use(snapshot)
        _, groups = linked_pages(snapshot)
        open_groups = [[page for page in group if page not in self._kept] for group in groups]
        ordered = sorted(filter(None, open_groups), key=lambda group: sum(used[page] for page in group) / len(group))
        return {page: number for number, page in enumerate((page for group in ordered for page in reversed(group)), 1)}


def _places(shelf: Shelf, parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """Yield where caches go in a shelf: first those that slide down in it, by the way."""
    start = shelf.start
    if shelf.flush:
        start = shelf.end - sum(part.size_bytes for part in parts)
    others = []
    for part in sorted(parts):
        if start <= part.offset < shelf.end:
            yield part.cache_id, start
            start += part.size_bytes
        else:
            others.append(part)
    for part in others:
        yield part.cache_id, start
        start += part.size_bytes
