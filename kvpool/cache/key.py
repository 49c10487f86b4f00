"""Names of cached content: ``(tenant, fingerprint, block hash)``.

Two caches hold the same bytes exactly when their keys are equal. The tenant keeps protection domains apart; the
fingerprint names everything but the tokens that makes bytes differ; the hash names the tokens up to and including the
block, because the caller chains hashes (each covers its parent's).
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias

from kvpool.errors import InvalidRequestError

HASH_BYTES = 16

MOST_HASHES = 1 << 16
"""Hashes of one request at most (a bound on the work that one item can ask for)."""

BlockHash: TypeAlias = bytes
"""Chained content hash of a block: 16 bytes, independent of the process that computed it."""


class CacheKey(NamedTuple):
    """The whole name of a sealed cache's content."""

    tenant: str
    fingerprint: str
    block_hash: BlockHash


KeyShards = list[dict[BlockHash, int]]
"""A dictionary in parts, by the last byte of the hash: one of 150,000 keys alone would stop everything for 8 ms when
it makes room, which it also does where as many come as go."""

SHARDS = 64


def key_shards() -> KeyShards:
    """Return an empty dictionary in parts."""
    return [{} for _ in range(SHARDS)]


def encode_block_id(block_id: int) -> BlockHash:
    """Return the hash that stands for a trace's block id: the id as a big-endian integer.

    Raises
    ------
    InvalidRequestError
        If the id is no whole number, is negative or needs more than 16 bytes.
    """
    try:
        return operator.index(block_id).to_bytes(HASH_BYTES, "big")
    except TypeError:
        raise InvalidRequestError(
            f"a block id is a whole number, not {block_id!r}: what is named by text is hashed, for instance with "
            f"hashlib.blake2b(text.encode(), digest_size={HASH_BYTES}).digest()",
            asked=repr(block_id),
        ) from None
    except OverflowError:
        raise InvalidRequestError(
            f"a block id must be at least 0 and below 2**{8 * HASH_BYTES}, not {block_id}", asked=str(block_id)
        ) from None


def check_hash(block_hash: object) -> BlockHash:
    """Return ``block_hash`` unchanged when it is one.

    Raises
    ------
    InvalidRequestError
        If it is anything but ``bytes`` of length 16.
    """
    if not isinstance(block_hash, bytes):
        kind = type(block_hash).__name__
        raise InvalidRequestError(f"a block hash is bytes of length {HASH_BYTES}, not {kind}", asked=kind)
    if len(block_hash) != HASH_BYTES:
        raise InvalidRequestError(
            f"a block hash has {HASH_BYTES} bytes, this one has {len(block_hash)}: "
            "shorten longer digests, for instance with hashlib.blake2b(digest_size=16)",
            asked_bytes=len(block_hash),
        )
    return block_hash


def fingerprint(
    *,
    model: str,
    revision: str = "",
    adapter: str = "",
    shard_rank: int = 0,
    shard_world: int = 1,
    dtype: str = "",
    layout: str = "",
    block_shape: Sequence[int] = (),
    tokens_per_block: int = 0,
) -> str:
    """Return the name (32 hexadecimal digits) of what makes the bytes of equal tokens differ.

    The same arguments give the same name in every process and on every machine.

    Parameters
    ----------
    model, revision, adapter
        Which weights: the model's name, the revision of its weights, the adapter on top (empty: none).
    shard_rank, shard_world
        Which part of a sharded model.
    dtype, layout, block_shape
        How a block's bytes are laid out: ``"bfloat16"``, a free word for the order of dimensions, the shape.
    tokens_per_block
        Tokens that one block holds (0: not said).

    Raises
    ------
    InvalidRequestError
        If the model has no name, or the rank is not below the world size.
    """
    if not model:
        raise InvalidRequestError("a fingerprint needs the model's name, it is empty", asked=model)
    if not 0 <= shard_rank < shard_world:
        raise InvalidRequestError(
            f"shard rank {shard_rank} is not one of the {shard_world} ranks (0 to {shard_world - 1})",
            shard_rank=shard_rank,
            shard_world=shard_world,
        )
    described = {
        "model": model,
        "revision": revision,
        "adapter": adapter,
        "shard": [int(shard_rank), int(shard_world)],
        "dtype": dtype,
        "layout": layout,
        "block_shape": [int(extent) for extent in block_shape],
        "tokens_per_block": int(tokens_per_block),
    }
    return fingerprint_digest(described)


def fingerprint_digest(identity: Mapping[str, Any]) -> str:
    """Return the fingerprint of a description made of JSON types, whatever the order of its keys.

    Raises
    ------
    InvalidRequestError
        If it holds anything that JSON cannot express exactly.
    """
    try:
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"what identifies a model must be numbers, text and lists: {error}") from error
    return blake2b(canonical.encode("ascii"), digest_size=HASH_BYTES).hexdigest()


def split_hashes(joined: bytes) -> list[bytes]:
    """Return the 16-byte hashes that a message carries joined.

    Raises
    ------
    InvalidRequestError
        If they are not whole, or too many.
    """
    count, rest = divmod(len(joined), HASH_BYTES)
    if rest or not 0 < count <= MOST_HASHES:
        raise InvalidRequestError(
            f"hashes come as {HASH_BYTES} bytes each, 1 to {MOST_HASHES} of them; got {len(joined)} bytes"
        )
    return [joined[start : start + HASH_BYTES] for start in range(0, len(joined), HASH_BYTES)]
