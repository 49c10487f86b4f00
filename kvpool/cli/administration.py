"""``kvpool ls``, ``leases``, ``contains``, ``evict``, ``invalidate``, ``trim``, ``defragment``, ``set-policy`` …

They speak as the operator: to all tenants, unless ``--tenant`` names one. None of them needs to run where the pool's
memory is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import click
from opentelemetry.context import get_current

from kvpool.actors.protocol import STEPS_S
from kvpool.cli.destination import check_file
from kvpool.cli.options import JSON, MODEL, NAME, ONE_MODEL, TENANT, format_key, format_model, parse_keys
from kvpool.cli.output import print_rows, write_json
from kvpool.cli.spinner import working
from kvpool.errors import InvalidRequestError, from_wire
from kvpool.sizes import format_count, format_size, parse_size
from kvpool.telemetry.context import inject

_ANSWER_S = 30.0
_PART = 1000
"""Caches of one answer of the pool."""

NOT_FOUND = 1
"""Exit status of ``invalidate`` when the keys it was given name nothing."""


async def _find(name: str) -> Any:
    """Return the handle of a pool's actor that speaks this version's protocol.

    Raises
    ------
    ProtocolError
        If it runs another version: says how to drain and restart it.
    """
    from kvpool.actors.cluster import ensure_ray, find_actor
    from kvpool.actors.handshake import shake_hands

    ensure_ray()
    return await shake_hands(lambda: find_actor(name), name, timeout_s=_ANSWER_S)


async def _call(method: Any, *arguments: Any, timeout_s: float = _ANSWER_S) -> Any:
    from kvpool.actors.cluster import call

    return await call(method, *arguments, timeout_s=timeout_s)


def ask(name: str, method: str, *arguments: Any, doing: str = "asking", timeout_s: float = _ANSWER_S) -> Any:
    """Call a method of a pool's actor, with a sign of life."""

    async def run() -> Any:
        return await _call(getattr(await _find(name), method), *arguments, timeout_s=timeout_s)

    with working(f"{doing} pool {name}"):
        return asyncio.run(run())


def _plain(value: Any) -> Any:
    """What JSON can hold: hashes as hexadecimal digits."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def format_age(seconds: float | None) -> str:
    """Return seconds as text in the largest unit of which there are two (``"12.3 s"``, ``"5 min"``)."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"


@click.command()
@NAME
@TENANT
@MODEL
@click.option("--limit", type=click.IntRange(min=0), default=20, show_default=True, help="Caches to list at most.")
@click.option(
    "--sort",
    type=click.Choice(["recent", "uses", "bytes"]),
    help="List first those used last, used most often, or largest; --limit is at most 1000 then.",
)
@JSON
def ls(
    name: str, tenant: str | None, model: str | int | None, limit: int, sort: str | None, json_path: str | None
) -> None:
    """List models and caches."""
    if sort is not None and limit > _PART:
        raise InvalidRequestError(f"--limit is at most {_PART} with --sort, not {limit}", asked=limit)

    async def run() -> dict[str, Any]:
        pool = await _find(name)
        listed: dict[str, Any] = {"next": None}
        caches: list[Any] = []
        while not caches or (listed["next"] is not None and len(caches) < limit):
            part = min(limit - len(caches), _PART)
            listed = await _call(pool.ls, tenant, model, part, sort, listed["next"])
            caches += listed["caches"]
            if not listed["caches"]:
                break
        return listed | {"caches": caches}

    with working(f"asking pool {name}"):
        listed = asyncio.run(run())
    if json_path is not None:
        write_json(json_path, _plain(listed))
        return
    models = [
        each | {"number": format_model(each["number"]), "block_bytes": _size(each["block_bytes"]),
                "limit_bytes": _size(each["limit_bytes"]), "bytes": format_size(each["bytes"])}
        for each in listed["models"]
    ]  # fmt: skip
    if models:
        print_rows(f"models of pool {name}", [_without(each, "fingerprint") for each in models])
    if listed["caches"]:
        rows = [
            each | {"id": str(each["id"]), "key": format_key(each["key"]) if each["key"] else None,
                    "number": format_model(each["number"]) if each["number"] is not None else None,
                    "bytes": format_size(each["bytes"]), "idle_s": format_age(each["idle_s"])}
            for each in listed["caches"]
        ]  # fmt: skip
        print_rows("caches", [{("idle" if key == "idle_s" else key): row[key] for key in row} for row in rows])
    click.echo(f"{len(listed['caches']):,} of {format_count(listed['total'], 'cache')} shown")


