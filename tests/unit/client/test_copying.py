"""Where blocks are read from."""

import ctypes

import numpy as np
import pytest
import torch

from kvpool.client.copying import source_addresses
from kvpool.client.spec import ModelSpec
from kvpool.errors import TensorMismatchError

SPEC = ModelSpec("m", dtype="float32", block_shape=(2, 3))
BLOCK = 24


def read(addresses):
    """The blocks at these addresses, as numbers."""
    return [np.frombuffer(ctypes.string_at(address, BLOCK), dtype=np.float32).tolist() for address in addresses]


def numbers(block):
    return [float(n) for n in np.asarray(block).ravel()]


@pytest.mark.parametrize("make", [torch.tensor, lambda blocks: np.array(blocks)], ids=["torch", "numpy"])
class TestSources:
    def values(self, make, count=3):
        return make(np.arange(6 * count, dtype=np.float32).reshape(count, 2, 3))

    def test_one_tensor_is_read_in_place_block_by_block(self, make):
        whole = self.values(make)
        addresses, kept = source_addresses(SPEC, whole, 3)
        first = whole.data_ptr() if hasattr(whole, "data_ptr") else whole.ctypes.data
        assert addresses == [first, first + BLOCK, first + 2 * BLOCK]
        assert kept[0] is whole or hasattr(whole, "data_ptr")

    def test_a_list_of_blocks_is_read_in_place(self, make):
        blocks = list(self.values(make))[::-1]
        addresses, kept = source_addresses(SPEC, blocks, 3)
        assert read(addresses) == [numbers(block) for block in blocks]
        assert len(kept) == 3
        assert addresses[0] - addresses[1] == BLOCK

    def test_what_is_not_contiguous_is_copied_and_the_copy_kept(self, make):
        whole = self.values(make, 6)[::2]
        turned = [block.swapaxes(0, 1) for block in make(np.arange(18, dtype=np.float32).reshape(3, 3, 2))]
        for source in (whole, turned):
            addresses, kept = source_addresses(SPEC, source, 3)
            assert read(addresses) == [numbers(block) for block in source]
            assert kept

    @pytest.mark.parametrize("count", [2, 4])
    def test_as_many_blocks_as_hashes(self, make, count):
        for source in (self.values(make), list(self.values(make))):
            with pytest.raises(TensorMismatchError, match=f"each hash needs a block: {count} of them, got 3"):
                source_addresses(SPEC, source, count)

    def test_shape_and_dtype_must_be_the_models(self, make):
        for bad in (
            make(np.zeros((3, 3, 2), dtype=np.float32)),
            make(np.zeros((3, 6), dtype=np.float32)),
            make(np.zeros((3, 2, 3), dtype=np.float64)),
            make(np.zeros((3, 2, 3), dtype=np.int32)),
        ):
            for source in (bad, list(bad)):
                with pytest.raises(TensorMismatchError, match=r"has blocks of float32\[2, 3\], got \w+\[") as caught:
                    source_addresses(SPEC, source, 3)
                assert str(bad.dtype).removeprefix("torch.") in caught.value.details["asked"]

    def test_one_bad_block_among_good_ones_is_found(self, make):
        blocks = [*self.values(make), make(np.zeros((2, 2), dtype=np.float32))]
        with pytest.raises(TensorMismatchError, match=r"got float32\[2, 2\]"):
            source_addresses(SPEC, blocks, 4)


def test_bfloat16_blocks_are_read_in_place():
    spec = ModelSpec("m", dtype=torch.bfloat16, block_shape=(4,))
    whole = torch.arange(8, dtype=torch.bfloat16).reshape(2, 4)
    assert source_addresses(spec, whole, 2)[0] == [whole.data_ptr(), whole.data_ptr() + 8]


def test_blocks_of_bytes_are_byte_arrays():
    spec = ModelSpec("m", block_bytes=16)
    whole = np.arange(32, dtype=np.uint8).reshape(2, 16)
    assert source_addresses(spec, whole, 2)[0] == [whole.ctypes.data, whole.ctypes.data + 16]


@pytest.mark.parametrize("blocks", [[b"x" * BLOCK], [None], [[1.0] * 6], "x"])
def test_anything_else_is_no_block(blocks):
    with pytest.raises(TensorMismatchError, match="torch tensors or numpy arrays in host memory"):
        source_addresses(SPEC, blocks, 1)


def test_a_tensor_elsewhere_is_named():
    with pytest.raises(TensorMismatchError, match="this one is on meta"):
        source_addresses(SPEC, torch.zeros((1, 2, 3), device="meta"), 1)


def test_lazily_negated_and_conjugated_tensors_are_stored_as_what_they_mean():
    numbers_ = torch.complex(torch.ones(6), torch.arange(6, dtype=torch.float32)).reshape(1, 2, 3)
    negated = numbers_.conj().imag  # a view with the negative bit: its memory has the positive numbers
    assert negated.is_neg()
    addresses, kept = source_addresses(SPEC, negated, 1)
    assert read(addresses) == [[-0.0, -1, -2, -3, -4, -5]]
    assert kept
