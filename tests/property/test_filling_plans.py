"""Plans that fill holes: whatever lies where, each move is possible after those before it, and pages come free."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.memory.compaction import Part, Plan, Snapshot, bytes_in_use, choose_join, moved, plan_slide
from kvpool.memory.exchange import plan_exchange
from kvpool.memory.filling import plan_filling
from kvpool.memory.subset import SubsetSums

PAGE = 16


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """A few runs of pages with free addresses between them; caches of some sizes, a few of which stay."""
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    number, pages, parts = draw(st.integers(0, 10)), [], []
    for _ in range(draw(st.integers(1, 6))):
        start = number * PAGE
        cursor, end = start, start + draw(st.integers(1, 6)) * PAGE
        while True:
            cursor += draw(st.sampled_from([0, 0, 0, 1, 3, 7]))
            size = draw(st.sampled_from(sizes))
            if cursor + size > end:
                break
            parts.append(Part(cursor, size, len(parts), draw(st.integers(0, 4)) > 0))
            cursor += size
        used = {page for part in parts for page in range(part.offset // PAGE, (part.end - 1) // PAGE + 1)}
        pages += [page * PAGE for page in range(start // PAGE, end // PAGE) if page in used]
        number = end // PAGE + draw(st.integers(1, 12))
    free = set(range(0, (number + 10) * PAGE, PAGE)) - set(pages)
    closed = draw(st.sets(st.sampled_from(sorted(free)), max_size=5))
    return Snapshot(PAGE, tuple(pages), tuple(parts), frozenset(free - closed), draw(st.integers(0, 12)))


def carried_out(snapshot: Snapshot, plan: Plan) -> set[int]:
    """Return the pages in which something lies when a plan is carried out, each move of which must be possible."""
    places = {part.cache_id: part for part in snapshot.parts}
    owner = {byte: part.cache_id for part in snapshot.parts for byte in range(part.offset, part.end)}
    for move in plan.moves:
        part = places[move.cache_id]
        assert part.movable
        assert (part.offset, part.size_bytes) == (move.source, move.size_bytes)
        there = range(move.destination, move.destination + move.size_bytes)
        assert all(owner.get(byte, move.cache_id) == move.cache_id for byte in there), "where it goes is free"
        assert not set(there) & set(range(part.offset, part.end)) or move.destination < move.source, "it slides down"
        for byte in range(part.offset, part.end):
            del owner[byte]
        owner.update(dict.fromkeys(there, move.cache_id))
        places[move.cache_id] = part._replace(offset=move.destination)
    return {byte // PAGE * PAGE for byte in owner}


@settings(max_examples=200, deadline=None)
@given(snapshots())
def test_a_plan_that_fills_holes_can_be_carried_out_and_frees_pages(snapshot: Snapshot) -> None:
    plan = plan_filling(snapshot)
    if not plan.moves:
        return
    pages = carried_out(snapshot, plan)
    added = pages - set(snapshot.pages)
    assert added <= snapshot.room
    assert len(added) <= snapshot.spare_pages
    after = moved(snapshot, plan.moves)._replace(pages=tuple(sorted(pages)))
    used = bytes_in_use(after)
    joined = choose_join(after, 1 << 40, 64)
    freed_next = max(
        len(plan_slide(after, 1 << 40, 64).freed), len(joined) - -(-sum(used[page] for page in joined) // PAGE)
    )
    assert len(pages) - freed_next < len(snapshot.pages), "fewer pages than before"


@settings(max_examples=200, deadline=None)
@given(snapshots())
def test_a_plan_that_exchanges_caches_can_be_carried_out_and_frees_pages(snapshot: Snapshot) -> None:
    plan = plan_exchange(snapshot, 3)
    pages = carried_out(snapshot, plan)
    assert pages <= set(snapshot.pages)
    assert pages.isdisjoint(plan.freed)
    assert bool(plan.moves) == bool(plan.freed)


@given(st.dictionaries(st.integers(1, 40), st.integers(0, 5), max_size=8), st.integers(0, 200))
def test_the_largest_sum_below_a_bound_is_found_and_made_of_what_is_there(stock: dict[int, int], bound: int) -> None:
    sums = {0}
    for size, count in stock.items():
        sums |= {each + size * number for each in sums for number in range(count + 1)}
    found = SubsetSums(stock, bound)
    total = found.at_most(bound)
    assert total == max(each for each in sums if each <= bound)
    parts = found.parts(total)
    assert sum(parts) == total
    assert all(parts.count(size) <= stock[size] for size in parts)
