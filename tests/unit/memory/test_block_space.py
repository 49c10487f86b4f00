"""What a scheduler may hand to the blocks inside a cache, and what must not stay in them."""

import numpy as np
import pytest
import torch

from kvpool.errors import DoubleReleaseError, InvalidRequestError, InvalidSizeError
from kvpool.memory.block_space import BlockSpace


@pytest.fixture
def space():
    space = BlockSpace(16, 4, 0, range(4))
    yield space
    space.check()


@pytest.mark.parametrize("array", [torch.tensor, np.array, tuple, lambda numbers: list(torch.tensor(numbers))])
def test_a_block_table_that_is_used_again_changes_nothing_that_is_free(space, array):
    table = array(space.allocate(8))
    space.free(table)
    if not isinstance(table, tuple):
        for place in range(8):
            table[place] = 3
    numbers = space.allocate(16)
    assert numbers == list(range(16)), "each once"
    assert {type(number) for number in numbers} == {int}


def test_numbers_that_can_be_read_only_once_are_freed(space):
    space.free(iter(space.allocate(3)))
    assert space.used_blocks == 0


@pytest.mark.parametrize(
    "numbers", [[True], [0, True], np.array([True]), torch.tensor([True]), [np.True_], [1.0], ["1"], 1, None,
                torch.tensor(1), torch.tensor([[0, 1]]), torch.tensor([0.0])]
)  # fmt: skip
def test_what_is_no_number_of_a_block_frees_nothing(space, numbers):
    space.allocate(16)
    with pytest.raises(InvalidRequestError, match="nothing was freed"):
        space.free(numbers)
    assert space.used_blocks == 16


def test_an_array_with_a_block_twice_frees_nothing(space):
    space.allocate(4)
    with pytest.raises(DoubleReleaseError):
        space.free(torch.tensor([1, 2, 1]))
    assert space.used_blocks == 4


def test_counts_are_whole_numbers(space):
    assert space.allocate(np.int64(3)) == [0, 1, 2]
    assert space.missing_for(torch.tensor(2)) == []
    for count in (-1, True, 1.0, "1", None, np.bool_(True)):
        with pytest.raises(InvalidRequestError):
            space.allocate(count)
        with pytest.raises(InvalidRequestError):
            space.missing_for(count)
    with pytest.raises(InvalidSizeError, match="can never be"):
        space.missing_for(17)


def test_blocks_come_in_ascending_order(space):
    table = space.allocate(16)
    space.free(table[::2])
    assert space.allocate(6) == table[:12:2]
