"""What a tenant, or a model of it, is guaranteed, and the most it may hold.

Bytes are those that caches take of their devices. An *owner* is a tenant or a model that has a quota; a model's name
stands for all its revisions, adapters and shards. Caches are charged to *accounts*: one for each model that has a
quota, one for the other models of each tenant that has one, and one for all else. The rules (``docs/quotas.md`` has
them in the words of a user):

*Limit.* What an owner holds, cached or leased, never exceeds its limit. It evicts its own first.

*Guarantee.* Cached bytes may lie anywhere, also in what is guaranteed to others: they are evicted when the owner asks.
Leases cannot be ended, so they may not. On each host, whose clients can use nothing else, a guarantee counts in
proportion to the host's memory, and every tenant needs::

    need = max(guaranteed to the tenant, sum over its accounts of max(guaranteed, leased))

A lease is given if it raises no need, which is called *entitled*, or if all needs then fit the host. So at any time
each owner gets its guarantee by evictions alone.

*Split.* If all guarantees together (those of a tenant's models within its own) exceed the memory there is, each counts
for ``guaranteed * capacity / sum``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from kvpool.amount import NOTHING, Amount
from kvpool.cache.index import CacheIndex
from kvpool.errors import InvalidRequestError, ensure
from kvpool.pool.device import Device
from kvpool.sizes import format_size

_MOST_TAKEN_AWAY = 10_000
"""Revisions that are kept of quotas that were taken away from names that nobody has registered, the latest.

