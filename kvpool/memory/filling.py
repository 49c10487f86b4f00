"""What to move into the room beside what is leased, so that fewer pages are left.

:mod:`kvpool.memory.shelves` says where caches are to lie in the pages that stay, and :mod:`kvpool.memory.assignment`
which; :mod:`kvpool.memory.rearrangement` finds an order. What is left in the other pages slides together in the next
step, and more pages come free by that than are added here: else there is no plan.

Several plans are made, and the one that frees most is taken. Where small caches are scarce, shelves chosen for all
sizes would count them several times, so shelves are chosen for the large ones alone, too. And where no page is free to
put aside what is in the way, filling the holes as they are is all that can be done.
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
    plan_slide,
)
from kvpool.memory.moves import Moves
from kvpool.memory.rearrangement import Rearrangement
from kvpool.memory.shelves import choose_shelves, fixed_pages


def plan_filling(snapshot: Snapshot) -> Plan:
    """Fill the shelves that leave the fewest pages, if more come free by it than are added."""
    if all(part.movable for part in snapshot.parts):
        return NOTHING
    best, most = NOTHING, 0
    for before in (snapshot, _without_anchored(snapshot)):
        for large_bytes in _large(before):
            plan = _plan(before, large_bytes, most + 1)
            gained = _freed_after(snapshot, plan) - len(plan.added) if plan.moves else 0
            if gained > most:
                best, most = plan, gained
    return best


def _without_anchored(snapshot: Snapshot) -> Snapshot:
    """Return the same, with all unmovable that lies in anchored pages: only the holes there are filled."""
    anchored, _, _ = anchored_pages(snapshot)
    parts = Parts.of(snapshot.parts)
    mask = -snapshot.page_bytes
    movable = [may and offset & mask not in anchored for may, offset in zip(parts.movable, parts.offsets, strict=True)]
    return snapshot._replace(parts=Parts(parts.offsets, parts.sizes_bytes, parts.ids, movable))


def _large(snapshot: Snapshot) -> list[int]:
    """Return from which size on caches are large: all are; those above a quarter of the bytes; those above half."""
    sizes_bytes = sorted(part.size_bytes for part in snapshot.parts if part.movable)
    up_to_bytes = list(accumulate(sizes_bytes, initial=0))
    least = [bisect_right(up_to_bytes, up_to_bytes[-1] * share // 4) - 1 for share in (1, 2)]
    return sorted({0, *(sizes_bytes[number] for number in least if number < len(sizes_bytes))})


def _plan(snapshot: Snapshot, large_bytes: int, least_pages: int) -> Plan:
    """Plan with shelves chosen for large caches, if so many pages could come free by it."""
    fixed = fixed_pages(snapshot)
    chosen = choose_shelves(snapshot, fixed, large_bytes, least_pages)
    if chosen is None:
        return NOTHING
    kept = fixed.union(*(each.kept for each in chosen))
    added = kept.difference(snapshot.pages)
    if len(added) > snapshot.spare_pages:
        room = frozenset(sorted(added)[: snapshot.spare_pages])
        return _plan(snapshot._replace(room=room), large_bytes, least_pages)
    assignment = Assignment(snapshot, kept, [shelf for each in chosen for shelf in each.shelves], large_bytes)
    goals = assignment.goals()
    order = Rearrangement(snapshot, goals, kept)
    if not order.carry_out(part.cache_id for part in assignment.in_the_way() if part.cache_id not in goals):
        return NOTHING
    return Plan(Moves.of(order.moves), (), (*sorted(added), *order.added))


def _freed_after(snapshot: Snapshot, plan: Plan) -> int:
    """Return how many pages are empty when a plan is carried out, or come free by the next step."""
    after = moved(snapshot, plan.moves)._replace(pages=tuple(sorted((*snapshot.pages, *plan.added))))
    used = bytes_in_use(after)
    left = after._replace(pages=tuple(page for page in after.pages if used[page]))
    empty = len(after.pages) - len(left.pages)
    everything = len(left.pages) * left.page_bytes
    joined = choose_join(left, everything, WINDOW_PAGES)
    by_joining = len(joined) - -(-sum(used[page] for page in joined) // left.page_bytes)
    return empty + max(by_joining, len(plan_slide(left, everything, WINDOW_PAGES).freed))
