"""Many pages, and limits that are too low for them."""

import asyncio

import model_process
import pytest
import ray
from driver import run_driver
from footprint import Footprint, footprint
from pool_actors import device_actors, pid_of, until_no_zombies

from kvpool.errors import SystemLimitError

PAGE = 64 * 1024


async def test_8000_pages_mapped_and_dropped_by_four_clients(make_pool, start_process):
    pool = await make_pool("host:1x500MiB")
    device = await pid_of(device_actors(pool)[0])
    clients = await asyncio.gather(*(start_process(pool) for _ in range(4)))
    before = {client.pid: client.footprint() for client in clients}
    device_before = footprint(device)

    for count, size_bytes in ((100, 20 * PAGE), (1000, 2 * PAGE)):
        await asyncio.gather(*(client.request(count, size_bytes, 1) for client in clients))
        stats = await pool.stats()
        assert stats.total("live_bytes") == stats.total("capacity_bytes") == 8000 * PAGE
        assert footprint(device).page_descriptors == footprint(device).page_mappings == 8000
        held = [client.footprint() for client in clients]
        assert [each.page_descriptors for each in held] == [0] * 4
        assert sum(each.page_mappings for each in held) >= 8000
        await asyncio.gather(*(client.release() for client in clients))

    await pool.trim()
    await until_no_zombies(pool)
    assert footprint(device) == device_before
    for client in clients:
        held = client.footprint()
        assert (held.page_descriptors, held.page_mappings) == (0, 0)
        assert held.sockets == before[client.pid].sockets
    await asyncio.gather(*(client.close() for client in clients))
    for client in clients:
        assert client.footprint() == Footprint()


async def test_a_client_with_a_low_limit_of_open_files_is_told_when_it_connects(pool):
    client = model_process.ModelProcess.remote()
    try:
        with pytest.raises(SystemLimitError, match="nofile"):
            await client.connect_with_nofile.remote(pool.name, 200)
    finally:
        ray.kill(client)
    assert (await pool.stats()).clients == 1  # ours


async def test_a_device_with_a_low_limit_of_open_files_is_told_at_the_start():
    program = """
        import asyncio, resource, ray
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, address="local", namespace="kvpool")
        from kvpool import CachePool
        from kvpool.actors.cluster import pool_names
        from kvpool.errors import SystemLimitError
        try:
            asyncio.run(CachePool.create(name="low", devices="host:1x500MiB", page_size="64KiB"))
        except SystemLimitError as error:
            print("SystemLimitError:", error)
        print("pools:", pool_names())
    """
    printed = await run_driver(program)
    assert "SystemLimitError: 8000 pages need" in printed
    assert "at most 1024" in printed
    assert "pools: []" in printed
