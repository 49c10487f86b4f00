"""The verbs of administration as people and programs call them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from command_line import Cli, start_process
from pool_actors import until_waiting
from rich.console import Console

from kvpool import ModelSpec, encode_block_id, sync
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


@pytest.fixture(scope="module")
def untouched(local_ray: None):
    """The name of a pool that no test changes."""
    name = f"t{os.getpid()}-untouched"
    sync.CachePool.create(name=name, devices="host:1x2MiB", page_size="64KiB").close()
    yield name
    sync.delete(name)


def written(*ids):
    return [f"hash:{key.hex()}" for key in keys(*ids)]


async def test_listings_and_questions(cli: Cli, filled) -> None:
    on = ("--name", filled.name)
    listed = json.loads((await cli("ls", *on, "--json", "-")).stdout)
    assert [(model["name"], model["revision"], model["keys"]) for model in listed["models"]] == [
        ("model", "7", 4),
        ("documents", "", 1),
    ]
    assert (listed["total"], len(listed["caches"])) == (5, 5)
    assert {cache["key"] for cache in listed["caches"]} > {key.hex() for key in keys(1, 2, 3, 4)}
    number = f"#{listed['models'][0]['number']}"
    table = (await cli("ls", *on, "--model", "model", "--limit", 2, "--sort", "recent")).stdout
    assert "2 of 4 caches shown" in table
    assert number in table, "as --model takes it"
    table = (await cli("ls", *on, "--model", number)).stdout
    assert all(text in table for text in written(1, 2, 3, 4)), "as KEY is taken"
    assert f"│ {number} " in table.partition("\ncaches ")[2], "which of several revisions a cache is of"
    assert f"│ {listed['caches'][0]['id']} │" in table, "an id, not a number to be read aloud"
    chain = written(1, 2, 9)
    assert (await cli("contains", *on, "--model", "model", *chain)).stdout == "2 of 3 in the pool: 2 on host-0\n"
    assert (await cli("contains", *on, "--model", "documents", "page 1")).stdout.startswith("1 of 1 in the pool")
    found = json.loads((await cli("contains", *on, "--model", number, *chain, "--json", "-")).stdout)
    assert (found["blocks"], found["devices"]) == (2, {"host-0": 2})


async def test_a_name_of_digits_is_no_number(cli: Cli, filled) -> None:
    """The first model of a pool has number 0: it must not be taken for the one that is named so."""
    on = ("--name", filled.name)
    first = json.loads((await cli("ls", *on, "--json", "-")).stdout)["models"][0]["number"]
    refused = await cli("invalidate", *on, "--model", first, "--all", code=2)
    assert f"no model '{first}'" in refused.stderr
    async with await filled.request_cache(str(first), size="1KiB") as cache:
        await cache.seal(key="k")
    assert (await cli("invalidate", *on, "--model", first, "--all")).stdout.startswith("1 cache invalidated")
    assert (await filled.ls("model"))["total"] == 4
    gone = json.loads((await cli("invalidate", *on, f"--model=#{first}", "--all", "--json", "-")).stdout)
    assert gone["caches"] == 4


async def test_a_key_is_the_text_that_was_sealed_whatever_it_looks_like(cli: Cli, filled) -> None:
    digits = "0123456789abcdef" * 2
    async with await filled.request_cache("documents", size="1KiB") as cache:
        await cache.seal(key=digits)
    command = ("invalidate", "--name", filled.name, "--model", "documents")
    nothing = await cli(*command, f"hash:{digits}", code=1)
    assert nothing.stdout.startswith("0 caches invalidated")
    assert nothing.stderr == "nothing is stored under these keys\n"
    assert (await cli(*command, digits)).stdout.startswith("1 cache invalidated")
    nothing = await cli(*command, digits, "--json", "-", code=1)
    assert json.loads(nothing.stdout)["caches"] == 0


async def test_who_holds_what_is_shown_and_revoked(cli: Cli, filled) -> None:
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
        assert f"{filled.client_id} held 1 cache, 1 MiB: revoked" in revoked.stdout


async def test_who_waits_is_shown(cli: Cli, filled) -> None:
    on = ("waiting", "--name", filled.name)
    assert (await cli(*on)).stdout == f"nobody waits for memory of pool {filled.name}\n"
    whole = (await filled.stats()).total("capacity_bytes")
    async with await filled.request_cache("work", size=whole):
        asked = [filled.request_cache("work", size=size, timeout_s=600.0) for size in ("128KiB", "64KiB", "64KiB")]
        tasks = [asyncio.create_task(each) for each in asked]
        await until_waiting(filled, 3)
        answer = json.loads((await cli(*on, "--json", "-")).stdout)
        own = await filled.waiting()
        for each in (*answer["requests"], *own["requests"]):
            assert 0 < each.pop("left_s") < 600.0 - each.pop("waited_s") + 1e-3
        assert answer == own
        assert [each["bytes"] >> 10 for each in own["requests"]] == [128, 64, 64]
        assert {(each["client"], each["pid"]) for each in own["requests"]} == {(filled.client_id, os.getpid())}
        assert (await filled.waiting(limit=1))["total"] == 3
        shown = (await cli(*on, "--limit", 2)).stdout
        assert all(text in shown for text in (filled.client_id, "work", "128 KiB", "any device of its host"))
        assert re.search(r"│ \d+\.\d s +│ \d+ min +│", shown)
        assert shown.endswith("2 of 3 waiting requests shown\n")
        assert (await cli(*on, "--tenant", "elsewhere")).stdout.startswith("nobody waits")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_content_is_evicted_invalidated_and_trimmed(cli: Cli, filled) -> None:
    on = ("--name", filled.name)
    evicted = json.loads((await cli("evict", *on, "--bytes", "16KiB", "--model", "model", "--json", "-")).stdout)
    assert evicted == {"caches": 1, "bytes": BLOCK_BYTES, "leased_caches": 0, "leased_bytes": 0}
    gone = await cli("invalidate", *on, "--model", "documents", "page 1")
    assert gone.stdout.startswith("1 cache invalidated")
    gone = json.loads((await cli("invalidate", *on, "--model", "model", *written(2), "--json", "-")).stdout)
    assert (gone["caches"], gone["held"]) == (2, {})
    assert (await cli("evict", *on, "--all")).stdout.startswith("1 cache evicted, 16 KiB")
    warm_bytes = (await filled.stats()).total("reserve_bytes")
    assert warm_bytes > 0
    trimmed = json.loads((await cli("trim", *on, "--json", "-")).stdout)
    assert trimmed == {"bytes": warm_bytes}, "also what this process still maps"
    assert (await filled.stats()).total("reserve_bytes") == 0
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
        (("evict", "--all", "--bytes", "1MiB"), "--bytes 1MiB and --all contradict each other"),
        (("evict", "--all", "--device", "host-9"), "no device 'host-9'"),
        (("evict", "--all", "--model", "none"), "no model 'none'"),
        (("evict", "--bytes", "much"), "much"),
        (("invalidate", "--model", "m"), "say what is to go"),
        (("invalidate", "--model", "none", "--all"), "no model 'none'"),
        (("leases", "--revoke", "nobody"), "no client 'nobody' is connected"),
        (("flush",), "this pool has no disk tier"),
        (("set-policy", "optimal"), "'optimal'"),
        (("events", "--limit", "1", "--json", "/nowhere/file"), "cannot write JSON"),
        (("events", "--limit", "1", "--json", "/etc"), "cannot write JSON to /etc: Is a directory"),
        (("ls", "--limit", "2000", "--sort", "bytes"), "--limit is at most 1000 with --sort"),
        (("invalidate", "--model", "m", "hash:12"), "write hash: and 32 hexadecimal digits"),
        (("invalidate", "--model", "m", ""), "a key is text or bytes, and not empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
async def test_bad_input_is_one_clear_line(cli: Cli, untouched: str, arguments: tuple[str, ...], message: str) -> None:
    answer = await cli(arguments[0], "--name", untouched, *arguments[1:], code=2)
    assert answer.stderr.startswith("kvpool: ")
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["ls", "leases", "contains", "evict", "invalidate", "trim", "flush", "set-policy", "events", "waiting"]
)
def test_each_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert (result.exit_code, result.stderr) == (0, "")
    for option in ("--json FILE", "--name"):
        assert option in result.stdout


async def test_each_command_that_asks_a_pool_gives_a_sign_of_life(
    cli: Cli, untouched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    @contextmanager
    def at_once(_after_s: float, tell: Callable[[], None], again_s: float) -> Iterator[None]:
        tell()
        yield

    def record(console: Console, text: Any = "", **options: Any) -> None:
        if console.stderr:
            told.append(text)
        else:
            shown(console, text, **options)

    shown = Console.print
    monkeypatch.setattr("kvpool.cli.spinner.called_after", at_once)
    monkeypatch.setattr(Console, "print", record)
    started = f"{untouched}-2"
    settings = ("--devices", "host:1x2MiB", "--name")
    for command in (
        ("start", *settings, started), ("stop", "--name", started),
        *((*verb.split(), "--name", untouched) for verb in ("status", "ls", "leases", "evict --all", "trim")),
        ("set-policy", "lru", "--name", untouched),
    ):  # fmt: skip
        await cli(*command)
        [text] = told  # standard output is for the answer alone
        assert command[-1] in text
        told.clear()


def removed(key: bytes | None, model: str = "model", size_bytes: int = BLOCK_BYTES) -> dict[str, object]:
    event = {"kind": "removed", "tenant": "default", "model": model, "key": key and key.hex(), "device": "host-0"}
    return event | {"size_bytes": size_bytes, "reason": "request", "number": 0, "revision": "7"}


async def test_events_are_lines_of_json_until_ctrl_c(filled, tmp_path) -> None:
    process = await start_process("events", "--name", filled.name, folder=tmp_path)
    async with asyncio.timeout(240):
        while b"listening" not in await process.stderr.readline():
            pass
        await filled.evict("16KiB", model="model")
        await filled.invalidate("model")
        await filled.evict("all", model="documents")
        lines = [json.loads(await process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    assert lines == [
        removed(*keys(4)),
        {name: value for name, value in removed(None).items() if name not in ("key", "device", "size_bytes")}
        | {"kind": "cleared", "reason": "invalidate"},
        lines[2],
    ]
    assert (lines[2]["kind"], lines[2]["model"]) == ("removed", "documents")


async def test_events_go_to_a_file_until_the_limit(cli: Cli, filled, tmp_path) -> None:
    to = ("--limit", 3, "--json", tmp_path / "events.jsonl")
    listening = asyncio.ensure_future(cli("events", "--name", filled.name, *to))
    model = await filled.model(ModelSpec("model", revision="7", block_bytes=BLOCK_BYTES))
    while not listening.done():  # it says nothing here when it begins to listen
        await filled.evict("all", model=model)
        await model.put_blocks(keys(1), np.ones((1, BLOCK_BYTES), np.uint8))
    await listening
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert {line["kind"] for line in lines} == {"stored", "removed"}
