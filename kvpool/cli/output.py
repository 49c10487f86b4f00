"""What commands print: tables for people, JSON for programs, progress on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvpool.cli.destination import STANDARD_OUTPUT, writing
from kvpool.cli.spinner import called_after

_PROGRESS_AFTER_S = 1.0
_PROGRESS_AGAIN_S = 10.0


def write_json(destination: str | Path, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` as JSON to a file, or to standard output for ``-``."""
    text = json.dumps(payload, indent=2, allow_nan=False) + "\n"
    if str(destination) == STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    with writing(destination):
        Path(destination).write_text(text, encoding="utf-8")


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table on standard output; columns are the keys, in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_format_value(row.get(column)) for column in columns))
    console = Console()
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        # A file or pipe has no width, and a table cut at 80 columns is of no use there.
        console.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how much of ``total`` is done.

    Shows it on standard error once the block has taken a second, also when nothing is done yet: a bar in a terminal,
    elsewhere (the log of a job) a line then, and one every ten seconds.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(description, total=total)
    shown = Event()
    done_so_far = 0

    def tell() -> None:
        share = 100 * done_so_far // total if total else 0
        console.print(f"{description}: {done_so_far:,} of {total:,} ({share} %)", highlight=False, soft_wrap=True)

    def show() -> None:
        bar.start()
        shown.set()

    def report(done: int) -> None:
        nonlocal done_so_far
        done_so_far = done
        bar.update(task, completed=done)

    told = (show, math.inf) if console.is_terminal else (tell, _PROGRESS_AGAIN_S)
    try:
        with called_after(_PROGRESS_AFTER_S, *told):
            yield report
    finally:
        if shown.is_set():  # it writes an empty line otherwise
            bar.stop()


def _format_value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return f"{_format_value(min(value))} to {_format_value(max(value))}" if value else "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
