"""``kvpool`` as people and programs call it, against a running cluster."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from command_line import Cli, call_process

from kvpool import CachePool, sync
from kvpool.actors.cluster import ensure_ray, pool_names
from kvpool.cli import main
from kvpool.client import delete
from kvpool.errors import PoolNotFoundError, ProtocolError
from kvpool.workload import generate, unique_blocks

MIB = 1 << 20
BLOCK_BYTES = 8192


@pytest.fixture
async def name() -> Any:
    """The name of a pool that this test may start; deleted if it did not do so itself."""
    own = f"cli-{os.getpid()}"
    yield own
    if own in pool_names():
        await delete(own)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "small.jsonl"
    lines = [
        json.dumps(
            {
                "timestamp": request.timestamp_ms,
                "input_length": request.input_length,
                "output_length": request.output_length,
                "hash_ids": request.hash_ids,
            }
        )
        for request in requests()
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def requests() -> list[Any]:
    return generate(3, sessions=40)


def simulated_ratio(trace: Path, blocks: int) -> float:
    result = CliRunner().invoke(main, ["simulate", str(trace), "--capacity", str(blocks), "--json", "-"])
    return float(json.loads(result.stdout)["rows"][0]["prefix_hit_ratio"])


# -- start, status, stop ----------------------------------------------------------------------------------------------


async def test_a_pool_is_started_shown_and_stopped(cli: Cli, name: str) -> None:
    answer = await cli("start", "--name", name, "--devices", "host:2x4MiB", "--placement", "round_robin", "--json", "-")
    started = json.loads(answer.stdout)
    assert (started["name"], started["placement"], started["policy"]) == (name, "round_robin", "lru")
    assert [device["capacity_bytes"] for device in started["devices"]] == [4 * MIB] * 2

    async with await CachePool.connect(name) as pool, await pool.request_cache("m", size="1MiB"):
        status = json.loads((await cli("status", "--name", name, "--json", "-")).stdout)
        assert sum(device["live_bytes"] for device in status["devices"]) == MIB
        assert (status["clients"], status["models"]) == (1, {"m": 1})
        table = (await cli("status", "--name", name)).stdout
        for text in (f"pool {name} (lru; placement round_robin)", "4 MiB", "1 MiB", "1 client, 0 keys"):
            assert text in table
        refused = await cli("stop", "--name", name, code=2)
        assert refused.stderr.startswith("kvpool: ")
        for way_out in (f"kvpool stop --name {name} --drain 60", f"kvpool leases --name {name} --revoke"):
            assert way_out in refused.stderr
        assert name in pool_names()

    assert (await cli("stop", "--name", name)).stdout == f"pool {name} is deleted\n"
    assert name not in pool_names()


async def test_a_process_of_its_own_ends_with_the_status(tmp_path: Path, name: str) -> None:
    started = await call_process("start", "--name", name, "--devices", "host:1x4MiB", "--json", "-", folder=tmp_path)
    assert json.loads(started.stdout)["name"] == name
    assert (await call_process("stop", "--name", name, folder=tmp_path)).stdout == f"pool {name} is deleted\n"
    refused = await call_process("status", "--name", name, folder=tmp_path, code=2)
    assert (refused.stdout, refused.stderr.count("\n")) == ("", 1)


async def test_starting_the_same_pool_again_joins_it_and_another_of_its_name_is_refused(cli: Cli, name: str) -> None:
    await cli("start", "--name", name, "--devices", "host:1x4MiB")
    await cli("start", "--name", name, "--devices", "host:1x4MiB")
    refused = await cli("start", "--name", name, "--devices", "host:2x4MiB", code=2)
    assert refused.stderr.startswith("kvpool: ")
    assert name in refused.stderr
    status = json.loads((await cli("status", "--name", name, "--json", "-")).stdout)
    assert len(status["devices"]) == 1


async def test_a_preset_may_be_given_another_size_and_policy(cli: Cli, name: str) -> None:
    answer = await cli(
        "start", "--name", name, "--preset", "vista", "--num-gpus", 2, "--memory-per-device", "4MiB", "--policy", "lru"
    )
    assert f"pool {name} (lru; placement least_loaded)" in answer.stdout
    status = json.loads((await cli("status", "--name", name, "--json", "-")).stdout)
    assert (status["preset"], status["policy_requested"]) == ("vista", "lru")
    assert [device["capacity_bytes"] for device in status["devices"]] == [4 * MIB] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status", "--name", "absent"), "no pool named 'absent' is running in this cluster"),
        (("stop", "--name", "absent"), "no pool named 'absent' is running in this cluster"),
        (("start", "--devices", "gpu:2"), "devices='gpu:2' is not understood"),
        (("start", "--name", "x", "--devices", "host:1x4MiB", "--policy", "optimal"), "'optimal'"),
        (("start", "--name", "x", "--devices", "host:1x4MiB", "--placement", "nearest"), "'nearest'"),
        (("start", "--preset", "vista", "--num-gpus", "0"), "asked for num_gpus=0"),
        (("start", "--num-gpus", "2"), "give --preset, or --devices host:2"),
        (("start", "--preset", "vista", "--num-gpus", "2", "--devices", "host:1"), "give --preset, or --devices"),
        (("replay", "absent.jsonl"), "there is no trace file absent.jsonl"),
        (("replay", "--capacity", "2"), "--capacity is a share"),
        (("replay", "--speed", "3x"), "--speed is one of max, 1x, 10x, not '3x'"),
        (("replay", "--block-bytes", "12"), "--block-bytes must be a positive multiple of 8"),
        (("replay", "--pool", "absent"), "no pool named 'absent' is running in this cluster"),
        (("replay", "--out", "/proc/nowhere"), "--out /proc/nowhere: cannot write there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
async def test_bad_input_is_one_clear_line(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    before = pool_names()
    answer = await cli(*arguments, code=2)
    assert answer.stdout == ""
    assert message in answer.stderr
    assert answer.stderr.startswith("kvpool: ")
    assert answer.stderr.count("\n") == 1
    assert set(pool_names()) <= set(before)


# -- replay -----------------------------------------------------------------------------------------------------------


async def test_a_replay_hits_what_simulate_says_and_every_byte_is_right(cli: Cli, trace: Path, tmp_path: Path) -> None:
    before = pool_names()
    # With one request in flight no block is looked up while another request is still writing it.
    command = ("replay", trace, "--capacity", "0.2", "--block-bytes", BLOCK_BYTES, "--in-flight", 1)
    answer = await cli(*command, "--out", tmp_path / "out", "--json", "-")
    figures = json.loads(answer.stdout)
    blocks = [len(request.hash_ids) for request in requests()]
    assert (figures["requests"], figures["blocks"]) == (len(blocks), sum(blocks))
    assert figures["wrong_bytes"] == 0
    assert figures["verified_bytes"] == figures["blocks_hit"] * BLOCK_BYTES > 0
    assert figures["evictions"] > 0
    assert 0 < figures["peak_memory_bytes"] <= figures["capacity_bytes"]
    capacity_blocks = round(0.2 * unique_blocks(requests()))
    assert figures["prefix_hit_ratio"] == pytest.approx(simulated_ratio(trace, capacity_blocks), abs=0.005)
    assert json.loads((tmp_path / "out" / "replay.json").read_text(encoding="utf-8")) == figures
    assert (tmp_path / "out" / "replay.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in answer.stderr
    assert set(pool_names()) <= set(before)


async def test_a_replay_on_devices_of_a_given_size_ends_with_a_table(cli: Cli, trace: Path) -> None:
    answer = await cli("replay", trace, "--devices", "host:2x4MiB", "--block-bytes", BLOCK_BYTES, "--limit", 60)
    lines = answer.stdout.splitlines()
    assert "replay of small.jsonl" in lines[0]
    table = dict((cell.strip() for cell in line.strip("│ ").split("│")) for line in lines if line.startswith("│"))
    assert table["wrong bytes"] == "0"
    assert table["requests"] == "60"
    assert table["peak memory"].endswith("of 8 MiB")
    assert not table["verified bytes"].startswith("0 ")


async def test_when_requests_in_flight_hold_all_memory_the_next_stores_nothing(cli: Cli, trace: Path) -> None:
    command = ("replay", trace, "--devices", "host:1x2MiB", "--limit", 60, "--in-flight", 6, "--json", "-")
    figures = json.loads((await cli(*command)).stdout)
    assert (figures["requests"], figures["wrong_bytes"], figures["capacity_bytes"]) == (60, 0, 2 * MIB)
    assert figures["blocks_hit"] + figures["blocks_stored"] < figures["blocks"]


async def test_a_replay_uses_a_running_pool_and_leaves_it_running(cli: Cli, trace: Path, name: str) -> None:
    await cli("start", "--name", name, "--devices", "host:1x4MiB")
    command = ("replay", trace, "--pool", name, "--block-bytes", 4096, "--limit", 30, "--json", "-")
    first, second = [json.loads((await cli(*command)).stdout) for _ in range(2)]
    assert first["wrong_bytes"] == second["wrong_bytes"] == 0
    assert second["prefix_hit_ratio"] > first["prefix_hit_ratio"], "the second finds what the first has stored"
    assert first["capacity_bytes"] == 4 * MIB
    status = json.loads((await cli("status", "--name", name, "--json", "-")).stdout)
    assert status["blocks_hit"] == first["blocks_hit"] + second["blocks_hit"]
    assert (status["clients"], sum(device["pinned_bytes"] for device in status["devices"])) == (0, 0)


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["alloc", "concurrency", "disk", "evict", "put-get"])
def test_each_benchmark_explains_itself(command: str) -> None:
    runner = CliRunner()
    assert command in runner.invoke(main, ["bench", "--help"]).stdout
    result = runner.invoke(main, ["bench", command, "--help"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "--json FILE" in result.stdout


async def test_a_pool_is_started_from_a_node_that_has_no_devices(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVPOOL_HOST", "a head without work")  # the devices' processes do not have it
    monkeypatch.chdir(tmp_path)
    command = ["start", "--name", name, "--devices", "host:1x4MiB", "--json", "-"]
    started = await asyncio.to_thread(CliRunner().invoke, main, command)
    assert started.exit_code == 0, started.output
    assert json.loads(started.stdout)["devices"][0]["capacity_bytes"] == 4 * MIB
    with pytest.raises(ProtocolError, match="no device on this host"):
        await CachePool.connect(name)
    monkeypatch.delenv("KVPOOL_HOST")
    async with await CachePool.connect(name) as pool:
        await pool.delete()


async def test_every_command_means_the_pool_of_the_configuration(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kvpool.yaml").write_text(f"name: {name}\ndevices: host:1x4MiB\n", encoding="utf-8")
    for command in (["start"], ["status", "--json", "-"]):
        done = await asyncio.to_thread(CliRunner().invoke, main, command)
        assert done.exit_code == 0, done.output
    async with await CachePool.connect() as pool:
        assert pool.name == name
    with pytest.raises(PoolNotFoundError, match="'another'"):
        await CachePool.connect("another")
    blocking = await asyncio.to_thread(sync.CachePool.connect)
    assert blocking.name == name
    await asyncio.to_thread(blocking.close)
    done = await asyncio.to_thread(CliRunner().invoke, main, ["stop"])
    assert done.exit_code == 0, done.output
    assert name not in pool_names()
    monkeypatch.setenv("KVPOOL_NAME", "elsewhere")
    for ask in (CachePool.connect, delete):
        with pytest.raises(PoolNotFoundError, match="'elsewhere'"):
            await ask()


def test_an_address_at_which_nobody_listens_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6")
    with pytest.raises(PoolNotFoundError, match=r"nobody answers at RAY_ADDRESS=127\.0\.0\.1:6"):
        ensure_ray(start=pytest.fail)
