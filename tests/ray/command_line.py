"""Calls of ``kvpool``: in this process, which has all imported and is connected, or in one of their own."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import ray
from click.testing import CliRunner

from kvpool.cli import main

RAY_LOG = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\t(INFO|WARNING) ")
SIGN_OF_LIFE = re.compile(r".* … \(\d+ s\)$|.*: [\d,]+ of [\d,]+ \(\d+ %\)$")
"""What a command says it does, when that takes a second or two."""


class Answer(NamedTuple):
    """What a command printed; ``stderr`` without the log lines of Ray itself and signs of life."""

    code: int
    stdout: str
    stderr: str


Cli = Callable[..., Awaitable[Answer]]


async def call_here(*arguments: object, code: int = 0) -> Answer:
    """Call the command line in a thread: commands run event loops of their own."""
    unset = {name: None for name in os.environ if name.startswith("KVPOOL_")}
    async with asyncio.timeout(240):
        done = await asyncio.to_thread(CliRunner(env=unset).invoke, main, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return _checked(Answer(done.exit_code, done.stdout, _own(done.stderr)), code)


async def start_process(*arguments: object, folder: Path) -> asyncio.subprocess.Process:
    """Start the command line in a process of its own, which finds the cluster of this test session."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KVPOOL_")}
    environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from kvpool.cli import main; main()", *(str(each) for each in arguments),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=environment,
    )  # fmt: skip


async def call_process(*arguments: object, folder: Path, code: int = 0) -> Answer:
    """Call the command line in a process of its own, and wait for its end."""
    process = await start_process(*arguments, folder=folder)
    async with asyncio.timeout(240):
        printed, complaints = await process.communicate()
    return _checked(Answer(process.returncode or 0, printed.decode(), _own(complaints.decode())), code)


def _own(complaints: str) -> str:
    lines = complaints.splitlines(keepends=True)
    return "".join(line for line in lines if not RAY_LOG.match(line) and not SIGN_OF_LIFE.match(line))


def _checked(answer: Answer, code: int) -> Answer:
    assert answer.code == code, answer.stderr
    assert "Traceback" not in answer.stderr
    return answer
