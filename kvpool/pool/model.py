"""A model, as it was registered."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Model:
    """What was registered once: the namespace of its keys and its limits."""

    number: int
    name: str
    tenant: str
    space: int
    block_bytes: int | None
    limit_bytes: int | None
    caches: int = 0
    blocks_looked_up: int = 0
    blocks_hit: int = 0
    fingerprint: str = ""
    revision: str = ""
    restored: bool = False
    """Nobody has registered it in this life: it is known by what an earlier one has noted on disk."""
