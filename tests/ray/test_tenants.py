"""Tenants on one device: no page of one is ever another's while a live process may map it."""

import asyncio

import pytest
from footprint import mapped_inodes
from pool_actors import until_no_zombies

PAGE = 64 * 1024
CAPACITY = 4 << 20
RED, BLUE = 0xAA, 0xBB


@pytest.mark.parametrize("ending", ["continued", "killed"])
async def test_a_stopped_client_keeps_its_pages_from_the_other_tenant(make_pool, start_process, ending):
    pool = await make_pool("host:1x4MiB", reserve=1.0)
    stopped, red, blue = await asyncio.gather(
        start_process(pool, "red"), start_process(pool, "red"), start_process(pool, "blue")
    )
    seen = await asyncio.gather(stopped.churn(40, RED, 1), red.churn(40, RED, 2), blue.churn(40, BLUE, 3))
    assert seen == [0, 0, 0]

    await stopped.request(20, PAGE, RED)
    await stopped.request(40, 4096, RED)
    await stopped.release()
    kept = mapped_inodes(stopped.pid)
    assert len(kept) >= 20
    stopped.stop()

    # Both tenants go on, and the other one takes all that it can get. What the stopped client maps is asked back, and
    # as it cannot answer, nobody gets it.
    assert await asyncio.gather(red.churn(25, RED, 4), blue.churn(25, BLUE, 5)) == [0, 0]
    taken = await blue.take_all(PAGE, BLUE, lost_bytes=len(kept) * PAGE)
    assert taken["foreign"] == 0
    assert mapped_inodes(stopped.pid) == kept
    assert not mapped_inodes(blue.pid) & kept
    assert (taken["caches"] + len(kept)) * PAGE == CAPACITY
    await pool.trim()  # asks for all that is warm, while so far only what was needed was asked for
    device = (await pool.stats()).devices[0]
    assert (device.live_bytes, device.zombie_bytes) == (taken["caches"] * PAGE, len(kept) * PAGE)
    assert (device.free_bytes, device.reserve_bytes) == (0, 0)

    if ending == "continued":
        stopped.resume()
    else:
        stopped.kill()
    await until_no_zombies(pool)
    if ending == "continued":
        assert not mapped_inodes(stopped.pid) & kept
    rest = await blue.take_all(PAGE, BLUE)
    assert rest == {"caches": len(kept), "foreign": 0}
    await blue.release()
    last = [red, blue] + [stopped] * (ending == "continued")
    seen = await asyncio.gather(*(p.churn(25, BLUE if p is blue else RED, 6 + n) for n, p in enumerate(last)))
    assert seen == [0] * len(last)


async def test_equal_keys_of_two_tenants_are_two_caches(pool, start_process):
    red, blue = await asyncio.gather(start_process(pool, "red"), start_process(pool, "blue"))
    assert await red.put([1, 2, 3], RED) == 3
    assert await blue.match([1, 2, 3]) == []
    assert await blue.put([1, 2], BLUE) == 2
    await asyncio.gather(red.match([1, 2, 3]), blue.match([1, 2, 3]))
    assert await red.digest() == [[RED]] * 3
    assert await blue.digest() == [[BLUE]] * 2
    assert not mapped_inodes(red.pid) & mapped_inodes(blue.pid)
    await asyncio.gather(red.release(), blue.release())
