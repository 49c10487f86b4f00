"""Metrics of applications, recorded beside those of the pool."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from numbers import Real

from opentelemetry import metrics
from opentelemetry.metrics import Histogram

from kvpool.errors import InvalidRequestError
from kvpool.telemetry.calls import SCOPE
from kvpool.version import __version__

DURATION_BOUNDARIES_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Buckets of durations, seconds. (OpenTelemetry's own begin at 5: they are made for milliseconds.)"""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_./-]{0,254}")
_UNIT = re.compile(r"[!-~]{1,63}")
_NUMBERS = (float, int, Real)  # the usual ones first, by their own class: an abstract class takes longer to ask

_lock = threading.Lock()
_known: dict[str, tuple[str, Histogram]] = {}


def record_metric(
    name: str,
    value: float,
    unit: str = "",
    attributes: Mapping[str, str | bool | int | float] | None = None,
    *,
    description: str = "recorded by an application",
) -> None:
    """Record one value of an application's own metric with the OpenTelemetry provider of this process.

    The values of a name make a histogram: their count, sum and distribution are kept, whether they are durations,
    sizes or counts. Without a provider nothing is recorded, at next to no cost.

    Parameters
    ----------
    name
        ``ocr.page.duration``, say: a letter first, then letters, digits, and ``_ . - /``.
    value
        0 or more; NumPy's numbers will do.
    unit
        In UCUM: ``s``, ``By``, ``1``, ``{page}``. A name keeps its unit. Required.
    attributes
        Of few different values each: every combination is a time series of its own.
    description
        What is measured; the first one given for a name stays.

    Raises
    ------
    InvalidRequestError
        If the unit is missing or another than before, the name cannot be one, or the value is no finite number of
        at least 0.
    """
    known = _known.get(name)
    if known is None or known[0] != unit:
        known = _make(name, unit, description)
    try:
        number = float(value) if isinstance(value, _NUMBERS) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise InvalidRequestError(f"metric {name!r}: a value is a finite number, 0 or more, not {value!r:.60}")
    known[1].record(number, attributes)


def _make(name: str, unit: str, description: str) -> tuple[str, Histogram]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"metric name {name!r} is not possible: a letter first, then letters, digits and _ . - /, at most 255"
        )
    if not isinstance(unit, str) or not _UNIT.fullmatch(unit):
        raise InvalidRequestError(
            f"metric {name!r} needs a unit, in UCUM: 's', 'By', '1', or what is counted, as '{{page}}'; got {unit!r}"
        )
    with _lock:
        known = _known.get(name)
        if known is None:
            histogram = metrics.get_meter(SCOPE, __version__).create_histogram(
                name,
                unit,
                description,
                explicit_bucket_boundaries_advisory=DURATION_BOUNDARIES_S if unit == "s" else None,
            )
            known = _known[name] = (unit, histogram)
    if known[0] != unit:
        raise InvalidRequestError(f"metric {name!r} has unit {known[0]!r}, not {unit!r}: a name keeps its unit")
    return known
