"""Where caches of one size go on several devices within quotas, all decided at once."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from kvpool.cache.heads import Heads
from kvpool.pool.device import Device
from kvpool.pool.ledger import Ledger
from kvpool.pool.quota import Account, Owner


class Spread(NamedTuple):
    """A decision on several caches."""

    devices: list[int]
    """The device of each."""
    going: list[int]
    """Rows that go for them, children before their parents."""


def spread(ledger: Ledger, account: Account, devices: Sequence[Device], need_bytes: int, count: int) -> Spread:
    """Return where the first of ``count`` caches go that need so much each; nowhere, if that takes a closer look.

    Into what is free, as placement says; if nothing is, for what is borrowed and worth least. Those who ask within
    their guarantee are decided on apart from those behind them, because what may go for these is another question.
    (Not always the same as one after the other: each of those takes what it needs on one device, though that may lie
    partly above another's guarantee while there are caches to take on other devices.)

    Parameters
    ----------
    devices
        Of one host, and not lost.
    """
    quotas, host = ledger.quotas, devices[0].host
    entitled = quotas.entitled_bytes(account, host) // need_bytes
    headroom, _ = quotas.headroom(account)
    most = min(count, entitled or count, quotas.leasable_bytes(account, host) // need_bytes)
    if headroom < inf:
        most = min(most, int(headroom // need_bytes))
    if most <= 0:
        return Spread([], [])
    free = [max(ledger.free_bytes(device), 0) for device in devices]
    chosen: list[int] = []
    while len(chosen) < most and (position := ledger.placement.choose(free, need_bytes)) >= 0:
        chosen.append(devices[position].number)
        free[position] -= need_bytes
    if chosen:
        return Spread(chosen, [])
    return _reclaimed(
        ledger, host, {device.number: n for device, n in zip(devices, free, strict=True)}, need_bytes, most
    )


def _reclaimed(ledger: Ledger, host: str, free: dict[int, int], need_bytes: int, most: int) -> Spread:
    index, quotas = ledger.index, ledger.quotas
    excess: dict[Owner, int] = {owner: owner.excess_at(host) for owner in quotas.owners()}
    heads = Heads(
        ledger.policy,
        (
            partition
            for number in free
            for partition in index.partitions.of(number)
            if all(excess[owner] > 0 for owner in quotas.account_in(partition).owners)
        ),
    )
    chosen: list[int] = []
    going: list[int] = []
    gathered: dict[int, list[int]] = {number: [] for number in free}
    while heads and len(chosen) < most:
        row = heads.row
        number, size_bytes = index.device[row], index.size_bytes[row]
        owners = quotas.account_in(index.partition[row]).owners
        if any(excess[owner] < size_bytes for owner in owners):
            heads.leave()
            continue
        heads.next()
        for owner in owners:
            excess[owner] -= size_bytes
        gathered[number].append(row)
        free[number] += size_bytes
        while free[number] >= need_bytes and len(chosen) < most:
            chosen.append(number)
            free[number] -= need_bytes
            going += gathered[number]  # what is gathered where it is too little for one more stays
            gathered[number] = []
    return Spread(chosen, going)
