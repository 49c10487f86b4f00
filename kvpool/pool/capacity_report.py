"""Why a request for memory was not met, with all figures."""

from __future__ import annotations

import math
from typing import Any

from kvpool.errors import CapacityError
from kvpool.pool.ledger import Ledger
from kvpool.pool.requests import CacheRequest
from kvpool.sizes import format_size


def capacity_error(ledger: Ledger, request: CacheRequest, why: str) -> CapacityError:
    """Return the error that explains with all figures why a request was not met."""
    devices = [ledger.devices[n] for n in request.devices if ledger.devices[n].lost is None]
    free = {device.number: max(ledger.free_bytes(device), 0) for device in devices}
    evictable = {device.number: ledger.index.evictable_bytes[device.number] for device in devices}
    pinned = {d.number: ledger.index.resident_bytes[d.number] - evictable[d.number] for d in devices}
    zombie_bytes = sum(device.zombie_bytes for device in devices)
    # Free bytes may lie in holes, each of them too small: then the device knows better.
    fitted = {number: min(free[number] + evictable[number], request.fits.get(number, math.inf)) for number in free}
    largest = max(fitted.values(), default=0)
    by_quota, allowed, quota_details = _by_quota(ledger, request, sum(free.values()) + sum(evictable.values()))
    largest = int(min(largest, allowed))
    where = f"{len(devices)} device{'' if len(devices) == 1 else 's'}"
    if request.change is not None:
        where = f"device {ledger.devices[request.change.device].name}, on which its cache lies and stays"
    return CapacityError(
        f"asked for {format_size(request.size_bytes)} and {why}: {by_quota}"
        f"{format_size(sum(free.values()))} free and {format_size(sum(evictable.values()))} evictable on "
        f"{where}, {format_size(sum(pinned.values()))} pinned by leases, {format_size(zombie_bytes)} zombie; at most "
        f"{format_size(largest)} would have fitted: release leases, wait longer (timeout_s), or add memory",
        asked_bytes=request.size_bytes,
        free_bytes=sum(free.values()),
        evictable_bytes=sum(evictable.values()),
        pinned_bytes=sum(pinned.values()),
        zombie_bytes=zombie_bytes,
        largest_bytes=largest,
        **quota_details,
    )


def _by_quota(ledger: Ledger, request: CacheRequest, at_hand_bytes: int) -> tuple[str, float, dict[str, Any]]:
    """Say what quotas have to do with a request that was not met, if anything, how much they allow, and the figures.

    ``at_hand_bytes``: what is free or evictable where it could have been met.
    """
    quotas = ledger.quotas
    if not quotas.active:
        return "", math.inf, {}
    account, host = quotas.account(request.model.space), request.client.host
    owner = request.at_limit
    if owner is not None and owner.limit_bytes < math.inf:  # else it was lifted since the request was last tried
        left_bytes = max(owner.limit_bytes - quotas.describe(owner)["leased_bytes"], 0)
        details = {"limit_bytes": int(owner.limit_bytes), "held_bytes": owner.held_bytes}
        return f"{quotas.why(owner)}. In all ", left_bytes, details
    leasable = quotas.leasable_bytes(account, host)
    if leasable >= min(request.size_bytes, at_hand_bytes):
        return "", math.inf, {}  # it is leases that are in the way
    why = (
        f"what others are guaranteed leaves {format_size(leasable)} more to lease to model "
        f"{request.model.name!r}; of its own guarantee {format_size(quotas.entitled_bytes(account, host))} are "
        "left (see 'kvpool quota'). In all "
    )
    return why, leasable, {"leasable_bytes": leasable}
