"""``kvpool start``, ``kvpool stop``, ``kvpool status``: a pool's life from the command line."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from kvpool.cache.disk.advice import PENDING_REMOVALS
from kvpool.cli.options import JSON, NAME
from kvpool.cli.output import print_rows, write_json
from kvpool.cli.spinner import working
from kvpool.errors import InvalidRequestError, KvpoolError
from kvpool.sizes import format_count, format_size


@click.command()
@click.option("--name", help="Name of the pool.  [default: kvpool]")
@click.option("--devices", help="'host:2' or 'host:2x512MiB': number and size of host-memory devices.")
@click.option("--memory-per-device", help="Size of a device, where --devices names none: '1GiB'.")
@click.option("--policy", help="Eviction policy.  [default: lru]")
@click.option("--placement", help="round_robin or least_loaded.  [default: least_loaded]")
@click.option("--host-memory", help="Host memory below each device, for what is evicted: '4GiB'.  [default: none]")
@click.option("--disk-url", help="Folder or fsspec URL below that.  [default: none]")
@click.option("--disk-budget", help="Most bytes there, for each device.  [default: 10GiB]")
@click.option("--preset", type=click.Choice(["vista", "deepseek-ocr"]), help="Sizes and policy of a known application.")
@click.option("--num-gpus", type=int, help="Number of devices of a --preset.  [default: 1]")
@JSON
def start(preset: str | None, num_gpus: int | None, json_path: str | None, **settings: Any) -> None:
    """Start a pool in the running Ray cluster, or join the same one.

    What is not given here comes from KVPOOL_* variables and kvpool.yaml.
    """
    from kvpool import presets
    from kvpool.actors.cluster import call, ensure_ray
    from kvpool.client import start as start_pool
    from kvpool.config import load_config
    from kvpool.pool.statistics import PoolStatistics

    given = {key: value for key, value in settings.items() if value is not None}
    make = {"vista": presets.vista_config, "deepseek-ocr": presets.deepseek_ocr_config}
    if num_gpus is not None and (preset is None or "devices" in given):
        raise InvalidRequestError(
            f"--num-gpus {num_gpus} says how many devices a --preset has, beside no other --devices: give --preset, or "
            f"--devices host:{max(num_gpus, 1)}",
            asked=num_gpus,
        )
    config = make[preset](1 if num_gpus is None else num_gpus, **given) if preset else load_config(**given)

    async def run() -> Any:
        ensure_ray()  # no Ray is started for it: the pool would end with this command
        actor = await start_pool(config)
        return PoolStatistics.from_dict(await call(actor.statistics, timeout_s=30.0))

    with working(f"starting pool {config.name}"):
        stats = asyncio.run(run())
    _show(stats, json_path)


@click.command()
@NAME
@click.option("--drain", "drain_s", type=float, help="Wait up to so many seconds for leases to end.")
@JSON
def stop(name: str, drain_s: float | None, json_path: str | None) -> None:
    """Delete a pool and give its memory back. Refuses while clients hold leases."""
    from kvpool.client import delete

    with working(f"stopping pool {name}"):
        asyncio.run(delete(name, drain_s=drain_s))
    if json_path is not None:
        write_json(json_path, {"deleted": name})
    else:
        click.echo(f"pool {name} is deleted")


@click.command()
@NAME
@JSON
def status(name: str, json_path: str | None) -> None:
    """Show what a pool holds and did."""
    from kvpool.actors.cluster import call, ensure_ray, find_actor
    from kvpool.actors.compatibility import leased_bytes, protocol_difference
    from kvpool.actors.handshake import find_living
    from kvpool.pool.statistics import PoolStatistics

    async def run() -> tuple[KvpoolError | None, Any]:
        ensure_ray()
        actor, described = await find_living(lambda: find_actor(name), timeout_s=30.0)
        other = protocol_difference(name, described)
        return other, await call(actor.statistics if other is None else actor.leases, timeout_s=30.0)

    with working(f"asking pool {name}"):
        other, answer = asyncio.run(run())
    if other is None:
        _show(PoolStatistics.from_dict(answer), json_path)
    else:
        _show_other_version(name, other, leased_bytes(answer), json_path)


def _show_other_version(name: str, other: KvpoolError, leases: dict[str, int], json_path: str | None) -> None:
    """Show what a pool of another version can still be asked, and how to replace it."""
    if json_path is not None:
        write_json(json_path, {"name": name, **other.details, "leases": leases})
        return
    rows = [{"client": client, "leased": format_size(size_bytes)} for client, size_bytes in sorted(leases.items())]
    print_rows(f"pool {name}, of another version", rows)
    click.echo(other.message)


def _show(stats: Any, json_path: str | None) -> None:
    if json_path is not None:
        write_json(json_path, stats.to_dict())
        return
    policy = stats.policy
    if stats.policy_requested != policy:
        policy = f"{policy}, started with {stats.policy_requested}"
    rows = [_device_row(device) for device in stats.devices]
    if any(device.lost for device in stats.devices):  # else a column of "ok" would only make the table wider
        rows = [
            row | {"state": "lost" if device.lost else "ok"} for row, device in zip(rows, stats.devices, strict=True)
        ]
    print_rows(f"pool {stats.name} ({policy}; placement {stats.placement})", rows)
    lower = [device for device in stats.devices if device.lower is not None]
    if lower:
        print_rows("below the devices", [_lower_row(device.name, device.lower) for device in lower])
        for device in lower:
            if device.lower["disk"] is not None and device.lower["disk_problem"]:
                click.echo(f"{device.name}: {device.lower['disk_problem']}")
            pending = (device.lower["disk"] or {}).get("pending_removals", 0)  # an earlier version does not tell
            if pending:
                what = f"{format_count(pending, 'removed cache')} hidden, and still on disk"
                click.echo(f"{device.name}: {what}: {PENDING_REMOVALS}")
            if left := device.lower.get("leftover_removals", 0):
                what = f"removed content of {format_count(left, 'model')} may still be in folders that are not used"
                click.echo(f"{device.name}: {what}: {PENDING_REMOVALS}")
    for device in stats.devices:
        if device.lost:
            click.echo(_of_lost(stats.name, device))
    if stats.policy_failure is not None:
        click.echo(f"{stats.policy} decides since the policy failed: {stats.policy_failure}")
    if stats.quotas:
        from kvpool.cli.quota import show_quotas

        show_quotas(stats.name, stats.quotas)
    below = f" and {stats.lower_keys:,} below" if lower else ""
    click.echo(
        f"{format_count(stats.clients, 'client')}, {format_count(stats.keys, 'key')}{below}, "
        f"{format_count(stats.waiting, 'request')} waiting; "
        f"{stats.blocks_hit:,} of {format_count(stats.blocks_looked_up, 'block')} hit ({stats.hit_ratio:.2%}), "
        f"{format_count(stats.evictions, 'eviction')}, {format_count(stats.refusals, 'refusal')}"
    )


def _device_row(device: Any) -> dict[str, Any]:
    """Return the figures of a device; its kind is in its name."""
    return {
        "device": device.name,
        "capacity": format_size(device.capacity_bytes),
        "live": format_size(device.live_bytes),
        "backed": format_size(device.backed_bytes),
        "frag.": f"{device.fragmentation:.0%}",
        "moved": format_size(device.compacted_bytes),
        "reserve": format_size(device.reserve_bytes),
        "zombie": format_size(device.zombie_bytes),
        "held": format_size(device.pinned_bytes),  # by leases too: "pinned", in 'ls', is by word alone
        "caches": device.caches,
        "evictions": device.evictions,
    }


def _of_lost(pool: str, device: Any) -> str:
    """Say what is gone with a device, what is not, and how to get both back."""
    again = f"'kvpool stop --name {pool}', then 'kvpool start'"
    reason = device.lost.strip().partition("\n")[0]  # Ray says more in the lines below
    if device.disk_url is None:
        return f"{device.name} is lost with all it held ({reason}); start the pool again for a new one: {again}"
    return (
        f"{device.name} is lost with what only its memory held ({reason}); what is on its disk, {device.disk_url}, is "
        f"kept, and found again when the pool is started again: {again}"
    )


def _lower_row(name: str, lower: dict[str, Any]) -> dict[str, Any]:
    host, disk = lower["host"], lower["disk"]
    if disk is not None:
        on_disk = f"{format_size(disk['used_bytes'])} of {format_size(disk['budget_bytes'])}"
        if disk.get("lost"):  # a pool of an earlier version does not tell
            on_disk = f"lost: {format_size(disk['used_bytes'])} out of reach"
    else:
        on_disk = lower["disk_problem"] or "-"
    if lower["leftover_folders"]:
        on_disk += f"; not used: {', '.join(lower['leftover_folders'])}"
    return {
        "device": name,
        "host memory": f"{format_size(host['used_bytes'])} of {format_size(host['capacity_bytes'])}" if host else "-",
        "disk": on_disk,
        "went down": lower["demoted"],
        "came up": lower["fills"],
        "dropped": lower["not_kept"] + (host["dropped"] if host else 0),
        "errors": _told(disk["errors"]) if disk is not None and disk["errors"] else 0,
    }


def _told(errors: dict[str, int]) -> str:
    causes = ", ".join(cause if len(errors) == 1 else f"{cause} {count:,}" for cause, count in sorted(errors.items()))
    return f"{sum(errors.values()):,} ({causes})"
