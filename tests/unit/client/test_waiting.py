"""Waiting requests of one client: grants that come early, late, or not at all."""

import asyncio

import pytest

from kvpool.client.waiting import WaitingRequests
from kvpool.errors import CacheStateError, PoolUnavailableError


class Method:
    """An actor's method whose answers the test gives, in the order of the calls."""

    def __init__(self):
        self.calls = []
        self._open = asyncio.Queue()

    def remote(self, *arguments):
        self.calls.append(arguments)
        answer = asyncio.get_running_loop().create_future()
        self._open.put_nowait(answer)
        return answer

    async def answer(self, value):
        """Answer the next call, once it is made."""
        async with asyncio.timeout(60):
            answer = await self._open.get()
        if isinstance(value, Exception):
            answer.set_exception(value)
        else:
            answer.set_result(value)


class Actor:
    def __init__(self):
        self.grants, self.cancel = Method(), Method()


def granted(cache_id):
    return ("granted", cache_id, 0, 64, 64, None)


@pytest.fixture
async def waiting():
    """The requests, the actor whose answers the test gives, and the list of what is given back."""
    actor, abandoned = Actor(), []
    requests = WaitingRequests(actor, "c", abandoned.append)
    yield requests, actor, abandoned
    requests.close()


async def turns(count=10):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_closing_tells_everyone_who_waits(waiting):
    requests, _, _ = waiting
    callers = [asyncio.create_task(requests.wait(ticket)) for ticket in (1, 2)]
    await turns()
    requests.close()
    for caller in [*callers, asyncio.create_task(requests.wait(3))]:
        with pytest.raises(CacheStateError, match="connection was closed"):
            async with asyncio.timeout(60):
                await caller


async def test_a_grant_that_overtook_its_ticket_is_given_back_when_the_ticket_is_given_up(waiting):
    requests, actor, abandoned = waiting
    caller = asyncio.create_task(requests.wait(1))
    await actor.grants.answer((2, [(2, granted(22)), (1, granted(11))]))
    assert await caller == granted(11)
    requests.give_up(2)
    assert abandoned == [granted(22)]
    await turns()
    assert actor.cancel.calls == []  # nothing waits any more


async def test_tickets_of_a_failed_poll_are_given_up_and_their_late_grants_given_back(waiting):
    requests, actor, abandoned = waiting
    callers = [asyncio.create_task(requests.wait(ticket)) for ticket in (1, 2)]
    await actor.grants.answer(PoolUnavailableError("no answer"))
    for caller in callers:
        with pytest.raises(PoolUnavailableError):
            await caller
    await actor.cancel.answer([1])  # 2 was granted already
    assert actor.cancel.calls == [("c", [1, 2])]
    await actor.grants.answer((1, [(2, granted(22))]))
    await turns()
    assert abandoned == [granted(22)]
    assert len(actor.grants.calls) == 2  # and polling has ended


async def test_a_poll_that_was_cancelled_before_it_began_is_begun_anew(waiting):
    requests, actor, abandoned = waiting
    caller = asyncio.create_task(requests.wait(1))
    await asyncio.sleep(0)
    requests._poller.cancel()
    await turns()
    caller.cancel()
    await actor.cancel.answer([])  # it is granted already
    await actor.grants.answer((1, [(1, granted(11))]))
    await turns()
    assert abandoned == [granted(11)]


async def test_polling_ends_when_it_fails_for_given_up_tickets_only(waiting):
    requests, actor, abandoned = waiting
    caller = asyncio.create_task(requests.wait(1))
    await actor.grants.answer(PoolUnavailableError("gone"))
    with pytest.raises(PoolUnavailableError):
        await caller
    await actor.cancel.answer(PoolUnavailableError("gone"))
    await actor.grants.answer(PoolUnavailableError("gone"))
    await turns()
    assert (len(actor.grants.calls), len(actor.cancel.calls), abandoned) == (2, 1, [])


async def test_what_cannot_be_given_back_does_not_stop_the_others(caplog):
    actor = Actor()

    def refuse(_answer):
        raise ZeroDivisionError

    requests = WaitingRequests(actor, "c", refuse)
    first, second = [asyncio.create_task(requests.wait(ticket)) for ticket in (1, 2)]
    await turns()
    first.cancel()
    await actor.cancel.answer([])
    await actor.grants.answer((1, [(1, granted(11)), (2, granted(22))]))
    assert await second == granted(22)
    assert "giving back" in caplog.text
    requests.close()
