"""Which pages stay because of what is unmovable, and what lies in the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile

from kvpool.memory.compaction import Part, Snapshot, linked_pages, pages_under

#: Where something starts and ends.
Bounds = tuple[int, int]


def anchored_pages(snapshot: Snapshot) -> tuple[set[int], list[list[int]], list[list[int]]]:
    """Return the pages that are anchored; the others, those that a cache lies across in one list; and of those that
    are anchored the pages before the first and behind the last that is unmovable, each from the outermost on."""
    fixed, runs = linked_pages(snapshot)
    anchored: set[int] = set()
    groups: list[list[int]] = []
    ends: list[list[int]] = []
    for run in runs:
        if fixed.isdisjoint(run):
            groups.append(run)
            continue
        anchored.update(run)
        for end in (list(takewhile(lambda page: page not in fixed, each)) for each in (run, reversed(run))):
            if end:
                ends.append(end)
    return anchored, groups, ends


def movable_by_page(snapshot: Snapshot) -> dict[int, list[Part]]:
    """Return the movable caches that lie in each page, at least in part."""
    found: dict[int, list[Part]] = {page: [] for page in snapshot.pages}
    for part in snapshot.parts:
        if part.movable:
            for page in pages_under(part.offset, part.size_bytes, snapshot.page_bytes):
                if page in found:
                    found[page].append(part)
    return found


def in_pages(by_page: Mapping[int, Sequence[Part]], pages: Iterable[int]) -> Iterable[Part]:
    """Return what lies in these pages, in that order, each once."""
    return dict.fromkeys(part for page in pages for part in by_page[page])


def side_by_side(pages: Iterable[int], page_bytes: int) -> Iterator[Bounds]:
    """Yield (start, end) of pages that lie side by side, as many as do."""
    start = end = -1
    for page in sorted(pages):
        if page != end:
            if end >= 0:
                yield start, end
            start = page
        end = page + page_bytes
    if end >= 0:
        yield start, end
