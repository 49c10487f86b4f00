"""What a disk that has no room for all is to hold of chains: the front of each."""

from disk_stores import key_of

from kvpool.cache.fronts import Fronts
from kvpool.cache.source import Source
from kvpool.errors import TierError

FULL, LOST = TierError("full", cause="ENOSPC"), TierError("lost", cause="EIO")


def fronts(*parents):
    """Caches 1, 2, … that hang on these."""
    return Fronts(
        [
            Source(key_of(number), None if parent is None else key_of(parent).block_hash, 1, 1)
            for number, parent in enumerate(parents, 1)
        ],
        ("ENOSPC",),
    )


def test_of_a_chain_all_behind_a_gap_is_behind_it():
    chain = fronts(None, 1, 2, 3, 4, 5)
    errors = [None, None, FULL, None, FULL, None]
    assert (chain.refused(errors), chain.behind(errors)) == ([2, 4], [3, 5])
    assert chain.worth_filling([2, 4], [3, 5]) == [2], "5 goes for 2; 4 is no better than 3"
    assert chain.worth_filling([2, 4], [5]) == [2]
    assert chain.worth_filling([2], []) == []


def test_what_failed_otherwise_is_no_gap_that_could_be_filled():
    chain = fronts(None, 1, 2, 3)
    assert chain.behind([None, LOST, None, None]) == []
    assert (chain.refused([LOST, None, FULL, None]), chain.behind([LOST, None, FULL, None])) == ([2], [3])


def test_a_chain_may_come_its_tail_first_and_with_others_and_begin_above():
    several = fronts(2, 99, None, 1, 3)  # 2, 1, 4 hang on 99, which is not among them; 3, 5
    errors = [None, FULL, None, None, None]
    assert several.refused(errors) == [1]
    assert several.behind(errors) == [0, 3]
    assert several.behind([FULL, None, None, None, None]) == [3]
    assert several.refused([FULL] * 5) == [1, 2, 0, 4, 3], "the head of each before the tail of any"


def test_keys_that_hang_on_each_other_come_to_an_end():
    odd = fronts(2, 1, 3)
    assert sorted(odd.refused([FULL] * 3)) == [0, 1, 2]
    assert odd.behind([None] * 3) == []


def test_of_a_long_chain():
    length = 20_000
    chain = fronts(None, *range(1, length))
    errors = [None] * length
    errors[10] = FULL
    assert chain.behind(errors) == list(range(11, length))
