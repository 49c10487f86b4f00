"""Pools that outlive the processes that made them: created, joined, administered and deleted from anywhere."""

import asyncio
import contextlib
import os
import signal

import numpy as np
import pytest
import ray
from driver import run_driver
from pool_actors import device_actors, leased_bytes, pid_of, until

import kvpool.actors.compatibility
import kvpool.client.connection
import kvpool.client.lane
import kvpool.client.pool
from kvpool import CachePool, ModelSpec, PoolStatistics, delete, encode_block_id
from kvpool.actors.cluster import call, kill, pool_names
from kvpool.actors.protocol import PROTOCOL_VERSION, host_identity
from kvpool.errors import (
    InvalidRequestError,
    PoolBusyError,
    PoolNotFoundError,
    PoolUnavailableError,
    ProtocolError,
    SystemLimitError,
)
from kvpool.memory.limits import memory_info
from kvpool.presets import create_deepseek_ocr_cache_pool, create_vista_cache_pool


async def test_a_pool_outlives_its_creator(local_ray):
    name, address = f"t{os.getpid()}-detached", ray.get_runtime_context().gcs_address
    made = await run_driver(
        """
        import asyncio, sys
        import numpy as np
        from kvpool import CachePool, ModelSpec, encode_block_id

        async def main():
            async with await CachePool.create(name=sys.argv[1], devices="host:1x2MiB", page_size="64KiB") as pool:
                model = await pool.model(ModelSpec("m", block_bytes=4096))
                hashes = [encode_block_id(number) for number in range(10)]
                print("stored", await model.put_blocks(hashes, np.full((10, 4096), 42, np.uint8)))
        asyncio.run(main())
        """,
        name,
        ray_address=address,
    )
    assert made == "stored 10\n"

    # By the blocking client, from a driver that knows nothing of the first.
    found = await run_driver(
        """
        import sys
        import numpy as np
        from kvpool import ModelSpec, encode_block_id
        from kvpool.sync import CachePool, delete

        hashes = [encode_block_id(number) for number in range(12)]
        with CachePool.connect(sys.argv[1]) as pool:
            model = pool.model(ModelSpec("m", block_bytes=4096))
            with model.match_prefix(hashes) as hit:
                print("hit", len(hit), sorted({int(value) for block in hit.numpy() for value in np.unique(block)}))
            with model.new_blocks(hashes) as new:
                for block in new.numpy():
                    block[:] = 43
                del block
                new.seal()
            print("stored", new.stored, "of which new", new.num_blocks)
            with pool.request_cache("m", size="64KiB") as cache:
                cache.tensor("uint8", (4,)).fill_(9)
                cache.seal("whole")
                print("sealed", cache.sealed, cache.info()["sealed"])
            print("keys", pool.stats().keys, "leases", pool.leases())
        delete(sys.argv[1])
        """,
        name,
        ray_address=address,
    )
    assert found.splitlines() == [
        "hit 10 [42]",
        "stored 12 of which new 2",
        "sealed True True",
        "keys 13 leases []",
    ]
    with pytest.raises(PoolNotFoundError):
        await CachePool.connect(name)


