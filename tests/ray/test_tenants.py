"""Tenants on one device: no page of one is ever another's while a live process may map it."""

import asyncio

import pytest
from footprint import mapped_inodes

SMALL = 4096
PAGE = 64 * 1024


@pytest.mark.parametrize("ending", ["continued", "killed"])
async def test_a_stopped_client_keeps_its_pages_from_the_other_tenant(make_pool, start_process, until, ending):
    pool = await make_pool("host:1x4MiB")
    stopped, red, blue = await asyncio.gather(
        start_process(pool, "red"), start_process(pool, "red"), start_process(pool, "blue")
    )
    first = await asyncio.gather(red.churn(150, 0xAA, 1), blue.churn(150, 0xBB, 2), stopped.churn(150, 0xAA, 3))
    assert [result["foreign"] for result in first] == [0, 0, 0]

    await stopped.request(20, PAGE, 0xAA)
    await stopped.request(20, SMALL, 0xAA)
    await stopped.release()
    kept = mapped_inodes(stopped.pid)
    assert len(kept) >= 20
    stopped.stop()

    # The other tenant needs more than the first one leaves: the pages that the stopped client maps are asked back.
    async def press():
        second = await asyncio.gather(red.churn(60, 0xAA, 4), blue.churn(60, 0xBB, 5))
        assert [result["foreign"] for result in second] == [0, 0]
        await blue.wait_for_memory(1, 4 << 20)
        return (await pool.stats()).total("zombie_bytes") > 0

    assert await press()
    stats = await pool.stats()
    still_mapped = mapped_inodes(stopped.pid)
    assert still_mapped == kept  # it cannot drop them
    assert stats.total("zombie_bytes") >= 20 * PAGE
    assert stats.total("free_bytes") + stats.total("zombie_bytes") <= stats.total("capacity_bytes")
    assert not mapped_inodes(blue.pid) & still_mapped
    third = await asyncio.gather(red.churn(40, 0xAA, 6))
    assert third[0]["foreign"] == 0

    if ending == "continued":
        stopped.resume()
    else:
        stopped.kill()

    async def no_zombies():
        return (await pool.stats()).total("zombie_bytes") == 0

    await until(no_zombies, "the zombies end with the client's mappings")
    if ending == "continued":
        assert not mapped_inodes(stopped.pid) & kept
        assert (await stopped.churn(100, 0xAA, 7))["foreign"] == 0
