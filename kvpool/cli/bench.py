"""``kvpool bench``: measurements, each beside something measured in the same run."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from kvpool.cli.interruption import Interruption
from kvpool.cli.options import JSON
from kvpool.cli.output import print_rows, progress, write_json
from kvpool.cli.spinner import working

_FRAGMENTATION = {
    "pattern": "pattern",
    "utilization": "utilization",
    "pages_utilization": "pages",
    "buddy_utilization": "buddy",
    "fragmentation_before": "fragmentation before",
    "fragmentation_after": "after",
    "fragmentation_bound": "bound",
    "largest_of_free": "largest / free",
    "pages_largest_of_free": "pages largest",
    "buddy_largest_of_free": "buddy largest",
    "moved_per_freed": "moved",
    "of_memcpy": "of memcpy",
}
"""Columns of the table, as in docs/compaction-figures.md: all would be wider than a screen."""


@click.group()
def bench() -> None:
    """Measure, beside something measured in the same run."""


def _benchmark(name: str, measures: str, lasts: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a benchmark; its help says how long it lasts: on two cores with little else to do."""
    return bench.command(name, short_help=f"{measures} ({lasts}).", epilog=f"Lasts about {lasts} on an idle machine.")


@_benchmark("alloc", "Allocators alone", "40 s")
@JSON
def alloc(json_path: str | None) -> None:
    """Time the allocators alone, by size class and under churn."""
    from kvpool.bench import alloc as benchmark

    _report_steps("allocators", benchmark.STEPS, benchmark.run, json_path)


@_benchmark("compaction", "Compaction, and what others notice of it", "1.5 min")
@JSON
def compaction(json_path: str | None) -> None:
    """Time compaction by the size of caches, and allocations, also of a pool's client, while it runs beside them."""
    from kvpool.bench import compaction as benchmark

    title = "compaction of 256 MiB in pages of 2 MiB"
    with Interruption() as interruption, working(f"measuring {title}"):
        result = benchmark.measure(interruption.run)
    _show(title, result, json_path)


@_benchmark("blocks", "Growth in place: blocks, and a cache resized by 1 GiB", "2 min")
@JSON
def blocks(json_path: str | None) -> None:
    """Time blocks handed out inside a cache, and a cache resized by 1 GiB up and down, 100 times."""
    from kvpool.bench import blocks as benchmark

    _report("growth in place", benchmark.measure, json_path)


@_benchmark("concurrency", "1, 100 and 1,000 concurrent requests; telemetry", "1 min")
@JSON
def concurrency(json_path: str | None) -> None:
    """Time 1, 100 and 1,000 concurrent requests, beside unmerged calls, a no-op actor, and with telemetry on."""
    from kvpool.bench import concurrency as benchmark

    _report("concurrent requests of 64 KiB", benchmark.measure, json_path)


@_benchmark("disk", "The disk tier, beside dd", "1.5 min")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    default=".",
    show_default=True,
    help="Where to write 0.8 GiB for a while: a folder on the disk to be measured.",
)
@JSON
def disk(folder: Path, json_path: str | None) -> None:
    """Time the disk tier: writing and reading back, beside dd of the same bytes in the same folder.

    Each 'ratio' is the median of seven rounds', 'ratios' from the lowest to the highest (--json has all): each round is
    compared with what was measured just before and after it.
    """
    from kvpool.bench import disk as benchmark

    title = "the disk tier"
    made = TemporaryDirectory(prefix="kvpool-bench-", dir=folder)
    with Interruption() as interruption, made as inside, working(f"measuring {title}"):
        result = interruption.run(benchmark.measure(Path(inside)))
    _show(title, result, json_path)


@_benchmark("evict", "Eviction in the books of a pool", "1 min")
@JSON
def evict(json_path: str | None) -> None:
    """Time eviction in the books of a pool: for each request, at worst, and of 512 MiB at once; ADAPTIVE beside LRU."""
    from kvpool.bench import evict as benchmark

    _report_steps("eviction", benchmark.STEPS, benchmark.run, json_path)


