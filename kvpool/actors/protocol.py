"""What client and actors must agree on: version, items of a batch, identity of a host."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpool.errors import InvalidRequestError
from kvpool.telemetry.context import is_carrier

PROTOCOL_VERSION = 4
"""Goes up with every change of a message. ``connect`` compares it: Ray keeps running an old job's actor code.

``describe``, ``leases`` and ``delete`` are called across versions: :mod:`kvpool.actors.compatibility` says how.
"""

NAMESPACE = "kvpool"
"""The Ray namespace of all pools and devices."""

STEPS_S = 600.0
"""How long the pool may take to evict, zero or give back much memory, seconds."""

CACHE_ITEM = {
    "sequence": int,
    "model": int,
    "size": int,
    "max_size": int,
    "timeout_s": (int, float),
    "priority": int,
}
CHANGE_ITEM = {"sequence": int, "id": int, "kind": str, "ranges": (list, tuple), "timeout_s": (int, float)}
PREFIX_ITEM = {"sequence": int, "model": int, "hashes": bytes}
FETCH_ITEM = {"sequence": int, "model": int, "hashes": bytes, "first": int, "timeout_s": (int, float)}
BLOCKS_ITEM = {
    "sequence": int,
    "model": int,
    "hashes": bytes,
    "parent": (bytes, type(None)),
    "output_tokens": (int, type(None)),
}
SEAL_ITEM = {"sequence": int, "model": int, "ids": (list, tuple), "keys": (list, tuple)}
LEASE_ITEM = {"sequence": int, "ids": (list, tuple)}
"""The fields of a request's items, each followed by its trace context (:data:`Carrier`) or None."""


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
    carrier = None  # the items that share a span carry the very same one
    for item in items:
        if (
            not isinstance(item, (tuple, list))
            or len(item) != len(kinds) + 1
            or not all(map(isinstance, item, kinds))
            or (timeout is not None and not item[timeout] < math.inf)
            or (ids is not None and not all(isinstance(cache_id, int) for cache_id in item[ids]))
            or not (item[-1] is None or item[-1] is carrier or is_carrier(item[-1]))
        ):
            names = ", ".join([*fields, "trace context"])
            raise InvalidRequestError(f"an item of this batch is ({names}), not {item!r}: nothing of it was done")
        carrier = item[-1]


def errors_of(answers: Sequence[Any]) -> list[tuple[int, tuple[str, str, dict[str, Any]]]]:
    """Return the errors in a pool's answers (:meth:`KvpoolError.to_wire`), each with the number of its item.

    An answer may hold several: one for each cache that could not be sealed or released.
    """
    found = []
    for item, answer in enumerate(answers):
        kind = answer[0]
        if kind == "error":
            found.append((item, answer[1:]))
        elif kind in ("released", "sealed", "persisted"):
            for outcome in answer[1]:
                if outcome is not True and isinstance(outcome, tuple):
                    found.append((item, outcome[1:]))
    return found


def host_identity() -> str:
    """Return what tells this host from others: the kernel's boot id, or ``KVPOOL_HOST`` (a switch for tests)."""
    forced = os.environ.get("KVPOOL_HOST")
    if forced:
        return forced
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
