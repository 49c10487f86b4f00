"""A model that uses the pool: what makes its bytes differ, and what a block of it looks like."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from kvpool.cache.key import HASH_BYTES
from kvpool.errors import InvalidRequestError
from kvpool.memory.dlpack import dtype_name, tensor_bytes
from kvpool.sizes import parse_size


@dataclass(frozen=True)
class ModelSpec:
    """Names a model once: everything that makes its bytes differ, the shape of a block, its limit.

    Parameters
    ----------
    name
        Of the model.
    revision, adapter
        Of its weights.
    shard_rank, shard_world
        Which part of a sharded model this process runs.
    layout
        Free text that tells memory layouts apart.
    dtype, block_shape
        Of one block; or
    block_bytes
        its size alone, when blocks are plain bytes. With neither, the model can use whole caches only.
    tokens_per_block
        How many tokens a block stands for.
    limit
        The most that its caches may hold together, bytes or text.
    """

    name: str
    revision: str = ""
    adapter: str = ""
    shard_rank: int = 0
    shard_world: int = 1
    layout: str = ""
    dtype: Any = None
    block_shape: tuple[int, ...] | None = None
    block_bytes: int | str | None = None
    tokens_per_block: int = 0
    limit: int | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InvalidRequestError(f"a model needs a name, a text that is not empty; got {self.name!r}")
        if (self.dtype is None) != (self.block_shape is None):
            raise InvalidRequestError(f"model {self.name!r}: dtype and block_shape come together")
        if self.block_shape is not None and self.block_bytes is not None:
            raise InvalidRequestError(f"model {self.name!r}: give dtype and block_shape, or block_bytes, not both")
        if self.block_shape is not None:
            object.__setattr__(self, "block_shape", tuple(self.block_shape))
        if self.block_shape is not None and not all(isinstance(n, int) and n > 0 for n in self.block_shape):
            raise InvalidRequestError(f"model {self.name!r}: block_shape={self.block_shape} must be positive integers")

    @property
    def block_dtype(self) -> str:
        """Name of the dtype of a block's elements; ``"uint8"`` when blocks are bytes."""
        return dtype_name(self.dtype) if self.dtype is not None else "uint8"

    @property
    def block_size_bytes(self) -> int | None:
        """Bytes of one block, or None when the model has no blocks."""
        if self.block_shape is not None:
            return tensor_bytes(self.block_shape, self.block_dtype)
        return parse_size(self.block_bytes) if self.block_bytes is not None else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one block's tensor.

        Raises
        ------
        InvalidRequestError
            If the model has no blocks.
        """
        if self.block_shape is not None:
            return self.block_shape
        size_bytes = self.block_size_bytes
        if size_bytes is None:
            raise InvalidRequestError(
                f"model {self.name!r} has no blocks: give its ModelSpec a dtype and block_shape, or block_bytes"
            )
        return (size_bytes,)

    def to_wire(self) -> dict[str, Any]:
        """Return the built-in types by which the pool registers the model."""
        identity = {
            "model": self.name,
            "revision": self.revision,
            "adapter": self.adapter,
            "shard_rank": self.shard_rank,
            "shard_world": self.shard_world,
            "dtype": self.block_dtype,
            "layout": self.layout,
            "block_shape": list(self.shape) if self.block_size_bytes is not None else [],
            "tokens_per_block": self.tokens_per_block,
        }
        limit_bytes = parse_size(self.limit) if self.limit is not None else None
        return {
            "name": self.name,
            "identity": identity,
            "block_bytes": self.block_size_bytes,
            "limit_bytes": limit_bytes,
        }


def content_hash(key: bytes | str) -> bytes:
    """Return the 16-byte hash of a key: 16 bytes as they are, anything else hashed (BLAKE2b)."""
    if isinstance(key, bytes) and len(key) == HASH_BYTES:
        return key
    if not isinstance(key, (bytes, str)) or not key:
        raise InvalidRequestError(
            f"a key is text or bytes, and not empty; got {key!r} (of a block's number: kvpool.encode_block_id)"
        )
    return blake2b(key.encode() if isinstance(key, str) else key, digest_size=HASH_BYTES).digest()


def content_hashes(keys: bytes | str | Sequence[bytes | str]) -> list[bytes]:
    """Return the hashes of keys: of one alone, or of several in a sequence; each as :func:`content_hash`."""
    if isinstance(keys, (bytes, str)) or not isinstance(keys, Iterable):
        return [content_hash(keys)]
    return [content_hash(key) for key in keys]


def join_hashes(hashes: Sequence[bytes]) -> bytes:
    """Return block hashes as one message field.

    Raises
    ------
    InvalidRequestError
        If one is not 16 bytes, or there is none.
    """
    if not hashes or any(not isinstance(h, bytes) or len(h) != HASH_BYTES for h in hashes):
        raise InvalidRequestError(
            f"block hashes are {HASH_BYTES} bytes each, at least one: made by kvpool.encode_block_id(number), or by "
            f"hashlib.blake2b(name, digest_size={HASH_BYTES}).digest()"
        )
    return b"".join(hashes)


def is_number(value: object, at_least: float) -> bool:
    """Return whether a value is a finite number, not below ``at_least``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and at_least <= value < math.inf


def wait_of(timeout_s: float | None, default_s: float) -> float:
    """Return how many seconds to wait for memory.

    Raises
    ------
    InvalidRequestError
        If ``timeout_s`` is no number of at least 0.
    """
    if timeout_s is not None and not is_number(timeout_s, at_least=0):
        raise InvalidRequestError(f"timeout_s is how many seconds to wait, 0 or more, not {timeout_s!r}")
    return default_s if timeout_s is None else timeout_s
