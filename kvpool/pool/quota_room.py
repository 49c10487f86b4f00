"""Room for new caches where there are quotas: by the rules of :mod:`kvpool.pool.quota`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from kvpool.pool.clearance import Clearance
from kvpool.pool.client import Client
from kvpool.pool.device import Device
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model
from kvpool.pool.quota import Account, Owner
from kvpool.pool.reclaim import Reclaim
from kvpool.pool.requests import MOST_SHORTAGES
from kvpool.pool.spread import spread


class QuotaRoom:
    """Places and evicts within quotas; the methods are those of :class:`~kvpool.pool.room.Room`.

    Parameters
    ----------
    ledger
        The pool's books.
    clearance
        Lets go what has to.
    """

    def __init__(self, ledger: Ledger, clearance: Clearance) -> None:
        self._ledger = ledger
        self._clearance = clearance
        self.at_limit: Owner | None = None
        """Whose limit left no room when it was last looked for; None: memory was short."""

    def find(
        self, client: Client, model: Model, size_bytes: int, max_size_bytes: int, shortages: Mapping[int, int],
        avoided: Collection[int],
    ) -> tuple[Device, list[int]] | None:  # fmt: skip
        """Return a device with room and the ids evicted for it there, or None."""
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

    def find_more(self, device: Device, model: Model, need_bytes: int, times: int) -> list[int] | None:
        """Return the ids evicted on a device so that a model has ``need_bytes`` more there; None: there is no room."""
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

    def find_on(self, device: Device, model: Model, need_bytes: int, count: int) -> tuple[int, list[int]] | None:
        """Return how many of ``count`` caches fit on a device, and the ids evicted there for them; None: none."""
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
        evicted = self._clearance.remove(decided.going)
        return [
            (ledger.devices[number], placed, evicted.pop(number, []))
            for number, placed in Counter(decided.devices).items()
        ]

    def evict_for(self, model: Model, device: Device, need_bytes: int, short_bytes: int) -> list[int]:
        """Evict on a device for caches of a model that are in the books already, with ``need_bytes``."""
        quotas = self._ledger.quotas
        account = quotas.account(model.space)
        entitled = quotas.entitled_bytes(account, device.host, need_bytes) >= need_bytes
        plan = self._plan(account, entitled)
        plan.on(device, short_bytes)
        return self._carry_out(plan, device)

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
                    plan = self._plan(Account(-1, None, None, shared), False)
                    if plan.own(owner, over_bytes):
                        break
                self._carry_out(plan, None)
            if owner.held_bytes <= owner.limit_bytes:
                quotas.draining.discard(owner)

    def _allowed(self, plan: Reclaim, account: Account, host: str, size_bytes: int) -> bool:
        """Whether quotas let an account lease so much more, once what is gathered for its limits has gone."""
        quotas = self._ledger.quotas
        for owner in account.owners:
            over_bytes = owner.held_bytes - sum(plan.found.values()) + size_bytes - owner.limit_bytes
            if over_bytes > 0 and not plan.own(owner, over_bytes):
                self.at_limit = owner
                return False
        return quotas.leasable_bytes(account, host) >= size_bytes

    def _reclaim(self, account: Account, host: str, size_bytes: int) -> Reclaim:
        return self._plan(account, self._ledger.quotas.entitled_bytes(account, host) >= size_bytes)

    def _plan(self, account: Account, entitled: bool) -> Reclaim:
        return Reclaim(self._ledger, account, entitled, self._clearance.sheltered_in)

    def _carry_out(self, plan: Reclaim, device: Device | None) -> list[int]:
        """Let what is gathered go; returns the ids of those on a device, which go with the next operation there."""
        return self._clearance.let_go(plan.rows, device)
