"""One local Ray for all tests, pools and model processes for each of them, and the check that nothing is left over."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from kvpool import CachePool
from kvpool.client import delete
from kvpool.errors import DeviceLostError, PoolNotFoundError, TierError

sys.path.insert(0, str(Path(__file__).parent))

import model_process
import storm_process
from command_line import Cli, call_here
from driver import START_TRIES, TOO_SLOW
from footprint import Footprint, birth, descendants, footprint, state
from pool_actors import (
    DEADLINE_S,
    device_actors,
    pid_of,
    pids_of_actors,
    until,
    until_leased,
    until_no_zombies,
    until_waiting,
)

_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this test session. Model processes are shipped to it by value: workers cannot import test modules."""
    ray.cloudpickle.register_pickle_by_value(model_process)
    ray.cloudpickle.register_pickle_by_value(storm_process)
    for tries_left in reversed(range(START_TRIES)):
        try:
            ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="kvpool")
            break
        except Exception as error:
            ray.shutdown()
            if TOO_SLOW not in str(error) or not tries_left:
                raise
    yield
    ray.shutdown()


def left_on_disk() -> set[str]:
    """Folders of device sockets, and shared memory that bears our name."""
    folders = {str(path) for path in Path(tempfile.gettempdir()).glob(f"kvpool-t{os.getpid()}-*")}
    return folders | {str(path) for path in Path("/dev/shm").glob("*kvpool*")}


@pytest.fixture(autouse=True)
def _nothing_left(local_ray: None) -> Iterator[None]:
    """Neither this process nor any process of this Ray that is still alive holds memory of the test's pools."""
    before, files, others = footprint(os.getpid()), left_on_disk(), holders()
    yield
    assert footprint(os.getpid()) == before
    assert left_on_disk() == files
    deadline = time.monotonic() + DEADLINE_S
    while (left := holders().items() - others.items()) and time.monotonic() < deadline:
        time.sleep(0.05)  # processes of a Ray that a program of the test has shut down die in their own time
    assert left == set()


def holders() -> dict[int, Footprint]:
    """Processes of this Ray that have pages mapped."""
    return {pid: held for pid in descendants(os.getpid()) if (held := footprint(pid)).page_mappings}


def _living(pids: Iterable[int]) -> dict[int, str]:
    return {pid: began for pid in pids if (began := birth(pid)) is not None}


class Pools:
    """Pools of one test: small, each with a name of its own."""

    def __init__(self) -> None:
        self._made: list[tuple[CachePool, dict[int, str | None]]] = []

    async def __call__(self, devices: str = "host:1x2MiB", page_size: str = "64KiB", **settings: Any) -> CachePool:
        name = settings.pop("name", f"t{os.getpid()}-{next(_numbers)}")
        pool = await CachePool.create(name=name, devices=devices, page_size=page_size, **settings)
        self._made.append((pool, {pid: birth(pid) for pid in await pids_of_actors(pool)}))
        return pool

    async def end(self) -> None:
        for pool, births in self._made:
            await self._end(pool)
            await until(lambda births=births: not births.items() & _living(births).items(), "the end of the actors")

    async def _end(self, pool: CachePool) -> None:
        await pool.close()
        try:
            last = await CachePool.connect(pool.name)
        except PoolNotFoundError:
            return  # the test has deleted it
        except DeviceLostError:
            await until(lambda: not device_actors(pool), "the end of the devices, which the test has killed")
        else:
            async with last:
                await empty(last)
        await delete(pool.name)


async def empty(pool: CachePool) -> None:
    """Check that nothing is leased, evict what is sealed, and check that all memory goes back to the system."""

    await until_leased(pool, 0)
    await until_waiting(pool, 0)
    devices = [device for device in (await pool.stats()).devices if device.lost is None]
    assert [device.pinned_bytes for device in devices] == [0] * len(devices)
    # Everything, asked for at once, evicts whatever is sealed.
    whole = await asyncio.gather(*(pool.request_cache("whole", size=device.capacity_bytes) for device in devices))
    await asyncio.gather(*(cache.release() for cache in whole))
    if pool.config["host_memory"]:  # what was evicted lies there now
        for model in {row["name"] for row in (await pool.ls())["models"]}:
            with contextlib.suppress(TierError):  # the test took the disk away; host memory is given back all the same
                await pool.invalidate(model)
    await pool.trim()

    await until_no_zombies(pool)
    stats = await pool.stats()
    for figure in ("live_bytes", "backed_bytes", "reserve_bytes", "zombie_bytes", "pinned_bytes", "evictable_bytes"):
        assert (figure, stats.total(figure)) == (figure, 0)
    for actor in device_actors(pool):
        held = footprint(await pid_of(actor))
        assert (held.page_descriptors, held.page_mappings) == (0, 0)


@pytest.fixture
async def make_pool() -> AsyncIterator[Pools]:
    """Make pools; at the end of the test each is shown to be given back whole, and deleted."""
    pools = Pools()
    yield pools
    await pools.end()


@pytest.fixture
async def pool(make_pool: Pools) -> CachePool:
    """A pool of one device of 2 MiB in pages of 64 KiB."""
    return await make_pool()


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Call the command line in this process, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return call_here


class Process:
    """A model process as the test sees it."""

    def __init__(self, actor: Any, pid: int, client_id: str) -> None:
        self.actor = actor
        self.pid = pid
        self.client_id = client_id

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        return getattr(self.actor, method).remote

    def footprint(self) -> Footprint:
        return footprint(self.pid)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@pytest.fixture
async def start_process(make_pool: Pools) -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    """Start model processes, connected to a pool; they are killed at the end of the test."""
    actors: list[Any] = []
    pids: list[int] = []

    async def start(pool: CachePool, tenant: str = "default") -> Process:
        actor = model_process.ModelProcess.remote()
        actors.append(actor)
        pid, client_id = await actor.connect.remote(pool.name, tenant)
        pids.append(pid)
        return Process(actor, pid, client_id)

    yield start
    for actor in actors:
        ray.kill(actor)
    for pid in pids:
        if state(pid) not in ("gone", "Z"):
            os.kill(pid, signal.SIGKILL)
    await until(lambda: all(state(pid) in ("gone", "Z") for pid in pids), "the end of the model processes")
