"""What a client of a pool knows: of itself, and of the caches it made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from pool_harness import PAGE

from kvpool.errors import KvpoolError, from_wire
from kvpool.memory.extents import Extents, front

BLOCK_BYTES = {"small": PAGE // 4, "large": PAGE + PAGE // 4}
"""What every tenant registers, under equal names and with equal hashes: four blocks a page, and two pages a block."""

Key = tuple[str, str, bytes]
"""Tenant, model, hash."""


@dataclass(eq=False)
class Made:
    """A cache, as its maker knows it."""

    id: int
    maker: str
    tenant: str
    model: str
    device: int
    offset: int
    size_bytes: int
    pages: tuple[tuple[int, int], ...]
    planned: bytes | None
    """Hash of the block it was asked for."""
    above: int
    """Id of the cache that it was chained behind when it was granted, -1 if there was none."""
    written: bytes
    asked: Key | None = None
    """The key under which its maker has asked to seal it, from that moment on."""
    sealed: bool = False
    generation: int = 0
    extents: Extents = ()
    """What its maker may count on: what it was told is backed, without what it has asked to give back."""
    max_size_bytes: int = 0
    changing: bool = False

    @property
    def sealable(self) -> bool:
        """Whether it is backed from its first byte on, and stays so."""
        return not self.changing and self.size_bytes > 0 and self.extents == front(self.size_bytes)


@dataclass(eq=False)
class Process:
    """A client: what it was answered, and what it has given up since."""

    name: str
    tenant: str
    models: dict[str, int]
    ready: bool = False
    alive: bool = True
    held: Counter[int] = field(default_factory=Counter)
    releasing: Counter[int] = field(default_factory=Counter)
    finishing: set[int] = field(default_factory=set)
    guessed: Counter[int] = field(default_factory=Counter)
    """Leases that it gave up before it was told of them: those of a look-up that may end without them."""
    tickets: set[int] = field(default_factory=set)

    def sure(self) -> list[int]:
        """Return the caches on which it holds a lease that it has not begun to give up."""
        return sorted(i for i, n in self.held.items() if n > self.releasing[i] and i not in self.finishing)


def content_of(key: Key) -> bytes:
    return blake2b(repr(key).encode(), digest_size=16).digest()


def whole(pattern: bytes, size_bytes: int, extents: Extents) -> bytes:
    """Return what is in these parts of a cache that was filled with a pattern from its first byte on."""
    filled = pattern * (size_bytes // len(pattern) + 1)
    return b"".join(filled[start:end] for start, end in extents)


def is_error(answer: Any, *kinds: type[KvpoolError]) -> bool:
    return isinstance(answer, tuple) and answer[0] == "error" and isinstance(from_wire(answer[1:]), kinds)
