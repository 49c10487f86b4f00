"""The metrics of a pool, all recorded in its pool actor: it sees every decision and every device's answer.

Counts and bytes are read from an immutable snapshot, because exporters ask in threads of their own and the pool's
state belongs to one event loop. Durations are recorded as they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from kvpool.pool.statistics import PoolStatistics
from kvpool.telemetry.metric import DURATION_BOUNDARIES_S

_MOST_MODELS = 100
"""Names of models that are told apart, first come first served: applications name models, and may name many."""

_OTHER = "other"

Reading = tuple[float, dict[str, str]]


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """What a pool held and had done at one moment. ``hits`` and ``misses`` are blocks by model."""

    statistics: PoolStatistics
    hits: dict[str, int]
    misses: dict[str, int]
    errors: dict[str, int]


def _of_devices(figure: str, snapshot: PoolSnapshot) -> Iterator[Reading]:
    for device in snapshot.statistics.devices:
        # A device that did not report has its gap, not a zero.
        if device.lost is None and device.reported:
            yield getattr(device, figure), {"device": device.name, "tier": device.kind}


def _below(host_figure: str | None, disk_figure: str, snapshot: PoolSnapshot) -> Iterator[Reading]:
    """Read a figure of each tier below each device; of one that a device does not have, or has not told, nothing."""
    for device in snapshot.statistics.devices:
        if device.lost is None and device.lower is not None:
            for tier, figure in (("host", host_figure), ("disk", disk_figure)):
                if figure is not None and device.lower[tier] is not None:
                    yield device.lower[tier][figure], {"device": device.name, "tier": tier}


def _left_device(snapshot: PoolSnapshot) -> Iterator[Reading]:
    for device in snapshot.statistics.devices:
        if device.lost is None and device.lower is not None:
            for outcome, figure in (("kept", "demoted"), ("lost", "not_kept"), ("copied_ahead", "copied_ahead")):
                yield device.lower[figure], {"device": device.name, "outcome": outcome}


def _lower_errors(snapshot: PoolSnapshot) -> Iterator[Reading]:
    for device in snapshot.statistics.devices:
        if device.lost is None and device.lower is not None:
            for tier in ("host", "disk"):
                figures = device.lower[tier] or {"errors": {}}
                causes = figures["errors"] | {f"bad_{cause}": n for cause, n in figures.get("bad_files", {}).items()}
                for cause, count in causes.items():
                    yield count, {"device": device.name, "tier": tier, "error.type": cause}


def _by_model(figure: str, snapshot: PoolSnapshot) -> Iterator[Reading]:
    for model, count in getattr(snapshot, figure).items():
        yield count, {"model": model}


def _evictions(snapshot: PoolSnapshot) -> Iterator[Reading]:
    for reason, count in {"capacity": 0, **snapshot.statistics.evictions_by_reason}.items():
        yield count, {"reason": reason}  # no policy: a total goes on where another one takes over


def _queue(snapshot: PoolSnapshot) -> Iterator[Reading]:
    yield snapshot.statistics.waiting, {}


def _quotas(figure: str, snapshot: PoolSnapshot) -> Iterator[Reading]:
    for quota in snapshot.statistics.quotas:
        if quota[figure] is not None:
            of_model = {} if quota["model"] is None else {"model": quota["model"]}
            yield quota[figure], {"tenant": quota["tenant"], **of_model}


def _errors(snapshot: PoolSnapshot) -> Iterator[Reading]:
    for error_type, count in snapshot.errors.items():
        yield count, {"error.type": error_type}


_SUMS: tuple[tuple[str, str, str, Callable[[PoolSnapshot], Iterable[Reading]]], ...] = (
    ("kvpool.memory.capacity", "By", "Memory of a device", partial(_of_devices, "capacity_bytes")),
    ("kvpool.memory.live", "By", "Bytes asked for by the caches on a device", partial(_of_devices, "live_bytes")),
    ("kvpool.memory.backed", "By", "Pages in which something lives", partial(_of_devices, "backed_bytes")),
    ("kvpool.memory.reserved", "By", "Pages kept warm for their tenants", partial(_of_devices, "reserve_bytes")),
    ("kvpool.memory.pinned", "By", "Held by leases or by word: not evictable", partial(_of_devices, "pinned_bytes")),
    ("kvpool.memory.zombie", "By", "Pages given up that a client may still map", partial(_of_devices, "zombie_bytes")),
    ("kvpool.lower.capacity", "By", "Most a lower tier may hold", partial(_below, "capacity_bytes", "budget_bytes")),
    ("kvpool.lower.used", "By", "What lies in a lower tier", partial(_below, "used_bytes", "used_bytes")),
    ("kvpool.lower.caches", "{cache}", "Caches in a lower tier", partial(_below, "entries", "files")),
    (
        "kvpool.lower.removals.pending",
        "{cache}",
        "Removed caches, hidden, whose files are still to go",
        partial(_below, None, "pending_removals"),
    ),
    ("kvpool.leases", "{lease}", "Leases that are held, pins by word included", partial(_of_devices, "leases")),
    ("kvpool.queue.length", "{request}", "Requests that wait for memory", _queue),
    ("kvpool.quota.guaranteed", "By", "What a quota guarantees now", partial(_quotas, "guaranteed_bytes")),
    ("kvpool.quota.limit", "By", "The most a quota lets hold now", partial(_quotas, "limit_bytes")),
    ("kvpool.quota.held", "By", "Held by the caches that a quota counts", partial(_quotas, "held_bytes")),
    ("kvpool.quota.leased", "By", "Held by leases or by word, of these", partial(_quotas, "leased_bytes")),
)  # fmt: skip
_GAUGES = (
    ("kvpool.memory.utilization", "1", "Live bytes as a share of capacity", partial(_of_devices, "utilization")),
    ("kvpool.memory.fragmentation", "1", "Share of backed bytes not live", partial(_of_devices, "fragmentation")),
)  # fmt: skip
_COUNTERS = (
    ("kvpool.cache.hits", "{block}", "Blocks found by look-ups", partial(_by_model, "hits")),
    ("kvpool.cache.misses", "{block}", "Blocks looked up and not found", partial(_by_model, "misses")),
    ("kvpool.evictions", "{cache}", "Caches evicted", _evictions),
    ("kvpool.compaction.moved", "By", "Moved by compaction", partial(_of_devices, "compacted_bytes")),
    ("kvpool.compaction.freed", "{page}", "Pages freed by compaction", partial(_of_devices, "compacted_pages")),
    ("kvpool.errors", "{error}", "Errors that clients were answered", _errors),
    ("kvpool.lower.hits", "{cache}", "Caches brought up from a lower tier", partial(_below, "hits", "hits")),
    (
        "kvpool.lower.misses",
        "{cache}",
        "Caches asked of a lower tier in vain",
        partial(_below, "misses", "misses"),
    ),
    ("kvpool.lower.written", "By", "Bytes brought down into a tier", partial(_below, "written_bytes", "written_bytes")),
    ("kvpool.lower.read", "By", "Bytes brought up from a tier", partial(_below, "read_bytes", "read_bytes")),
    ("kvpool.lower.demotions", "{cache}", "Caches that left a device, or were copied before that", _left_device),
    ("kvpool.lower.errors", "{error}", "Faults of a tier, by cause", _lower_errors),
)


class PoolMetrics:
    """Instruments of one pool.

    Parameters
    ----------
    meter
        Makes them.
    """

    def __init__(self, meter: Meter) -> None:
        self.snapshot: PoolSnapshot | None = None
        """Replaced as a whole, never changed."""
        self._models: set[str] = set()
        for name, unit, description, read in _SUMS:
            meter.create_observable_up_down_counter(name, [partial(self._observe, read)], unit, description)
        for name, unit, description, read in _GAUGES:
            meter.create_observable_gauge(name, [partial(self._observe, read)], unit, description)
        for name, unit, description, read in _COUNTERS:
            meter.create_observable_counter(name, [partial(self._observe, read)], unit, description)
        histogram = partial(meter.create_histogram, explicit_bucket_boundaries_advisory=DURATION_BOUNDARIES_S)
        self._allocation = histogram(
            "kvpool.allocation.duration", "s", "From a request's arrival at the pool to its memory, waiting included"
        )
        self._eviction = histogram(
            "kvpool.eviction.duration", "s", "From the decision to evict to the device's answer that it is done"
        )
        self._demotion = histogram(
            "kvpool.lower.demotion.duration", "s", "From the decision to bring caches down to the device's answer"
        )
        self._fill = histogram(
            "kvpool.lower.fill.duration", "s", "From the decision to bring caches up to the device's answer"
        )
        self._wait = histogram("kvpool.wait.duration", "s", "How long a request waited for memory in the queue")

    def model_label(self, name: str) -> str:
        """Return the value of the attribute ``model`` for a model: its name, or ``other`` when there are too many."""
        if name not in self._models:
            if len(self._models) >= _MOST_MODELS:
                return _OTHER
            self._models.add(name)
        return name

    def allocated(self, model: str, duration_s: float) -> None:
        """Record that memory for ``model`` was granted."""
        self._allocation.record(duration_s, {"model": self.model_label(model)})

    def evicted(self, device: str, tier: str, policy: str, duration_s: float) -> None:
        """Record that a device carried an eviction out that a policy had decided on."""
        self._eviction.record(duration_s, {"device": device, "tier": tier, "policy": policy})

    def demoted(self, device: str, reason: str, duration_s: float) -> None:
        """Record that a device brought caches down: for their ``eviction``, or ``ahead`` of that."""
        self._demotion.record(duration_s, {"device": device, "reason": reason})

    def filled(self, device: str, duration_s: float) -> None:
        """Record that a device brought caches up, or could not."""
        self._fill.record(duration_s, {"device": device})

    def waited(self, model: str, outcome: str, duration_s: float) -> None:
        """Record the end of a wait in the queue."""
        self._wait.record(duration_s, {"model": self.model_label(model), "outcome": outcome})

    def _observe(
        self, read: Callable[[PoolSnapshot], Iterable[Reading]], _options: CallbackOptions
    ) -> list[Observation]:
        snapshot = self.snapshot
        return [Observation(value, attributes) for value, attributes in read(snapshot)] if snapshot else []
