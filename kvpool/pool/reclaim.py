"""Which caches go where there are quotas: what is borrowed first, and nothing that is guaranteed to somebody else.

*Borrowed* is what all owners of a cache hold beyond their guarantees. The order at a shortage, by the policy within
each:

1. what is borrowed, whoever asks;
2. what the asking account may take in any case: its own, and what of its tenant has no guarantee of its own;
3. for who asks within its guarantee: caches that lie partly above another's. One that is larger than what was borrowed
   could keep a guarantee from being met for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kvpool.cache.heads import Heads
from kvpool.pool.device import Device
from kvpool.pool.ledger import Ledger
from kvpool.pool.quota import Account, Owner

Sheltered = Callable[[list[int], int, list[int]], list[int]]
"""Given partitions, bytes and rows that go anyway: others of these partitions that can go with what hangs on them
elsewhere, children first."""


class Reclaim:
    """One decision on what goes. Rows are gathered, and none goes before the decision is made.

    Parameters
    ----------
    ledger
        The pool's books.
    account
        Who asks.
    entitled
        Whether it asks within its guarantee.
    sheltered
        Finds rows where victims run out, because their children lie on other devices.
    """

    def __init__(self, ledger: Ledger, account: Account, entitled: bool, sheltered: Sheltered) -> None:
        self._ledger = ledger
        self._index = ledger.index
        self._quotas = ledger.quotas
        self._account = account
        self._entitled = entitled
        self._sheltered = sheltered
        self._excess: dict[tuple[Owner, str], int] = {}
        self._chosen: dict[int, None] = {}
        self.found: dict[int, int] = {}
        """Bytes gathered, by device."""

    def copy(self) -> Reclaim:
        """Return one that begins with what is gathered so far."""
        other = Reclaim(self._ledger, self._account, self._entitled, self._sheltered)
        other._excess, other._chosen, other.found = self._excess.copy(), self._chosen.copy(), self.found.copy()
        return other

    @property
    def rows(self) -> list[int]:
        """What is gathered, children before parents."""
        return list(self._chosen)

    def worth(self, device: int) -> tuple[bool, Any]:
        """Return what orders devices by what would go there first; those with nothing that is borrowed come last."""
        host = self._ledger.devices[device].host
        heads = Heads(self._ledger.policy, self._borrowed(device, host))
        return (False, heads.worth) if heads else (True, 0)

    def own(self, owner: Owner, most_bytes: float) -> bool:
        """Gather caches that count for an owner's limit, on all devices, until ``most_bytes`` are found; else False."""
        index, quotas = self._index, self._quotas
        partitions = [
            partition for partition in range(len(index.partitions)) if owner in quotas.account_in(partition).owners
        ]
        found = self._take(partitions, most_bytes, self._not_shared, straddling=False)
        if found < most_bytes:
            free = [partition for partition in partitions if not self._not_shared(quotas.account_in(partition))]
            found += self._add(self._sheltered(free, int(most_bytes - found), self.rows))
        return found >= most_bytes

    def on(self, device: Device, short_bytes: int) -> int:
        """Gather what goes on a device until ``short_bytes`` are found there; returns how many were."""
        number, partitions = device.number, self._index.partitions.of(device.number)
        found = self._take(partitions, short_bytes, self._all_owners, straddling=False)
        if found < short_bytes:
            found += self._take(partitions, short_bytes - found, self._not_shared, straddling=False)
        if found < short_bytes and self._index.evictable_bytes[number] > found:
            found += self._hidden(device, short_bytes - found)
        if found < short_bytes and self._entitled:
            found += self._take(partitions, short_bytes - found, self._not_shared, straddling=True)
        return found

    def _borrowed(self, device: int, host: str) -> list[int]:
        quotas = self._quotas
        return [
            partition
            for partition in self._index.partitions.of(device)
            if all(self._left(owner, host) > 0 for owner in quotas.account_in(partition).owners)
        ]

    def _all_owners(self, account: Account) -> Iterable[Owner]:
        return account.owners

    def _not_shared(self, account: Account) -> list[Owner]:
        return [owner for owner in account.owners if owner not in self._account.owners]

    def _left(self, owner: Owner, host: str) -> int:
        known = self._excess.get((owner, host))
        if known is None:
            known = self._excess[owner, host] = owner.excess_at(host)
        return known

    def _take(
        self,
        partitions: Iterable[int],
        short_bytes: float,
        protected: Callable[[Account], Iterable[Owner]],
        *,
        straddling: bool,
    ) -> int:
        """Gather victims of some partitions, as long as those who are protected keep their guarantees."""
        index, quotas, devices = self._index, self._quotas, self._ledger.devices
        heads = Heads(self._ledger.policy, partitions)
        found = 0
        while heads and found < short_bytes:
            row = heads.row
            if row in self._chosen:
                heads.next()
                continue
            size_bytes, host = index.size_bytes[row], devices[index.device[row]].host
            least = 1 if straddling else size_bytes
            account = quotas.account_in(index.partition[row])
            if any(self._left(owner, host) < least for owner in protected(account)):
                heads.leave()
                continue
            found += self._add((row,))
            heads.next()
        return found

    def _hidden(self, device: Device, short_bytes: int) -> int:
        """Gather on a device what is sheltered by children elsewhere, account by account."""
        found = 0
        for partition in self._index.partitions.of(device.number):
            if found >= short_bytes:
                break
            protected = self._not_shared(self._quotas.account_in(partition))
            most = min([short_bytes - found, *(self._left(owner, device.host) for owner in protected)])
            if most > 0:
                before = self.found.get(device.number, 0)
                for row in self._sheltered([partition], most, self.rows):
                    host = self._ledger.devices[self._index.device[row]].host
                    least = 1 if self._entitled else self._index.size_bytes[row]
                    if any(self._left(owner, host) < least for owner in protected):
                        break  # children come before their parents, so these can go alone
                    self._add((row,))
                found += self.found.get(device.number, 0) - before
        return found

    def _add(self, rows: Iterable[int]) -> int:
        index, quotas, devices = self._index, self._quotas, self._ledger.devices
        added = 0
        for row in rows:
            device, size_bytes = index.device[row], index.size_bytes[row]
            host = devices[device].host
            self._chosen[row] = None
            self.found[device] = self.found.get(device, 0) + size_bytes
            for owner in quotas.account_in(index.partition[row]).owners:
                self._excess[owner, host] = self._left(owner, host) - size_bytes
            added += size_bytes
        return added
