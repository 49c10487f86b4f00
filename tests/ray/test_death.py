"""Processes that die while others count on them."""

import asyncio
import functools
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from footprint import Footprint, footprint, state
from loop_clock import out_of_time
from pool_actors import (
    DEADLINE_S,
    device_actors,
    kill_device,
    leased_bytes,
    pid_of,
    until,
    until_lost,
    until_no_zombies,
    until_waiting,
)
from ray.exceptions import ActorUnavailableError

import kvpool.actors.fleet
from kvpool import CachePool, ModelSpec, delete, encode_block_id
from kvpool.actors.cluster import call, end, kill
from kvpool.actors.fleet import Fleet
from kvpool.errors import (
    DeviceLostError,
    PoolUnavailableError,
    ProtocolError,
    StaleCacheError,
)

BLOCK_BYTES = 16 * 1024
BLOCKS = ModelSpec("model", block_bytes=BLOCK_BYTES)


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a forked child"])
async def test_a_killed_client_gives_everything_back(make_pool, start_process, forked):
    pool = await make_pool("host:2x1MiB")
    capacity_bytes = 1 << 20
    other = await start_process(pool)
    assert await other.put([1, 2, 3, 4], 5) == 4

    client = await start_process(pool)
    assert len(await client.match([1, 2, 3, 4])) == 4
    await client.request(3, 100_000, 1)
    assert len(await client.begin_blocks([1, 2, 3, 4, 5, 6], 9)) == 2  # written, never sealed
    await client.ask_for_more(20, capacity_bytes)
    child = await client.fork_sleeper() if forked else 0

    # Both devices whole: there is room for that when every lease of the client has ended, and no request of the
    # client is in front any more.
    ask = functools.partial(pool.request_cache, "whole", size=capacity_bytes, timeout_s=2 * DEADLINE_S)
    wanted = [asyncio.create_task(ask()) for _ in range(2)]
    await until_waiting(pool, 22)
    client.kill()
    began = time.perf_counter()
    async with asyncio.timeout(DEADLINE_S):
        whole = await asyncio.gather(*wanted)
    print(f"\nall memory granted {1000 * (time.perf_counter() - began):.0f} ms after SIGKILL")

    if forked:
        assert state(child) not in ("gone", "Z")
        os.kill(child, signal.SIGKILL)
    assert await leased_bytes(pool) == {pool.client_id: 2 * capacity_bytes}
    stats = await pool.stats()
    assert (stats.clients_died, stats.waiting, stats.total("zombie_bytes")) == (1, 0, 0)
    for cache in whole:
        view = cache.numpy("uint8", (capacity_bytes,))
        view[:] = 3  # all of it can be written
        del view
        await cache.release()
    assert await other.match([5]) == []  # unsealed at its writer's death: it never was
    await other.release()


async def test_a_killed_device_takes_its_own_caches_only(make_pool):
    pool = await make_pool("host:2x1MiB")
    lost, kept = sorted([await pool.request_cache("m", size="256KiB") for _ in range(2)], key=lambda c: c.device)
    assert (lost.device, kept.device) == ("host-0", "host-1")
    model = await pool.model(BLOCKS)
    blocks = await model.new_blocks(keys(range(20)))
    assert set(map(arena_of(pool), blocks.addresses())) == {0, 1}
    waiting = asyncio.create_task(pool.request_cache("m", size="1MiB"))
    await until_waiting(pool, 1)

    await kill_device(pool, 0)

    await until_lost(pool, 0)
    kept.numpy("uint8", (10,))[:] = 1
    with pytest.raises((DeviceLostError, StaleCacheError)):
        await blocks.finish()  # part of the chain is gone
    await lost.release()  # nothing is left to release, and that is no error
    await kept.release()
    async with asyncio.timeout(DEADLINE_S):
        cache = await waiting
    assert cache.device == "host-1"
    assert await leased_bytes(pool) == {pool.client_id: 1 << 20}
    await cache.release()
    await until_no_zombies(pool)  # blocks never wait, and these pages were mapped here, more than are kept warm
    assert await model.put_blocks(keys([1]), np.ones((1, BLOCK_BYTES), np.uint8)) == 1


