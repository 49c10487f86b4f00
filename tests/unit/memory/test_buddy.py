"""BuddyAllocator: exact sizes, exact errors, nothing lost."""

import random

import pytest

from kvpool.errors import (
    AddressSpaceError,
    CacheStateError,
    ConfigError,
    DoubleReleaseError,
    InvalidSizeError,
    InvariantError,
    UnknownCacheError,
)
from kvpool.memory.buddy import BuddyAllocator

MIN = 4096


def test_a_size_of_n_minimum_blocks_takes_exactly_n() -> None:
    buddy = BuddyAllocator(64 * MIN, MIN)
    for blocks in range(1, 64):
        offset = buddy.allocate(blocks * MIN - 1)
        assert buddy.allocation_size(offset) == blocks * MIN
        assert buddy.used_bytes == blocks * MIN
        buddy.check()
        buddy.free(offset)
        assert buddy.largest_free_bytes == buddy.total_bytes
        buddy.check()


def test_the_tail_given_back_is_used_by_others() -> None:
    buddy = BuddyAllocator(8 * MIN, MIN)
    five, two, one = buddy.allocate(5 * MIN), buddy.allocate(2 * MIN), buddy.allocate(MIN)
    assert (five, two, one) == (0, 6 * MIN, 5 * MIN)
    assert buddy.free_bytes == 0


def test_a_range_that_may_grow_is_kept_whole() -> None:
    buddy = BuddyAllocator(16 * MIN, MIN)
    offset = buddy.allocate(MIN, max_size_bytes=5 * MIN)
    assert buddy.allocation_size(offset) == 8 * MIN
    same = buddy.allocate(3 * MIN, max_size_bytes=3 * MIN)
    assert buddy.allocation_size(same) == 3 * MIN
    buddy.check()


def test_ranges_lie_at_multiples_of_their_power_of_two() -> None:
    buddy = BuddyAllocator(1024 * MIN, MIN)
    for size in (1, 2, 4, 8, 3, 1, 16, 7):
        offset = buddy.allocate(size * MIN)
        assert offset % (MIN << (size - 1).bit_length()) == 0


def test_the_address_freed_last_is_reused_first() -> None:
    buddy = BuddyAllocator(64 * MIN, MIN)
    offsets = [buddy.allocate(MIN) for _ in range(64)]
    for offset in offsets[::2]:  # every second one: none can merge
        buddy.free(offset)
    assert [buddy.allocate(MIN) for _ in range(32)] == offsets[::2][::-1]


def test_splits_and_merges_through_twenty_orders() -> None:
    buddy = BuddyAllocator(MIN << 20, MIN)
    for _ in range(3):
        offset = buddy.allocate(MIN)
        assert buddy.largest_free_bytes == MIN << 19
        buddy.check()
        buddy.free(offset)
        assert buddy.largest_free_bytes == MIN << 20
        buddy.check()


def test_an_uneven_arena_is_used_to_its_end() -> None:
    buddy = BuddyAllocator(13 * MIN, MIN)
    assert buddy.max_block_bytes == 8 * MIN
    buddy.check()
    offsets = sorted(buddy.allocate(MIN) for _ in range(13))
    assert offsets == [i * MIN for i in range(13)]
    with pytest.raises(AddressSpaceError):
        buddy.allocate(MIN)
    for offset in offsets:
        buddy.free(offset)
    buddy.check()
    assert buddy.largest_free_bytes == 8 * MIN


def test_blocks_of_the_largest_size_are_never_merged() -> None:
    buddy = BuddyAllocator(4 * MIN, MIN, max_block_bytes=MIN)
    offsets = [buddy.allocate(MIN) for _ in range(4)]
    for offset in offsets:
        buddy.free(offset)
    buddy.check()
    assert buddy.free_bytes == 4 * MIN
    assert buddy.largest_free_bytes == MIN


def test_running_out_of_addresses_is_an_error_of_its_own_and_says_what_would_fit() -> None:
    buddy = BuddyAllocator(8 * MIN, MIN)
    buddy.allocate(3 * MIN)
    with pytest.raises(AddressSpaceError, match="largest range") as caught:
        buddy.allocate(8 * MIN)
    assert caught.value.details == {"asked_bytes": 8 * MIN, "free_bytes": 5 * MIN, "largest_bytes": 4 * MIN}
    assert buddy.allocation_size(buddy.allocate(4 * MIN)) == 4 * MIN


