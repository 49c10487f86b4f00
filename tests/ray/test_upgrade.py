"""A pool of an older version: recognized, looked at, drained and replaced by this one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
from command_line import call_here
from driver import run_driver
from pool_actors import until

import kvpool
from kvpool import CachePool
from kvpool.actors.cluster import pool_names
from kvpool.actors.protocol import PROTOCOL_VERSION
from kvpool.errors import PoolBusyError, ProtocolError

OLDER = PROTOCOL_VERSION - 1

START = """
    import os, sys
    os.chdir(sys.argv[1])  # workers look for modules in the driver's folder first
    sys.path[0] = sys.argv[1]
    import asyncio, ray
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": sys.argv[1]}}, namespace="kvpool", log_to_driver=False)
    import kvpool
    assert kvpool.__version__ == "0.0.9"

    async def main():
        async with await kvpool.CachePool.create(name=sys.argv[2], devices="host:1x2MiB", page_size="64KiB"):
            pass
    asyncio.run(main())
"""

HOLD = """
    import os, sys
    os.chdir(sys.argv[1])  # workers look for modules in the driver's folder first
    sys.path[0] = sys.argv[1]
    import asyncio, ray
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": sys.argv[1]}}, namespace="kvpool", log_to_driver=False)
    import kvpool
    from kvpool.errors import PoolBusyError, PoolError

    async def main():
        pool = await kvpool.CachePool.connect(sys.argv[2])
        cache = await pool.request_cache("m", size=4096)
        view = cache.numpy("uint8", (4096,))
        view[:] = 7
        print("holding", flush=True)
        sys.stdin.readline()
        while True:  # until the drain has begun
            try:
                await (await pool.request_cache("m", size=4096)).release()
            except PoolBusyError:
                break
        print("refused; what it holds is", int(view[0]), flush=True)
        del view
        await cache.release()
        await asyncio.to_thread(sys.stdin.readline)
        try:
            await pool.request_cache("m", size=4096)
        except PoolError as error:
            print("after the end:", type(error).__name__, flush=True)
    asyncio.run(main())
"""


class OlderPool(NamedTuple):
    """A pool that was started by the package in ``folder``."""

    name: str
    folder: Path
    address: str


@pytest.fixture(scope="module")
def older_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This package as an older version: the protocol's number is one less."""
    folder = tmp_path_factory.mktemp("older")
    package = folder / "kvpool"
    shutil.copytree(Path(kvpool.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, pattern, text in (
        ("actors/protocol.py", r"^PROTOCOL_VERSION = \d+", f"PROTOCOL_VERSION = {OLDER}"),
        ("version.py", r'^__version__ = ".*"', '__version__ = "0.0.9"'),
    ):
        source, count = re.subn(pattern, text, (package / file).read_text(), flags=re.MULTILINE)
        assert count == 1
        (package / file).write_text(source)
    return folder


@pytest.fixture
async def older(older_package: Path, local_ray: None) -> OlderPool:
    pool = OlderPool(f"t{os.getpid()}-older", older_package, ray.get_runtime_context().gcs_address)
    await run_driver(START, str(older_package), pool.name, ray_address=pool.address)
    yield pool
    if pool.name in pool_names():
        await kvpool.delete(pool.name)


def cli(pool: OlderPool, command: str, code: int = 0) -> str:
    """Type a command line (with ``NAME=value`` in front, as a shell takes it)."""
    program = shlex.quote(sys.executable) + " -c 'from kvpool.cli import main; main()'"
    done = subprocess.run(
        re.sub(r"(^| )kvpool (?=\w)", rf"\1{program} ", command, count=1),
        shell=True, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "RAY_ADDRESS": pool.address},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture
def holder(older: OlderPool) -> Iterator[subprocess.Popen[str]]:
    """A client of the older version that holds a lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(older.folder), older.name],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "RAY_ADDRESS": older.address},
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


async def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return (await asyncio.to_thread(process.stdout.readline)).strip()


async def test_an_older_pool_is_recognized_by_connect_and_create(older: OlderPool) -> None:
    for meet in (CachePool.connect(older.name), CachePool.create(name=older.name, devices="host:1x2MiB")):
        with pytest.raises(ProtocolError, match=f"runs kvpool 0.0.9 with protocol {OLDER}") as caught:
            await meet
        assert caught.value.details["commands"] == [
            f"kvpool stop --name {older.name} --drain 60",
            f"KVPOOL_DEVICES=host:1x2MiB KVPOOL_PAGE_SIZE=65536 kvpool start --name {older.name}",
        ]
    assert await ray.get_actor(older.name, namespace="kvpool").leases.remote() == []  # it goes on


async def test_an_older_pool_is_drained_and_restarted_by_the_commands_of_the_message(
    older: OlderPool, holder: subprocess.Popen[str]
) -> None:
    assert await line(holder) == "holding"
    shown = await asyncio.to_thread(cli, older, f"kvpool status --name {older.name}")
    assert "4 KiB" in shown  # who still holds leases
    assert f"kvpool stop --name {older.name} --drain 60" in shown
    status = json.loads(await asyncio.to_thread(cli, older, f"kvpool status --name {older.name} --json -"))
    assert (status["pool_version"], status["pool"], list(status["leases"].values())) == ("0.0.9", OLDER, [4096])
    stop, start = status["commands"]

    with pytest.raises(PoolBusyError):
        await kvpool.delete(older.name)
    assert holder.stdin is not None
    print("drain", file=holder.stdin, flush=True)
    stopping = asyncio.create_task(asyncio.to_thread(cli, older, stop))
    # While it drains, the old client keeps what it has and gets no more; when it lets go, the pool ends.
    assert await line(holder) == "refused; what it holds is 7"
    assert await stopping == f"pool {older.name} is deleted\n"
    await until(lambda: older.name not in pool_names(), "the end of the pool")
    print("end", file=holder.stdin, flush=True)
    assert await line(holder) in ("after the end: PoolUnavailableError", "after the end: PoolNotFoundError")

    await asyncio.to_thread(cli, older, start)
    async with await CachePool.connect(older.name) as pool:
        assert (pool.config["devices"], pool.config["page_size"]) == ("host:1x2MiB", 65536)
        assert (await pool.actor.describe.remote())["version"] == kvpool.__version__
        await pool.delete()


async def test_commands_refuse_an_older_pool_and_say_how_to_replace_it(older: OlderPool) -> None:
    for command in (
        "ls", "leases", "leases --revoke 1-a", "contains --model m k", "evict --all", "invalidate --model m --all",
        "trim", "set-policy lru", "events",
    ):  # fmt: skip
        refused = await call_here(*command.split(), "--name", older.name, code=2)
        assert refused.stdout == ""
        assert refused.stderr.startswith(f"kvpool: pool '{older.name}' runs kvpool 0.0.9 with protocol {OLDER}")
        assert f"'kvpool stop --name {older.name} --drain 60'" in refused.stderr


async def test_the_doctor_says_that_a_pool_is_older(older: OlderPool) -> None:
    command = f"kvpool doctor --name {older.name} --devices host:1x16MiB --json -"
    rows = json.loads(await asyncio.to_thread(cli, older, command, 1))["rows"]
    [row] = [row for row in rows if row["where"] == f"pool {older.name}"]
    assert (row["check"], row["result"]) == ("pool", "failed")
    assert f"`kvpool stop --name {older.name} --drain 60`, then `KVPOOL_DEVICES=" in row["mend"]
