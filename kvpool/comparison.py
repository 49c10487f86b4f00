"""Several policies at several capacities on one workload: simulated in parallel processes, beside the offline bound."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from kvpool.simulate import SimulationRow, offline_bound, simulate
from kvpool.sizes import format_count
from kvpool.workload import TraceRequest

BOUND = "offline bound"
_REPORT_EVERY_S = 0.2
_LINES = ("-", "--", "-.", ":")
_MARKERS = "os^Dv"
"""Of the lines of a plot: as many as have no factor in common with the kinds of lines."""


class Cell(NamedTuple):
    """One simulation to be done."""

    policy: str
    capacity: float
    seed: int
    host_capacity: float | None = None


class ComparisonRow(NamedTuple):
    """One policy at all capacities, percent of blocks."""

    policy: str
    percents: tuple[float, ...]
    """Prefix hits, the mean of the seeds."""
    deviations: tuple[float, ...]
    """Standard deviation over the seeds; 0 for one alone."""


def run_cells(
    requests: Sequence[TraceRequest],
    cells: Sequence[Cell],
    processes: int,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> list[SimulationRow]:
    """Simulate all cells and return their rows in the same order.

    Parameters
    ----------
    requests
        The workload.
    cells
        What to simulate.
    processes
        How many run at once; with 1, it is done in this one.
    on_progress
        Told now and then how many requests are done, all cells together.

    Raises
    ------
    InvalidRequestError, UnknownPolicyError
        As :func:`kvpool.simulate.simulate` does.
    """
    if processes == 1 or len(cells) == 1:
        rows: list[SimulationRow] = []
        for cell in cells:
            before = len(rows) * len(requests)
            report = _report_from(on_progress, before)
            rows.append(simulate(requests, cell.policy, cell.capacity, report, cell.seed, cell.host_capacity))
        return rows
    # Spawned, not forked: whoever calls this may have threads.
    context = multiprocessing.get_context("spawn")
    done = context.Array("q", len(cells))
    with ProcessPoolExecutor(min(processes, len(cells)), context, _begin_process, (requests, done)) as pool:
        futures = [pool.submit(_run_in_process, number, cell) for number, cell in enumerate(cells)]
        try:
            waiting: set[Future[SimulationRow]] = set(futures)
            while waiting:
                ended, waiting = wait(waiting, _REPORT_EVERY_S, FIRST_COMPLETED)
                for future in ended:
                    future.result()  # the first error ends it all
                on_progress(sum(done[:]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _report_from(on_progress: Callable[[int], None], before: int) -> Callable[[int], None]:
    return lambda done: on_progress(before + done)


_process: tuple[Sequence[TraceRequest], SynchronizedArray[int]] | None = None
"""In a process of the pool: the workload, and where it says how far each cell is."""


def _begin_process(requests: Sequence[TraceRequest], done: SynchronizedArray[int]) -> None:
    global _process
    _process = requests, done


def _run_in_process(number: int, cell: Cell) -> SimulationRow:
    if _process is None:
        raise RuntimeError("a cell in a process that was not begun")
    requests, done = _process

    def report(count: int) -> None:
        done[number] = count

    return simulate(requests, cell.policy, cell.capacity, report, cell.seed, cell.host_capacity)


def compare(
    requests: Sequence[TraceRequest],
    rows: Iterable[SimulationRow],
    capacities: Sequence[float],
    host_capacity: float | None = None,
) -> list[ComparisonRow]:
    """Return one row for each policy, in their order, and one for the bound that none can pass, at the end."""
    ratios: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        ratios.setdefault(row["policy"], {}).setdefault(row["capacity"], []).append(100 * row["prefix_hit_ratio"])
    table = [
        ComparisonRow(policy, tuple(fmean(at[c]) for c in capacities), tuple(pstdev(at[c]) for c in capacities))
        for policy, at in ratios.items()
    ]
    bounds = tuple(100 * offline_bound(requests, capacity, host_capacity) for capacity in capacities)
    return [*table, ComparisonRow(BOUND, bounds, (0.0,) * len(bounds))]


def heading(rows: Sequence[SimulationRow]) -> str:
    """Return what the table of a comparison says, also of a host tier that all rows have below the device."""
    host = _below(rows)
    return f"prefix hits, % of all blocks, by capacity{host and f', {host}'}"


def _below(rows: Sequence[SimulationRow]) -> str:
    blocks = rows[0]["host_capacity_blocks"] if rows else 0
    return f"with {format_count(blocks, 'block')} of host memory below (its hits included)" if blocks else ""


def printable(table: Sequence[ComparisonRow], capacities: Sequence[float]) -> list[dict[str, str]]:
    """Return the rows of a table for people: percent, with the deviation where there are several seeds."""
    lines = []
    for row in table:
        line = {"policy": row.policy}
        for capacity, percent, deviation in zip(capacities, row.percents, row.deviations, strict=True):
            line[name_of(capacity)] = f"{percent:.2f}" + (f" ± {deviation:.2f}" if deviation >= 0.005 else "")
        lines.append(line)
    return lines


def as_json(
    rows: Sequence[SimulationRow], table: Sequence[ComparisonRow], capacities: Sequence[float]
) -> dict[str, Any]:
    """Return rows and comparison as built-in types."""
    return {
        "rows": list(rows),
        "capacities": list(capacities),
        "comparison": [row._asdict() for row in table],
    }


def write(title: str, payload: dict[str, Any], table: Sequence[ComparisonRow], folder: Path) -> list[Path]:
    """Write ``simulate.json``, ``simulate.md`` and, where matplotlib is installed, ``simulate.png``.

    Makes the folder; returns what was written.
    """
    capacities = payload["capacities"]
    lines = printable(table, capacities)
    header = list(lines[0])
    text = [f"# {title}", "", f"{heading(payload['rows']).capitalize()}.", ""]
    text += [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    text += [f"| {' | '.join(line.values())} |" for line in lines]
    written = [folder / "simulate.json", folder / "simulate.md"]
    folder.mkdir(parents=True, exist_ok=True)
    written[0].write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    written[1].write_text("\n".join(text) + "\n", encoding="utf-8")
    try:
        import matplotlib as mpl
    except ImportError:
        return written
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    places = range(len(capacities))
    for number, row in enumerate(table):
        style: dict[str, Any] = {"color": "black", "linewidth": 1}
        if row.policy != BOUND:  # of policies with the same values each is seen: through the gaps, and by its marker
            style = {"linestyle": _LINES[number % len(_LINES)], "marker": _MARKERS[number % len(_MARKERS)]}
            style |= {"markersize": 9, "fillstyle": "none"}
        axes.errorbar(places, row.percents, yerr=row.deviations, label=row.policy, capsize=3, **style)
    axes.set_xticks(list(places), [name_of(capacity) for capacity in capacities])
    axes.set_xlabel("capacity")
    axes.set_ylabel("prefix hits (% of blocks)")
    highest = max(max(map(sum, zip(row.percents, row.deviations, strict=True))) for row in table)
    axes.set_ylim(0, 1.06 * highest or 1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(f"{title}\n{_below(payload['rows'])}".strip())
    written.append(folder / "simulate.png")
    figure.savefig(written[2], dpi=120)
    pyplot.close(figure)
    return written


def name_of(capacity: float) -> str:
    """Return a capacity for people: a share (float) or a number of blocks (int)."""
    return format_count(capacity, "block") if isinstance(capacity, int) else f"{100 * capacity:g} %"