@_benchmark("fragmentation", "What churn wastes, and what compaction wins back", "10 s")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Sizes of one pattern: the tokens of these requests. Default: the Mooncake conversations in the folder "
    "KVPOOL_TRACES, if it is set, else generated ones.",
)
@JSON
def fragmentation(trace: Path | None, json_path: str | None) -> None:
    """Churn on 256 MiB, by a trace and against the allocator: what is wasted, and what compaction wins back.

    Utilization: of a full memory, the lowest of four times. Fragmentation: 1 - live / backed pages; no compaction
    could go below the bound, since pages with something leased stay. Largest / free: the largest cache that would fit,
    of what is free. 'pages' is the same without compaction, 'buddy' one contiguous range in powers of two. Moved:
    bytes copied for each byte that came free, and how fast, of memcpy. (--json has more figures.)
    """
    from kvpool.bench import fragmentation as benchmark
    from kvpool.workload import generate, read_trace

    folder = os.environ.get("KVPOOL_TRACES")
    if trace is None and folder:
        trace = Path(folder) / "mooncake_conversation.jsonl.gz"
    patterns = benchmark.patterns(read_trace(trace) if trace else generate(1))
    run = partial(benchmark.run, patterns)
    _report_steps("churn on 256 MiB in pages of 2 MiB", len(patterns), run, json_path, _FRAGMENTATION)


@_benchmark("put-get", "Storing and reading 512 MiB, beside memcpy and Ray", "20 s")
@JSON
def put_get(json_path: str | None) -> None:
    """Time storing and reading of 512 MiB in blocks of 2 MiB, beside memcpy and ray.put / ray.get."""
    from kvpool.bench import put_get as benchmark

    _report("512 MiB in blocks of 2 MiB", benchmark.measure, json_path)


@_benchmark("quotas", "How soon a guarantee that was borrowed is there", "20 s")
@JSON
def quotas(json_path: str | None) -> None:
    """Time how soon a model gets its guarantee of 40 % while another idles, borrows, or asks for all it can."""
    from kvpool.bench import quotas as benchmark

    _report("guarantees that were borrowed", benchmark.measure, json_path)


@_benchmark("tiers", "The host tier: 512 MiB down and up", "15 s")
@JSON
def tiers(json_path: str | None) -> None:
    """Time bringing 512 MiB down to the host tier and up again, beside memcpy of the same bytes."""
    from kvpool.bench import tiers as benchmark

    _report("the host tier, 512 MiB in caches of 2 MiB", benchmark.measure, json_path)


@_benchmark("waiting", "Requests that wait for memory", "20 s")
@JSON
def waiting(json_path: str | None) -> None:
    """Time a release past 2,000 waiting requests, and the return of a killed client's memory."""
    from kvpool.bench import waiting as benchmark

    _report("memory that is waited for", benchmark.measure, json_path)


def _shortened(value: object) -> object:
    return round(value, 2) if isinstance(value, float) else value


def _report(title: str, measure: Callable[[], Coroutine[Any, Any, dict[str, Any]]], json_path: str | None) -> None:
    """Run a benchmark and print its rows."""
    with Interruption() as interruption, working(f"measuring {title}"):
        result = interruption.run(measure())
    _show(title, result, json_path)


def _report_steps(
    title: str,
    steps: int,
    run: Callable[[Callable[[int], None]], dict[str, Any]],
    json_path: str | None,
    columns: Mapping[str, str] | None = None,
) -> None:
    """Run a benchmark that tells how many of its steps are done; print its rows as :func:`_show` does."""
    with Interruption(), progress(f"measuring {title}", total=steps) as done:
        result = run(done)
    _show(title, result, json_path, columns)


def _show(title: str, result: dict[str, Any], json_path: str | None, columns: Mapping[str, str] | None = None) -> None:
    """Print a benchmark's rows, or those ``columns`` of them, by their key, under other names."""
    if json_path is not None:
        write_json(json_path, result)
        return
    rows = result["rows"]
    if columns is not None:
        rows = [{shown: _shortened(row[key]) for key, shown in columns.items()} for row in rows]
    print_rows(title, rows)
