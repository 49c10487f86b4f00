"""``kvpool quota``: what tenants and models are guaranteed and limited to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from kvpool.cli.administration import ask
from kvpool.cli.options import JSON, MODEL, NAME
from kvpool.cli.output import print_rows, write_json
from kvpool.errors import InvalidRequestError
from kvpool.sizes import format_size, parse_size


@click.command()
@NAME
@click.option("--tenant", help="Of this tenant.  [default: all; with --model: default]")
@MODEL
@click.option("--guaranteed", help="Bytes, 10GiB, 40% of the pool, or 'none'.  [default when setting: none]")
@click.option("--limit", help="The same: the most it may hold, or 'none'.  [default when setting: none]")
@click.option("--revision", type=int, help="Change nothing if this one, or a later one, holds.")
@JSON
def quota(
    name: str,
    tenant: str | None,
    model: str | int | None,
    guaranteed: str | None,
    limit: str | None,
    revision: int | None,
    json_path: str | None,
) -> None:
    """Show quotas; with --guaranteed or --limit, state the whole quota of a --model, or of a --tenant.

    What is not given when setting one is nothing guaranteed, or no limit.
    """
    if guaranteed is None and limit is None:
        if revision is not None:
            raise InvalidRequestError("--revision goes with --guaranteed or --limit: say what is to hold")
        shown = [each for each in ask(name, "quotas", tenant) if model is None or each["model"] == model]
        if json_path is not None:
            write_json(json_path, {"quotas": shown})
        else:
            show_quotas(name, shown)
            if not shown:
                whose = " for that model" if model is not None else f" of tenant {tenant}" if tenant is not None else ""
                click.echo(f"pool {name} has no quota{whose}; state one with --guaranteed or --limit")
        return
    if model is None and tenant is None:
        raise InvalidRequestError("a quota is a model's or a tenant's: give --model, or --tenant")
    asked = (tenant or "default", model, guaranteed or 0, limit, revision)
    holds = ask(name, "set_quota", *asked, doing="setting a quota of")
    if json_path is not None:
        write_json(json_path, holds)
        return
    show_quotas(name, [holds])
    if not holds["applied"]:
        click.echo(f"not changed: revision {holds['revision']} holds already, asked for {revision}")


def show_quotas(name: str, quotas: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each quota, if there is any."""
    if not quotas:
        return
    rows = [
        {
            "tenant": each["tenant"],
            "model": (each["model"] or "(all)") + ("" if each.get("registered", True) else " (not registered)"),
            "guaranteed": _amount(each["guaranteed"], each["guaranteed_bytes"]),
            "limit": "none" if each["limit"] is None else _amount(each["limit"], each["limit_bytes"]),
            "holds": format_size(each["held_bytes"]),
            "leased": format_size(each["leased_bytes"]),
            "waiting": each["waiting"],
            "revision": each["revision"],
        }
        for each in quotas
    ]
    print_rows(f"quotas of pool {name}", rows)
    for warning in dict.fromkeys(line for each in quotas for line in (each["warning"] or "").splitlines()):
        click.echo(f"warning: {warning}")


def _amount(given: str, size_bytes: int) -> str:
    now = format_size(size_bytes)
    asked = given if given.endswith("%") else format_size(parse_size(given)) if size_bytes else now
    return now if asked == now else f"{asked}: {now}"  # less than was asked, where all guarantees exceed the memory
