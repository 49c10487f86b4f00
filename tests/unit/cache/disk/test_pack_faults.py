"""Packs on a store that fails or hangs, and calls that are given up meanwhile."""

import asyncio
import errno
import threading

import pytest
from disk_stores import DEADLINE_S, FaultyFolder, key_of, read, refuse_the_first_write
from packed_caches import CONTENTS, FILE, contents, write_together

from kvpool.cache.disk import local_packs
from kvpool.cache.disk.packing import Write
from kvpool.errors import TierError


async def test_a_pack_that_cannot_be_written_leaves_nothing_and_costs_one_error(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    faults.errors["write"] = OSError(errno.EIO, "Input/output error")
    assert await write_together(tier, range(6)) == [False] * 6
    with pytest.raises(TierError, match="5 more"):
        await write_together(tier, range(6), "write_through")
    faults.errors.clear()
    assert not any(await contents(tier, range(6)))
    assert (tier.statistics().errors, tier.statistics().used_bytes) == ({"EIO": 2}, 0)
    assert all(await write_together(tier, range(6)))
    assert all(await contents(tier, range(6)))


async def test_on_a_store_that_is_full_below_the_budget_old_ones_go_for_a_pack(open_tier, tmp_path, monkeypatch):
    gone = []
    tier = await open_tier(str(tmp_path), on_gone=gone.extend)
    await write_together(tier, range(8))
    refuse_the_first_write(monkeypatch)
    assert all(await write_together(tier, range(10, 14)))
    assert gone == [key_of(number) for number in range(4)]
    assert await contents(tier, range(14)) == [False] * 4 + [True] * 4 + [False] * 2 + [True] * 4


async def test_a_sync_that_fails_acknowledges_none_of_a_pack(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    faults.errors["sync"] = OSError(errno.EIO, "Input/output error")
    writes = (tier.write_through(key_of(number), None, CONTENTS[number]) for number in range(5))
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [TierError] * 5
    faults.errors.clear()
    await write_together(tier, range(5), "write_through")
    assert all(await contents(tier, range(5)))


async def test_one_that_cannot_get_its_hole_stays_and_goes_first_later(open_tier, tmp_path, monkeypatch):
    gone = []
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(4))
    await tier.close()
    tier = await open_tier(str(tmp_path), 4 * FILE, on_gone=gone.extend)
    real = local_packs.punch_hole

    def punch_hole(file, start, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_packs, "punch_hole", punch_hole)
    assert not await tier.write_back(key_of(9), None, CONTENTS[9])
    assert (gone, tier.statistics().used_bytes) == ([], 4 * FILE)
    assert all(await contents(tier, range(1, 4)))
    monkeypatch.setattr(local_packs, "punch_hole", real)
    assert await tier.write_back(key_of(9), None, CONTENTS[9])
    assert gone == [key_of(0)]


async def arrival(faults):
    assert await asyncio.to_thread(faults.arrived.acquire, True, DEADLINE_S)


async def test_one_of_a_pack_that_is_being_written_can_be_removed_and_one_that_waits_ends_at_once(
    open_tier, tmp_path, faults
):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults), threads=1)
    gate = faults.gates["write"] = threading.Event()
    under_way = [asyncio.ensure_future(tier.write_through(key_of(n), None, CONTENTS[n])) for n in range(4)]
    await arrival(faults)
    waiting = [asyncio.ensure_future(tier.write_back(key_of(n), None, CONTENTS[n])) for n in range(4, 8)]
    await asyncio.sleep(0)
    del faults.gates["write"]
    removal = asyncio.ensure_future(tier.remove([key_of(1), key_of(5)]))
    waiting[3].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[3]
    under_way[2].cancel()
    await asyncio.sleep(0)
    assert not under_way[2].done(), "the thread reads its memory"
    assert tier.find(key_of(1)) is None
    gate.set()
    assert await removal == 1
    with pytest.raises(asyncio.CancelledError):
        await under_way[2]
    assert await asyncio.gather(*waiting[:3]) == [True, False, True]
    for _ in range(2):
        assert await contents(tier, range(8)) == [True, False, True, True, True, False, True, False]
        await tier.close()
        tier = await open_tier(str(tmp_path))


async def test_closing_gives_up_what_waits_to_be_packed(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults), threads=1)
    gate = faults.gates["write"] = threading.Event()
    under_way = [asyncio.ensure_future(tier.write_back(key_of(n), None, CONTENTS[n])) for n in range(3)]
    await arrival(faults)
    waiting = [asyncio.ensure_future(tier.write_back(key_of(n), None, CONTENTS[n])) for n in range(3, 6)]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(tier.close())
    await asyncio.sleep(0)
    gate.set()
    await closing
    assert await asyncio.gather(*under_way, *waiting) == [True] * 3 + [False] * 3


async def test_reads_of_a_pack_go_together_and_one_that_is_removed_meanwhile_is_a_miss(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults), threads=1)
    await write_together(tier, range(6))
    gate = faults.gates["read"] = threading.Event()
    first = asyncio.ensure_future(read(tier, key_of(0)))
    await arrival(faults)
    del faults.gates["read"]
    waiting = [asyncio.ensure_future(read(tier, key_of(number))) for number in range(1, 6)]
    await asyncio.sleep(0)
    removal = asyncio.ensure_future(tier.remove([key_of(2)]))
    waiting[2].cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await first == CONTENTS[0]
    assert await removal == 1
    left = await asyncio.gather(*waiting, return_exceptions=True)
    assert left[:2] == [CONTENTS[1], None]
    assert isinstance(left[2], asyncio.CancelledError)
    assert left[3:] == [CONTENTS[4], CONTENTS[5]]


async def test_given_up_together_what_waits_ends_at_once_and_what_a_thread_has_when_it_is_done(
    open_tier, tmp_path, faults
):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults), threads=1)
    gate = faults.gates["write"] = threading.Event()

    def made(numbers):
        return [Write(key_of(number), None, memoryview(CONTENTS[number]), durable=True) for number in numbers]

    held, waiting = made(range(3)), made([*range(3, 6), 4])
    under_way = asyncio.ensure_future(tier.write(held))
    await arrival(faults)
    del faults.gates["write"]
    behind = asyncio.ensure_future(tier.write(waiting))
    await asyncio.sleep(0)
    waiting[0].cancel()  # one by itself: the others go on
    held[0].cancel()
    assert [each.done.done() for each in (waiting[0], held[0])] == [True, False]
    under_way.cancel()
    behind.cancel()
    with pytest.raises(asyncio.CancelledError):
        await behind
    assert not under_way.done(), "the thread reads their memory"
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await under_way
    assert all(write.done.cancelled() for write in (*held, *waiting))
    assert await contents(tier, range(6)) == [True] * 3 + [False] * 3
    assert tier.statistics().waiting_writes == 0
    await asyncio.gather(*(tier.write_through(key_of(number), None, CONTENTS[number]) for number in range(6)))
    assert await contents(tier, range(6)) == [True] * 6, "no key and no room was kept"