@click.command()
@NAME
@TENANT
@click.option("--revoke", "client", metavar="CLIENT", help="End all leases of this client, without its help.")
@JSON
def leases(name: str, tenant: str | None, client: str | None, json_path: str | None) -> None:
    """Show who holds what: process, job, age, bytes. With --revoke, end what one client holds.

    A revoked process gets an error when it next uses its handles; its tensors stay mapped. What it can still write to
    is given to nobody until it has dropped them or has ended.
    """
    if client is not None:
        ended = ask(name, "revoke", client, tenant)
        if json_path is not None:
            write_json(json_path, ended)
            return
        click.echo(
            f"{ended['client']} held {format_count(ended['caches'], 'cache')}, {format_size(ended['bytes'])}: revoked; "
            f"it may still map {format_size(ended['mapped_bytes'])}"
        )
        return
    held = ask(name, "leases", tenant)
    if json_path is not None:
        write_json(json_path, {"leases": held})
        return
    if not held:
        click.echo(f"nobody holds memory of pool {name}")
        return
    rows = [
        each | {"bytes": format_size(each["bytes"]), "pid": each["pid"] and str(each["pid"]),
                "node": each["node"] and each["node"][:8], "age": format_age(each["age_s"]),
                "connected": format_age(each["connected_s"])}
        for each in held
    ]  # fmt: skip
    print_rows(f"leases of pool {name}", [_without(row, "age_s", "connected_s") for row in rows])


@click.command()
@NAME
@click.option("--tenant", default="default", show_default=True, help="Whose model.")
@ONE_MODEL
@click.argument("keys", nargs=-1, required=True, callback=parse_keys, metavar="KEY...")
@JSON
def contains(name: str, tenant: str, model: str | int, keys: tuple[bytes, ...], json_path: str | None) -> None:
    """Show how many of the leading KEYs of a chain are on a pool's devices, and where (not what lies below these).

    A KEY is the text under which a cache was sealed, or a block's hash: hash: and 32 hexadecimal digits. Takes no
    lease, and counts as no use.
    """
    (answer,) = ask(name, "contains", tenant, [(model, b"".join(keys), inject(get_current()))])
    if answer[0] == "error":
        raise from_wire(answer[1:])
    found = answer[1]
    if json_path is not None:
        write_json(json_path, found)
        return
    where = ", ".join(f"{blocks:,} on {device}" for device, blocks in sorted(found["devices"].items()))
    click.echo(f"{found['blocks']:,} of {len(keys):,} in the pool{': ' + where if where else ''}")


@click.command()
@NAME
@TENANT
@MODEL
@click.option("--device", help="Only what is on this device.")
@click.option("--bytes", "size", help="Stop when so much is found: '1GiB'.")
@click.option("--all", "everything", is_flag=True, help="Evict all that nobody holds.")
@JSON
def evict(
    name: str,
    tenant: str | None,
    model: str | int | None,
    device: str | None,
    size: str | None,
    everything: bool,
    json_path: str | None,
) -> None:
    """Evict caches that nobody holds, in the order of the eviction policy."""
    if everything and size is not None:
        raise InvalidRequestError(f"--bytes {size} and --all contradict each other: give one of them", asked=size)
    if not everything and size is None:
        raise InvalidRequestError("say how much is to go: --bytes 1GiB, or --all (of --tenant, --model or --device)")
    size_bytes = parse_size(size) if size is not None else None
    went = ask(name, "evict", tenant, model, device, size_bytes, doing="evicting from", timeout_s=STEPS_S)
    if json_path is not None:
        write_json(json_path, went)
        return
    click.echo(
        f"{format_count(went['caches'], 'cache')} evicted, {format_size(went['bytes'])}; held, so not evicted: "
        f"{format_count(went['leased_caches'], 'cache')}, {format_size(went['leased_bytes'])}"
    )


@click.command()
@NAME
@TENANT
@ONE_MODEL
@click.option("--all", "everything", is_flag=True, help="All content of the model.")
@click.argument("keys", nargs=-1, callback=parse_keys, metavar="[KEY...]")
@JSON
def invalidate(
    name: str, tenant: str | None, model: str | int, everything: bool, keys: tuple[bytes, ...], json_path: str | None
) -> None:
    """Remove a model's content for good, or what is stored under KEYs and all that is chained behind them.

    A KEY is the text under which a cache was sealed, or a block's hash: hash: and 32 hexadecimal digits. When the
    command ends, no look-up finds the content, what was being written cannot be sealed, and the memory is zeroed; who
    holds a lease on it keeps it until it ends, and is named. Exit status: 1 if nothing is stored under the KEYs.
    """
    if everything == bool(keys):
        raise InvalidRequestError("say what is to go: the keys, or --all content of the model")
    gone = ask(
        name, "invalidate", model, list(keys) or None, tenant, doing="invalidating content of", timeout_s=STEPS_S
    )
    if json_path is not None:
        write_json(json_path, _plain(gone))
    else:
        _show_invalidated(gone)
    if keys and not (gone["caches"] or gone["unsealed"] or gone["lower_keys"] or gone["held"]):
        click.echo("nothing is stored under these keys", err=True)
        click.get_current_context().exit(NOT_FOUND)


