"""Requests that wait for memory, and callers that stop waiting."""

import asyncio
import time

import pytest

from kvpool.errors import CapacityError

PAGE = 64 * 1024


async def fill(pool):
    """Lease all memory of a pool of one device, page by page."""
    pages = (await pool.stats()).total("capacity_bytes") // PAGE
    return await asyncio.gather(*(pool.request_cache("m", size=PAGE) for _ in range(pages)))


async def test_a_release_gets_through_2000_waiting_requests(pool):
    held = await fill(pool)
    waiting = [asyncio.create_task(pool.request_cache("m", size=PAGE, timeout_s=60)) for _ in range(2000)]
    while (await pool.stats()).waiting < 2000:
        await asyncio.sleep(0)

    began = time.perf_counter()
    async with asyncio.timeout(10):
        await held.pop().release()
        acknowledged = time.perf_counter()
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    granted = time.perf_counter()
    print(f"\nacknowledged after {1000 * (acknowledged - began):.1f} ms, granted {1000 * (granted - began):.1f} ms")
    assert done == {waiting[0]}  # first come, first served
    assert (await pool.stats()).waiting == 1999

    held.append(waiting.pop(0).result())
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    while (await pool.stats()).waiting:
        await asyncio.sleep(0)
    await asyncio.gather(*(cache.release() for cache in held))


async def test_a_request_is_refused_with_all_figures_when_its_time_is_up(pool):
    held = await fill(pool)
    for timeout_s in (0, 0.05):
        with pytest.raises(CapacityError, match="64 KiB") as refused:
            await pool.request_cache("m", size=PAGE, timeout_s=timeout_s)
        assert refused.value.details["asked_bytes"] == PAGE
        assert refused.value.details["pinned_bytes"] == PAGE * len(held)
        assert refused.value.details["largest_bytes"] == 0
    assert (await pool.stats()).waiting == 0
    await asyncio.gather(*(cache.release() for cache in held))


async def test_a_cancelled_waiting_request_leaves_no_lease(pool):
    held = await fill(pool)
    waiting = asyncio.create_task(pool.request_cache("m", size=PAGE))
    while not (await pool.stats()).waiting:
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    while (await pool.stats()).waiting:
        await asyncio.sleep(0)
    await asyncio.gather(*(cache.release() for cache in held))  # and the pool's fixture finds no lease


async def test_a_request_cancelled_at_any_moment_leaves_no_lease(pool, until):
    """Grants race with cancels: at whatever step of the event loop the caller gives up, the memory comes back."""
    await pool.model("m")
    held = await fill(pool)
    for turns in range(40):
        spare = held.pop()
        asked = [asyncio.create_task(pool.request_cache("m", size=PAGE)) for _ in range(3)]
        releasing = asyncio.create_task(spare.release())
        for _ in range(turns):
            await asyncio.sleep(0.0002 if turns % 2 else 0)
        for task in asked:
            task.cancel()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        await releasing
        for outcome in outcomes:
            if not isinstance(outcome, asyncio.CancelledError):
                await outcome.release()
        held.append(await pool.request_cache("m", size=PAGE, timeout_s=5))
    await asyncio.gather(*(cache.release() for cache in held))

    async def none():
        return not await pool.actor.leases.remote()

    await until(none, "the end of all leases")


async def test_a_request_cancelled_when_its_grant_has_come_leaves_no_lease(pool, until):
    """The grant lies in the caller's future, and the caller is cancelled before it runs again."""
    held = await fill(pool)
    waiting = asyncio.create_task(pool.request_cache("m", size=PAGE))
    while not pool._connection._waiting:
        await asyncio.sleep(0)
    (future,) = pool._connection._waiting.values()
    future.add_done_callback(lambda _: waiting.cancel())
    await held.pop().release()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    async def given_back():
        return (await pool.actor.leases.remote())[pool.client_id] == PAGE * len(held)

    await until(given_back, "the lease of the cancelled request ends")
    await asyncio.gather(*(cache.release() for cache in held))


async def test_an_answer_that_comes_to_a_cancelled_caller_leaves_no_lease(pool, until):
    """The same for an answer that was granted at once."""
    model = await pool.model("m")
    lane = pool._connection.caches
    task = asyncio.create_task(model.request_cache(PAGE))
    while not lane._items:
        await asyncio.sleep(0)
    lane._items[0][1].add_done_callback(lambda _: task.cancel())
    with pytest.raises(asyncio.CancelledError):
        await task

    async def none():
        return not await pool.actor.leases.remote()

    await until(none, "the lease of the cancelled request ends")
    assert (await pool.stats()).grants == 1