def builtin(value):
    """Whether a value is made of nothing but built-in types."""
    if isinstance(value, dict):
        return type(value) is dict and all(builtin(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(builtin, value))
    return type(value) in (int, float, str, bytes, bool, type(None))


async def test_the_bare_handle_speaks_builtin_types(pool):
    actor = ray.get_actor(pool.name, namespace="kvpool")
    client = {"protocol": PROTOCOL_VERSION, "id": "bare", "tenant": "default", "host": host_identity(), "token": ""}
    hashes = encode_block_id(1) + encode_block_id(2)
    spec = ModelSpec("m", block_bytes=4096).to_wire()
    assert builtin(spec)

    async def answer(method, *arguments):
        value = await getattr(actor, method).remote(*arguments)
        assert builtin(value), f"{method} returned {value!r}"
        return value

    assert (await answer("connect", client))["reachable"] == [0]
    _, model = await answer("register_model", "bare", spec)
    ((_, cache_id, device, size_bytes, _, _),) = await answer(
        "request_caches", "bare", [(1, model, 4096, 4096, 0.0, 0, None)]
    )
    assert (device, size_bytes) == (0, 4096)
    ((_, resident, ids, _, _),) = await answer("request_blocks", "bare", [(2, model, hashes, None, None, None)])
    assert (resident, len(ids)) == (0, 2)
    await answer("seal", "bare", [(3, model, ids, [encode_block_id(1), encode_block_id(2)], None)])
    ((_, found, *_),) = await answer("look_up", "bare", [(4, model, hashes, None)])
    assert found == ids
    ((refused, kind, *_),) = await answer("request_caches", "bare", [(5, model, 1 << 40, 1 << 40, 0.0, 0, None)])
    assert (refused, kind) == ("error", "InvalidSizeError")
    assert (await answer("describe_caches", "bare", [cache_id]))[0]["leases"] == 1
    (held,) = await answer("leases")
    assert (held["client"], held["bytes"], held["caches"], held["pid"]) == ("bare", 4096 + 2 * 4096, 3, None)
    for method in ("describe", "start", "statistics", "trim", "ls", "events"):
        await answer(method)
    assert (await answer("evict", None, None, None, None))["leased_caches"] == 3  # all that nobody holds: nothing
    ((_, found),) = await answer("contains", "default", [("m", hashes)])
    assert (found["blocks"], found["model"]) == (2, model)
    assert await answer("set_policy", "lru") == "lru"
    assert PoolStatistics.from_dict(await answer("statistics")).total("live_bytes") == 3 * 4096
    await answer("grants", "bare", 0, 0.0)
    await answer("release", "bare", [(6, [cache_id], None), (7, ids, None)])
    assert (await answer("invalidate", "m", [encode_block_id(1)]))["caches"] == 2
    assert (await answer("revoke", "bare"))["caches"] == 2
    await answer("disconnect", "bare")


async def test_delete_refuses_or_drains_while_leases_are_held(pool, start_process):
    process = await start_process(pool)
    await process.request(1, 4096, 1)
    held = await pool.request_cache("m", size=4096)
    for drain_s in (None, 0.1):
        with pytest.raises(PoolBusyError, match=process.client_id):
            await delete(pool.name, drain_s=drain_s)
    with pytest.raises(PoolBusyError, match=process.client_id) as busy:
        await pool.delete()
    assert busy.value.details["leases"][process.client_id] == 4096
    # Nothing has changed: this connection and its lease are as before, and memory is given out.
    held.numpy("uint8", (4,))[:] = 1
    model = await pool.model(ModelSpec("blocks", block_bytes=4096))
    assert await model.put_blocks([encode_block_id(1)], np.ones((1, 4096), np.uint8)) == 1
    async with await pool.request_cache("m", size=4096):
        await held.release()

    deleting = asyncio.create_task(delete(pool.name, drain_s=300))
    while True:  # while it drains, no more memory is given out
        try:
            async with await pool.request_cache("m", size=4096):
                pass
        except PoolBusyError:
            break
    for ask in (
        lambda: model.match_prefix([encode_block_id(1)]),
        lambda: model.new_blocks([encode_block_id(2)]),
        lambda: CachePool.connect(pool.name),
        lambda: delete(pool.name, drain_s=300),
    ):
        with pytest.raises(PoolBusyError, match="being deleted"):
            await ask()
    assert not deleting.done()
    await process.release()
    await deleting
    with pytest.raises(PoolNotFoundError):
        await CachePool.connect(pool.name)


@pytest.mark.parametrize("drain_s", [-1, float("nan"), float("inf"), "soon", True])
async def test_a_drain_time_that_is_none_changes_nothing(pool, drain_s):
    with pytest.raises(InvalidRequestError, match="drain_s"):
        await call(pool.actor.delete, drain_s)
    async with await pool.request_cache("m", size=4096):
        pass


async def test_a_deleted_pool_frees_its_name_when_nobody_kills_its_actor(pool):
    await pool.actor.delete.remote()
    with pytest.raises(PoolNotFoundError, match="has been deleted"):
        await call(pool.actor.start)
    with pytest.raises(PoolNotFoundError):
        await CachePool.connect(pool.name)
    await until(lambda: pool.name not in pool_names(), "the pool actor ends itself")
    again = await CachePool.create(name=pool.name, devices="host:1x1MiB", page_size="64KiB")
    await again.delete()


async def test_whether_a_pool_was_started_or_joined_is_logged(local_ray, caplog):
    settings: dict = {"name": f"t{os.getpid()}-logged", "devices": "host:1x1MiB", "page_size": "64KiB"}
    caplog.set_level("INFO", logger="kvpool.client")
    async with await CachePool.create(**settings) as pool:
        async with await CachePool.create(**settings):
            pass
        told = [record.getMessage() for record in caplog.records if record.name == "kvpool.client"]
        assert told == [
            f"pool {pool.name} is started, on host:1x1MiB",
            f"pool {pool.name} ran already, with the same config: joined, with all that it holds",
        ]
        await pool.delete()


async def test_a_name_that_still_stands_for_a_dead_pool_is_looked_up_again(pool, monkeypatch):
    stale = pool.actor
    await pool.delete()
    asked = {"made": 0, "found": 0}

    def twice(find, key):
        # What Ray itself does until it has told this process of the actor's end, for a moment of no certain length.
        def answer(argument):
            asked[key] += 1
            return stale if asked[key] <= 2 else find(argument)

        return answer

    monkeypatch.setattr(kvpool.client.pool, "make_pool", twice(kvpool.client.pool.make_pool, "made"))
    monkeypatch.setattr(kvpool.client.connection, "find_pool", twice(kvpool.client.connection.find_pool, "found"))
    with pytest.raises(PoolNotFoundError):
        await CachePool.connect(pool.name)
    async with await CachePool.create(name=pool.name, devices="host:1x1MiB", page_size="64KiB") as again:
        assert again.actor != stale
        await again.delete()
    assert asked["made"] == 3
    again = await CachePool.create(name=pool.name, devices="host:1x1MiB", page_size="64KiB")
    await again.close()
    asked["found"] = 0
    monkeypatch.setattr(kvpool.client.pool, "find_pool", twice(kvpool.client.pool.find_pool, "found"))
    await delete(pool.name)
    assert (asked["found"], pool.name in pool_names()) == (3, False)


@pytest.mark.parametrize("when", ["before its answer", "before its devices"])
async def test_a_deletion_in_which_the_pools_actor_dies_is_done(pool, when):
    def let_it_die(actor):
        import kvpool.actors.pool_actor

        if when == "before its answer":
            kvpool.actors.pool_actor.end_self = lambda _: os._exit(1)
        else:
            actor._fleet.end = lambda _: os._exit(1)

    await pool.actor.__ray_call__.remote(let_it_die)
    await pool.delete()
    assert (pool.name in pool_names(), device_actors(pool)) == (False, [])


async def test_a_pool_that_dies_while_it_starts_is_told(local_ray, monkeypatch):
    made = []

    def dying(config):
        made.append(make_pool(config))
        kill(made[-1])
        return made[-1]

    make_pool = kvpool.client.pool.make_pool
    monkeypatch.setattr(kvpool.client.pool, "make_pool", dying)
    name = f"t{os.getpid()}-dying"
    with pytest.raises(PoolUnavailableError, match="is gone"):
        await CachePool.create(name=name, devices="host:1x1MiB", page_size="64KiB")
    assert len(set(made)) == 2  # the first might have been one that had run before
    await until(lambda: name not in pool_names(), "the pool is gone")


async def test_devices_of_one_node_are_promised_its_memory_in_sum(local_ray):
    each_mib = int(0.6 * memory_info().free_bytes) >> 20
    name = f"t{os.getpid()}-sum"
    with pytest.raises(SystemLimitError, match="free"):
        await CachePool.create(name=name, devices=f"host:2x{each_mib}MiB", page_size="64MiB")
    await until(lambda: name not in pool_names(), "the pool is gone")
    async with await CachePool.create(name=name, devices=f"host:1x{each_mib}MiB", page_size="64MiB") as pool:
        await pool.delete()


async def test_another_protocol_version_is_told_when_connecting(pool, monkeypatch):
    actor = pool.actor
    described = await actor.connect.remote({"protocol": 99, "id": "new", "future": True})
    assert described == await actor.describe.remote()  # nothing else: the newcomer decides by "protocol"
    assert (await pool.stats()).clients == 1

    monkeypatch.setattr(kvpool.actors.compatibility, "PROTOCOL_VERSION", 99)
    with pytest.raises(ProtocolError, match=f"with protocol {PROTOCOL_VERSION}, this process kvpool .* protocol 99"):
        await CachePool.connect(pool.name)
    with pytest.raises(ProtocolError, match=f"with protocol {PROTOCOL_VERSION}, this process kvpool .* protocol 99"):
        await CachePool.create(name=pool.name, devices="host:1x4MiB")
    assert (await pool.stats()).clients == 1


async def test_a_host_without_a_device_is_told_when_connecting(pool, monkeypatch):
    monkeypatch.setenv("KVPOOL_HOST", "elsewhere")
    with pytest.raises(ProtocolError, match="no device on this host \\(elsewhere\\)"):
        await CachePool.connect(pool.name)


async def test_a_pool_that_does_not_answer_is_told_and_what_comes_late_is_given_back(pool, monkeypatch):
    await pool.model("m")
    pid = await pid_of(pool.actor)
    os.kill(pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as impatient:
            impatient.setattr(kvpool.client.lane, "ANSWER_S", 0.3)
            with pytest.raises(PoolUnavailableError, match="did not answer"):
                await pool.request_cache("m", size="1MiB")
    finally:
        os.kill(pid, signal.SIGCONT)

    async def given_back():
        return (await pool.stats()).grants == 1 and await leased_bytes(pool) == {}

    await until(given_back, "the late grant is given back")


async def test_presets_say_what_they_run_on(local_ray):
    for create, name, capacity_bytes, policy in (
        (create_vista_cache_pool, "vista", 2 << 30, "size_aware_lru"),
        (create_deepseek_ocr_cache_pool, "deepseek-ocr", 1 << 30, "lru"),
    ):
        async with await create(1, name=f"t{os.getpid()}-{name}") as pool:
            stats = await pool.stats()
            assert (stats.preset, stats.policy, stats.policy_requested) == (name, policy, policy)
            assert [(device.kind, device.capacity_bytes) for device in stats.devices] == [("host", capacity_bytes)]
            await pool.delete()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may lower the niceness that Ray gives its workers")
async def test_actors_run_at_the_priority_of_ordinary_programs(pool):
    for pid in [await pid_of(actor) for actor in (pool.actor, *device_actors(pool))]:
        for thread in map(int, os.listdir(f"/proc/{pid}/task")):
            with contextlib.suppress(ProcessLookupError):  # it has ended since it was listed
                assert os.getpriority(os.PRIO_PROCESS, thread) <= 0
