"""``kvpool waiting``: who waits for memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from kvpool.cli.administration import ask, format_age
from kvpool.cli.options import JSON, NAME, TENANT
from kvpool.cli.output import print_rows, write_json
from kvpool.pool.waiting import MOST_LISTED
from kvpool.sizes import format_count, format_size


@click.command()
@NAME
@TENANT
@click.option(
    "--limit", type=click.IntRange(0, MOST_LISTED), default=20, show_default=True, help="Requests to list at most."
)
@JSON
def waiting(name: str, tenant: str | None, limit: int, json_path: str | None) -> None:
    """Show who waits for memory, in the order of the queue: process, model, bytes, since when and for how long still.

    A new cache waits for memory on any device of its host, one that grows for its own device, or either for room below
    the limit of its model or tenant.
    """
    listed = ask(name, "waiting", tenant, limit)
    if json_path is not None:
        write_json(json_path, listed)
        return
    if not listed["total"]:
        click.echo(f"nobody waits for memory of pool {name}")
        return
    if listed["requests"]:
        print_rows(f"waiting for memory of pool {name}", [_row(each) for each in listed["requests"]])
    click.echo(f"{len(listed['requests']):,} of {format_count(listed['total'], 'waiting request')} shown")


def _row(request: Mapping[str, Any]) -> dict[str, Any]:
    if request["limit_of"] is not None:
        lacks = f"the limit of {request['limit_of']}"
    else:
        lacks = "any device of its host" if request["device"] is None else request["device"]
    kind = "new cache" if request["cache"] is None else f"growth of cache {request['cache']}"
    return {
        "client": request["client"],
        "tenant": request["tenant"],
        "model": request["model"],
        "bytes": format_size(request["bytes"]),
        "for": kind,
        "waits for": lacks,
        "priority": request["priority"],
        "waited": format_age(request["waited_s"]),
        "left": format_age(request["left_s"]),
        "pid": request["pid"] and str(request["pid"]),
        "hostname": request["hostname"],
    }
