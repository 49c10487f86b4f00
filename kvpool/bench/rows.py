"""One row of a benchmark, and how repeated measurements become one figure."""

from __future__ import annotations

from typing import Any


def row(name: str, value: float, unit: str, baseline: float | None = None) -> dict[str, Any]:
    """Return a row: a value, what it is compared with in the same unit and run, and ``value / baseline``."""
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": value / baseline if baseline else None,
    }


def quantile(values: list[float], share: float) -> float:
    """Return the value below which ``share`` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def median(values: list[float]) -> float:
    """Return the middle value."""
    return quantile(values, 0.5)