@pytest.mark.parametrize(
    ("size", "maximum"), [(0, None), (-1, None), (8 * MIN + 1, None), (2, 1), (1, 9 * MIN), (0.5, None)]
)
def test_impossible_sizes_are_refused_and_change_nothing(size: int, maximum: int | None) -> None:
    buddy = BuddyAllocator(8 * MIN, MIN)
    with pytest.raises(InvalidSizeError, match="ask for 1 to"):
        buddy.allocate(size, maximum)
    assert buddy.free_bytes == 8 * MIN
    buddy.check()


def test_freeing_what_is_not_allocated() -> None:
    buddy = BuddyAllocator(16 * MIN, MIN)
    kept = buddy.allocate(4 * MIN)
    freed = buddy.allocate(MIN)
    buddy.free(freed)
    for offset in (freed, freed + MIN, 8 * MIN):
        with pytest.raises(DoubleReleaseError):
            buddy.free(offset)
    for offset in (kept + MIN, kept + 1, freed + 1, -MIN, 16 * MIN, 1 << 60):
        with pytest.raises(UnknownCacheError):
            buddy.free(offset)
        with pytest.raises(UnknownCacheError):
            buddy.allocation_size(offset)
    assert buddy.used_bytes == 4 * MIN
    buddy.check()


def test_pages_are_given_and_taken_back() -> None:
    page = 16 * MIN
    buddy = BuddyAllocator(0, MIN, max_block_bytes=page)
    with pytest.raises(AddressSpaceError):
        buddy.allocate(MIN)
    buddy.add(7 * page)
    buddy.add(6 * page)  # its buddy at the next order: still two blocks
    first, whole = buddy.allocate(MIN), buddy.allocate(page)
    assert {first - first % page, whole} == {6 * page, 7 * page}
    for offset in (6 * page, 7 * page, 8 * page):
        with pytest.raises(CacheStateError):
            buddy.take(offset)
    buddy.free(first)
    buddy.check()
    assert buddy.is_free_block(first - first % page)
    buddy.take(first - first % page)
    assert buddy.total_bytes == buddy.used_bytes == page
    with pytest.raises(UnknownCacheError):
        buddy.free(first)  # its block is gone
    buddy.check()


@pytest.mark.parametrize("offset", [0, MIN, -16 * MIN])
def test_only_a_new_aligned_block_is_added(offset: int) -> None:
    buddy = BuddyAllocator(16 * MIN, MIN)
    with pytest.raises(CacheStateError, match="not managed yet"):
        buddy.add(offset)
    assert buddy.total_bytes == 16 * MIN


@pytest.mark.parametrize("sizes", [(100, 3, None), (16, 8, 4), (17, 2, None), (-8, 2, 8), (0, 2, None), (16, 0, None)])
def test_sizes_that_do_not_fit_together(sizes: tuple[int, int, int | None]) -> None:
    with pytest.raises(ConfigError):
        BuddyAllocator(*sizes)


def test_check_finds_damage() -> None:
    def fresh() -> BuddyAllocator:
        buddy = BuddyAllocator(8 * MIN, MIN)
        buddy.allocate(MIN)
        return buddy

    lost, twice, apart = fresh(), fresh(), fresh()
    del lost._free[MIN][MIN]
    twice._live[MIN] = MIN
    del apart._live[0]
    apart._free[MIN][0] = None
    for damaged in (lost, twice, apart):
        with pytest.raises(InvariantError):
            damaged.check()


def test_churn_loses_nothing() -> None:
    rng = random.Random(7)
    buddy = BuddyAllocator(1 << 24, MIN)
    live = [buddy.allocate(rng.randint(1, 20) * MIN) for _ in range(200)]
    for step in range(5000):
        buddy.free(live.pop(rng.randrange(len(live))))
        live.append(buddy.allocate(rng.randint(1, 20) * MIN))
        if step % 500 == 0:
            buddy.check()
    for offset in live:
        buddy.free(offset)
    buddy.check()
    assert buddy.largest_free_bytes == 1 << 24


