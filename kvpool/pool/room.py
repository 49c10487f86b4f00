"""Room for new caches: on which device, and what goes there for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from kvpool.cache.chains import deepest_first, depths, with_ancestors, with_descendants
from kvpool.cache.table import KEYED
from kvpool.errors import CapacityError
from kvpool.pool.below import Below
from kvpool.pool.client import Client
from kvpool.pool.device import Device
from kvpool.pool.fanout import nothing_more
from kvpool.pool.leases import PINNER
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model
from kvpool.pool.quota import Account, Owner
from kvpool.pool.reclaim import Reclaim
from kvpool.pool.requests import MOST_SHORTAGES, CacheRequest
from kvpool.pool.spread import spread
from kvpool.sizes import format_size


class Room:
    """Places and evicts, by the books.

    Parameters
    ----------
    ledger
        The pool's books.
    below
        Where evicted content goes.
    """

    def __init__(self, ledger: Ledger, below: Below) -> None:
        self._ledger = ledger
        self._below = below
        self.news = 0
        """How often room came free so far."""
        self.changed = False
        """It came free in a decision on somebody else, and may be enough for who waits."""
        self.at_limit: Owner | None = None
        """Whose limit left no room when it was last looked for; None: memory was short."""

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
            return self._find_within_quotas(client, model, size_bytes, max_size_bytes, shortages, avoided)
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
            evicted = self.evict(device, short_bytes, 0 if times else short_bytes)
            if evicted:
                return device, evicted
        return None

    def _find_within_quotas(
        self, client: Client, model: Model, size_bytes: int, max_size_bytes: int, shortages: Mapping[int, int],
        avoided: Collection[int],
    ) -> tuple[Device, list[int]] | None:  # fmt: skip
        """:meth:`find` by the rules of :mod:`kvpool.pool.quota`."""
        ledger = self._ledger
        quotas = ledger.quotas
        self.at_limit = None
        account = quotas.account(model.space)
        devices = [ledger.devices[n] for n in client.devices if ledger.devices[n].lost is None]
        needs = {device.number: device.footprint_bytes(size_bytes, max_size_bytes) for device in devices}
        if not needs:
            return None
        # Devices of one host have pages of one size: where not, the largest footprint is what quotas must allow.
        most_bytes = max(needs.values())
        headroom, owner = quotas.headroom(account)
        if owner is not None and headroom + quotas.evictable_bytes(owner) < most_bytes:
            self.at_limit = owner
            return None
        plan = self._reclaim(account, client.host, most_bytes)
        if not self._allowed(plan, account, client.host, most_bytes):
            return None
        fitting = []
        for device in devices:
            free_bytes = max(ledger.free_bytes(device), 0) + plan.found.get(device.number, 0)
            fits = free_bytes >= needs[device.number] and device.number not in shortages
            fits = fits and device.number not in avoided
            fitting.append(free_bytes if fits else -1)
        chosen = ledger.placement.choose(fitting, size_bytes)
        if chosen >= 0:
            return devices[chosen], self._carry_out(plan, devices[chosen])
        for device in sorted(devices, key=lambda device: plan.worth(device.number)):
            times = shortages.get(device.number, 0)
            if times > MOST_SHORTAGES or device.number in avoided:
                continue
            going = plan.copy()
            if times:
                enough = going.on(device, needs[device.number] << times) > 0
            else:
                there_bytes = max(ledger.free_bytes(device), 0) + going.found.get(device.number, 0)
                short_bytes = needs[device.number] - there_bytes
                enough = (
                    ledger.index.evictable_bytes[device.number] >= short_bytes
                    and going.on(device, short_bytes) >= short_bytes
                )
            if enough:
                return device, self._carry_out(going, device)
        return None

    def _reclaim(self, account: Account, host: str, size_bytes: int) -> Reclaim:
        entitled = self._ledger.quotas.entitled_bytes(account, host) >= size_bytes
        return Reclaim(self._ledger, account, entitled, self._sheltered_in)

    def _allowed(self, plan: Reclaim, account: Account, host: str, size_bytes: int) -> bool:
        """Whether quotas let an account lease so much more, once what is gathered for its limits has gone."""
        quotas = self._ledger.quotas
        for owner in account.owners:
            over_bytes = owner.held_bytes - sum(plan.found.values()) + size_bytes - owner.limit_bytes
            if over_bytes > 0 and not plan.own(owner, over_bytes):
                self.at_limit = owner
                return False
        return quotas.leasable_bytes(account, host) >= size_bytes

    def _carry_out(self, plan: Reclaim, device: Device | None) -> list[int]:
        """Let what is gathered go; returns the ids of those on a device, which goes with the next operation there."""
        if not plan.found:
            return []
        self.news += 1
        self.changed = True
        return self._removed_for(device, plan.rows)

    def _find_more_within_quotas(self, device: Device, model: Model, need_bytes: int, times: int) -> list[int] | None:
        ledger = self._ledger
        self.at_limit = None
        account = ledger.quotas.account(model.space)
        headroom, owner = ledger.quotas.headroom(account)
        if owner is not None and headroom + ledger.quotas.evictable_bytes(owner) < need_bytes:
            self.at_limit = owner
            return None
        plan = self._reclaim(account, device.host, need_bytes)
        if times > MOST_SHORTAGES or not self._allowed(plan, account, device.host, need_bytes):
            return None
        if times:
            enough = plan.on(device, need_bytes << times) > 0
        else:
            short_bytes = need_bytes - max(ledger.free_bytes(device), 0) - plan.found.get(device.number, 0)
            enough = short_bytes <= 0 or plan.on(device, short_bytes) >= short_bytes
        return self._carry_out(plan, device) if enough else None

    def _find_on_within_quotas(
        self, device: Device, model: Model, need_bytes: int, count: int
    ) -> tuple[int, list[int]] | None:
        ledger = self._ledger
        self.at_limit = None
        account = ledger.quotas.account(model.space)
        # Who asks within its guarantee may take more: so those that do are decided on apart from those behind them.
        entitled = ledger.quotas.entitled_bytes(account, device.host) // need_bytes
        most = min(count, entitled) if entitled else count
        fitting = min(most, ledger.quotas.leasable_bytes(account, device.host) // need_bytes)
        while fitting > 0:
            plan = self._reclaim(account, device.host, fitting * need_bytes)
            if self._allowed(plan, account, device.host, fitting * need_bytes):
                free_bytes = max(ledger.free_bytes(device), 0) + plan.found.get(device.number, 0)
                short_bytes = fitting * need_bytes - free_bytes
                if short_bytes > 0:
                    free_bytes += plan.on(device, short_bytes)
                if free_bytes >= fitting * need_bytes:
                    return fitting, self._carry_out(plan, device)
                fitting = free_bytes // need_bytes  # decided on anew, so that nothing goes that makes room for nobody
                continue
            if self.at_limit is None:
                return None
            rest = max(int(self.at_limit.limit_bytes - self.at_limit.held_bytes + sum(plan.found.values())), 0)
            fitting = min(fitting - 1, rest // need_bytes)
        return None

    def drain(self) -> None:
        """Evict what is above limits that were lowered, as far as nobody holds it."""
        quotas = self._ledger.quotas
        for owner in list(quotas.draining):
            over_bytes = owner.held_bytes - owner.limit_bytes
            # To look for what can go takes as long as there are caches, and this is asked at every event.
            if over_bytes > 0 and owner.drained != owner.given_back and quotas.evictable_bytes(owner) > 0:
                owner.drained = owner.given_back
                # What the tenant's models are guaranteed goes last.
                for shared in ((owner,), tuple(quotas.owners(owner.tenant))):
                    plan = Reclaim(self._ledger, Account(-1, None, None, shared), False, self._sheltered_in)
                    if plan.own(owner, over_bytes):
                        break
                self._carry_out(plan, None)
            if owner.held_bytes <= owner.limit_bytes:
                quotas.draining.discard(owner)

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

        Empty if that takes a closer look: see :meth:`find`.
        """
        ledger = self._ledger
        devices = [ledger.devices[number] for number in client.devices if ledger.devices[number].lost is None]
        needs = {device.footprint_bytes(size_bytes, max_size_bytes) for device in devices}
        if len(needs) != 1:
            return []
        decided = spread(ledger, ledger.quotas.account(model.space), devices, needs.pop(), count)
        if decided.going:
            self.news += 1
            self.changed = True
        evicted = self._remove(decided.going)
        return [
            (ledger.devices[number], placed, evicted.pop(number, []))
            for number, placed in Counter(decided.devices).items()
        ]

    def find_on(
        self, device: Device, model: Model, size_bytes: int, max_size_bytes: int, count: int
    ) -> tuple[int, list[int]] | None:
        """Return how many of ``count`` caches of one size go to a device, and the ids evicted there for them."""
        ledger = self._ledger
        need_bytes = device.footprint_bytes(size_bytes, max_size_bytes)
        if ledger.quotas.active:
            return self._find_on_within_quotas(device, model, need_bytes, count)
        free_bytes = max(ledger.free_bytes(device), 0)
        evicted: list[int] = []
        if free_bytes < need_bytes:
            count = min(count, (free_bytes + ledger.index.evictable_bytes[device.number]) // need_bytes)
            if not count:
                return None
            evicted = self.evict(device, count * need_bytes - free_bytes, need_bytes - free_bytes)
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
            return self._find_more_within_quotas(device, model, need_bytes, times)
        free_bytes = max(ledger.free_bytes(device), 0)
        if not times and free_bytes >= need_bytes:
            return []
        short_bytes = need_bytes << times if times else need_bytes - free_bytes
        if times > MOST_SHORTAGES or (not times and ledger.index.evictable_bytes[device.number] < short_bytes):
            return None
        return self.evict(device, short_bytes, 0 if times else short_bytes) or None

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
        partitions = [partition for device in devices for partition in ledger.index.partitions_of(device.number)]
        return ledger.policy.admit(model.space, hashes, rows, partitions, size_bytes, wanted - free, now)

    def evict_for(self, model: Model, device: Device, need_bytes: int, short_bytes: int) -> list[int]:
        """:meth:`evict` for caches of a model that are in the books already, with ``need_bytes``: as quotas let it."""
        quotas = self._ledger.quotas
        if not quotas.active:
            return self.evict(device, short_bytes)
        account = quotas.account(model.space)
        entitled = quotas.entitled_bytes(account, device.host, need_bytes) >= need_bytes
        plan = Reclaim(self._ledger, account, entitled, self._sheltered_in)
        plan.on(device, short_bytes)
        return self._carry_out(plan, device)

    def evict(self, device: Device, short_bytes: int, least_bytes: int = 0) -> list[int]:
        """Take the caches worth least off a device's books until ``short_bytes`` are found; returns their ids.

        Where less than ``least_bytes`` would be found, nothing goes.
        """
        index = self._ledger.index
        rows: list[int] = []
        found_bytes = 0
        for row in index.victims(device.number):
            if found_bytes >= short_bytes:
                break
            found_bytes += index.size_bytes[row]
            rows.append(row)
        if found_bytes < short_bytes and index.evictable_bytes[device.number] > found_bytes:
            rows, found_bytes = self._sheltered(device.number, short_bytes)
        if found_bytes < least_bytes or not rows:
            return []
        self.news += 1
        self.changed = True  # elsewhere, too: what sheltered a parent on another device is gone
        return self._removed_for(device, rows)

    def _sheltered(self, number: int, short_bytes: int) -> tuple[list[int], int]:
        """Return what can go from a device with what hangs on it elsewhere, children first, and its bytes there.

        For where victims run out because the children of the rest lie on other devices. Policies rank no cache before
        its children, so the longest untouched goes first, of these the deepest. What somebody holds, and all that lies
        before it in its chain, stays. Takes 20 ms where there are 200,000 caches.
        """
        index = self._ledger.index
        partitions = index.partitions_of(number)
        going = np.array(self._sheltered_in(partitions, short_bytes, ()), np.int64)
        sizes, devices = np.frombuffer(index.size_bytes, np.int64), np.frombuffer(index.device, np.int32)
        return going.tolist(), int(sizes[going[devices[going] == number]].sum())

    def _sheltered_in(self, partitions: Sequence[int], short_bytes: int, but: Sequence[int]) -> list[int]:
        """Return the rows of :meth:`_sheltered` in some partitions, without those that go anyway."""
        index = self._ledger.index
        pins, where = np.frombuffer(index.pins, np.uint32), np.frombuffer(index.partition, np.int32)
        flags, sizes = np.frombuffer(index.flags, np.uint8), np.frombuffer(index.size_bytes, np.int64)
        idle = (flags & KEYED != 0) & np.isin(where, partitions)
        idle[with_ancestors(index, np.flatnonzero((flags != 0) & (pins > 0)))] = False
        idle[list(but)] = False
        rows = np.flatnonzero(idle)
        rows = rows[np.lexsort((-depths(index)[rows], np.frombuffer(index.last_accessed, np.float64)[rows]))]
        enough = int(np.searchsorted(np.cumsum(sizes[rows]), short_bytes)) + 1
        going = deepest_first(index, with_descendants(index, rows[:enough]))
        chosen: list[int] = going[~np.isin(going, list(but))].tolist() if but else going.tolist()
        return chosen

    def _removed_for(self, device: Device | None, rows: list[int]) -> list[int]:
        """Take caches off the books; returns the ids of those on a device. Those of others are evicted there."""
        by_device = self._remove(rows)
        here = [] if device is None else by_device.pop(device.number, [])
        for number, ids in by_device.items():
            self._ledger.send(number, ("evict", ids), nothing_more)
        return here

    def _remove(self, rows: list[int]) -> dict[int, list[int]]:
        """Take caches off the books, children before parents; returns by device the ids to be evicted there."""
        if not rows:
            return {}
        ledger = self._ledger
        index = ledger.index
        by_device: dict[int, list[int]] = {}
        void: dict[int, list[int]] = {}
        devices, has_void = index.device, index.has_void
        for row in rows:
            cache_id = index.id_of(row)
            by_device.setdefault(devices[row], []).append(cache_id)
            if has_void and index.is_void(row):
                void.setdefault(devices[row], []).append(cache_id)
        self._below.lower(rows)
        ledger.count_evictions(rows, "capacity")
        index.remove_all(rows)
        for device, ids in void.items():  # zeroed by this, ahead of the operation that evicts them for somebody
            ledger.send(device, ("void", ids, PINNER), nothing_more)
        return by_device

    def capacity_error(self, request: CacheRequest, why: str) -> CapacityError:
        """Return the error that explains with all figures why a request was not met."""
        ledger = self._ledger
        devices = [ledger.devices[n] for n in request.devices if ledger.devices[n].lost is None]
        free = {device.number: max(ledger.free_bytes(device), 0) for device in devices}
        evictable = {device.number: ledger.index.evictable_bytes[device.number] for device in devices}
        pinned = {d.number: ledger.index.resident_bytes[d.number] - evictable[d.number] for d in devices}
        zombie_bytes = sum(device.zombie_bytes for device in devices)
        # Free bytes may lie in holes, each of them too small: then the device knows better.
        fitted = {number: min(free[number] + evictable[number], request.fits.get(number, math.inf)) for number in free}
        largest = int(max(fitted.values(), default=0))
        by_quota, quota_details = self._by_quota(request, sum(free.values()) + sum(evictable.values()))
        return CapacityError(
            f"asked for {format_size(request.size_bytes)} and {why}: {by_quota}"
            f"{format_size(sum(free.values()))} free and {format_size(sum(evictable.values()))} evictable on "
            f"{len(devices)} device{'' if len(devices) == 1 else 's'}, "
            f"{format_size(sum(pinned.values()))} pinned by leases, {format_size(zombie_bytes)} zombie; at most "
            f"{format_size(largest)} would have fitted: release leases, wait longer (timeout_s), or add memory",
            asked_bytes=request.size_bytes,
            free_bytes=sum(free.values()),
            evictable_bytes=sum(evictable.values()),
            pinned_bytes=sum(pinned.values()),
            zombie_bytes=zombie_bytes,
            largest_bytes=largest,
            **quota_details,
        )

    def _by_quota(self, request: CacheRequest, at_hand_bytes: int) -> tuple[str, dict[str, Any]]:
        """Say what quotas have to do with a request that was not met, if anything, with the figures.

        ``at_hand_bytes``: what is free or evictable where it could have been met.
        """
        quotas = self._ledger.quotas
        if not quotas.active:
            return "", {}
        account, host = quotas.account(request.model.space), request.client.host
        owner = request.at_limit
        if owner is not None and owner.limit_bytes < math.inf:  # else it was lifted since the request was last tried
            details = {"limit_bytes": int(owner.limit_bytes), "held_bytes": owner.held_bytes}
            return f"{quotas.why(owner)}. In all ", details
        leasable = quotas.leasable_bytes(account, host)
        if leasable >= min(request.size_bytes, at_hand_bytes):
            return "", {}  # it is leases that are in the way
        return (
            f"what others are guaranteed leaves {format_size(leasable)} more to lease to model "
            f"{request.model.name!r}; of its own guarantee {format_size(quotas.entitled_bytes(account, host))} are "
            "left (see 'kvpool quota'). In all "
        ), {"leasable_bytes": leasable}