A word that comes late or twice must find them, for as long as it can be on its way: minutes. Names may be without end
(a controller's tenants that come and go), so what is kept of them may not be. Older ones are forgotten: to be taken for
new, a word would have to stay out until so many other quotas have been taken away.
"""

LAST_REVISION = (1 << 63) - 1
"""A signed number of 64 bits, as databases and other languages have it."""


@dataclass(slots=True, eq=False)
class Owner:
    """A tenant or a model that has a quota."""

    tenant: str
    model: str | None
    """Its name; None: the tenant as a whole."""
    guaranteed: Amount = NOTHING
    limit: Amount | None = None
    revision: int = 0
    """0: by a model's registration alone, which gives way to anybody's word."""
    guaranteed_bytes: int = 0
    """What it comes to now, after the split."""
    limit_bytes: float = inf
    held_bytes: int = 0
    guaranteed_at: dict[str, int] = field(default_factory=dict)
    """By host."""
    held_at: dict[str, int] = field(default_factory=dict)
    given_back: int = 0
    """How often something of it was given back by its last holder, or left: only then more of it can go than before."""
    drained: int = -1
    """As often when it was last drained."""

    @property
    def has_none(self) -> bool:
        """Whether it is guaranteed nothing and has no limit."""
        return self.guaranteed.is_nothing and self.limit is None

    def excess_at(self, host: str) -> int:
        """Return by how much it is over its guarantee on a host."""
        return self.held_at.get(host, 0) - self.guaranteed_at.get(host, 0)

    def __str__(self) -> str:
        return f"tenant {self.tenant!r}" if self.model is None else f"model {self.model!r} of tenant {self.tenant!r}"


@dataclass(slots=True, eq=False)
class Account:
    """What caches are charged to."""

    number: int
    tenant: str | None
    own: Owner | None = None
    """The model's, if it is a model's account."""
    owners: tuple[Owner, ...] = ()
    """All whose quotas count its bytes."""
    leased_at: dict[str, int] = field(default_factory=dict)
    """By host: bytes that cannot be evicted, because somebody holds them."""

    def needed_at(self, host: str, but_bytes: int = 0) -> int:
        """Return what it takes of its tenant's guarantee there, were ``but_bytes`` of it not leased yet."""
        leased = self.leased_at.get(host, 0) - but_bytes
        return leased if self.own is None else max(leased, self.own.guaranteed_at.get(host, 0))


class Quotas:
    """Who may take how much. The meter of the index once there is a quota; costs nothing before.

    Parameters
    ----------
    index
        The pool's caches.
    devices
        The pool's devices.
    """

    def __init__(self, index: CacheIndex, devices: Sequence[Device]) -> None:
        self._index = index
        self._devices = devices
        self._owners: dict[tuple[str, str | None], Owner] = {}
        self._accounts: list[Account] = [Account(0, None)]
        self._by_name: dict[tuple[str, str | None], Account] = {}
        self._spaces: dict[int, tuple[str, str]] = {}
        """By space, the tenant and model for which it was made."""
        self._registered: set[tuple[str, str | None]] = set()
        """Models, and tenants that have some (model None)."""
        self._taken_away: dict[tuple[str, str | None], int] = {}
        """Revisions of those who have no quota any more and are in no other book, the oldest first."""
        self._unused: list[int] = []
        """Numbers of accounts that nothing was ever charged to."""
        self._by_tenant: dict[str, list[Account]] = {}
        self._alive = -1
        self.active = False
        """Whether anybody has a quota."""
        self.reckoned = False
        """Whether limits may have become lower since somebody last looked at who waits for more."""
        self.draining: set[Owner] = set()
        """Those that hold more than a limit that was lowered."""
        self.warning: str | None = None
        """What is to be told of each guarantee, if they cannot all be met."""

    # -- to set ---------------------------------------------------------------------------------------------------

    def register(self, space: int, tenant: str, model: str, limit_bytes: int | None, now: float) -> None:
        """Take in a namespace of a model. A limit that it was registered with holds until somebody sets its quota."""
        self._spaces.setdefault(space, (tenant, model))
        self._registered |= {(tenant, model), (tenant, None)}
        if limit_bytes is not None and not self._revision(tenant, model):
            self._set(tenant, model, NOTHING, Amount(limit_bytes, 0.0, str(limit_bytes)), 0, now)
        elif self.active:
            self._index.set_accounts({space: self._account_named(*self._spaces[space]).number}, now=now)

    def adopt(self, space: int, tenant: str, model: str, limit_bytes: int | None, now: float) -> None:
        """Let another limit hold in place of that of a registration, or none; who has set a quota is heeded first."""
        owner = self._owners.get((tenant, model))
        if limit_bytes is None and owner is not None and not owner.revision:
            self._set(tenant, model, NOTHING, None, 0, now)
        else:
            self.register(space, tenant, model, limit_bytes, now)

    def set(
        self,
        tenant: str,
        model: str | None,
        guaranteed: Amount,
        limit: Amount | None,
        revision: int | None,
        now: float,
    ) -> bool:
        """Set the whole quota of a tenant or a model; False if that revision, or a later one, holds already.

        Raises
        ------
        InvalidRequestError
            If the guarantee is more than the limit, or the revision is no number from 1 to 2**63 - 1. Nothing is
            changed.
        """
        held = self._revision(tenant, model)
        if revision is not None:
            _check_revision(revision)
        if revision is not None and revision <= held:
            return False
        capacity_bytes = sum(self._capacities().values())
        if limit is not None and guaranteed.of(capacity_bytes) > limit.of(capacity_bytes):
            raise InvalidRequestError(
                f"asked to guarantee {guaranteed.text} and to limit to {limit.text}, which is less: give a limit of at "
                "least the guarantee"
            )
        next_revision = min(held + 1, LAST_REVISION)  # who states none is not refused
        self._set(tenant, model, guaranteed, limit, next_revision if revision is None else revision, now)
        self._forget_unused(tenant, model)
        return True

    def _revision(self, tenant: str, model: str | None) -> int:
        known = self._owners.get((tenant, model))
        return self._taken_away.get((tenant, model), 0) if known is None else known.revision

    def _forget_unused(self, tenant: str, model: str | None) -> None:
        """Keep no more than the revision of who has no quota any more and no model.

        (Nothing can be charged to its account then: models stay registered, and what was theirs is charged like them.)
        """
        owner = self._owners[tenant, model]
        if not owner.has_none or (tenant, model) in self._registered:
            return
        del self._owners[tenant, model]
        account = self._by_name.pop((tenant, model))
        self._unused.append(account.number)
        self._by_tenant[tenant].remove(account)
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        if model is None:
            for other in self._by_tenant.get(tenant, ()):
                other.owners = tuple(each for each in other.owners if each is not owner)
        self._taken_away[tenant, model] = owner.revision
        if len(self._taken_away) > _MOST_TAKEN_AWAY:
            del self._taken_away[next(iter(self._taken_away))]

    def _set(
        self, tenant: str, model: str | None, guaranteed: Amount, limit: Amount | None, revision: int, now: float
    ) -> None:
        owner = self._owners.setdefault((tenant, model), Owner(tenant, model))
        self._taken_away.pop((tenant, model), None)
        self.active = True
        owner.guaranteed, owner.limit, owner.revision = guaranteed, limit, revision
        if (tenant, model) not in self._by_name:
            number = self._unused.pop() if self._unused else len(self._accounts)
            account = Account(number, tenant, owner if model is not None else None)
            self._accounts[number : number + 1] = [account]
            self._by_name[tenant, model] = account
            self._by_tenant.setdefault(tenant, []).append(account)
        whole = self._owners.get((tenant, None))
        for account in self._by_tenant[tenant]:
            account.owners = tuple(each for each in (account.own, whole) if each is not None)
        self._index.meter = None  # counted anew below
        self._index.set_accounts(
            {space: self._account_named(*name).number for space, name in self._spaces.items()}, now=now
        )
        self._count()
        self.split()

    def _account_named(self, tenant: str, model: str) -> Account:
        found = self._by_name.get((tenant, model)) or self._by_name.get((tenant, None))
        return found or self._accounts[0]

    def _count(self) -> None:
        for account in self._accounts:
            account.leased_at.clear()
        for owner in self._owners.values():
            owner.held_bytes = 0
            owner.held_at.clear()
        self._index.meter = self
        totals = self._index.totals_by_partition(len(self._index.partitions))
        for partition, (held, evictable) in enumerate(zip(*totals, strict=True)):
            self.charge(partition, held, evictable)

    def split(self) -> None:
        """Reckon what quotas come to, when one was set or the pool's devices have changed."""
        self._alive = self._count_alive()
        self.reckoned = True
        capacities = self._capacities()
        capacity_bytes = sum(capacities.values())
        asked = {key: owner.guaranteed.of(capacity_bytes) for key, owner in self._owners.items()}
        for key, owner in self._owners.items():
            owner.limit_bytes = inf if owner.limit is None else owner.limit.of(capacity_bytes)
            if owner.limit_bytes < asked[key]:  # as it may be once a device is lost
                asked[key] = int(owner.limit_bytes)
        together = sum(
            max(asked.get((tenant, None), 0), sum(n for (t, model), n in asked.items() if t == tenant and model))
            for tenant in self._by_tenant
        )
        fits = together <= capacity_bytes
        self.warning = None if fits else _exceeding(together, capacity_bytes)
        for key, owner in self._owners.items():
            owner.guaranteed_bytes = asked[key] if fits else asked[key] * capacity_bytes // together
            owner.guaranteed_at = {
                host: owner.guaranteed_bytes * here_bytes // capacity_bytes if capacity_bytes else 0
                for host, here_bytes in capacities.items()
            }
            if owner.held_bytes > owner.limit_bytes:
                self.draining.add(owner)
                owner.drained = -1

    def follow_devices(self) -> None:
        """Split anew if a device came or was lost. For the end of each event."""
        if self._owners and self._alive != self._count_alive():
            self.split()

    def _count_alive(self) -> int:
        return sum(device.lost is None for device in self._devices)

    def _capacities(self) -> dict[str, int]:
        capacities: dict[str, int] = {}
        for device in self._devices:
            if device.lost is None:
                capacities[device.host] = capacities.get(device.host, 0) + device.capacity_bytes
        return capacities

    # -- bytes ----------------------------------------------------------------------------------------------------

    def charge(self, partition: int, held_bytes: int, evictable_bytes: int) -> None:
        """Take in that a partition's caches take so much more, of which so much can be evicted; or less."""
        device, number = self._index.partitions[partition]
        host, account = self._devices[device].host, self._accounts[number]
        for owner in account.owners:
            owner.held_bytes += held_bytes
            owner.held_at[host] = owner.held_at.get(host, 0) + held_bytes
            owner.given_back += evictable_bytes > 0 or held_bytes < 0
        account.leased_at[host] = account.leased_at.get(host, 0) + held_bytes - evictable_bytes

    # -- to ask ---------------------------------------------------------------------------------------------------

    def account(self, space: int) -> Account:
        """Return the account to which a namespace's caches are charged."""
        return self._accounts[self._index.spaces.accounts[space]]

    def account_in(self, partition: int) -> Account:
        """Return the account whose caches lie in a partition."""
        return self._accounts[self._index.partitions[partition][1]]

    def limit_of(self, account: Account) -> tuple[float, Owner | None]:
        """Return the most that an account may ever hold, and by whose limit."""
        return min(
            ((owner.limit_bytes, owner) for owner in account.owners), key=lambda each: each[0], default=(inf, None)
        )

    def headroom(self, account: Account) -> tuple[float, Owner | None]:
        """Return how much more an account may hold before it has to evict, and by whose limit."""
        rooms = ((owner.limit_bytes - owner.held_bytes, owner) for owner in account.owners)
        return min(rooms, key=lambda each: each[0], default=(inf, None))

    def evictable_bytes(self, owner: Owner) -> int:
        """Return what an owner holds that nobody has leased; chains may keep some of it all the same."""
        return owner.held_bytes - self._leased(owner)

    def _leased(self, owner: Owner) -> int:
        return sum(sum(a.leased_at.values()) for a in self._by_tenant.get(owner.tenant, ()) if owner in a.owners)

    def entitled_bytes(self, account: Account, host: str, but_bytes: int = 0) -> int:
        """Return how much more may be leased there within guarantees alone, were ``but_bytes`` of it not leased yet."""
        if account.tenant is None:
            return 0
        slack = 0
        if account.own is not None:
            slack = max(account.own.guaranteed_at.get(host, 0) - account.leased_at.get(host, 0) + but_bytes, 0)
        guaranteed = self._guaranteed_at(account.tenant, host)
        needed = self._needed((other for other in self._by_tenant[account.tenant] if other is not account), host)
        needed += account.needed_at(host, but_bytes)
        return slack + max(guaranteed - needed, 0)

    def leasable_bytes(self, account: Account, host: str) -> int:
        """Return how much more may be leased there: what is entitled, and what no guarantee needs. O(accounts)."""
        there = [device for device in self._devices if device.host == host and device.lost is None]
        free = sum(device.capacity_bytes - device.zombie_bytes for device in there)
        free -= self._accounts[0].leased_at.get(host, 0)
        for tenant, accounts in self._by_tenant.items():
            free -= max(self._guaranteed_at(tenant, host), self._needed(accounts, host))
        return self.entitled_bytes(account, host) + max(free, 0)

    def _guaranteed_at(self, tenant: str, host: str) -> int:
        whole = self._owners.get((tenant, None))
        return 0 if whole is None else whole.guaranteed_at.get(host, 0)

    def _needed(self, accounts: Iterable[Account], host: str) -> int:
        return sum(account.needed_at(host) for account in accounts)

    def leasable_run(self, space: int, host: str, rows: Sequence[int]) -> int:
        """Return how many of the first rows of a namespace may be leased on a host; those that are leased take none."""
        index = self._index
        left = self.leasable_bytes(self.account(space), host)
        for position, row in enumerate(rows):
            if not index.pins[row]:
                left -= index.size_bytes[row]
                if left < 0:
                    return position
        return len(rows)

    # -- to show --------------------------------------------------------------------------------------------------

    def owners(self, tenant: str | None = None) -> list[Owner]:
        """Return who has a quota, in a tenant or in all."""
        return [owner for owner in self._owners.values() if tenant in (None, owner.tenant)]

    def owner(self, tenant: str, model: str | None) -> Owner:
        """Return a tenant or model whose quota was set, or taken away."""
        known = self._owners.get((tenant, model))
        return Owner(tenant, model, revision=self._revision(tenant, model)) if known is None else known

    def is_registered(self, owner: Owner) -> bool:
        """Whether there is a model of that name, or any of that tenant."""
        return (owner.tenant, owner.model) in self._registered

    def describe(self, owner: Owner) -> dict[str, Any]:
        """Return one quota as built-in types; a tenant's has model None."""
        return {
            "tenant": owner.tenant,
            "model": owner.model,
            "guaranteed": owner.guaranteed.text,
            "limit": None if owner.limit is None else owner.limit.text,
            "guaranteed_bytes": owner.guaranteed_bytes,
            "limit_bytes": None if owner.limit_bytes == inf else int(owner.limit_bytes),
            "held_bytes": owner.held_bytes,
            "leased_bytes": self._leased(owner),
            "revision": owner.revision,
            "warning": "\n".join(self._warnings(owner)) or None,
        }

    def _warnings(self, owner: Owner) -> Iterable[str]:
        if self.warning is not None and not owner.guaranteed.is_nothing:
            yield self.warning
        if owner.held_bytes > owner.limit_bytes:
            yield (
                f"{owner} holds more than its limit, {format_size(owner.held_bytes)} of at most "
                f"{format_size(int(owner.limit_bytes))}, and drains: what nobody has leased is evicted at once, the "
                "rest as leases end; none is revoked ('kvpool leases' shows them)"
            )

    def why(self, owner: Owner) -> str:
        """Say that an owner is at its limit."""
        shown = self.describe(owner)
        return (
            f"{owner} holds {format_size(owner.held_bytes)} of at most {format_size(shown['limit_bytes'] or 0)}, of "
            f"which {format_size(shown['leased_bytes'])} are leased: release some of it, or raise its limit (set_quota)"
        )

    def check(self) -> None:
        """Raise :class:`~kvpool.errors.InvariantError` if the figures do not agree with the caches. For tests."""
        if not self.active:
            return
        kept = {
            id(owner): (owner.held_bytes, {h: n for h, n in owner.held_at.items() if n})
            for owner in self._owners.values()
        }
        leased = [{h: n for h, n in account.leased_at.items() if n} for account in self._accounts]
        self._count()
        counted = {
            id(owner): (owner.held_bytes, {h: n for h, n in owner.held_at.items() if n})
            for owner in self._owners.values()
        }
        ensure(kept == counted, "bytes held by owners", kept=list(kept.values()), counted=list(counted.values()))
        again = [{h: n for h, n in account.leased_at.items() if n} for account in self._accounts]
        ensure(leased == again, "bytes leased by accounts", kept=leased, counted=again)
        for owner in self._owners.values():
            ensure(owner.held_bytes <= owner.limit_bytes or owner in self.draining, "over its limit", owner=str(owner))


def _exceeding(together_bytes: int, capacity_bytes: int) -> str:
    return (
        f"all guarantees together are {format_size(together_bytes)}, and the pool has {format_size(capacity_bytes)} of "
        "memory: each counts for its share of that, and no more, until less is guaranteed or devices come back"
    )


def _check_revision(revision: object) -> None:
    if not isinstance(revision, int) or isinstance(revision, bool) or not 1 <= revision <= LAST_REVISION:
        raise InvalidRequestError(f"a revision is a number from 1 to 2**63 - 1, not {revision!r}", asked=revision)
