"""What is in the pool, as lists of built-in types. Reads the columns of the table at once, and makes few objects."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvpool.cache.table import SEALED, Rows
from kvpool.errors import InvalidRequestError
from kvpool.pool.leases import Leases
from kvpool.pool.ledger import Ledger

MOST_LISTED = 1000
"""Caches of one answer. With 200,000 in the table it takes the pool's event loop 2 ms, or 5 when they are sorted."""

_SORTS = {"recent": "last_accessed", "uses": "access_count", "bytes": "size_bytes"}


def list_models(ledger: Ledger, tenant: str | None, model: str | int | None) -> list[dict[str, Any]]:
    """Return the models of a tenant or of all, or those of one name or number, with what they have in the pool.

    Each is ``{"number", "name", "tenant", "revision", "fingerprint", "block_bytes", "limit_bytes", "caches", "keys",
    "bytes"}``; bytes are those that its caches take of their devices.

    Raises
    ------
    InvalidRequestError
        If there is no such model.
    """
    caches, keys, size_bytes = ledger.index.totals_by_space(len(ledger.index.spaces))
    return [
        {
            "number": each.number,
            "name": each.name,
            "tenant": each.tenant,
            "revision": each.revision,
            "fingerprint": each.fingerprint,
            "block_bytes": each.block_bytes,
            "limit_bytes": each.limit_bytes,
            "caches": caches[each.space],
            "keys": keys[each.space],
            "bytes": size_bytes[each.space],
        }
        for each in (ledger.find_models(model, tenant) if model is not None else ledger.models)
        if tenant in (None, each.tenant)
    ]


def list_caches(
    ledger: Ledger,
    leases: Leases,
    tenant: str | None,
    model: str | int | None,
    limit: int,
    sort: str | None,
    after: int | None,
    now: float,
) -> dict[str, Any]:
    """Return ``{"caches": [...], "total": how many match, "next": cursor or None}``.

    Each is ``{"id", "model", "number", "revision", "tenant", "key", "device", "bytes", "sealed", "leases", "pinned",
    "idle_s", "accesses"}``: name, number and revision of the model (None where its content is void), bytes that were
    asked for, leases without pins by word, seconds since it was last leased or given up.

    Parameters
    ----------
    limit
        Caches to return, at most 1000.
    sort
        ``recent``, ``uses`` or ``bytes``, the most first; None: in the order of the table.
    after
        The cursor of the answer before, to go on behind it. What comes and goes between two answers may be missed.

    Raises
    ------
    InvalidRequestError
        If there is no such model or order, a limit is out of bounds, or a cursor is given with an order.
    """
    if sort is not None and sort not in _SORTS:
        raise InvalidRequestError(f"caches are sorted by {', '.join(_SORTS)}, not {sort!r}", asked=sort)
    if not isinstance(limit, int) or not 0 <= limit <= MOST_LISTED:
        raise InvalidRequestError(f"list 0 to {MOST_LISTED} caches at once, not {limit!r}: go on with 'after'")
    if after is not None and sort is not None:
        raise InvalidRequestError("a sorted listing has no next part: give sort or after, not both")
    index = ledger.index
    if model is not None:
        spaces = sorted({each.space for each in ledger.find_models(model, tenant)})
    else:
        spaces = index.spaces.of(tenant)
    rows: Rows = index.rows_of(*spaces) if spaces else np.array([], np.int64)
    total = len(rows)
    if sort is not None:
        worth = np.asarray(getattr(index, _SORTS[sort]))[rows].astype(np.float64)
        shown = rows[np.argsort(-worth, kind="stable")[:limit]]
        following = None
    else:
        rest = rows[rows > (-1 if after is None else after)]
        shown = rest[:limit]
        following = int(shown[-1]) if 0 < len(shown) < len(rest) else None
    return {
        "caches": [
            _describe(ledger, leases, row, cache_id, now)
            for row, cache_id in zip(shown.tolist(), index.ids_of(shown), strict=True)
        ],
        "total": total,
        "next": following,
    }


def _describe(ledger: Ledger, leases: Leases, row: int, cache_id: int, now: float) -> dict[str, Any]:
    index = ledger.index
    model = ledger.model_of(row)
    pinned = leases.pinned.get(cache_id, 0)
    return {
        "id": cache_id,
        "model": model.name if model is not None else None,  # None: its content is void
        "number": model.number if model is not None else None,
        "revision": model.revision if model is not None else None,
        "tenant": index.tenant_of(row),
        "key": index.key_of(row),
        "device": ledger.devices[index.device[row]].name,
        "bytes": index.asked_bytes[row],
        "sealed": bool(index.flags[row] & SEALED),
        "leases": index.pins[row] - pinned,
        "pinned": bool(pinned),
        "idle_s": now - index.last_accessed[row],
        "accesses": index.access_count[row],
    }
