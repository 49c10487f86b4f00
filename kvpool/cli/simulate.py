"""``kvpool simulate``: what an eviction policy would hit on a trace, without a pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from kvpool.cache.eviction import find_policy
from kvpool.cli.options import JSON
from kvpool.cli.output import print_rows, progress, write_json
from kvpool.simulate import SimulationRow, capacity_in_blocks
from kvpool.simulate import simulate as simulate_policy
from kvpool.workload import read_trace, unique_blocks


def parse_capacity(text: str | float) -> float:
    """Return a share of the trace's unique blocks (float, written with a point) or a number of blocks (int)."""
    try:
        return int(text) if str(text).lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is neither a share such as 0.05 nor a number of blocks such as 5000"
        ) from None


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option("--policy", "policies", multiple=True, default=("lru",), show_default=True, help="Repeat for several.")
@click.option(
    "--capacity",
    "capacities",
    type=parse_capacity,
    metavar="SHARE|BLOCKS",
    multiple=True,
    default=(0.05,),
    show_default=True,
    help="Share of the trace's unique blocks (0.05; 1.0 is all) or number of blocks (5000). Repeat for several.",
)
@JSON
def simulate(trace: Path, policies: tuple[str, ...], capacities: tuple[float, ...], json_path: str | None) -> None:
    """Say what an eviction policy would hit on TRACE (.jsonl or .jsonl.gz with block ids).

    The prefix hit ratio is that of a pool with so much memory: leading resident blocks / all blocks, looked up before
    a request changes anything.
    """
    for policy in policies:
        find_policy(policy)
    requests = list(read_trace(trace))
    unique = unique_blocks(requests)
    if unique:
        for capacity in capacities:
            capacity_in_blocks(capacity, unique)
    cells = [(policy, capacity) for policy in policies for capacity in capacities]
    rows: list[SimulationRow] = []
    with progress(f"simulating {trace.name}", total=len(cells) * len(requests)) as report:
        for policy, capacity in cells:
            before = len(rows) * len(requests)
            rows.append(simulate_policy(requests, policy, capacity, partial(_report_from, report, before)))
    if json_path is not None:
        write_json(json_path, {"rows": rows})
    else:
        print_rows(f"{trace.name}: {len(requests):,} requests, {unique:,} unique blocks", rows)


def _report_from(report: Callable[[int], None], before: int, done: int) -> None:
    report(before + done)
