"""Room for new caches: on which device, and what goes there for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvpool.pool.clearance import Clearance
from kvpool.pool.client import Client
from kvpool.pool.device import Device
from kvpool.pool.fanout import nothing_more
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model
from kvpool.pool.quota import Owner
from kvpool.pool.quota_room import QuotaRoom
from kvpool.pool.requests import MOST_BLOCK_SHORTAGES, MOST_SHORTAGES
from kvpool.pool.stepwise import wants_memory


class Room:
    """Places and evicts, by the books.

    Parameters
    ----------
    ledger
        The pool's books.
    clearance
        Lets go what has to.
    """

    def __init__(self, ledger: Ledger, clearance: Clearance) -> None:
        self._ledger = ledger
        self.clearance = clearance
        self._within_quotas = QuotaRoom(ledger, clearance)

    @property
    def at_limit(self) -> Owner | None:
        """Whose limit left no room when it was last looked for; None: memory was short."""
        return self._within_quotas.at_limit

    def find(
        self, client: Client, model: Model, size_bytes: int, max_size_bytes: int, shortages: Mapping[int, int],
        avoided: Collection[int] = (),
    ) -> tuple[Device, list[int]] | None:  # fmt: skip
        """Return a device with room and the ids evicted there for it, or None; never one of those ``avoided``.

        ``shortages`` tells how often each device had less room than the books say. Such a device is not believed:
        others come first, then room is made there by eviction, twice as much each time, within bounds: what is short
        may be zombies that are about to go, and evicting more would not free them.
        """
        ledger = self._ledger
        if ledger.quotas.active:
            return self._within_quotas.find(client, model, size_bytes, max_size_bytes, shortages, avoided)
        devices = [ledger.devices[number] for number in client.devices]
        fitting = []
        for device in devices:
            free_bytes = ledger.free_bytes(device)
            fits = free_bytes >= device.footprint_bytes(size_bytes, max_size_bytes)
            fits = fits and device.number not in avoided
            fitting.append(free_bytes if fits and device.number not in shortages else -1)
        chosen = ledger.placement.choose(fitting, size_bytes)
        if chosen >= 0:
            return devices[chosen], []
        worth_least = ledger.policy.victim()
        if worth_least < 0:
            return None
        first = ledger.index.device[worth_least]
        for device in sorted(devices, key=lambda device: device.number != first):
            if device.lost is not None or device.number in avoided:
                continue
            need_bytes = device.footprint_bytes(size_bytes, max_size_bytes)
            times = shortages.get(device.number, 0)
            if times > MOST_SHORTAGES:
                continue
            short_bytes = need_bytes << times if times else need_bytes - max(ledger.free_bytes(device), 0)
            if not times and ledger.index.evictable_bytes[device.number] < short_bytes:
                continue
            evicted = self.clearance.evict(device, short_bytes, 0 if times else short_bytes)
            if evicted:
                return device, evicted
        return None

    def find_run(
        self, client: Client, model: Model, size_bytes: int, max_size_bytes: int, count: int,
        avoided: Collection[int] = (),
    ) -> tuple[Device, int, list[int]] | None:  # fmt: skip
        """Return where the first of ``count`` caches of one size go: a device, how many, the ids evicted for it.

        The same as :meth:`find` for one after the other, but where there is only one device it is decided at once.
        """
        if len(client.devices) > 1:
            found = self.find(client, model, size_bytes, max_size_bytes, {}, avoided)
            return None if found is None else (found[0], 1, found[1])
        device = self._ledger.devices[client.devices[0]]
        if device.lost is not None or device.number in avoided:
            return None
        there = self.find_on(device, model, size_bytes, max_size_bytes, count)
        return None if there is None else (device, *there)

    def find_spread(
        self, client: Client, model: Model, size_bytes: int, max_size_bytes: int, count: int
    ) -> list[tuple[Device, int, list[int]]]:
        """Return where the first of ``count`` caches go within quotas: devices, how many there, the ids evicted there.

        Empty if that takes a closer look: see :meth:`find`. (Without quotas a closer look takes as long.)
        """
        if not self._ledger.quotas.active:
            return []
        return self._within_quotas.find_spread(client, model, size_bytes, max_size_bytes, count)

    def find_on(
        self, device: Device, model: Model, size_bytes: int, max_size_bytes: int, count: int
    ) -> tuple[int, list[int]] | None:
        """Return how many of ``count`` caches of one size go to a device, and the ids evicted there for them."""
        ledger = self._ledger
        need_bytes = device.footprint_bytes(size_bytes, max_size_bytes)
        if ledger.quotas.active:
            return self._within_quotas.find_on(device, model, need_bytes, count)
        free_bytes = max(ledger.free_bytes(device), 0)
        evicted: list[int] = []
        if free_bytes < need_bytes:
            count = min(count, (free_bytes + ledger.index.evictable_bytes[device.number]) // need_bytes)
            if not count:
                return None
            evicted = self.clearance.evict(device, count * need_bytes - free_bytes, need_bytes - free_bytes)
            free_bytes = ledger.free_bytes(device)
        fitting = min(count, free_bytes // need_bytes)
        if fitting > 0:
            return fitting, evicted
        if evicted:  # zombies take the room that the books say there is; these have left the books all the same
            ledger.send(device.number, ("evict", evicted), nothing_more)
        return None

    def find_more(self, device: Device, model: Model, need_bytes: int, times: int) -> list[int] | None:
        """Return the ids evicted on a device so that a model has ``need_bytes`` more there; None: there is no room.

        ``times``: how often the device had less room than the books say, see :meth:`find`.
        """
        ledger = self._ledger
        if not need_bytes:  # a device that is short of it all the same is not asked for ever
            return None if times > MOST_SHORTAGES else []
        if ledger.quotas.active:
            return self._within_quotas.find_more(device, model, need_bytes, times)
        free_bytes = max(ledger.free_bytes(device), 0)
        if not times and free_bytes >= need_bytes:
            return []
        short_bytes = need_bytes << times if times else need_bytes - free_bytes
        if times > MOST_SHORTAGES or (not times and ledger.index.evictable_bytes[device.number] < short_bytes):
            return None
        return self.clearance.evict(device, short_bytes, 0 if times else short_bytes) or None

    def admit(self, client: Client, model: Model, hashes: Sequence[bytes], rows: Sequence[int], now: float) -> int:
        """Return how many blocks of a chain behind its leading run ``rows`` are worth the room they take."""
        ledger = self._ledger
        wanted = len(hashes) - len(rows)
        size_bytes = free = 0
        devices = [ledger.devices[number] for number in client.devices if ledger.devices[number].lost is None]
        for device in devices:
            size_bytes = device.footprint_bytes(model.block_bytes or 0, model.block_bytes or 0)
            free += max(ledger.free_bytes(device), 0) // size_bytes
        if ledger.quotas.active and size_bytes:
            headroom, _ = ledger.quotas.headroom(ledger.quotas.account(model.space))
            free = int(min(free, max(headroom, 0) // size_bytes))
        if wanted <= free or any(device.has_lower for device in devices):
            return wanted  # with tiers below, what a policy would not store has its place there
        partitions = [partition for device in devices for partition in ledger.index.partitions.of(device.number)]
        return ledger.policy.admit(model.space, hashes, rows, partitions, size_bytes, wanted - free, now)

    def evict_for(self, model: Model, device: Device, need_bytes: int, short_bytes: int) -> list[int]:
        """Evict on a device for caches of a model that are in the books already, with ``need_bytes``: as quotas let it.

        Returns the ids of what went, ``short_bytes`` of it or as much as there is.
        """
        if self._ledger.quotas.active:
            return self._within_quotas.evict_for(model, device, need_bytes, short_bytes)
        return self.clearance.evict(device, short_bytes)

    def make_up_for(
        self, shortage: Mapping[str, Any] | None, model: Model, device: Device, size_bytes: int, count: int, tries: int
    ) -> list[int]:
        """Return the ids evicted for blocks in the books for which a device had less room than these say; none: no use.

        Where its last free bytes are holes, more has to go: twice as much each time, within bounds. Blocks, new or from
        below, never wait for memory.

        Parameters
        ----------
        shortage
            What it answered.
        size_bytes, count
            Of those that it did not place.
        tries
            How often this was done for them before.
        """
        if shortage is None or not wants_memory(shortage) or tries >= MOST_BLOCK_SHORTAGES:
            return []
        need_bytes = count * device.footprint_bytes(size_bytes, size_bytes)
        return self.evict_for(model, device, need_bytes, need_bytes << tries)

    def drain(self) -> None:
        """Evict what is above limits that were lowered, as far as nobody holds it."""
        self._within_quotas.drain()
