"""How a model is named, and how its blocks' hashes travel."""

from dataclasses import replace

import pytest
import torch

from kvpool.client.spec import ModelSpec, content_hash, join_hashes
from kvpool.errors import InvalidRequestError, InvalidSizeError, TensorMismatchError

OCR = ModelSpec("ocr", dtype=torch.bfloat16, block_shape=(12, 2, 16, 10, 128))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "needs a name"),
        ({"dtype": torch.float32}, "dtype and block_shape come together"),
        ({"block_shape": (1, 2)}, "dtype and block_shape come together"),
        ({"dtype": torch.float32, "block_shape": (2,), "block_bytes": 8}, "not both"),
        ({"dtype": torch.float32, "block_shape": (2, 0)}, r"block_shape=\(2, 0\) must be positive"),
        ({"dtype": torch.float32, "block_shape": (2, -1)}, "must be positive"),
        ({"dtype": torch.float32, "block_shape": (2, 1.5)}, "must be positive integers"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(fields, message):
    with pytest.raises(InvalidRequestError, match=message):
        ModelSpec(**{"name": "m", **fields})


@pytest.mark.parametrize(
    ("spec", "dtype", "size_bytes", "shape"),
    [
        (OCR, "bfloat16", 12 * 2 * 16 * 10 * 128 * 2, (12, 2, 16, 10, 128)),
        (ModelSpec("m", dtype="float32", block_shape=(3, 5)), "float32", 60, (3, 5)),
        (ModelSpec("m", block_bytes="64KiB"), "uint8", 65536, (65536,)),
        (ModelSpec("m", block_bytes=100), "uint8", 100, (100,)),
    ],
)
def test_a_block_has_a_size_and_a_shape(spec, dtype, size_bytes, shape):
    assert (spec.block_dtype, spec.block_size_bytes, spec.shape) == (dtype, size_bytes, shape)
    assert spec.to_wire()["block_bytes"] == size_bytes


def test_a_model_may_have_no_blocks():
    spec = ModelSpec("m")
    assert spec.block_size_bytes is None
    assert spec.to_wire()["block_bytes"] is None
    assert spec.to_wire()["identity"]["block_shape"] == []
    with pytest.raises(InvalidRequestError, match="'m' has no blocks: give"):
        _ = spec.shape


def test_unreadable_sizes_and_dtypes_are_refused_before_the_pool_hears_of_them():
    with pytest.raises(InvalidSizeError):
        ModelSpec("m", block_bytes=0).to_wire()
    with pytest.raises(InvalidSizeError):
        ModelSpec("m", limit="much").to_wire()
    with pytest.raises(TensorMismatchError):
        ModelSpec("m", dtype="float12", block_shape=(1,)).to_wire()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"revision": "2"},
        {"adapter": "lora"},
        {"shard_rank": 1, "shard_world": 2},
        {"layout": "nhd"},
        {"dtype": torch.float16},
        {"block_shape": (12, 2, 16, 128, 10)},
        {"tokens_per_block": 16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_makes_bytes_differ_is_part_of_the_identity(change):
    assert replace(OCR, **change).to_wire()["identity"] != OCR.to_wire()["identity"]


def test_a_limit_is_no_part_of_the_identity_and_travels_in_bytes():
    limited = replace(OCR, limit="1GiB").to_wire()
    assert limited["identity"] == OCR.to_wire()["identity"]
    assert (limited["limit_bytes"], OCR.to_wire()["limit_bytes"]) == (1 << 30, None)


def test_a_dtype_is_the_same_by_object_and_by_name():
    assert replace(OCR, dtype="bfloat16").to_wire() == OCR.to_wire()


def test_sixteen_bytes_are_a_hash_already():
    assert content_hash(b"0123456789abcdef") == b"0123456789abcdef"


def test_other_keys_are_hashed_the_same_in_every_process():
    assert content_hash("prompt").hex() == "b46464fa9f8c261c941975d95fb5d12b"  # as b2sum --length=128 has it
    assert content_hash("prompt") == content_hash(b"prompt")
    assert content_hash("0123456789abcdef") != b"0123456789abcdef", "text is always hashed"
    assert len({content_hash(bytes(n)) for n in range(1, 40)}) == 39


@pytest.mark.parametrize("key", ["", b"", None, 3, ("a",)])
def test_a_key_is_text_or_bytes(key):
    with pytest.raises(InvalidRequestError, match="text or bytes, and not empty"):
        content_hash(key)


def test_hashes_are_joined_in_order():
    assert join_hashes([b"a" * 16, b"b" * 16]) == b"a" * 16 + b"b" * 16


@pytest.mark.parametrize(
    "hashes", [[], [b"short"], [b"a" * 16, b"b" * 17], ["a" * 16], [bytearray(16)], [1], b"a" * 16]
)
def test_a_hash_is_sixteen_bytes(hashes):
    with pytest.raises(InvalidRequestError, match="16 bytes each, at least one"):
        join_hashes(hashes)