def test_shrinking_gives_the_tail_back() -> None:
    buddy = BuddyAllocator(16 * MIN, MIN)
    offset = buddy.allocate(7 * MIN)
    for blocks in (7, 5, 3, 1):
        buddy.shrink(offset, blocks * MIN - 1)
        assert buddy.allocation_size(offset) == buddy.used_bytes == blocks * MIN
        buddy.check()
    for size in (0, MIN + 1):
        with pytest.raises(InvalidSizeError, match="cannot shrink"):
            buddy.shrink(offset, size)
    buddy.free(offset)
    with pytest.raises(DoubleReleaseError):
        buddy.shrink(offset, MIN)
    assert buddy.largest_free_bytes == 16 * MIN


def filled(rng: random.Random) -> tuple[BuddyAllocator, list[int]]:
    """A block full of ranges of any size, some of which are freed; and where the others begin."""
    buddy = BuddyAllocator(0, MIN, 64 * MIN)
    buddy.add(64 * MIN)
    position, starts = 64 * MIN, []
    while position < 128 * MIN:
        blocks = rng.randint(1, min(9, 128 - position // MIN))
        buddy.carve(position, blocks * MIN)
        starts.append(position)
        position += blocks * MIN
    for start in rng.sample(starts, len(starts) // 2):
        buddy.free(start)
        starts.remove(start)
    return buddy, starts


@pytest.mark.parametrize("seed", range(20))
def test_a_block_is_cleared_whatever_lies_in_it(seed: int) -> None:
    buddy, starts = filled(random.Random(seed))
    buddy.clear(64 * MIN, starts)
    buddy.check()
    assert buddy.used_bytes == 0
    assert buddy.allocate(64 * MIN) == 64 * MIN


def test_what_is_known_of_free_parts_is_bounded_and_may_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.memory.buddy._MOST_CUTS", 2)
    for seed in range(20):
        buddy, starts = filled(random.Random(seed))
        gaps = buddy.free_runs()
        buddy.carve_all([offset for offset, _ in gaps], [size_bytes for _, size_bytes in gaps])
        buddy.check()
        assert buddy.free_bytes == 0
        for offset, _ in gaps[::2]:
            buddy.free(offset)
        buddy.clear(64 * MIN, sorted({*starts, *(offset for offset, _ in gaps[1::2])}))
        buddy.check()
        assert len(buddy._cuts) <= 2


@pytest.mark.parametrize("seed", range(5))
def test_only_a_block_of_which_all_ranges_are_named_is_cleared(seed: int) -> None:
    rng = random.Random(seed)
    buddy, starts = filled(rng)
    starts.remove(rng.choice(starts))
    with pytest.raises(InvariantError):
        buddy.clear(64 * MIN, starts)


def test_free_ranges_are_carved_as_allocate_hands_them_out_and_others_anywhere() -> None:
    buddy = BuddyAllocator(16 * MIN, MIN)
    low, high = buddy.allocate(4 * MIN), buddy.allocate(4 * MIN)
    buddy.carve_all([8 * MIN, 14 * MIN], [4 * MIN, 2 * MIN])
    buddy.check()
    assert sorted(buddy.free_blocks[2 * MIN]) == [12 * MIN]
    with pytest.raises(CacheStateError):
        buddy.carve_all([12 * MIN, 13 * MIN], [MIN, 2 * MIN])
    buddy.check()
    for offset in (low, high, 8 * MIN, 14 * MIN, 12 * MIN):
        buddy.free(offset)
    buddy.check()
    assert buddy.largest_free_bytes == 16 * MIN


def test_ranges_go_on_from_one_block_to_the_next() -> None:
    """Where an arena is no power of two it has several; what lay on both sides of the border was called unsound."""
    addresses = BuddyAllocator(24 * MIN, MIN)
    addresses.carve(15 * MIN, MIN)
    addresses.carve(16 * MIN, MIN)
    addresses.unite(15 * MIN, 2 * MIN)
    addresses.carve(22 * MIN, 2 * MIN)
    addresses.check()
    addresses.free(15 * MIN)
    addresses.free(22 * MIN)
    addresses.check()
    assert addresses.largest_free_bytes == 16 * MIN
