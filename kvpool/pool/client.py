"""A client of the pool, and what it has to write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvpool.memory.extents import Extents


@dataclass(slots=True)
class Client:
    """One connected process."""

    id: str
    tenant: str
    host: str
    devices: list[int]
    """Numbers of the devices whose memory it can map: those of its own host."""
    who: dict[str, Any] = field(default_factory=dict)
    """What it said of itself: process, host name, job, node."""
    since: float = 0.0
    """When it connected."""


@dataclass(slots=True)
class Backing:
    """What is backed of a cache that is being written, and may grow and shrink."""

    max_size_bytes: int
    known: Extents
    """As its device last said."""
    planned: Extents
    """As it will be when the device has done what it was told; as known while it was told nothing."""
    shared: bool
    """Whether it lies in shared pages, and takes the same whatever is backed of it."""
    under_way: bool = False
    """Whether there is a change that the device has not answered. One at a time."""


class Writer(NamedTuple):
    """Who writes a cache that is not sealed yet: the only client that may seal it."""

    client: str
    born: int
    """How many invalidations there had been when it was asked for."""
    planned: bytes | None
    """Hash of the block that it was asked for; None: it is no block."""
    priority: int = 0
    """With which it was asked for: it waits with the same to grow."""
    backing: Backing | None = None
    """None: as much as was asked for, from the first byte on, and it may not become more."""
