"""The file beside the content of a tenant and fingerprint that says which models it is of.

The fingerprint is a digest: what a model is called cannot be read from it. So that whoever asks by name reaches what an
earlier life has left, names lie beside it: a line that says what this is, a JSON object with ``tenant``,
``fingerprint`` and ``models``, and an xxh3-128 of both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import xxhash

from kvpool.cache.disk.folder import Folder

MOST_BYTES = 1 << 24

_MAGIC = b"kvpool models 1\n"
_CHECKSUM_BYTES = 16


class NotedModel(NamedTuple):
    """What is known of a model by its registration, beside its tenant and fingerprint."""

    name: str
    revision: str
    block_bytes: int | None
    limit_bytes: int | None


def encode_models(tenant: str, fingerprint: str, models: Sequence[NotedModel]) -> bytes:
    """Return the content of the file; the same models give the same bytes."""
    described = {"tenant": tenant, "fingerprint": fingerprint, "models": [model._asdict() for model in models]}
    content = _MAGIC + json.dumps(described, sort_keys=True).encode()
    return content + xxhash.xxh3_128_digest(content)


def decode_models(content: bytes, tenant: str, fingerprint: str) -> list[NotedModel] | None:
    """Return the models that the file of a tenant and fingerprint names, or None if it is not what it should be."""
    named, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if not named.startswith(_MAGIC) or xxhash.xxh3_128_digest(named) != checksum:
        return None
    try:
        described = json.loads(named[len(_MAGIC) :])
        models = [NotedModel(**model) for model in described["models"]]
        ours = (described["tenant"], described["fingerprint"]) == (tenant, fingerprint)
    except (ValueError, KeyError, TypeError):
        return None
    return models if ours and models and all(map(_is_sound, models)) else None


def read_models(folder: Folder, path: str, size_bytes: int) -> bytes | None:
    """Return the content of the file at a path, None if it has not the size that it was listed with, or none of ours.

    Raises what the store raises.
    """
    if not len(_MAGIC) + _CHECKSUM_BYTES <= size_bytes <= MOST_BYTES:
        return None
    content = bytearray(size_bytes)
    return bytes(content) if folder.read(path, (content,)) == size_bytes else None


def _is_sound(model: NotedModel) -> bool:
    sizes = (model.block_bytes, model.limit_bytes)
    return bool(model.name) and all(isinstance(text, str) for text in model[:2]) and all(map(_is_size, sizes))


def _is_size(size_bytes: Any) -> bool:
    return size_bytes is None or (isinstance(size_bytes, int) and not isinstance(size_bytes, bool) and size_bytes > 0)
