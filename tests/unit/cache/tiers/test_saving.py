"""Writing to disk what lies in the host tier, by word."""

import asyncio
import threading

from disk_stores import arrived, key_of
from loop_clock import LONG_S, out_of_time

from kvpool.cache.host_index import Kind

URL = "faulty://tier"
FULL = OSError(28, "No space left on device")


async def test_all_of_the_host_tier_is_on_disk_then_copies_too(open_device, faults):
    device = await open_device(100, URL, watermark=1.0)
    await device.demote(*range(40))
    await device.demote(*range(40, 70))
    await device.copy_ahead(*range(70, 80))
    assert device.disk.statistics().files == 0
    assert await device.tiers.save(None) == {}
    assert len((await device.tiers.on_disk(None))[0]) == 80
    device.host.check()
    await device.tiers.close()
    again = await open_device(0, URL)
    assert await again.fill(*range(60)) == [True] * 60


async def test_of_one_tenant_alone(open_device, faults):
    device = await open_device(8, URL, watermark=1.0)
    await device.demote(1, 2, tenant="a")
    await device.demote(3, tenant="b")
    assert await device.tiers.save("a") == {}
    assert [len((await device.tiers.on_disk(tenant))[0]) for tenant in ("a", "b", None)] == [2, 0, 2]


async def test_what_cannot_be_written_is_told_and_stays_in_the_host(open_device, faults):
    device = await open_device(8, URL, watermark=1.0)
    await device.demote(1, 2)
    faults.errors["put"] = FULL
    assert [error.details["cause"] for error in (await device.tiers.save(None)).values()] == ["ENOSPC"] * 2
    assert device.found(1, 2) == ["host", "host"]
    device.host.check()


async def test_what_went_again_while_others_were_written_lies_in_the_host_alone(open_device, faults, monkeypatch):
    """Taken for saved it would go before all others, and would not be written again."""
    device = await open_device(8, URL, watermark=1.0)
    await device.demote(1, 2)
    write_each = device.tiers._calls.write_each

    async def write_and_lose_one(sources):
        errors = await write_each(sources)
        await device.disk.evict([key_of(1)])  # as for what another call writes
        return errors

    monkeypatch.setattr(device.tiers._calls, "write_each", write_and_lose_one)
    assert await device.tiers.save(None) == {}
    assert [device.host.index.get(key_of(number)).kind for number in (1, 2)] == [Kind.SOLE, Kind.SAVED]
    device.host.check()


async def test_what_is_given_up_because_the_tiers_close_is_told(open_device, faults):
    device = await open_device(8, URL, watermark=1.0)
    await device.demote(1, 2)
    gate = faults.gates["put"] = threading.Event()
    saving = asyncio.ensure_future(device.tiers.save(None))
    await arrived(faults, 2)
    closing = asyncio.ensure_future(device.tiers.close())
    await asyncio.sleep(0)
    gate.set()
    await closing
    assert [error.details["cause"] for error in (await saving).values()] == ["closed"] * 2


async def test_what_is_stored_anew_before_its_files_could_be_removed_is_told(open_device, faults):
    device = await open_device(8, URL, watermark=1.0)
    await device.tiers.write_through([device.written(1)])
    faults.errors["delete"] = PermissionError(13, "Permission denied")
    assert await device.tiers.remove([key_of(1)]) == 1, "the next start removes it"
    await device.demote(1)
    assert list(await device.tiers.save(None)) == [key_of(1)]
    faults.errors.clear()
    assert await device.tiers.save(None) == {}
    assert len((await device.tiers.on_disk(None))[0]) == 1


async def test_a_store_that_hangs_keeps_its_entries_and_nobody_waiting(open_device, faults):
    device = await open_device(8, URL, watermark=1.0, deadline_s=LONG_S)
    await device.demote(1, 2)
    gate = faults.gates["put"] = threading.Event()
    errors = await out_of_time(device.tiers.save(None), arrived(faults, 2))
    assert [error.details["cause"] for error in errors.values()] == ["timeout"] * 2
    entry = device.host.index.get(key_of(1))
    assert entry.holds == 1, "a thread reads it"
    gate.set()
    await device.saved()
    assert entry.holds == 0


async def test_what_was_there_before_a_mark_is_not_written_again_but_where_it_is_named(open_device, faults):
    device = await open_device(16, URL, watermark=1.0)
    await device.demote(1, 2)
    mark = device.tiers.mark
    await device.demote(3)
    await device.demote(4, tenant="b")
    assert await device.tiers.save("default", mark, {key_of(2)}) == {}
    assert [device.disk.find(key_of(number)) is not None for number in range(1, 5)] == [False, True, True, False]


async def test_without_a_disk_it_says_so_of_what_lies_in_the_host_alone(open_device):
    device = await open_device(4)
    assert await device.tiers.save(None) == {}
    await device.demote(1, 2, tenant="a")
    await device.demote(3, tenant="b")
    await device.copy_ahead(4)
    assert [error.details["cause"] for error in (await device.tiers.save(None)).values()] == ["no_disk"] * 3
    assert len(await device.tiers.save("a")) == 2
