"""Run the main job from start to end: a Ray of its own, the replay through `ray job submit`, and Ray's end.

Usage: python jobs/demo.py [TRACE]. Without a trace a multi-turn workload is generated.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

JOBS = Path(__file__).resolve().parent
OUT = Path("demo-out")


def main() -> int:
    """Start Ray, submit the job, print its output, stop Ray; returns the job's exit status."""
    ray_command = shutil.which("ray", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if ray_command is None:
        print("demo: the 'ray' command is not installed beside this Python: run 'make install'", file=sys.stderr)
        return 2
    # Ray 2.60 wants a token from everyone who talks to a cluster; this makes one unless there is one.
    subprocess.run([ray_command, "get-auth-token", "--generate"], check=True, stdout=subprocess.DEVNULL)
    # The job's entry point is looked up in the PATH that the cluster was started with.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    import ray

    print("demo: starting Ray ...", flush=True)
    context = ray.init(
        address="local",
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=_free_port(),
        log_to_driver=False,
    )
    try:
        print(f"demo: dashboard at http://{context.dashboard_url}", flush=True)
        trace = ["--trace", str(Path(sys.argv[1]).resolve())] if sys.argv[1:] and sys.argv[1] else []
        # Where several Rays run on one machine, Ray 2.60 gives a job the address of any of them.
        job = ["env", f"RAY_ADDRESS={context.address_info['gcs_address']}"]
        job += ["python", "replay_trace.py", *trace, "--capacity", "0.05", "--out", str(OUT.resolve())]
        command = [ray_command, "job", "submit", "--address", f"http://{context.dashboard_url}"]
        command += ["--working-dir", str(JOBS), "--", *job]
        print("demo:", " ".join(command), flush=True)
        return subprocess.run(command, check=False).returncode
    finally:
        ray.shutdown()
        print("demo: Ray is stopped", flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