async def test_a_pool_whose_only_device_died_answers_at_once(pool):
    cache = await pool.request_cache("m", size="64KiB")
    await kill_device(pool, 0)

    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(DeviceLostError):
            await pool.request_cache("m", size="64KiB")
        await until_lost(pool, 0)
        with pytest.raises(DeviceLostError, match="all devices of this host are lost: delete the pool"):
            await pool.request_cache("m", size="64KiB")
        await cache.release()
        with pytest.raises(DeviceLostError, match="are lost: delete it and start it again"):
            await CachePool.connect(pool.name)


async def test_what_died_with_its_device_needs_no_release(pool):
    first, second = [await pool.request_cache("m", size="64KiB") for _ in range(2)]
    await kill_device(pool, 0)
    await first.release()  # on its way while nobody has noticed
    await until_lost(pool, 0)
    await second.release()
    assert pool.leases() == []


async def test_a_connection_that_fails_half_way_leaves_nothing(make_pool, tmp_path):
    pool = await make_pool("host:2x1MiB")
    socket, away = pool._connection.devices[1]["socket_path"], str(tmp_path / "away")
    os.rename(socket, away)
    try:
        before = footprint(os.getpid())
        with pytest.raises(DeviceLostError, match="no owner serves pages"):
            await CachePool.connect(pool.name)
        assert footprint(os.getpid()) == before
        assert (await pool.stats()).clients == 1
    finally:
        os.rename(away, socket)


async def test_a_view_of_lost_memory_is_refused(pool):
    cache = await pool.request_cache("m", size="64KiB")
    cache.numpy("uint8", (10,))[:] = 1
    await kill_device(pool, 0)
    await until(lambda: not pool._connection.arenas[0]._connection.live, "the client notices")
    try:
        with pytest.raises(DeviceLostError):
            cache.numpy("uint8", (10,))
    finally:
        await cache.release()


async def test_blocks_of_lost_memory_are_not_opened(pool):
    model = await pool.model(BLOCKS)
    new = await model.new_blocks([encode_block_id(1)])
    device = new._devices[0]
    await kill_device(pool, device)
    await until(lambda: not pool._connection.arenas[device]._connection.live, "the client notices")
    with pytest.raises(DeviceLostError):
        new.numpy()
    await new.release()


async def test_a_pool_deleted_by_another_leaves_nothing_here(pool):
    """A client that is connected but leases nothing keeps nobody from deleting the pool; it closes as ever."""
    async with await pool.request_cache("m", size="1MiB") as cache:
        cache.numpy("uint8", (10,))[:] = 1
    await delete(pool.name)
    with pytest.raises(PoolUnavailableError):
        await pool.stats()
    await pool.close()
    assert footprint(os.getpid()) == Footprint()


async def test_a_killed_pool_actor_is_told_to_those_who_wait(pool):
    waiting = [asyncio.create_task(pool.request_cache("m", size="2MiB")) for _ in range(2)]
    first, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    await until_waiting(pool, 1)
    devices = device_actors(pool)
    os.kill(await pid_of(pool.actor), signal.SIGKILL)
    (other,) = set(waiting) - first
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(PoolUnavailableError):
            await other
        with pytest.raises(PoolUnavailableError):
            await pool.request_cache("m", size="64KiB")
    for device in devices:
        await device.shutdown.remote()
        ray.kill(device)
    first.pop().result()._lease.released = True  # it is gone: nobody is left to release it to
    waiting.clear()


async def test_a_pool_is_made_again_after_its_actor_was_killed(make_pool):
    settings = {"devices": "host:2x1MiB"}
    first = await make_pool(**settings)
    orphans = device_actors(first)
    pids = await asyncio.gather(*map(pid_of, orphans))
    ray.kill(first.actor)
    second = await make_pool(name=first.name, **settings)
    assert [state(pid) for pid in pids if state(pid) not in ("gone", "Z")] == []
    async with await second.request_cache("m", size="1MiB"), await second.request_cache("m", size="1MiB"):
        pass


