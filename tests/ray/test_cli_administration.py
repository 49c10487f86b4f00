"""The verbs of administration as people and programs call them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import ray
from click.testing import CliRunner
from test_cli import Cli, cli  # noqa: F401

from kvpool import ModelSpec, encode_block_id
from kvpool.cli import main

BLOCK_BYTES = 16 * 1024


def keys(*ids):
    return [encode_block_id(block_id) for block_id in ids]


@pytest.fixture
async def filled(pool):
    """A pool with a chain of four blocks, and a cache sealed under a text."""
    model = await pool.model(ModelSpec("model", revision="7", block_bytes=BLOCK_BYTES))
    await model.put_blocks(keys(1, 2, 3, 4), np.ones((4, BLOCK_BYTES), np.uint8))
    async with await pool.request_cache("documents", size="100KiB") as cache:
        await cache.seal(key="page 1")
    return pool


async def test_listings_and_questions(cli: Cli, filled) -> None:  # noqa: F811
    on = ("--name", filled.name)
    listed = json.loads((await cli("ls", *on, "--json", "-")).stdout)
    assert [(model["name"], model["revision"], model["keys"]) for model in listed["models"]] == [
        ("model", "7", 4),
        ("documents", "", 1),
    ]
    assert (listed["total"], len(listed["caches"])) == (5, 5)
    assert {cache["key"] for cache in listed["caches"]} > {key.hex() for key in keys(1, 2, 3, 4)}
    table = (await cli("ls", *on, "--model", "model", "--limit", 2, "--sort", "recent")).stdout
    assert "2 of 4 caches shown" in table
    assert "256 KiB" not in table
    hexes = [key.hex() for key in keys(1, 2, 9)]
    assert (await cli("contains", *on, "--model", "model", *hexes)).stdout == "2 of 3 in the pool: 2 on host-0\n"
    assert (await cli("contains", *on, "--model", "documents", "page 1")).stdout.startswith("1 of 1 in the pool")
    found = json.loads(
        (await cli("contains", *on, "--model", listed["models"][0]["number"], *hexes, "--json", "-")).stdout
    )
    assert (found["blocks"], found["devices"]) == (2, {"host-0": 2})


async def test_who_holds_what_is_shown_and_revoked(cli: Cli, filled) -> None:  # noqa: F811
    on = ("--name", filled.name)
    assert (await cli("leases", *on)).stdout == f"nobody holds memory of pool {filled.name}\n"
    async with await filled.request_cache("work", size="1MiB"):
        (held,) = json.loads((await cli("leases", *on, "--json", "-")).stdout)["leases"]
        assert (held["client"], held["pid"], held["bytes"]) == (filled.client_id, os.getpid(), 1 << 20)
        table = (await cli("leases", *on)).stdout
        assert all(text in table for text in (filled.client_id, str(os.getpid()), "1 MiB"))
        assert (await cli("leases", *on, "--tenant", "elsewhere")).stdout.startswith("nobody")
        refused = await cli("leases", *on, "--tenant", "elsewhere", "--revoke", filled.client_id, code=2)
        assert "no client" in refused.stderr
        revoked = await cli("leases", *on, "--revoke", filled.client_id)
        assert f"{filled.client_id} held 1 caches, 1 MiB: revoked" in revoked.stdout


async def test_content_is_evicted_invalidated_and_trimmed(cli: Cli, filled) -> None:  # noqa: F811
    on = ("--name", filled.name)
    evicted = json.loads((await cli("evict", *on, "--bytes", "16KiB", "--model", "model", "--json", "-")).stdout)
    assert evicted == {"caches": 1, "bytes": BLOCK_BYTES, "leased_caches": 0, "leased_bytes": 0}
    gone = await cli("invalidate", *on, "--model", "documents", "page 1")
    assert gone.stdout.startswith("1 caches invalidated")
    gone = json.loads((await cli("invalidate", *on, "--model", "model", keys(2)[0].hex(), "--json", "-")).stdout)
    assert (gone["caches"], gone["held"]) == (2, {})
    assert (await cli("evict", *on, "--all")).stdout.startswith("1 caches evicted, 16 KiB")
    assert json.loads((await cli("trim", *on, "--json", "-")).stdout)["bytes"] >= 0
    assert "given back" in (await cli("trim", *on)).stdout
    assert json.loads((await cli("set-policy", *on, "LRU", "--json", "-")).stdout) == {"policy": "lru"}
    status = json.loads((await cli("status", *on, "--json", "-")).stdout)
    assert status["evictions_by_reason"] == {"capacity": 0, "request": 2, "invalidate": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ls", "--model", "none"), "no model 'none' is registered"),
        (("contains", "--model", "none", "key"), "no model 'none' is registered by tenant 'default'"),
        (("evict",), "say how much is to go"),
        (("evict", "--all", "--bytes", "1MiB"), "say how much is to go"),
        (("evict", "--all", "--device", "host-9"), "no device 'host-9'"),
        (("evict", "--bytes", "much"), "much"),
        (("invalidate", "--model", "m"), "say what is to go"),
        (("invalidate", "--model", "none", "--all"), "no model 'none'"),
        (("leases", "--revoke", "nobody"), "no client 'nobody' is connected"),
        (("set-policy", "optimal"), "'optimal'"),
        (("events", "--limit", "1", "--json", "/nowhere/file"), "cannot write JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
async def test_bad_input_is_one_clear_line(pool, arguments: tuple[str, ...], message: str) -> None:
    command = [arguments[0], "--name", pool.name, *arguments[1:]]
    answer = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("kvpool: ")
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["ls", "leases", "contains", "evict", "invalidate", "trim", "set-policy", "events"])
def test_each_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert (result.exit_code, result.stderr) == (0, "")
    for option in ("--json FILE", "--name"):
        assert option in result.stdout


@pytest.mark.parametrize("ending", ["limit", "interrupt"])
async def test_events_are_lines_of_json_until_the_limit_or_ctrl_c(filled, ending: str) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    limit = ("--limit", "3") if ending == "limit" else ()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from kvpool.cli import main; main()", "events", "--name", filled.name, *limit,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    async with asyncio.timeout(60):
        while b"listening" not in await process.stderr.readline():
            pass
        await filled.evict("16KiB", model="model")
        await filled.invalidate("model")
        await filled.evict(model="documents")
        lines = [json.loads(await process.stdout.readline()) for _ in range(3)]
        if ending == "interrupt":
            process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    assert lines == [
        {"kind": "removed", "tenant": "default", "model": "model", "key": keys(4)[0].hex(), "device": "host-0",
         "size_bytes": BLOCK_BYTES, "reason": "request"},
        {"kind": "cleared", "tenant": "default", "model": "model", "reason": "invalidate"},
        lines[2],
    ]  # fmt: skip
    assert (lines[2]["kind"], lines[2]["model"]) == ("removed", "documents")
