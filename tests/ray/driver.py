"""Python programs in processes of their own."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap


async def run_driver(program: str, *arguments: str, ray_address: str | None = None) -> str:
    """Run a program, in the cluster at ``ray_address`` or else in a Ray of its own; returns what it printed."""
    # Without an address Ray would take any cluster of this machine, which may end while the program runs.
    environment = os.environ | {"RAY_ADDRESS": ray_address or "local"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(program), *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=environment,
    )  # fmt: skip
    async with asyncio.timeout(90):
        printed, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    return printed.decode()
