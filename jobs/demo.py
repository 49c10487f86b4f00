"""Run the main job from start to end: a Ray of its own, the replay through `ray job submit`, and Ray's end.

Usage: python jobs/demo.py [TRACE]. Without a trace a multi-turn workload is generated.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOBS = Path(__file__).resolve().parent
OUT = Path("demo-out")
_START_S = 60.0


def main() -> int:
    """Start Ray, submit the job, print its output, stop Ray; returns the job's exit status."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    if sys.argv[1:] and sys.argv[1] and not Path(sys.argv[1]).is_file():
        print(f"demo: there is no file {sys.argv[1]}", file=sys.stderr)
        return 2
    ray_command = shutil.which("ray", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if ray_command is None:
        print("demo: the 'ray' command is not installed beside this Python: run 'make install'", file=sys.stderr)
        return 2
    # Ray 2.60 wants a token from everyone who talks to a cluster; this makes one unless there is one.
    subprocess.run([ray_command, "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    # The job's entry point is looked up in the PATH that the cluster was started with.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ["RAY_AUTH_MODE"] = "token"  # what ray.init() sets: the cluster asks for the token, its clients show it
    os.environ.pop("RAY_ADDRESS", None)
    # Every port and the folder are its own, so that it runs beside other Rays: with ray.init() the agent that takes
    # jobs would have a fixed port, and a job would be given the address of any Ray on the machine.
    ports = {name: _free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
    with tempfile.TemporaryDirectory(prefix="kvpool-demo-", ignore_cleanup_errors=True) as folder:
        start = [ray_command, "start", "--head", "--block", "--disable-usage-stats", "--temp-dir", folder]
        start += ["--node-ip-address", "127.0.0.1", "--ray-client-server-port", str(_free_port())]
        start += [f"--{name}={port}" for name, port in ports.items()]
        print("demo: starting Ray ...", flush=True)
        cluster = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not _answers(ports["dashboard-port"], cluster):
                print(f"demo: Ray did not start; its logs are in {folder}, try: {' '.join(start)}", file=sys.stderr)
                return 2
            print(f"demo: dashboard at {dashboard}", flush=True)
            trace = ["--trace", str(Path(sys.argv[1]).resolve())] if sys.argv[1:] and sys.argv[1] else []
            job = ["env", f"RAY_ADDRESS=127.0.0.1:{ports['port']}", "python", "replay_trace.py", *trace]
            job += ["--capacity", "0.05", "--out", str(OUT.resolve())]
            command = [ray_command, "job", "submit", "--address", dashboard, "--working-dir", str(JOBS), "--", *job]
            print("demo:", " ".join(command), flush=True)
            return subprocess.run(command, check=False).returncode
        finally:
            print("demo: stopping Ray, which takes up to half a minute ...", flush=True)
            cluster.terminate()
            cluster.wait()
            print("demo: Ray is stopped", flush=True)


def _answers(port: int, cluster: subprocess.Popen[bytes]) -> bool:
    """Wait until something listens on the port; False when Ray ends before, or after a minute."""
    deadline = time.monotonic() + _START_S
    while cluster.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            time.sleep(0.1)
        else:
            return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
