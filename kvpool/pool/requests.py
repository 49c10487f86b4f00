"""Requests for memory on their way: what was asked, where it was planned, what has come so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from kvpool.memory.extents import Extents
from kvpool.memory.tickets import Ticket
from kvpool.pool.client import Client
from kvpool.pool.instructions import Answer, Batch
from kvpool.pool.model import Model
from kvpool.pool.quota import Owner

MOST_SHORTAGES = 5
"""After so many answers that a device is short, a request stops evicting there until it is tried anew."""

MOST_BLOCK_SHORTAGES = 3
"""How often more is evicted for blocks, new or from below, on a device that is short: they never wait for memory."""

MOST_IN_VAIN = 3
"""It stops sooner, and begins no more while it waits, once so much went for nothing: what is leased is in the way.

(Else each release would let a request that waits evict many times what it needs, and nothing would be cached for long.)
"""


class Change(NamedTuple):
    """What is to become of what is backed of a cache."""

    cache_id: int
    device: int
    kind: str
    """``"resize"``, ``"back"`` or ``"unback"``."""
    asked: Extents
    """The parts that are meant; of a resize, all that is to be backed."""


Shortage: TypeAlias = Owner | str | int
"""What somebody waits for: room below an owner's limit, memory of a host (its name) or of a device (its number)."""


@dataclass(slots=True, eq=False)
class CacheRequest:
    """One asked-for cache, or change of one, on its way to an answer or waiting.

    Of a change, ``size_bytes`` is what it needs beyond what the cache has.
    """

    client: Client
    model: Model
    sequence: int
    size_bytes: int
    max_size_bytes: int
    timeout_s: float
    deadline: float
    batch: Batch | None
    item: int
    priority: int
    trace: Any
    asked: float
    ticket: Ticket | None = None
    queued: float = 0.0
    """When it got its ticket."""
    shortages: dict[int, int] = field(default_factory=dict)
    """How often each device had less room than the books say, since the request was last tried anew."""
    fits: dict[int, int] = field(default_factory=dict)
    """The largest size for which each such device last said that it had room."""
    told: dict[int, int] = field(default_factory=dict)
    """The largest size for which each device had room when it was last short,"""
    in_vain: dict[int, int] = field(default_factory=dict)
    """and how many answers in a row had said the same."""
    news: int = 0
    """How often room had come free when it was last tried anew."""
    born: int = 0
    """How many invalidations there had been when it was asked for."""
    refused: int = -1
    """How often room had come free when a device last had none for it after all."""
    short_of: Shortage | None = None
    """What it lacked when it was last tried: memory of a host or a device, or room below somebody's limit."""
    avoided: frozenset[int] = frozenset()
    """Devices that a new cache leaves to those before it, who wait to grow there."""
    change: Change | None = None

    def note_shortage(self, device: int, largest_bytes: int) -> None:
        """Note that a device had less room than the books say, and what of use to this one it had room for."""
        same = self.told.get(device) == largest_bytes
        self.in_vain[device] = self.in_vain[device] + 1 if same else 0
        self.told[device] = largest_bytes
        self.shortages[device] = self.shortages.get(device, 0) + 1
        if self.in_vain[device] >= MOST_IN_VAIN:
            self.shortages[device] = MOST_SHORTAGES + 1

    @property
    def at_limit(self) -> Owner | None:
        """Whose limit it waits for, if for any."""
        return self.short_of if isinstance(self.short_of, Owner) else None

    @property
    def place(self) -> str | int:
        """Where it waits for memory: a new cache on any device of its host, a change on its own."""
        return self.client.host if self.change is None else self.change.device

    @property
    def devices(self) -> list[int]:
        """Numbers of the devices that could meet it."""
        return self.client.devices if self.change is None else [self.change.device]


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
        self.changes: list[tuple[Change, CacheRequest]] = []

    def put(self, device: int, evict: list[int], ids: Sequence[int], requests: Sequence[CacheRequest]) -> None:
        """Add requests for the same that were given room on a device, and what goes there for them."""
        if evict:
            self.evict.setdefault(device, []).extend(evict)
        first = requests[0]
        key = (first.client.id, device, first.size_bytes, first.max_size_bytes)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = ([], [])
        group[0].extend(ids)
        group[1].extend(requests)

    def put_change(self, evict: list[int], change: Change, request: CacheRequest) -> None:
        """Add a change that was given room, and what goes for it. Changes leave behind the new caches."""
        if evict:
            self.evict.setdefault(change.device, []).extend(evict)
        self.changes.append((change, request))
