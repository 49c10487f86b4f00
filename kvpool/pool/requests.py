"""Requests for memory on their way: what was asked, where it was planned, what has come so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvpool.memory.tickets import Ticket
from kvpool.pool.client import Client
from kvpool.pool.instructions import Answer, Batch
from kvpool.pool.model import Model


@dataclass(slots=True, eq=False)
class CacheRequest:
    """One asked-for cache, on its way to an answer or waiting."""

    client: Client
    model: Model
    sequence: int
    size_bytes: int
    max_size_bytes: int
    timeout_s: float
    deadline: float
    batch: Batch | None
    item: int
    trace: Any
    asked: float
    ticket: Ticket | None = None
    queued: float = 0.0
    """When it got its ticket."""
    shortages: dict[int, int] = field(default_factory=dict)
    """How often each device had less room than the books say, since the request was last tried anew."""
    news: int = 0
    """How often room had come free when it was last tried anew."""
    born: int = 0
    """How many invalidations there had been when it was asked for."""


@dataclass(slots=True, eq=False)
class BlocksRequest:
    """New blocks of one chain: the rows made for them, and their places as the devices answer."""

    client: Client
    sequence: int
    model: Model
    batch: Batch
    item: int
    trace: Any
    resident: int
    ids: list[int]
    devices: list[int]
    places: list[Any]
    open_operations: int = 0
    failure: Answer | None = None
    """The error of a device that could not even look for room."""


class Orders:
    """What the devices will be asked for: one operation for each client, device and size.

    The operations of one device leave in the order of their making, and the first carries all its evictions: a later
    request may have been planned into room that an earlier one's eviction made.
    """

    def __init__(self) -> None:
        self.evict: dict[int, list[int]] = {}
        self.groups: dict[tuple[str, int, int, int], tuple[list[int], list[CacheRequest]]] = {}

    def put(self, device: int, evict: list[int], cache_id: int, request: CacheRequest) -> None:
        """Add a request that was given room on a device, and what goes there for it."""
        if evict:
            self.evict.setdefault(device, []).extend(evict)
        key = (request.client.id, device, request.size_bytes, request.max_size_bytes)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = ([], [])
        group[0].append(cache_id)
        group[1].append(request)
