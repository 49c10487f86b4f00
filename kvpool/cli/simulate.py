"""``kvpool simulate``: what eviction policies would hit on a trace, without a pool."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from kvpool.cache.eviction import plain_name, policy_names
from kvpool.cache.guarded_policy import make_policy
from kvpool.cache.index import CacheIndex
from kvpool.cli.destination import check_folder, writing
from kvpool.cli.options import JSON
from kvpool.cli.output import print_rows, progress, write_json
from kvpool.comparison import Cell, as_json, compare, heading, name_of, printable, run_cells, write
from kvpool.errors import InvalidRequestError
from kvpool.simulate import SimulationRow, capacity_in_blocks
from kvpool.sizes import format_count
from kvpool.workload import generate, read_trace, unique_blocks

_ALL = "all"
_SEED = 1
"""Of the generated workload: what ``kvpool replay`` takes by default."""
_SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)


def parse_capacity(text: str | float) -> float:
    """Return a share of the trace's unique blocks (float, written with a point) or a number of blocks (int)."""
    try:
        return int(text) if str(text).lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is neither a share such as 0.05 nor a number of blocks such as 5000"
        ) from None


def _check(capacity: float, unique: int, option: str) -> None:
    try:
        capacity_in_blocks(capacity, unique)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{option}: {error.message}", **error.details) from None


def _printable(rows: Sequence[SimulationRow]) -> list[dict[str, object]]:
    """Return rows for a table, without what its title says (the requests), and what there is none of."""
    left_out = {"requests"}
    if not any(row["host_capacity_blocks"] for row in rows):
        left_out |= {"host_capacity_blocks", "host_hit_ratio"}
    if not any(row["seed"] for row in rows):
        left_out.add("seed")
    printed: list[dict[str, object]] = []
    for row in rows:
        texts = {
            "seed": str(row["seed"]),
            "capacity": name_of(row["capacity"]),
            "prefix_hit_ratio": f"{row['prefix_hit_ratio']:.2%}",
            "host_hit_ratio": f"{row['host_hit_ratio']:.2%}",
        }
        printed.append({key: texts.get(key, value) for key, value in row.items() if key not in left_out})
    return printed


@click.command()
@click.argument("trace", required=False, type=click.Path(path_type=Path))
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=("lru",),
    show_default=True,
    help="A name, or module:name of one's own. Several with commas, or repeat it; all: every one that is built in.",
)
@click.option(
    "--capacity",
    "capacities",
    type=parse_capacity,
    metavar="SHARE|BLOCKS",
    multiple=True,
    help="Share of the trace's unique blocks, with a point (0.05 is 5 %, 1.0 all), or number of blocks, without (5000; "
    "1 is one block). Repeat for several.  "
    "[default: 0.05; of several policies 0.01, 0.05, 0.1, 0.25, 0.5]",
)
@click.option(
    "--host-capacity",
    type=parse_capacity,
    metavar="SHARE|BLOCKS",
    help="Of a host tier below, to which what is evicted goes, and from which it comes up; written as --capacity.  "
    "[default: none]",
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each, averaged.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Simulations at once.  [default: one a core]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=check_folder("simulate.json", "simulate.md", "simulate.png"),
    help="Folder for simulate.json, simulate.md and simulate.png.",
)
@JSON
def simulate(
    trace: Path | None,
    policies: tuple[str, ...],
    capacities: tuple[float, ...],
    host_capacity: float | None,
    seeds: int,
    processes: int | None,
    out: Path | None,
    json_path: str | None,
) -> None:
    """Say what eviction policies would hit on TRACE (.jsonl or .jsonl.gz with block ids).

    Without TRACE it is the multi-turn workload that 'kvpool replay' generates. The prefix hit ratio is that of a pool
    with so much memory: leading resident blocks / all blocks, looked up before a request changes anything. Several
    policies, seeds, or --out give a comparison by capacity beside the offline bound, which no policy can pass that does
    not know the future. With --host-capacity the prefix hit ratio is that of both tiers together: it contains the host
    hit ratio, what came up from the host. So is the bound: of the host it is assumed that whatever it holds comes up in
    time, of a chain no more is hit than the device has room for.
    """
    given = [name.strip() for policy in policies for name in policy.split(",")]
    names = dict.fromkeys(
        plain_name(name) for policy in given for name in (policy_names() if policy == _ALL else [policy])
    )
    for policy in names:
        make_policy(policy, CacheIndex())
    comparing = len(names) > 1 or seeds > 1 or out is not None
    if not capacities:
        capacities = _SHARES if comparing else (0.05,)
    workload = f"a generated workload, seed {_SEED}" if trace is None else trace.name
    requests = generate(_SEED) if trace is None else list(read_trace(trace))
    unique = unique_blocks(requests)
    if unique:
        for capacity in capacities:
            _check(capacity, unique, "--capacity")
        if host_capacity is not None:
            _check(host_capacity, unique, "--host-capacity")
    cells = [
        Cell(policy, capacity, seed, host_capacity)
        for policy in names
        for capacity in capacities
        for seed in range(seeds)
    ]
    with progress(f"simulating {workload}", total=len(cells) * len(requests)) as report:
        rows = run_cells(requests, cells, processes or len(os.sched_getaffinity(0)), report)
    title = f"{workload}: {format_count(len(requests), 'request')}, {format_count(unique, 'unique block')}"
    if not comparing:
        if json_path is not None:
            write_json(json_path, {"rows": rows})
        else:
            print_rows(title, _printable(rows))
        return
    table = compare(requests, rows, capacities, host_capacity)
    payload = as_json(rows, table, capacities)
    if json_path is not None:
        write_json(json_path, payload)
    else:
        print_rows(title, _printable(rows))
        print_rows(heading(rows), printable(table, capacities))
    if out is not None:
        with writing(out):
            written = write(title, payload, table, out)
        for file in written:
            click.echo(f"wrote {file}", err=True)
