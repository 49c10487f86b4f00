"""What client and actors must agree on: version, items of a batch, identity of a host."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpool.errors import InvalidRequestError

PROTOCOL_VERSION = 2
"""Goes up with every change of a message. ``connect`` compares it: Ray keeps running an old job's actor code."""

NAMESPACE = "kvpool"
"""The Ray namespace of all pools and devices."""

CACHE_ITEM = {"sequence": int, "model": int, "size": int, "max_size": int, "timeout_s": (int, float)}
PREFIX_ITEM = {"sequence": int, "model": int, "hashes": bytes}
BLOCKS_ITEM = {
    "sequence": int,
    "model": int,
    "hashes": bytes,
    "parent": (bytes, type(None)),
    "output_tokens": (int, type(None)),
}
SEAL_ITEM = {"sequence": int, "model": int, "ids": (list, tuple), "keys": (list, tuple)}
LEASE_ITEM = {"sequence": int, "ids": (list, tuple)}
"""The fields of a request's items, each followed by the trace context (None in this version)."""


def check_items(items: Sequence[Any], fields: dict[str, Any]) -> None:
    """Refuse a batch in which an item is malformed, before a decision is made on any of them.

    Raises
    ------
    InvalidRequestError
        Names the fields that an item has.
    """
    kinds = tuple(fields.values())
    timeout = list(fields).index("timeout_s") if "timeout_s" in fields else None
    ids = list(fields).index("ids") if "ids" in fields else None
    for item in items:
        if (
            not isinstance(item, (tuple, list))
            or len(item) != len(kinds) + 1
            or not all(map(isinstance, item, kinds))
            or (timeout is not None and not item[timeout] < math.inf)
            or (ids is not None and not all(isinstance(cache_id, int) for cache_id in item[ids]))
        ):
            names = ", ".join([*fields, "trace context"])
            raise InvalidRequestError(f"an item of this batch is ({names}), not {item!r}: nothing of it was done")


def host_identity() -> str:
    """Return what tells this host from others: the kernel's boot id, or ``KVPOOL_HOST`` (a switch for tests)."""
    forced = os.environ.get("KVPOOL_HOST")
    if forced:
        return forced
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
