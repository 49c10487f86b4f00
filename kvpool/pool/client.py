"""A client of the pool, and what it has to write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


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


class Writer(NamedTuple):
    """Who writes a cache that is not sealed yet: the only client that may seal it."""

    client: str
    born: int
    """How many invalidations there had been when it was asked for."""
    planned: bytes | None
    """Hash of the block that it was asked for; None: it is no block."""
