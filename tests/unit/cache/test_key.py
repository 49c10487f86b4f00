"""Names of content must be equal exactly when the bytes are, in every process."""

import subprocess
import sys
from typing import Any

import pytest

from kvpool.cache.key import HASH_BYTES, check_hash, encode_block_id, fingerprint, fingerprint_digest
from kvpool.errors import InvalidRequestError

COMPLETE: dict[str, Any] = {
    "model": "m",
    "revision": "r1",
    "adapter": "a",
    "shard_rank": 1,
    "shard_world": 4,
    "dtype": "bfloat16",
    "layout": "NHD",
    "block_shape": (2, 16, 8),
    "tokens_per_block": 16,
}


def test_block_ids_are_big_endian_numbers_of_16_bytes() -> None:
    assert encode_block_id(0) == bytes(16)
    assert encode_block_id(258) == bytes(14) + b"\x01\x02"
    assert encode_block_id(2**128 - 1) == b"\xff" * HASH_BYTES


@pytest.mark.parametrize("block_id", [-1, 2**128])
def test_a_block_id_that_does_not_fit_is_refused(block_id: int) -> None:
    with pytest.raises(InvalidRequestError, match=str(block_id)):
        encode_block_id(block_id)


@pytest.mark.parametrize("block_id", ["a", None, 1.5, b"x"])
def test_a_block_id_that_is_no_number_is_refused_with_what_to_do_instead(block_id: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"whole number, not .*blake2b.*digest_size=16"):
        encode_block_id(block_id)  # type: ignore[arg-type]


def test_a_hash_is_returned_as_it_is() -> None:
    block_hash = bytes(range(16))
    assert check_hash(block_hash) is block_hash


@pytest.mark.parametrize("wrong", [b"", bytes(15), bytes(32), bytearray(16), "0123456789abcdef", 7, None])
def test_anything_but_16_bytes_is_no_hash(wrong: object) -> None:
    with pytest.raises(InvalidRequestError, match="16"):
        check_hash(wrong)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model", "n"),
        ("revision", "r2"),
        ("adapter", ""),
        ("shard_rank", 2),
        ("shard_world", 8),
        ("dtype", "float16"),
        ("layout", "HND"),
        ("block_shape", (2, 8, 16)),
        ("tokens_per_block", 32),
    ],
)
def test_each_thing_that_makes_bytes_differ_changes_the_fingerprint(name: str, other: object) -> None:
    assert fingerprint(**{**COMPLETE, name: other}) != fingerprint(**COMPLETE)


def test_parts_do_not_run_into_each_other() -> None:
    assert fingerprint(model="ab", revision="c") != fingerprint(model="a", revision="bc")


def test_a_fingerprint_does_not_depend_on_the_process() -> None:
    program = f"from kvpool.cache.key import fingerprint; print(fingerprint(**{COMPLETE!r}))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
            timeout=240,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert printed == {fingerprint(**COMPLETE)}
    assert len(fingerprint(**COMPLETE)) == 2 * HASH_BYTES


@pytest.mark.parametrize("wrong", [{"model": ""}, {"shard_rank": 4}, {"shard_rank": -1}, {"shard_world": 0}])
def test_a_fingerprint_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        fingerprint(**{**COMPLETE, **wrong})


def test_a_digest_ignores_the_order_of_keys() -> None:
    assert fingerprint_digest({"a": 1, "b": [2]}) == fingerprint_digest({"b": [2], "a": 1})


@pytest.mark.parametrize("wrong", [{"a": object()}, {"a": float("nan")}, {"a": b"bytes"}])
def test_a_digest_of_what_json_cannot_hold_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="identifies a model"):
        fingerprint_digest(wrong)
