"""Python programs in processes of their own."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap

START_TRIES = 4
"""Ray gives up a start of its own after 30 s, which nothing changes; on a machine that is very busy it takes longer."""
TOO_SLOW = "node timed out during startup"
"""What it says then."""


async def run_driver(program: str, *arguments: str, ray_address: str | None = None) -> str:
    """Run a program, in the cluster at ``ray_address`` or else in a Ray of its own; returns what it printed."""
    for tries_left in reversed(range(START_TRIES)):
        code, printed, complaints = await _run(program, *arguments, ray_address=ray_address)
        if TOO_SLOW not in complaints or not tries_left:
            break
    assert code == 0, complaints
    return printed


async def _run(program: str, *arguments: str, ray_address: str | None) -> tuple[int | None, str, str]:
    # Without an address Ray would take any cluster of this machine, which may end while the program runs.
    environment = os.environ | {"RAY_ADDRESS": ray_address or "local"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(program), *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment,
    )  # fmt: skip
    async with asyncio.timeout(240):
        printed, complaints = await process.communicate()
    return process.returncode, printed.decode(), complaints.decode()
