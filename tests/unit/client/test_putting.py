"""The copy of ``put_blocks`` in threads."""

import asyncio
import threading

import numpy as np
import pytest

from kvpool.client import putting


class Blocks:
    """New blocks that note when they are released."""

    def __init__(self, events, addresses=(0,)):
        self.events = events
        self._addresses = list(addresses)

    def __len__(self):
        return len(self._addresses)

    def addresses(self):
        return self._addresses

    async def finish(self, *, durable=False):
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
        assert end.wait(60)
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


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
async def test_threads_share_the_blocks_and_leave_none_out(monkeypatch, threads):
    monkeypatch.setattr(putting, "threads_for", lambda size_bytes: threads)
    block_bytes = putting._INLINE_BYTES
    source = np.random.default_rng(threads).integers(0, 255, (7, block_bytes), dtype=np.uint8)
    target = np.zeros_like(source)
    order = [3, 0, 1, 2, 6, 5, 4]
    await putting.fill(
        Blocks([], [target[n].ctypes.data for n in order]), [source[n].ctypes.data for n in order], block_bytes
    )
    assert (target == source).all()


async def test_memory_is_not_released_while_one_of_several_copies_runs(monkeypatch):
    monkeypatch.setattr(putting, "threads_for", lambda size_bytes: 2)
    events, failed, end = [], threading.Event(), threading.Event()

    def copy(destinations, *_):
        if destinations == [0]:
            failed.set()
            raise ZeroDivisionError
        assert end.wait(60)
        events.append("copied")

    monkeypatch.setattr(putting, "copy_blocks", copy)
    put = asyncio.create_task(putting.fill(Blocks(events, [0, 1]), [0, 1], 1 << 20))
    await asyncio.to_thread(failed.wait, 30)
    assert (put.done(), events) == (False, [])
    end.set()
    with pytest.raises(ZeroDivisionError):
        await put
    assert events == ["copied", "released"]


def test_a_second_thread_needs_enough_to_copy():
    assert putting.threads_for(1) == putting.threads_for(2 * putting._THREAD_BYTES - 1) == 1
    most = putting.threads_for(1 << 40)
    assert 1 <= most <= putting._MOST_THREADS
