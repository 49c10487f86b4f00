"""The version that client and actors must share, and the identity of a host."""

from __future__ import annotations

import os
from pathlib import Path

PROTOCOL_VERSION = 1
"""Goes up with every change of a message. ``connect`` compares it: Ray keeps running an old job's actor code."""

NAMESPACE = "kvpool"
"""The Ray namespace of all pools and devices."""


def host_identity() -> str:
    """Return what tells this host from others: the kernel's boot id, or ``KVPOOL_HOST`` (a switch for tests)."""
    forced = os.environ.get("KVPOOL_HOST")
    if forced:
        return forced
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
