"""What happened below a device, counted, and the figures of its tiers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.host_index import Kind
from kvpool.cache.host_tier import HostTier


@dataclass(slots=True)
class TierCounters:
    """Counts since the start."""

    demoted: int = 0
    """Caches that left the device and could be found below."""
    not_kept: int = 0
    """Caches that left the device and could not: no tier had room for them, or took them in time."""
    copied_ahead: int = 0
    fills: int = 0
    """Caches brought up."""
    misses: int = 0
    """Caches that could not be."""
    host_hits: int = 0
    host_misses: int = 0
    """Caches that were to be brought up and did not lie in the host tier, or no longer."""
    host_written_bytes: int = 0
    host_read_bytes: int = 0
    dropped: int = 0
    """Caches that the host tier alone had, and dropped."""


def tier_statistics(
    host: HostTier | None, disk: DiskTier | None, problem: str | None, counters: TierCounters
) -> dict[str, Any]:
    """Return all figures, built-in types only; ``host`` and ``disk`` are None where there is no such tier.

    ``problem`` is why there is no disk; of one that there is, ``disk_problem`` is what is the matter with it now.
    """
    in_host = None
    if host is not None:
        in_host = {
            "capacity_bytes": host.capacity_bytes,
            "used_bytes": host.index.used_bytes,
            "copy_bytes": host.index.kind_bytes(Kind.COPY),
            "saved_bytes": host.index.kind_bytes(Kind.SAVED),
            "sole_bytes": host.index.kind_bytes(Kind.SOLE),
            "entries": len(host.index),
            "hits": counters.host_hits,
            "misses": counters.host_misses,
            "written_bytes": counters.host_written_bytes,
            "read_bytes": counters.host_read_bytes,
            "dropped": counters.dropped,
            "errors": dict(host.errors),
        }
    on_disk = None if disk is None else disk.statistics()
    return {
        "host": in_host,
        "disk": None if on_disk is None else asdict(on_disk),
        "disk_problem": problem if on_disk is None else on_disk.problem,
        "demoted": counters.demoted,
        "not_kept": counters.not_kept,
        "copied_ahead": counters.copied_ahead,
        "fills": counters.fills,
        "misses": counters.misses,
    }