async def test_the_next_start_clears_what_a_pool_left_that_was_killed_with_its_devices(make_pool):
    first = await make_pool(devices="host:2x16MiB", page_size="64KiB")
    folder = os.path.dirname(first._connection.devices[0]["socket_path"])
    devices = device_actors(first)
    for pid in await asyncio.gather(*map(pid_of, [*devices, first.actor])):
        os.kill(pid, signal.SIGKILL)
    for actor in [*devices, first.actor]:
        await end(actor)
    assert sorted(os.listdir(folder)) == ["0.sock", "1.sock"]
    os.utime(folder, (1, 1))  # what was made a moment ago might be about to be served
    second = await make_pool(name=first.name, devices="host:1x16MiB", page_size="64KiB")
    assert os.path.basename(folder) not in os.listdir(os.path.dirname(folder))
    async with await second.request_cache("m", size="1MiB"):
        pass


async def test_a_device_is_started_once(pool):
    (device,) = device_actors(pool)
    with pytest.raises(ProtocolError, match="started already"):
        await call(device.start)
    async with await pool.request_cache("m", size="1MiB"):
        pass


class Answering:
    """A device's handle, and the event that a call of it was answered."""

    def __init__(self, actor):
        self._actor, self.answered = actor, asyncio.Event()

    def __getattr__(self, name):
        method = getattr(self._actor, name)

        async def remote(*arguments):
            answer = await method.remote(*arguments)
            self.answered.set()
            return answer

        return SimpleNamespace(remote=remote)


async def test_a_device_that_hangs_is_left_out_and_ended(make_pool, monkeypatch):
    pool = await make_pool("host:2x1MiB")
    hung, sound = device_actors(pool)
    pid = await pid_of(hung)
    asked = Answering(sound)
    fleet = Fleet(*[lambda *_: None] * 3)
    fleet._actors = {0: hung, 1: asked}
    monkeypatch.setattr(kvpool.actors.fleet, "kill", lambda actor: kill(sound if actor is asked else actor))
    os.kill(pid, signal.SIGSTOP)
    assert await out_of_time(fleet.ask([0, 1], "leases"), asked.answered.wait()) == {1: {}}
    asked.answered.clear()
    await out_of_time(fleet.end([0, 1]), asked.answered.wait())
    await until(lambda: state(pid) in ("gone", "Z"), "the end of the device that hangs")


async def test_a_device_out_of_reach_is_killed_when_it_is_given_up(pool):
    class Unreachable:
        """A device whose connection has failed while its process lives."""

        def __init__(self, actor):
            self._actor, self.events = actor, self
            self._failures = [RuntimeError("something else"), ActorUnavailableError("no connection", None)]

        def __getattr__(self, name):
            return getattr(self._actor, name)

        async def remote(self, *_):
            raise self._failures.pop(0)

    (device,) = device_actors(pool)
    pid = await pid_of(device)
    lost = []
    fleet = Fleet(lambda *_: None, lambda *_: None, lambda *told: lost.append(told))
    fleet._actors = {0: device}
    await fleet._watch(0, Unreachable(device))  # goes on after the first failure, which tells nothing of the device
    assert [(number, sent) for number, sent, _ in lost] == [(0, [])]
    await until(lambda: state(pid) in ("gone", "Z"), "the end of the device")
    await until_lost(pool, 0)


def keys(ids):
    return [encode_block_id(number) for number in ids]


def arena_of(pool):
    """Return a function from an address to the number of the device whose arena it lies in."""

    def arena(address):
        (number,) = (
            number
            for number, arena in pool._connection.arenas.items()
            for base in arena._bases.values()
            if base <= address < base + arena._arena_bytes
        )
        return number

    return arena
