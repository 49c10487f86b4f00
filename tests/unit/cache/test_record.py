"""The power-of-two blocks of which a range is made."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.cache.record import CacheBlock, blocks_of
from kvpool.memory.buddy import BuddyAllocator

MIN = 4096


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (1, [(0, 1)]),
        (MIN, [(0, 1)]),
        (MIN + 1, [(0, 2)]),
        (7 * MIN, [(0, 4), (4, 2), (6, 1)]),
        (6 * MIN - 5, [(0, 4), (4, 2)]),
        (64 * MIN, [(0, 64)]),
    ],
)
def test_a_range_is_the_powers_of_two_in_its_length(size_bytes, expected):
    base = 128 * MIN
    blocks = blocks_of(base, size_bytes, MIN)
    assert blocks == tuple(CacheBlock(base + at * MIN, count * MIN) for at, count in expected)


@given(size_bytes=st.integers(1, 64 * MIN))
def test_blocks_are_buddies_side_by_side_and_just_cover_what_the_allocator_keeps(size_bytes):
    allocator = BuddyAllocator(64 * MIN, MIN)
    offset = allocator.allocate(size_bytes)
    blocks = blocks_of(offset, size_bytes, MIN)
    end = offset
    for block in blocks:
        assert block.offset == end
        assert block.size_bytes & (block.size_bytes - 1) == 0
        assert block.offset % block.size_bytes == 0
        end += block.size_bytes
    assert end - offset == allocator.allocation_size(offset)
    assert end - offset - MIN < size_bytes <= end - offset
    assert sorted(blocks, key=lambda block: -block.size_bytes) == list(blocks)
