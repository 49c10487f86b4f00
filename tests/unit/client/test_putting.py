"""The copy of ``put_blocks`` in a thread."""

import asyncio
import threading

import pytest

from kvpool.client import putting


class Blocks:
    """New blocks that note when they are released."""

    def __init__(self, events):
        self.events = events

    def __len__(self):
        return 1

    def addresses(self):
        return [0]

    async def finish(self):
        self.events.append("finished")

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.events.append("released")


@pytest.fixture
def copying(monkeypatch):
    """A copy that takes until ``end`` is set; ``began`` says that it runs."""
    events, began, end = [], threading.Event(), threading.Event()

    def copy(*_):
        began.set()
        assert end.wait(30)
        events.append("copied")

    monkeypatch.setattr(putting, "copy_blocks", copy)
    yield events, began, end
    end.set()


async def test_memory_is_not_released_under_the_copy_however_often_it_is_cancelled(copying):
    events, began, end = copying
    put = asyncio.create_task(putting.fill(Blocks(events), [0], 1 << 20))
    await asyncio.to_thread(began.wait, 30)
    for _ in range(3):
        put.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert (put.done(), events) == (False, [])
    end.set()
    with pytest.raises(asyncio.CancelledError):
        await put
    assert events == ["copied", "released"]


async def test_a_copy_that_fails_is_told(monkeypatch):
    def copy(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(putting, "copy_blocks", copy)
    events = []
    with pytest.raises(ZeroDivisionError):
        await putting.fill(Blocks(events), [0], 1 << 20)
    assert events == ["released"]