def _show_invalidated(gone: Mapping[str, Any]) -> None:
    click.echo(
        f"{format_count(gone['caches'], 'cache')} invalidated, {format_size(gone['bytes'])}; "
        f"{gone['unsealed']:,} that were being written cannot be sealed any more"
    )
    if gone["lower_keys"]:
        same = ": the same content, where it lay in both places" if gone["caches"] else ""
        click.echo(f"{format_count(gone['lower_keys'], 'key')} removed from the tiers below the devices{same}")
    for client, (caches, size_bytes) in gone["held"].items():
        click.echo(f"{client} still holds {caches:,} of them, {format_size(size_bytes)}: zeroed when it lets go")


@click.command()
@NAME
@JSON
def trim(name: str, json_path: str | None) -> None:
    """Give the pool's warm pages back to the system."""
    size_bytes = ask(name, "trim", doing="trimming", timeout_s=STEPS_S)
    if json_path is not None:
        write_json(json_path, {"bytes": size_bytes})
    else:
        click.echo(f"{format_size(size_bytes)} given back, as soon as clients that still map some of it let go")


@click.command()
@NAME
@JSON
def defragment(name: str, json_path: str | None) -> None:
    """Compact the pool's memory; what somebody has leased stays where it is."""
    done = ask(name, "defragment", doing="compacting", timeout_s=STEPS_S)
    if json_path is not None:
        write_json(json_path, done)
    else:
        click.echo(f"{format_size(done['moved_bytes'])} moved, {format_count(done['freed_pages'], 'page')} freed")


@click.command()
@NAME
@TENANT
@JSON
def flush(name: str, tenant: str | None, json_path: str | None) -> None:
    """Write all that is stored to disk, so that a pool of the same name and disk_url finds it again.

    For a clean end: 'kvpool flush', then 'kvpool stop'. Stop what writes before.
    """
    done = ask(name, "flush", tenant, doing="writing to disk what is stored in", timeout_s=STEPS_S)
    if json_path is not None:
        write_json(json_path, done)
        return
    click.echo(f"on disk: {format_count(done['caches'], 'cache')}, {format_size(done['bytes'])}")
    if done["displaced"]:
        what = format_count(done["displaced"], "cache")
        click.echo(f"not there for want of room: {what}. disk_budget, or its disk, is too small for all")


@click.command("set-policy")
@NAME
@click.argument("policy")
@JSON
def set_policy(name: str, policy: str, json_path: str | None) -> None:
    """Let another eviction policy decide from now on; it takes over what is resident.

    POLICY is a name, or module:name of one's own; what the module's file says now is what decides.
    """
    now = ask(name, "set_policy", policy)
    if json_path is not None:
        write_json(json_path, {"policy": now})
    else:
        click.echo(f"pool {name} evicts by {now}")


@click.command()
@NAME
@TENANT
@click.option("--limit", type=click.IntRange(min=1), help="End after so many events.")
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    default="-",
    show_default=True,
    callback=check_file,
    help="Write JSON lines to FILE.",
)
def events(name: str, tenant: str | None, limit: int | None, json_path: str) -> None:
    """Write what happens to the pool's content, as it happens: a line of JSON for each event, until Ctrl-C."""
    from kvpool.client.events import EventReader

    async def run() -> None:
        reader = EventReader(partial(_call, (await _find(name)).events), tenant)
        await reader.start()
        click.echo(f"listening to pool {name}", err=True)
        left = limit
        with click.open_file(json_path, "w", encoding="utf-8") as out:  # not before the pool is found: it empties it
            while left is None or left > 0:
                for event in (await reader.poll())[:left]:
                    out.write(json.dumps(event.to_dict()) + "\n")
                    left = left if left is None else left - 1
                out.flush()

    with suppress(KeyboardInterrupt):
        asyncio.run(run())


def _size(size_bytes: int | None) -> str | None:
    return format_size(size_bytes) if size_bytes is not None else None


def _without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}
