"""Which blocks the caches of the emptiest pages go into."""

from kvpool.memory.compaction import Plan
from kvpool.memory.fitting import Blocks, plan_fit

PAGE = 16


def plan(pages: dict[int, dict[int, int] | None], free: dict[int, list[int]]) -> Plan:
    """Plan for pages of 16: by offset what lies in them; the id of each is its offset."""
    parts = {
        page: None if sizes is None else {offset: (offset, size) for offset, size in sizes.items()}
        for page, sizes in pages.items()
    }
    orders = {size: free.get(size, []) for size in (1, 2, 4, 8, 16)}
    return plan_fit(parts.items(), Blocks(orders, set(pages), PAGE))


def places(made: Plan) -> dict[int, int]:
    assert all(move.cache_id == move.source for move in made.moves)
    return {move.source: move.destination for move in made.moves}


def test_each_goes_into_a_block_of_its_size_first() -> None:
    made = plan({0: {0: 4, 8: 2, 12: 2}}, {2: [38, 18], 4: [52, 36], 8: [64]})
    assert made.freed == (0,)
    assert places(made) == {0: 52, 8: 18, 12: 38}


def test_larger_blocks_are_split_and_what_is_left_is_used_next() -> None:
    made = plan({0: {0: 2, 4: 2, 8: 1, 12: 1}, 16: {16: 4}}, {8: [32]})
    assert (made.freed, places(made)) == ((0,), {0: 32, 4: 34, 8: 36, 12: 37})


def test_neighbours_stay_neighbours_where_a_larger_block_is_split() -> None:
    made = plan({0: {1: 1, 2: 1, 3: 1}}, {4: [32]})
    assert places(made) == {1: 32, 2: 33, 3: 34}


def test_nothing_goes_into_pages_that_are_emptied_themselves() -> None:
    made = plan({0: {0: 8}, 16: {16: 8}}, {8: [8, 24, 40]})
    assert (made.freed, places(made)) == ((0,), {0: 40})


def test_a_page_of_which_not_all_finds_a_block_stays_as_it_is_and_so_do_those_behind() -> None:
    made = plan({0: {0: 1}, 16: {16: 4, 24: 4}, 32: {32: 1}}, {1: [48, 50], 4: [52]})
    assert (made.freed, places(made)) == ((0,), {0: 48})


def test_other_sizes_and_what_goes_on_in_another_page_end_the_plan() -> None:
    free = {4: [64, 68], 8: [72]}
    assert plan({0: {0: 4}, 16: {16: 3}}, free).freed == (0,)
    assert plan({0: {0: 4}, 16: None}, free).freed == (0,)
    assert not plan({0: {0: 32}}, free).moves


def test_an_empty_page_comes_free_without_a_move() -> None:
    made = plan({0: {}}, {})
    assert (made.freed, list(made.moves)) == ((0,), [])
