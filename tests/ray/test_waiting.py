"""Requests that wait for memory, and callers that stop waiting."""

import asyncio
import time

import pytest
from pool_actors import DEADLINE_S, until, until_leased, until_waiting

from kvpool.errors import CapacityError

PAGE = 64 * 1024


async def fill(pool):
    """Lease all memory of a pool of one device, page by page."""
    pages = (await pool.stats()).total("capacity_bytes") // PAGE
    return await asyncio.gather(*(pool.request_cache("m", size=PAGE) for _ in range(pages)))


async def test_a_release_gets_through_2000_waiting_requests(pool):
    held = await fill(pool)
    waiting = [asyncio.create_task(pool.request_cache("m", size=PAGE, timeout_s=600)) for _ in range(2000)]
    await until_waiting(pool, 2000)

    began = time.perf_counter()
    async with asyncio.timeout(DEADLINE_S):
        await held.pop().release()
        acknowledged = time.perf_counter()
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    granted = time.perf_counter()
    print(f"\nacknowledged after {1000 * (acknowledged - began):.1f} ms, granted {1000 * (granted - began):.1f} ms")
    assert len(done) == 1
    assert (await pool.stats()).waiting == 1999

    held.append(done.pop().result())
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await until_waiting(pool, 0)
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


async def test_deadlines_that_pass_at_once_are_all_answered(pool):
    """Each in a call of its own: the next one comes in before the pool has told the last one that its time is up."""
    held = await fill(pool)
    number = (await pool.model("m")).number
    item = (1, number, PAGE, PAGE, 1e-6, None)
    answers = await asyncio.gather(*(pool.actor.request_caches.remote(pool.client_id, [item]) for _ in range(100)))
    assert {answer[0] for (answer,) in answers} <= {"queued", "error"}
    tickets = {answer[1] for (answer,) in answers if answer[0] == "queued"}
    seen = 0
    while tickets:
        async with asyncio.timeout(DEADLINE_S):
            seen, outcomes = await pool.actor.grants.remote(pool.client_id, seen, 2 * DEADLINE_S)
        assert {answer[1] for _, answer in outcomes} == {"CapacityError"}
        tickets.difference_update(ticket for ticket, _ in outcomes)
    await asyncio.gather(*(cache.release() for cache in held))


async def test_a_cancelled_waiting_request_leaves_no_lease(pool):
    held = await fill(pool)
    waiting = asyncio.create_task(pool.request_cache("m", size=PAGE))
    await until_waiting(pool, 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until_waiting(pool, 0)
    await asyncio.gather(*(cache.release() for cache in held))  # and the pool's fixture finds no lease


async def test_a_request_cancelled_at_any_moment_leaves_no_lease(pool):
    """Grants race with cancels: at whatever step of the event loop the caller gives up, the memory comes back."""
    held = await fill(pool)
    for turns in range(40):
        asked = [asyncio.create_task(pool.request_cache("m", size=PAGE)) for _ in range(3)]
        releasing = asyncio.create_task(held.pop().release())
        for _ in range(turns):
            await asyncio.sleep(0.0002 if turns % 2 else 0)
        for task in asked:
            task.cancel()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        await releasing
        for outcome in outcomes:
            if not isinstance(outcome, asyncio.CancelledError):
                await outcome.release()
        held.append(await pool.request_cache("m", size=PAGE, timeout_s=DEADLINE_S))
    await asyncio.gather(*(cache.release() for cache in held))
    await until_leased(pool, 0)


async def test_a_grant_that_meets_a_cancelled_caller_is_given_back(pool, monkeypatch):
    """The caller is cancelled in the very turn of the event loop in which its grant comes."""
    held = await fill(pool)
    waiting = asyncio.create_task(pool.request_cache("m", size=PAGE))
    await until_waiting(pool, 1)
    requests = pool._connection._waiting
    take = requests._take

    def take_and_cancel(ticket, answer):
        take(ticket, answer)
        waiting.cancel()

    monkeypatch.setattr(requests, "_take", take_and_cancel)
    await held.pop().release()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until_leased(pool, PAGE * len(held))
    await asyncio.gather(*(cache.release() for cache in held))


async def test_a_grant_that_is_missed_by_the_last_poll_is_given_back(pool):
    """A grant follows while the only caller gives up: somebody must still fetch it."""
    held = await fill(pool)
    waiting = asyncio.create_task(pool.request_cache("m", size=PAGE))
    await until_waiting(pool, 1)
    requests = pool._connection._waiting
    await until(lambda: requests._poller is not None, "the client waits for the grant")
    requests._poller.cancel()  # it was about to end, as if another grant had just come with it
    await held.pop().release()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until_leased(pool, PAGE * len(held))
    await asyncio.gather(*(cache.release() for cache in held))


async def test_an_answer_that_meets_a_cancelled_caller_is_given_back(pool):
    """The same for a cache that is granted at once."""
    model = await pool.model("m")
    lane = pool._connection.caches
    task = asyncio.create_task(model.request_cache(PAGE))
    await asyncio.sleep(0)
    ((item, trace, future),) = lane._items
    lane._items = [(item, trace, CancellingFuture(future, task))]
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_leased(pool, 0)
    assert (await pool.stats()).grants == 1


class CancellingFuture:
    """Takes an answer, and cancels at once the task that awaits it."""

    def __init__(self, future, task):
        self.done = future.done
        self.set_exception = future.set_exception
        self._future = future
        self._task = task

    def set_result(self, answer):
        self._future.set_result(answer)
        self._task.cancel()
