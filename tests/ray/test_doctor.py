"""``kvpool doctor`` within a cluster, and with one that cannot be asked."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from driver import run_driver
from pool_actors import pid_of

import kvpool.doctor.survey
from kvpool import CachePool
from kvpool.doctor.examination import check_pool
from kvpool.doctor.facts import Facts
from kvpool.doctor.survey import survey

Rows = list[dict[str, Any]]
Doctor = Callable[..., Awaitable[Rows]]


@pytest.fixture
async def doctor(local_ray: None, tmp_path: Path) -> Doctor:
    """Call the command in a process of its own; returns its rows."""
    address = ray.get_runtime_context().gcs_address

    async def call(*arguments: str, wrapper: tuple[str, ...] = (), **environment: str) -> Rows:
        process = await asyncio.create_subprocess_exec(
            *wrapper, sys.executable, "-c", "from kvpool.cli import main; main()", "doctor", "--json", "-", *arguments,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
            env={**os.environ, "RAY_ADDRESS": address, **environment},
        )  # fmt: skip
        async with asyncio.timeout(240):
            printed, complaints = await process.communicate()
        assert process.returncode in (0, 1), complaints.decode()
        rows: Rows = json.loads(printed)["rows"]
        assert process.returncode == any(row["result"] == "failed" for row in rows)
        return rows

    return call


def one(rows: Rows, check: str, where: str = "") -> dict[str, Any]:
    [row] = [row for row in rows if row["check"] == check and where in row["where"]]
    return row


def failed(rows: Rows, pool: CachePool | None = None) -> list[tuple[str, str]]:
    """Return what failed, but for pools that are not ours: any program of this machine may start one in our Ray."""
    return [
        (row["check"], row["where"])
        for row in rows
        if row["result"] == "failed" and (row["check"] != "pool" or (pool and row["where"] == f"pool {pool.name}"))
    ]


async def test_nodes_and_pools_are_looked_at(doctor: Doctor, pool: CachePool) -> None:
    rows = await doctor("--devices", "host:1x16MiB")
    assert failed(rows, pool) == []
    assert one(rows, "cluster")["found"].startswith("1 node, ")
    assert one(rows, "pool", pool.name)["result"] == "ok"
    node = {row["check"] for row in rows if row["where"].startswith("node ")}
    assert {"nofile", "max_map_count", "memory", "sockets", "shm", "versions", "pages", "peer", "driver"} <= node
    assert (await pool.stats()).clients == 1  # it was no client


async def test_what_the_nodes_processes_may_not_is_found_from_elsewhere_and_refused_at_the_start() -> None:
    """The limit is low where Ray runs, not where the doctor is called."""
    printed = await run_driver("""
        import asyncio, json, os, resource, subprocess, sys
        import ray
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, address="local", namespace="kvpool")

        @ray.remote(num_cpus=0)
        def raylet():
            return os.getppid()

        resource.prlimit(ray.get(raylet.remote()), resource.RLIMIT_NOFILE, (1024, 1024))
        os.environ.update(RAY_ADDRESS=ray.get_runtime_context().gcs_address, KVPOOL_PAGE_SIZE="64KiB")
        command = [sys.executable, "-c", "from kvpool.cli import main; main()"]

        for devices in ("host:1x500MiB", "host:1x4MiB"):
            asked = subprocess.run([*command, "doctor", "--devices", devices, "--json", "-"], capture_output=True)
            rows = json.loads(asked.stdout)["rows"]
            print([(row["check"], row["where"][:4]) for row in rows if row["result"] == "failed"])
            started = subprocess.run([*command, "start", "--devices", devices], capture_output=True, text=True)
            print(started.returncode, "at most 1024" in started.stderr)
    """)
    assert printed.splitlines() == ["[('nofile', 'node')]", "2 True", "[]", "0 False"]


def test_the_logs_are_looked_for_where_the_cluster_keeps_them(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    found = survey([])
    assert found.nodes
    for facts in found.nodes.values():
        assert isinstance(facts, Facts)
        assert facts.ray_logs is not None
        logs = Path(facts.ray_logs)
        assert list(logs.glob("worker-*.err"))
        assert ray.get_runtime_context().get_session_name() in logs.parts


async def test_a_process_that_does_not_share_the_socket_folder(doctor: Doctor, pool: CachePool) -> None:
    [device] = (await pool.actor.describe.remote())["devices"]
    folder = Path(device["socket_path"]).parent
    wrapper = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "sh")
    tried = await asyncio.create_subprocess_exec(*wrapper, "true", stderr=subprocess.DEVNULL)
    if await tried.wait():
        pytest.skip("mounts of one's own are not allowed here")
    rows = await doctor("--devices", "host:1x16MiB", wrapper=wrapper)
    assert failed(rows, pool) == [("pool", f"pool {pool.name}")]
    assert "docs/containers.md" in one(rows, "pool", pool.name)["mend"]


async def test_a_pool_that_is_stopped_is_told_within_the_deadline(
    pool: CachePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvpool.doctor.survey, "_POOL_S", 0.5)
    pid = await pid_of(pool.actor)
    os.kill(pid, signal.SIGSTOP)
    try:
        finding = check_pool(await kvpool.doctor.survey._ask_pool(pool.name))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert finding.result == "failed"
    assert "did not answer within 0.5 s" in finding.found


async def test_a_wrong_token(doctor: Doctor) -> None:
    rows = await doctor(RAY_AUTH_TOKEN="not the clusters", RAY_AUTH_MODE="token")
    assert ("cluster", "here") in failed(rows)
    assert "RAY_AUTH_MODE=token" in one(rows, "cluster")["mend"]


async def test_no_token_at_all_while_the_cluster_wants_one(doctor: Doctor, tmp_path: Path) -> None:
    rows = await doctor(HOME=str(tmp_path), RAY_AUTH_MODE="token")
    assert failed(rows)[:2] == [("token", "here"), ("cluster", "here")]


async def test_an_address_at_which_nobody_answers(doctor: Doctor) -> None:
    with socket.socket() as bound:  # bound, so that nobody else listens there
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        rows = await doctor(RAY_ADDRESS=address)
    assert failed(rows)[:1] == [("cluster", "here")]
    assert "Connection refused" in one(rows, "cluster")["found"]
    assert one(rows, "nofile")["where"] == "here"  # the host is examined all the same


def test_a_cluster_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(kvpool.doctor.survey, "_SURVEY_S", 3.0)
        assert survey([]).error == "the cluster did not answer within 3 s"
