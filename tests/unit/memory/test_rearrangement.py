"""In which order caches reach their places while others lie there."""

from kvpool.memory.compaction import Part, Snapshot
from kvpool.memory.rearrangement import Rearrangement

PAGE = 8


def snapshot(text: str, room: tuple[int, ...] = (), spare_pages: int = 0) -> Snapshot:
    """Pages side by side; a letter is a block of a cache, a capital one of a cache that stays, a dot is free."""
    parts = [Part(text.index(name), text.count(name), ord(name), name.islower()) for name in sorted(set(text) - {"."})]
    free = frozenset(page * PAGE for page in room)
    return Snapshot(PAGE, tuple(range(0, len(text), PAGE)), tuple(sorted(parts)), free, spare_pages)


def order(before: Snapshot, goals: dict[str, int], kept: set[int], away: str = "") -> list[tuple[str, int]] | None:
    """Return the moves as (cache, where it goes), or None if there is no order."""
    found = Rearrangement(before, {ord(name): place for name, place in goals.items()}, {page * PAGE for page in kept})
    if not found.carry_out(map(ord, away)):
        return None
    return [(chr(move.cache_id), move.destination) for move in found.moves]


def test_what_is_in_the_way_of_another_goes_first() -> None:
    assert order(snapshot("A..bbbcc"), {"c": 4, "b": 1}, {0}) == [("b", 1), ("c", 4)]


def test_of_a_circle_one_goes_to_a_hole_in_another_page_and_comes_back() -> None:
    before = snapshot("Abbbcccc........")
    assert order(before, {"b": 5, "c": 1}, {0}) == [("c", 8), ("b", 5), ("c", 1)]


def test_nothing_slides_up_over_itself() -> None:
    before = snapshot("..bbbb.A........")
    assert order(before, {"b": 3}, {0}) == [("b", 8), ("b", 3)]


def test_what_has_no_place_leaves_the_pages_that_are_kept_for_those_that_have() -> None:
    before = snapshot("A.bbbcc....dddd.")
    assert order(before, {"d": 1}, {0}) == [("b", 8), ("d", 1)], "c is in nobody's way"
    assert order(before, {"d": 1}, {0}, away="c") == [("b", 8), ("d", 1), ("c", 11)], "where d lay"
    assert order(before, {}, {0}, away="b") == [("b", 8)]


def test_without_a_hole_a_page_is_added_where_one_may_be() -> None:
    full = "Abbbcccc"
    assert order(snapshot(full), {"b": 5, "c": 1}, {0}) is None
    assert order(snapshot(full, room=(1,)), {"b": 5, "c": 1}, {0}) is None, "there is no memory for it"
    found = Rearrangement(snapshot(full, room=(1,), spare_pages=1), {ord("b"): 5, ord("c"): 1}, {0})
    assert found.carry_out(())
    assert found.added == [PAGE]


def test_what_stays_is_never_moved_out_of_the_way() -> None:
    assert order(snapshot("bb..AA.........."), {"b": 3}, {0}) is None
