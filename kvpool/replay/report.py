"""What a replay shows at its end: a table, and in a folder the same as JSON and a plot."""

from __future__ import annotations

import json
from pathlib import Path

from kvpool.replay.driver import ReplayResult
from kvpool.sizes import MIB, format_count, format_size


def summary(result: ReplayResult) -> list[tuple[str, str]]:
    """Return the lines of the final table."""
    figures = result.to_dict()
    return [
        ("requests", f"{result.requests:,}"),
        ("blocks", f"{result.blocks:,}"),
        ("prefix hit ratio", f"{result.prefix_hit_ratio:.2%}"),
        ("verified bytes", f"{result.verified_bytes:,} ({format_size(result.verified_bytes)})"),
        ("wrong bytes", f"{result.wrong_bytes:,}"),
        ("evictions", f"{result.evictions:,}"),
        ("allocation p50 / p99", f"{result.allocation_ms(0.5):.2f} / {result.allocation_ms(0.99):.2f} ms"),
        ("peak memory", f"{format_size(result.peak_bytes)} of {format_size(result.capacity_bytes)}"),
        ("blocks/s", f"{figures['blocks_per_s']:,.0f} ({result.seconds:.1f} s)"),
        ("eviction policy", result.policy),
    ]


def write(result: ReplayResult, folder: Path) -> list[Path]:
    """Write ``replay.json`` and, where matplotlib is installed, ``replay.png``.

    Makes the folder; returns what was written.
    """
    written = [folder / "replay.json"]
    folder.mkdir(parents=True, exist_ok=True)
    written[0].write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    try:
        import matplotlib as mpl
    except ImportError:
        return written
    mpl.use("Agg")
    from matplotlib import pyplot

    samples = result.samples
    at = [sample["requests"] for sample in samples]
    figure, (ratio, memory, evictions) = pyplot.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    ratio.plot(at, [100 * sample["prefix_hit_ratio"] for sample in samples], color="tab:blue")
    ratio.set_ylabel("prefix hit ratio so far (%)")
    ratio.set_ylim(bottom=0)
    memory.plot(at, [sample["memory_bytes"] / MIB for sample in samples], color="tab:green", label="in use")
    memory.axhline(result.capacity_bytes / MIB, color="grey", linestyle="--", label="capacity")
    memory.set_ylabel("memory (MiB)")
    memory.set_ylim(bottom=0)
    memory.legend(loc="lower right")
    evictions.plot(at, [sample["evictions"] for sample in samples], color="tab:red")
    evictions.set_ylabel("evictions")
    evictions.set_xlabel("requests")
    for axes in (ratio, memory, evictions):
        axes.grid(alpha=0.3)
    counted = f"{format_count(result.requests, 'request')}, {format_count(result.blocks, 'block')}"
    figure.suptitle(f"kvpool replay: {counted}, {result.policy}")
    written.append(folder / "replay.png")
    figure.savefig(written[1], dpi=120)
    pyplot.close(figure)
    return written
