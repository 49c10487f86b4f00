"""Niceness of our actors, in processes of their own: it cannot be undone without privilege."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import logging, os, sys, threading
from pathlib import Path
from kvpool.actors.priority import niceness, run_at_normal_priority
logging.basicConfig(level=logging.INFO)
os.setpriority(os.PRIO_PROCESS, 0, 15)
end = threading.Event()
thread = threading.Thread(target=end.wait, daemon=True)
thread.start()
if sys.argv[1] != "0":
    os.setuid(int(sys.argv[1]))
print(niceness())
run_at_normal_priority()
threads = [int(entry.name) for entry in Path("/proc/self/task").iterdir()]
print(sorted(os.getpriority(os.PRIO_PROCESS, each) for each in threads))
end.set()
"""

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root may lower its niceness, and become another user")


def run(user: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, str(user)], capture_output=True, text=True, timeout=240)


def test_every_thread_runs_at_normal_priority_and_the_doctor_expects_it():
    done = run(0)
    assert done.stdout.strip() == "0\n[0, 0]", done.stderr


def test_who_may_not_is_told_what_to_do_and_goes_on():
    done = run(65534)
    assert done.stdout.strip() == "15\n[15, 15]", done.stderr
    assert "RAY_worker_niceness=0" in done.stderr
