"""The demo: a Ray of its own, the main job through ``ray job submit``, and nothing left of either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

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
    mark = f"DEMO_OF_TEST={tmp_path}"
    variable, _, value = mark.partition("=")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KVPOOL_"))}
    with (tmp_path / "stderr").open("w+", encoding="utf-8") as complaints:
        demo = subprocess.Popen(
            [sys.executable, str(DEMO), str(trace)],
            cwd=tmp_path,
            env=clean | {variable: value},
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        )
        assert demo.stdout is not None
        lines, seen = [], {}
        for line in demo.stdout:
            lines.append(line)
            if "wrong bytes" in line:
                seen = started_with(mark)
        printed = "".join(lines)
        assert demo.wait() == 0, printed + (tmp_path / "stderr").read_text(encoding="utf-8")

    table = {cells[0].strip(): cells[1].strip() for cells in rows_of(printed)}
    assert table["wrong bytes"] == "0"
    assert table["requests"] == str(requests)
    assert "replay of small.jsonl" in printed
    figures = json.loads((tmp_path / "demo-out" / "replay.json").read_text(encoding="utf-8"))
    assert figures["requests"] == requests
    assert figures["wrong_bytes"] == 0
    assert figures["verified_bytes"] > 0
    assert (tmp_path / "demo-out" / "replay.png").read_bytes().startswith(b"\x89PNG")

    assert any("raylet" in command for command in seen.values()), "while it runs, its processes can be seen"
    stopping, stopped = printed.splitlines()[-2:]
    assert stopping.startswith("demo: stopping Ray")
    assert stopped == "demo: Ray is stopped"
    deadline_s = monotonic() + 60
    while (left := started_with(mark)) and monotonic() < deadline_s:
        sleep(0.1)  # killed processes are reaped in their own time
    assert left == {}


def rows_of(printed: str) -> list[list[str]]:
    lines = (line for line in printed.splitlines() if line.startswith("│"))
    return [line.strip("│ ").split("│") for line in lines]
