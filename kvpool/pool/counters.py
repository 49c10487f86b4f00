"""What the pool has done so far."""

from __future__ import annotations

from dataclasses import dataclass, field

EVICTION_REASONS = ("capacity", "request", "invalidate")
"""Why content leaves: room for other content, an administrator's word, or because it is void."""


@dataclass(slots=True)
class Counters:
    """Totals since the pool began."""

    requests: int = 0
    grants: int = 0
    refusals: int = 0
    lookups: int = 0
    blocks_looked_up: int = 0
    blocks_hit: int = 0
    blocks_stored: int = 0
    blocks_lowered: int = 0
    """Sent to the tiers below when they were evicted."""
    blocks_raised: int = 0
    """Brought up from there."""
    evictions: int = 0
    evicted_bytes: int = 0
    clients_died: int = 0
    duplicates: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    evictions_by_reason: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EVICTION_REASONS, 0))
