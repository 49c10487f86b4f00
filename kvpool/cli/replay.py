"""``kvpool replay``: the main job from the command line."""

from __future__ import annotations

from pathlib import Path

import click

from kvpool.cli.destination import check_folder, writing
from kvpool.cli.interruption import Interruption
from kvpool.cli.options import JSON
from kvpool.cli.output import print_rows, progress, write_json
from kvpool.sizes import format_count


@click.command()
@click.argument("trace", required=False, type=click.Path(path_type=Path))
@click.option("--trace", "trace_option", type=click.Path(path_type=Path), help="The same, as an option.")
@click.option("--devices", default="host:2", show_default=True, help="'host:2' or 'host:2x300MiB'.")
@click.option(
    "--capacity",
    default=0.05,
    show_default=True,
    help="Memory as a share of the trace's unique blocks (no size given).",
)
@click.option("--block-bytes", default=65536, show_default=True, help="Size of a block.")
@click.option("--replicas", default=3, show_default=True, help="Model actors.")
@click.option("--in-flight", default=3, show_default=True, help="Requests at once. What one still writes, others miss.")
@click.option("--speed", default="max", show_default=True, help="max, 1x or 10x the trace's pace.")
@click.option("--policy", default="lru", show_default=True, help="Eviction policy.")
@click.option("--limit", type=click.IntRange(min=1), help="Replay only the first so many requests.")
@click.option("--seed", default=1, show_default=True, help="Of the generated workload, when no trace is given.")
@click.option("--pool", help="Use this running pool instead of starting one for the replay.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=check_folder("replay.json", "replay.png"),
    help="Folder for replay.json and replay.png.",
)
@JSON
def replay(
    trace: Path | None,
    trace_option: Path | None,
    devices: str,
    capacity: float,
    block_bytes: int,
    replicas: int,
    in_flight: int,
    speed: str,
    policy: str,
    limit: int | None,
    seed: int,
    pool: str | None,
    out: Path | None,
    json_path: str | None,
) -> None:
    """Replay a trace against a pool: real memory, every hit verified.

    TRACE is a .jsonl or .jsonl.gz file in the Mooncake format; without it a multi-turn workload is generated.
    """
    from kvpool.replay import report
    from kvpool.replay.driver import ReplayPlan
    from kvpool.replay.driver import replay as run_replay
    from kvpool.workload import generate, read_trace

    path = trace or trace_option
    requests = list(read_trace(path)) if path else list(generate(seed))
    requests = requests[:limit]
    plan = ReplayPlan(devices, capacity, block_bytes, replicas, in_flight, speed, policy, pool)
    with Interruption() as interruption, progress("replaying", total=len(requests)) as done:
        result = interruption.run(run_replay(requests, plan, done))
    if json_path is not None:
        write_json(json_path, result.to_dict())
    else:
        title = f"replay of {path.name if path else f'a generated workload, seed {seed}'}"
        print_rows(title, [{"figure": name, "value": value} for name, value in report.summary(result)])
    if out is not None:
        with writing(out):
            written = report.write(result, out)
        for file in written:
            click.echo(f"wrote {file}", err=True)
    if result.wrong_bytes:
        raise click.ClickException(f"{format_count(result.wrong_bytes, 'wrong byte')}: memory was corrupted")
