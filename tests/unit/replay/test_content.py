"""What replayed blocks hold: wrong bytes must not pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.errors import InvalidRequestError
from kvpool.replay.content import BlockContent, mix

BLOCK_BYTES = 1024
IDS = st.integers(0, 2**64 - 1)


def written(block_id: int, block_bytes: int = BLOCK_BYTES) -> np.ndarray:
    block = np.full(block_bytes, 0xA5, np.uint8)
    BlockContent(block_bytes).write(block, block_id)
    return block


@given(IDS, IDS)
def test_blocks_of_two_ids_differ_in_every_word(first: int, second: int) -> None:
    different = written(first).view(np.uint64) != written(second).view(np.uint64)
    assert bool(different.all()) == (first != second)
    assert bool(different.any()) == (first != second)


@given(IDS)
def test_the_words_of_a_block_differ(block_id: int) -> None:
    """So a block read at a wrong offset shows."""
    words = written(block_id).view(np.uint64)
    assert len(np.unique(words)) == len(words)


@given(IDS, st.sets(st.integers(0, BLOCK_BYTES - 1)), st.integers(1, 255))
def test_wrong_bytes_are_counted_exactly(block_id: int, wrong: set[int], flip: int) -> None:
    block, content = written(block_id), BlockContent(BLOCK_BYTES)
    for position in wrong:
        block[position] ^= flip
    assert content.wrong_bytes(block, block_id) == len(wrong)


def test_memory_that_nobody_wrote_is_wrong() -> None:
    content = BlockContent(BLOCK_BYTES)
    for block_id in range(50):
        assert content.wrong_bytes(np.zeros(BLOCK_BYTES, np.uint8), block_id) > BLOCK_BYTES * 9 // 10


def test_one_verifier_serves_many_blocks() -> None:
    content = BlockContent(BLOCK_BYTES)
    blocks = {block_id: written(block_id) for block_id in (0, 1, 2**63, 7)}
    assert [content.wrong_bytes(block, block_id) for block_id, block in blocks.items()] == [0] * 4
    assert content.wrong_bytes(blocks[1], 0) > 0


def test_ids_are_mixed_to_different_words() -> None:
    """SplitMix64 is a bijection; its first output for seed 0 is published."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert len({mix(block_id) for block_id in range(100_000)}) == 100_000


@pytest.mark.parametrize("block_bytes", [0, -8, 7, 4097])
def test_blocks_are_whole_words(block_bytes: int) -> None:
    with pytest.raises(InvalidRequestError, match=str(block_bytes)):
        BlockContent(block_bytes)
