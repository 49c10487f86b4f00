"""What a pool holds and did, as figures."""

from __future__ import annotations

from copy import copy
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from kvpool.errors import ProtocolError

if TYPE_CHECKING:
    from kvpool.pool.state import PoolState


HOST_TIER = "host"
"""The kind of a device in host memory, and the tier it belongs to."""


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """One device. Bytes; *live* is what was asked for, *backed* the pages in use."""

    name: str
    host: str
    kind: str
    capacity_bytes: int
    live_bytes: int
    backed_bytes: int
    reserve_bytes: int
    zombie_bytes: int
    free_bytes: int
    evictable_bytes: int
    pinned_bytes: int
    caches: int
    leases: int
    evictions: int
    compacted_bytes: int
    """Moved by compaction."""
    compacted_pages: int
    """Freed by it."""
    lost: str | None
    reported: bool
    """Whether the device told its figures; else they are zeros."""
    lower: dict[str, Any] | None
    """What its lower tiers hold and did (:meth:`kvpool.cache.lower_tiers.LowerTiers.statistics`); None: it has none, or
    it is lost."""
    disk_url: str | None = None
    """Where its disk tier keeps its files, also after the device is lost; None: it has none."""
    # What comes later has a default, too: pools that run since before it do not tell it.

    @property
    def utilization(self) -> float:
        """Live bytes as a share of the capacity."""
        return self.live_bytes / self.capacity_bytes if self.capacity_bytes else 0.0

    @property
    def fragmentation(self) -> float:
        """Share of the backed bytes in which nothing lives."""
        return 1 - self.live_bytes / self.backed_bytes if self.backed_bytes else 0.0


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A whole pool: its policies, its devices, and totals since it began.

    ``models`` counts, by name, the caches and blocks that models were given; ``evictions_by_reason`` why content left
    (``capacity``, ``request`` by an administrator, ``invalidate``); ``blocks_lowered`` and ``blocks_raised`` what went
    to the tiers below the devices and came up again, ``lower_keys`` what lies there now. ``policy_failure`` is why the
    policy that was asked for last does not decide any more. ``quotas`` is what :meth:`kvpool.CachePool.quotas` returns,
    of all tenants.
    """

    name: str
    policy: str
    policy_requested: str
    policy_failure: str | None
    placement: str
    preset: str | None
    devices: tuple[DeviceStatistics, ...]
    clients: int
    models: dict[str, int]
    keys: int
    waiting: int
    requests: int
    grants: int
    refusals: int
    lookups: int
    blocks_looked_up: int
    blocks_hit: int
    blocks_stored: int
    blocks_lowered: int
    blocks_raised: int
    lower_keys: int
    evictions: int
    evicted_bytes: int
    evictions_by_reason: dict[str, int]
    duplicates: int
    clients_died: int
    errors: dict[str, int]
    quotas: list[dict[str, Any]]

    def total(self, field: str) -> int:
        """Return the sum of one figure over all devices, for example ``total("live_bytes")``."""
        return sum(int(getattr(device, field)) for device in self.devices)

    @property
    def hit_ratio(self) -> float:
        """Blocks hit as a share of blocks looked up."""
        return self.blocks_hit / self.blocks_looked_up if self.blocks_looked_up else 0.0

    @property
    def utilization(self) -> float:
        """Live bytes as a share of the whole capacity."""
        capacity_bytes = self.total("capacity_bytes")
        return self.total("live_bytes") / capacity_bytes if capacity_bytes else 0.0

    @property
    def fragmentation(self) -> float:
        """Share of all backed bytes in which nothing lives."""
        backed_bytes = self.total("backed_bytes")
        return 1 - self.total("live_bytes") / backed_bytes if backed_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return built-in types, ratios included: what crosses process borders and goes into JSON."""
        figures = asdict(self)
        figures["devices"] = [
            asdict(device) | {"utilization": device.utilization, "fragmentation": device.fragmentation}
            for device in self.devices
        ]
        ratios = ("hit_ratio", "utilization", "fragmentation")
        return figures | {name: getattr(self, name) for name in ratios}

    @classmethod
    def from_dict(cls, figures: dict[str, Any]) -> PoolStatistics:
        """Return the statistics that :meth:`to_dict` described. Figures that this version does not know are left out.

        Raises
        ------
        ProtocolError
            If figures are missing that have no default: they come from a pool of another version.
        """
        missing = _needed(cls) - figures.keys()
        for device in figures.get("devices", ()):
            missing |= {f"devices.{name}" for name in _needed(DeviceStatistics) - device.keys()}
        if missing:
            raise ProtocolError(
                f"the statistics lack {', '.join(sorted(missing))}: the pool runs another version of kvpool. Drain it "
                f"('kvpool stop --name {figures.get('name', 'NAME')} --drain 60') and start it again with this one",
                missing=sorted(missing),
            )
        own = _known(cls, figures)
        own["devices"] = tuple(DeviceStatistics(**_known(DeviceStatistics, device)) for device in figures["devices"])
        return cls(**own)


