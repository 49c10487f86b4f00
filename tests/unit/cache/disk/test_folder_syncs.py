"""Syncs of a folder are shared, and never by a name that was written after one began."""

import asyncio
import threading

import pytest
from disk_stores import DEADLINE_S, content_of, key_of

from kvpool.cache.disk.folder_syncs import FolderSyncs


class SlowFolder:
    """Notes which names each of its syncs covers; each waits at a gate."""

    def __init__(self):
        self.names: list[str] = []
        self.covered: list[list[str]] = []
        self.begun, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.error: Exception | None = None

    def sync(self, path):
        covered = [name for name in self.names if name.startswith(path)]
        self.begun.release()
        assert self.gate.acquire(timeout=DEADLINE_S)
        if self.error is not None:
            raise self.error
        self.covered.append(covered)


@pytest.fixture
async def folder():
    return SlowFolder()


@pytest.fixture
async def syncs(folder):
    made = FolderSyncs(folder, 2)
    yield made
    folder.gate.release(100)
    await made.close()


async def test_who_asks_while_one_goes_on_shares_the_next(folder, syncs):
    async def write(name):
        folder.names.append(name)
        await syncs.sync(name[0])
        assert any(name in covered for covered in folder.covered), name

    first = asyncio.create_task(write("a1"))
    assert await asyncio.to_thread(folder.begun.acquire, timeout=DEADLINE_S)
    others = [asyncio.create_task(write(f"a{number}")) for number in range(2, 9)]
    elsewhere = asyncio.create_task(write("b1"))
    assert await asyncio.to_thread(folder.begun.acquire, timeout=DEADLINE_S), "another folder waits for none of these"
    folder.gate.release(100)
    await asyncio.gather(first, *others, elsewhere)
    assert sorted(map(len, folder.covered)) == [1, 1, 8]


async def test_an_error_is_everyones_who_shared_it_and_the_next_is_tried_anew(folder, syncs):
    folder.error = OSError(5, "I/O error")
    folder.gate.release(100)
    outcomes = await asyncio.gather(*(syncs.sync("a") for _ in range(3)), return_exceptions=True)
    assert outcomes == [folder.error] * 3
    folder.error = None
    await syncs.sync("a")


async def test_threads_write_on_while_a_folder_is_synced(open_tier, tmp_path, monkeypatch):
    tier = await open_tier(str(tmp_path / "tier"), threads=1)
    await tier.write_through(key_of(0), None, content_of(0))
    gate, real = threading.Event(), tier._folder.sync
    monkeypatch.setattr(tier._folder, "sync", lambda path: (gate.wait(DEADLINE_S), real(path)))
    through = [asyncio.create_task(tier.write_through(key_of(n), None, content_of(n))) for n in range(1, 6)]
    async with asyncio.timeout(DEADLINE_S):
        while tier.statistics().files < 6:  # noqa: ASYNC110  they come by threads
            await asyncio.sleep(0.001)
    assert not any(write.done() for write in through), "what is not synced is not acknowledged"
    gate.set()
    await asyncio.gather(*through)
