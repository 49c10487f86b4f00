"""What to move into the room beside what is leased, so that fewer pages are left.

:mod:`kvpool.memory.shelves` says where caches are to lie in the pages that stay, and :mod:`kvpool.memory.assignment`
which; :mod:`kvpool.memory.rearrangement` finds an order. What is left in the other pages slides together in the next
step, and more pages come free by that than are added here: else there is no plan.

Where small caches are scarce, shelves chosen for all sizes would count them several times, so shelves are chosen for
the large ones alone, and the small ones go into what is left. Where that finds nothing, often because no page is free
to put aside what is in the way, filling the holes as they are is all that can be done.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from kvpool.memory.anchors import anchored_pages
from kvpool.memory.assignment import Assignment
from kvpool.memory.compaction import (
    NOTHING,
    WINDOW_PAGES,
    Parts,
    Plan,
    Snapshot,
    bytes_in_use,
    choose_join,
    moved,
)
from kvpool.memory.moves import Moves
from kvpool.memory.rearrangement import Rearrangement
from kvpool.memory.shelves import Gaps, choose_shelves


def plan_filling(snapshot: Snapshot) -> Plan:
    """Fill the shelves that leave the fewest pages, if more come free by it than are added."""
    if all(part.movable for part in snapshot.parts):
        return NOTHING
    plan = _plan(snapshot, _large_bytes(snapshot))
    if not _frees_more(snapshot, plan):
        plan = _plan(_without_anchored(snapshot), 0)
        if not _frees_more(snapshot, plan):
            return NOTHING
    return plan


def _without_anchored(snapshot: Snapshot) -> Snapshot:
    """Return the same, with all unmovable that lies in anchored pages: only the holes there are filled."""
    anchored, _, _ = anchored_pages(snapshot)
    parts = Parts.of(snapshot.parts)
    mask = -snapshot.page_bytes
    movable = [may and offset & mask not in anchored for may, offset in zip(parts.movable, parts.offsets, strict=True)]
    return snapshot._replace(parts=Parts(parts.offsets, parts.sizes_bytes, parts.ids, movable))


def _large_bytes(snapshot: Snapshot) -> int:
    """Return from which size on caches are large: those above half of the bytes."""
    sizes_bytes = sorted(part.size_bytes for part in snapshot.parts if part.movable)
    up_to_bytes = list(accumulate(sizes_bytes, initial=0))
    number = bisect_right(up_to_bytes, up_to_bytes[-1] // 2) - 1
    return sizes_bytes[number] if number < len(sizes_bytes) else 0


def _plan(snapshot: Snapshot, large_bytes: int) -> Plan:
    """Plan with shelves chosen for large caches, if a page could come free by it."""
    gaps = Gaps(snapshot)
    chosen, least_pages = choose_shelves(gaps, large_bytes)
    if least_pages >= len(snapshot.pages):
        return NOTHING
    kept = gaps.fixed.union(*(each.kept for each in chosen))
    added = kept.difference(snapshot.pages)
    if len(added) > snapshot.spare_pages:
        room = frozenset(sorted(added)[: snapshot.spare_pages])
        return _plan(snapshot._replace(room=room), large_bytes)
    assignment = Assignment(snapshot, kept, [shelf for each in chosen for shelf in each.shelves])
    goals = assignment.goals()
    order = Rearrangement(snapshot, goals, kept)
    if not order.carry_out(part.cache_id for part in assignment.in_the_way() if part.cache_id not in goals):
        return NOTHING
    return Plan(Moves.of(order.moves), (), (*sorted(added), *order.added), least_pages)


def _frees_more(snapshot: Snapshot, plan: Plan) -> bool:
    """Whether more pages are empty when a plan is carried out, or come free by the next step, than it adds."""
    if not plan.moves:
        return False
    after = moved(snapshot, plan.moves)._replace(pages=tuple(sorted((*snapshot.pages, *plan.added))))
    used = bytes_in_use(after)
    left = after._replace(pages=tuple(page for page in after.pages if used[page]))
    joined = choose_join(left, len(left.pages) * left.page_bytes, WINDOW_PAGES)
    joined_pages = -(-sum(used[page] for page in joined) // left.page_bytes)
    return len(left.pages) - len(joined) + joined_pages < len(snapshot.pages)
