"""The stream of events: each event comes once, whatever becomes of those that wait for it."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from kvpool.client.blocking import BlockingEventStream
from kvpool.client.events import EventStream


class Pool:
    """Answers polls with the events that have happened; a connection to it."""

    def __init__(self):
        self.tenant = "default"
        self.actor = SimpleNamespace(events=None)
        self.happened = []
        self.polling, self.news = threading.Event(), asyncio.Event()

    async def call(self, _method, seen, wait_s, _tenant, *, timeout_s):
        assert timeout_s > wait_s
        if seen is None:
            return len(self.happened), []
        if seen == len(self.happened):
            self.polling.set()
            try:
                async with asyncio.timeout(wait_s):
                    await self.news.wait()
            except TimeoutError:
                return seen, []
        return len(self.happened), [(kind,) for kind in self.happened[seen:]]

    async def happen(self, *kinds):
        self.happened += kinds
        self.news.set()


@pytest.fixture
def loop():
    """The event loop of a blocking client, in its thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_an_interrupted_wait_loses_no_event_and_brings_none_twice(loop):
    pool = Pool()
    interrupted = []

    def run(make, *arguments):
        future = asyncio.run_coroutine_threadsafe(make(*arguments), loop)
        if interrupt.is_set() and make.__name__ != "start":
            assert pool.polling.wait(60)
            interrupted.append(future)
            raise KeyboardInterrupt
        return future.result(10)

    interrupt = threading.Event()
    interrupt.set()
    stream = BlockingEventStream(EventStream(pool), run).start()
    with pytest.raises(KeyboardInterrupt):
        stream.next(10.0)
    interrupt.clear()
    assert stream.next(0.0) is None  # not as long as the one that was left behind
    asyncio.run_coroutine_threadsafe(pool.happen("stored", "removed"), loop).result(10)
    interrupted[0].result(10)
    assert [stream.next(0.0).kind, stream.next(0.0).kind, stream.next(0.0)] == ["stored", "removed", None]


async def test_two_that_wait_at_once_share_what_comes():
    pool = Pool()
    stream = await EventStream(pool).start()
    both = [asyncio.ensure_future(stream.next(10.0)) for _ in range(2)]
    await asyncio.sleep(0)
    await pool.happen("stored", "removed")
    async with asyncio.timeout(60):
        assert [event.kind for event in await asyncio.gather(*both)] == ["stored", "removed"]
    assert await stream.next(0.0) is None


async def test_a_wait_that_is_cancelled_loses_no_event():
    pool = Pool()
    stream = await EventStream(pool).start()
    waiting = asyncio.ensure_future(stream.next(10.0))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await pool.happen("stored")
    assert (await stream.next(0.0)).kind == "stored"
