"""Who waits for memory, as a list of built-in types."""

from __future__ import annotations

from heapq import nsmallest
from math import inf
from typing import Any

from kvpool.errors import InvalidRequestError
from kvpool.memory.tickets import TicketQueue
from kvpool.pool.ledger import Ledger
from kvpool.pool.requests import CacheRequest
from kvpool.pool.validation import footprint_bytes

MOST_LISTED = 1000
"""Requests of one answer."""


def list_waiting(
    ledger: Ledger, queue: TicketQueue[CacheRequest], tenant: str | None, limit: int, now: float
) -> dict[str, Any]:
    """Return ``{"requests": [...], "total": how many wait}``, those of a tenant or of all, in the order of the queue.

    Each is ``{"client", "tenant", "model", "number", "bytes", "kind", "cache", "device", "limit_of", "priority",
    "waited_s", "left_s", "pid", "hostname", "job", "node"}``: name and number of the model; what it needs, of a growth
    beyond what there is; ``new`` or ``growth``; the cache that is to grow, and its device, None where a new one may go
    to any device of the client's host; whose limit leaves no room, None where memory is short; seconds since it asked,
    and until it is told that there was no room; what the client said of itself.

    Parameters
    ----------
    limit
        Requests to return, at most 1000.

    Raises
    ------
    InvalidRequestError
        If the limit is out of bounds.
    """
    if not isinstance(limit, int) or not 0 <= limit <= MOST_LISTED:
        raise InvalidRequestError(f"list 0 to {MOST_LISTED} waiting requests at once, not {limit!r}", asked=limit)
    waiting = [
        (-request.priority, ticket, request)
        for ticket, request in queue.items()
        if tenant in (None, request.client.tenant)
    ]
    shown = nsmallest(limit, waiting, key=lambda each: each[:2])
    return {"requests": [_describe(ledger, request, now) for _, _, request in shown], "total": len(waiting)}


def _describe(ledger: Ledger, request: CacheRequest, now: float) -> dict[str, Any]:
    client, change = request.client, request.change
    return {
        "client": client.id,
        "tenant": client.tenant,
        "model": request.model.name,
        "number": request.model.number,
        "bytes": request.size_bytes,
        "kind": "new" if change is None else "growth",
        "cache": None if change is None else change.cache_id,
        "device": None if change is None else ledger.devices[change.device].name,
        "limit_of": _limit_of(ledger, request),
        "priority": request.priority,
        "waited_s": now - request.asked,
        "left_s": max(request.deadline - now, 0.0),
        **{field: client.who.get(field) for field in ("pid", "hostname", "job", "node")},
    }


def _limit_of(ledger: Ledger, request: CacheRequest) -> str | None:
    """Say whose limit leaves no room, if any; of who stands behind others, and was not tried itself, too."""
    quotas = ledger.quotas
    if not quotas.active:
        return None
    need_bytes = request.size_bytes if request.change is not None else footprint_bytes(ledger, request)
    for owner in quotas.account(request.model.space).owners:
        room_bytes = owner.limit_bytes - owner.held_bytes + quotas.evictable_bytes(owner)
        # What can be evicted may not be enough all the same, for chains keep some of it: then it was tried in vain.
        if room_bytes < need_bytes or (owner is request.at_limit and owner.limit_bytes < inf):
            return str(owner)
    return None
