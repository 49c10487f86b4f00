"""The demo: a Ray of its own, the main job through ``ray job submit``, and nothing left of either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from kvpool.workload import generate

DEMO = Path(__file__).parents[2] / "jobs" / "demo.py"


def write_trace(path: Path) -> int:
    requests = generate(5, sessions=25)
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            fields = {
                "timestamp": request.timestamp_ms,
                "input_length": request.input_length,
                "output_length": request.output_length,
                "hash_ids": request.hash_ids,
            }
            file.write(json.dumps(fields) + "\n")
    return len(requests)


def started_with(mark: str) -> dict[int, str]:
    """Processes whose environment holds ``mark``: whatever the demo started has inherited it."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended meanwhile
    return found


def test_the_demo_replays_a_trace_prints_the_figures_and_stops_its_ray(tmp_path: Path) -> None:
    trace = tmp_path / "small.jsonl"
    requests = write_trace(trace)
    mark = f"KVPOOL_DEMO_TEST={tmp_path}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KVPOOL_"))}
    with (tmp_path / "log").open("w+", encoding="utf-8") as log:
        demo = subprocess.Popen(
            [sys.executable, str(DEMO), str(trace)],
            cwd=tmp_path,
            env=clean,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