def _needed(described: type[PoolStatistics | DeviceStatistics]) -> set[str]:
    return {field.name for field in fields(described) if field.default is MISSING}


def _known(described: type[PoolStatistics | DeviceStatistics], figures: dict[str, Any]) -> dict[str, Any]:
    return {field.name: figures[field.name] for field in fields(described) if field.name in figures}


def collect(
    state: PoolState,
    memory: dict[int, dict[str, Any]],
    *,
    policy_requested: str | None = None,
    preset: str | None = None,
) -> PoolStatistics:
    """Return the statistics of a pool.

    Parameters
    ----------
    state
        The pool's state.
    memory
        For each device number what it reported: ``live``, ``backed``, ``reserve``, ``zombie``, ``free`` bytes,
        ``caches``, ``leases``, and ``lower``, the figures of its lower tiers. A device that is missing counts as empty.
    policy_requested, preset
        What the pool was asked for, where something else stands in for it.
    """
    ledger = state.ledger
    index, counters = ledger.index, ledger.counters
    devices = []
    for device in ledger.devices:
        number = device.number
        reported = memory.get(number, {})
        devices.append(
            DeviceStatistics(
                name=device.name,
                host=device.host,
                kind=HOST_TIER,
                capacity_bytes=device.capacity_bytes,
                live_bytes=reported.get("live", 0),
                backed_bytes=reported.get("backed", 0),
                reserve_bytes=reported.get("reserve", 0),
                zombie_bytes=reported.get("zombie", 0),
                free_bytes=reported.get("free", 0),
                evictable_bytes=index.evictable_bytes[number],
                pinned_bytes=index.resident_bytes[number] - index.evictable_bytes[number],
                caches=reported.get("caches", 0),
                leases=reported.get("leases", 0),
                evictions=device.evictions,
                compacted_bytes=reported.get("compacted", (0, 0))[0],
                compacted_pages=reported.get("compacted", (0, 0))[1],
                lost=device.lost,
                reported=number in memory,
                lower=reported.get("lower"),
                disk_url=device.disk_url,
            )
        )
    models: dict[str, int] = {}
    for model in ledger.models:  # tenants, and revisions, may share a name
        models[model.name] = models.get(model.name, 0) + model.caches
    totals: dict[str, Any] = {
        name: copy(getattr(counters, name))  # some are dicts, which go on counting
        for name in PoolStatistics.__dataclass_fields__
        if name in type(counters).__dataclass_fields__
    }
    return PoolStatistics(
        name=state.name,
        policy=state.policy_name,
        policy_requested=policy_requested or state.policy_name,
        policy_failure=state.policy_failure,
        placement=state.placement_name,
        preset=preset,
        devices=tuple(devices),
        clients=len(ledger.clients),
        models=models,
        keys=index.published,
        lower_keys=len(state.below),
        waiting=len(state.allocations.queue),
        quotas=state.quotas(),
        **totals,
    )
