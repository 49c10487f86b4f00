"""Stores that are full, gone, denied, slow or unusable: misses that are counted, never errors and never wrong bytes."""

import asyncio
import errno
import shutil
import threading

import pytest
from disk_stores import DEADLINE_S, FaultyFolder, FullDisk, SmallFolder, arrived, content_of, key_of
from loop_clock import LONG_S, out_of_time

from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.host_index import Kind

PAGE = 64 << 10
URL = "faulty://tier"

FULL = OSError(errno.ENOSPC, "No space left on device")
DENIED = PermissionError(errno.EACCES, "Permission denied")


class DriverError(Exception):
    """What drivers raise: no OSError."""


async def settled(device):
    """Writes are done, and all that is gone has been told."""
    await device.saved()
    await asyncio.sleep(0)
    device.check()


@pytest.mark.parametrize(
    ("error", "cause"), [(FULL, "ENOSPC"), (DENIED, "EACCES"), (DriverError("throttled"), "DriverError")]
)
async def test_a_store_that_takes_nothing_below_a_host_tier(open_device, faults, caplog, error, cause):
    device = await open_device(4, URL, patience_s=LONG_S)
    faults.errors["put"] = error
    for number in range(8):
        assert await device.demote(number) == [True], "the newest is kept, and an old one dropped"
    await settled(device)
    # About the oldest: what is being tried right now is passed over.
    gone = {number for number in range(8) if key_of(number) in device.gone}
    assert len(gone) == len(device.gone) == 4
    assert 7 not in gone
    assert await device.fill(*range(8)) == [number not in gone for number in range(8)]
    figures = device.tiers.statistics()
    assert figures["host"]["dropped"] == 4
    assert set(figures["disk"]["errors"]) == {cause}
    assert sum("writing" in message for message in caplog.messages) == 1
    faults.errors.clear()
    await device.demote(*set(range(8)) - gone)
    for number in range(8, 16):
        assert await device.demote(number) == [True]
    await settled(device)
    assert len(device.gone) == 4, "the store takes it again"


@pytest.mark.parametrize("error", [FULL, DENIED, DriverError("throttled")])
async def test_a_store_that_takes_nothing_below_a_device(open_device, faults, error):
    device = await open_device(0, URL)
    faults.errors["put"] = error
    assert await device.demote(1, 2) == [False, False]
    assert await device.copy_ahead(3) == [False]
    assert await device.fill(1) == [False]
    assert device.tiers.statistics()["not_kept"] == 2
    faults.errors.clear()
    assert await device.demote(1, 2) == [True, True]
    assert await device.fill(1, 2) == [True, True]


async def test_a_store_that_gives_nothing(open_device, faults):
    device = await open_device(0, URL)
    await device.demote(1, 2)
    faults.errors["get"] = DriverError("timed out")
    assert await device.fill(1, 2) == [False, False]
    faults.errors.clear()
    assert await device.fill(1, 2) == [True, True], "the files may be good"
    assert device.gone == []


async def test_a_file_that_is_not_what_it_was_is_a_miss_and_gone(open_device, tmp_path):
    device = await open_device(0, str(tmp_path / "tier"))
    for number in (1, 2):
        await device.demote(number)
    path = tmp_path / "tier" / device.disk.find(key_of(1)).path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert await device.fill(1, 2) == [False, True]
    await settled(device)
    assert (device.gone, device.found(1, 2)) == ([key_of(1)], [None, "disk"])


async def test_a_folder_that_vanishes_costs_what_was_only_there(open_device, tmp_path):
    device = await open_device(4, str(tmp_path / "tier"), watermark=0.5)
    for number in range(6):
        await device.demote(number)
    await settled(device)
    shutil.rmtree(tmp_path / "tier")
    tiers = device.found(*range(6))
    assert set(tiers) == {"host", "disk"}
    for number, tier in enumerate(tiers):
        assert await device.fill(number) == [tier == "host"]
    for number in range(6, 12):
        assert await device.demote(number) == [True]
    await settled(device)
    assert set(device.gone) == {key_of(number) for number in range(12) if device.tiers.find(key_of(number)) is None}


async def test_a_slow_store_holds_a_demotion_up_once_for_a_bounded_time(open_device, faults):
    device = await open_device(4, URL, patience_s=0.05, watermark=0.0)
    gate = faults.gates["put"] = threading.Event()
    assert await device.demote(0, 1, 2, 3) == [True] * 4
    assert await device.demote(4) == [False], "everything is being written, and stays where it is"
    # From now on nobody waits, until the store answers again: this would take too long.
    device.tiers._demotion.patience_s = LONG_S
    async with asyncio.timeout(DEADLINE_S):
        assert await device.demote(5) == [False]
    assert device.tiers.statistics()["not_kept"] == 2
    gate.set()
    await settled(device)
    assert await device.demote(6) == [True]
    await settled(device)
    assert device.gone == []
    assert await device.fill(0, 1, 2, 3, 6) == [True] * 5


async def test_what_cannot_wait_for_a_slow_store_is_dropped_and_told(open_device, faults):
    device = await open_device(16, URL, patience_s=0.05, watermark=1.0)
    gate = faults.gates["put"] = threading.Event()
    assert await device.demote(*range(16)) == [True] * 16
    assert await device.demote(16, 17) == [True, True]
    await asyncio.sleep(0)
    dropped = [number for number in range(18) if device.tiers.find(key_of(number)) is None]
    assert len(dropped) == 2
    assert sorted(device.gone) == [key_of(number) for number in dropped]
    assert device.tiers.statistics()["host"]["dropped"] == 2
    gate.set()
    await settled(device)
    assert await device.fill(*range(18)) == [number not in dropped for number in range(18)]


async def test_without_a_host_tier_a_slow_store_never_sees_the_memory_that_is_used_again(open_device, faults):
    device = await open_device(0, URL, patience_s=LONG_S)
    gate = faults.gates["put"] = threading.Event()
    demoting = device.demote(*range(12))
    assert await out_of_time(demoting, arrived(faults)) == [False] * 12  # and the memory is overwritten
    async with asyncio.timeout(DEADLINE_S):
        assert not any(await device.demote(*range(20, 32)))
    gate.set()
    await settled(device)
    written = device.disk.statistics().written_files
    assert written >= 1, "what had a thread was finished"
    assert sum(await device.fill(*range(12), *range(20, 32))) == written
    assert await device.demote(40) == [True]
    assert await device.fill(40) == [True]


async def test_a_disk_in_use_elsewhere_is_done_without(open_device, tmp_path, caplog):
    other = DiskTier(folder_at(str(tmp_path / "tier")), 1 << 30)
    await other.start()
    device = await open_device(4, str(tmp_path / "tier"))
    assert device.restored == []
    assert await device.demote(1) == [True]
    assert await device.fill(1) == [True]
    (error,) = await device.tiers.write_through([device.written(1)])
    figures = device.tiers.statistics()
    assert figures["disk"] is None
    assert "another process" in figures["disk_problem"]
    assert "another process" in str(error)
    assert sum("going on without the disk" in message for message in caplog.messages) == 1
    await other.close()


async def test_a_cancelled_fill_returns_when_no_thread_writes_to_its_memory_any_more(open_device, faults):
    device = await open_device(0, URL)
    await device.demote(*range(12))
    gate = faults.gates["get"] = threading.Event()
    filling = asyncio.create_task(device.fill(*range(12)))
    await arrived(faults, 4)  # as many as there are threads
    filling.cancel()
    done, _ = await asyncio.wait((filling,), timeout=0.01)
    assert not done
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await filling
    assert faults.arrived.acquire(blocking=False) is False, "those without a thread were never read"
    assert await device.fill(*range(12)) == [True] * 12


async def test_a_cancelled_demotion_is_finished_first(open_device, copies):
    device = await open_device(4)
    demoting = asyncio.create_task(device.tiers.demote([device.written(1)]))
    await copies.reached()
    demoting.cancel()
    done, _ = await asyncio.wait((demoting,), timeout=0.01)
    assert not done
    copies.open()
    with pytest.raises(asyncio.CancelledError):
        await demoting
    assert await device.fill(1) == [True]


async def test_a_cancelled_fill_from_the_host_leaves_the_entry_as_it_was(open_device, copies):
    device = await open_device(4)
    copies.open()
    await device.demote(1)
    copies.close()
    filling = asyncio.create_task(device.fill(1))
    await copies.reached()
    filling.cancel()
    copies.open()
    with pytest.raises(asyncio.CancelledError):
        await filling
    assert device.host.index.get(key_of(1)).kind is Kind.SOLE
    device.host.check()
    assert await device.fill(1) == [True]


async def test_what_is_being_filled_is_not_dropped_for_room(open_device, copies):
    device = await open_device(2)
    copies.open()
    await device.demote(1, 2)
    copies.close()
    filling = asyncio.create_task(device.fill(1))
    await copies.reached()
    demoting = asyncio.create_task(device.tiers.demote([device.written(3), device.written(4)]))
    await asyncio.sleep(0)
    copies.open()
    assert await filling == [True]
    assert await demoting == [True, False] or device.found(3, 4) == ["host", None]
    assert device.found(1, 2) == ["host", None]


async def test_closing_with_a_store_that_hangs_waits_for_its_threads_only(open_device, faults):
    device = await open_device(0, URL)
    gate = faults.gates["put"] = threading.Event()
    writing = [asyncio.create_task(device.tiers.write_through([device.written(number)])) for number in range(20)]
    await arrived(faults)
    closing = asyncio.create_task(device.tiers.close())
    await asyncio.sleep(0)
    assert device.found(0) == [None]
    gate.set()
    await closing
    assert all([(await write)[0] is not None for write in writing])


async def test_a_folder_with_a_fault_at_any_step_yields_right_bytes_or_misses(open_device, faults, tmp_path):
    device = await open_device(4, FaultyFolder(str(tmp_path / "tier"), faults), watermark=0.5)
    for step in ("write", "read", "remove", "sync", "size"):
        faults.errors[step] = FULL
        for number in range(8):
            await device.demote(number)
        await device.fill(*range(8))
        faults.errors.clear()
        await device.fill(*range(8))
    await settled(device)


@pytest.mark.parametrize("fit", [0, 1, 7, 11, 12])
async def test_of_a_chain_that_a_disk_has_no_room_for_the_front_is_stored(open_device, tmp_path, fit):
    """All of it is one pack, of which nothing was stored then."""
    folder = SmallFolder(str(tmp_path), fit * (PAGE + 4096) + 3 * 4096)  # with headers, and tables of packs
    device = await open_device(0, folder)
    errors = await device.tiers.write_through([device.written(number) for number in range(12)])
    there = [error is None for error in errors]
    assert there == [True] * fit + [False] * (12 - fit)
    assert {error.details["cause"] for error in errors if error is not None} <= {"ENOSPC"}
    assert device.found(*range(12)) == ["disk" if each else None for each in there]
    assert await device.fill(*range(12)) == there


CHAIN = 24
ON_DISK = PAGE + 4096  # with its header, in whole blocks of the file system


class DiskOfFiles(FullDisk):
    """One that takes no packs."""

    takes_packs = False


def chain(device, numbers):
    """A chain with its bytes in the device's memory."""
    numbers = list(numbers)
    parents = [None, *(key_of(number).block_hash for number in numbers)]
    return [device.written(number)._replace(parent=parent) for number, parent in zip(numbers, parents, strict=False)]


@pytest.mark.parametrize("kind", [FullDisk, DiskOfFiles])
@pytest.mark.parametrize("old", [0, 6, 19])
@pytest.mark.parametrize("crowded", [(5,), (0, 9), (18,), (3, 4, 5, 6)])
async def test_a_chain_that_a_full_disk_has_no_room_for_has_no_gap(open_device, tmp_path, kind, old, crowded):
    """Those that found no room for a moment let others behind them take theirs: these go for them first."""
    fit = 19
    folder = kind(str(tmp_path), fit * ON_DISK + 12 * 4096)  # tables of packs
    device = await open_device(0, folder, 16 * 4 * ON_DISK)  # packs of four
    for number in range(100, 100 + old):
        (error,) = await device.tiers.write_through([device.written(number)])
        assert error is None
    # Each is tried again when something old has gone for it.
    folder.crowded.update({bytes(content_of(number, 4096)): 2 if old else 1 for number in crowded})
    errors = await device.tiers.write_through(chain(device, range(CHAIN)))
    there = [error is None for error in errors]
    assert there == [True] * fit + [False] * (CHAIN - fit)
    assert {error.details["cause"] for error in errors if error is not None} == {"ENOSPC"}
    assert device.found(*range(CHAIN)) == ["disk" if each else None for each in there]
    assert await device.fill(*range(CHAIN)) == there
    device.disk._index.check()


@pytest.mark.parametrize("kind", [FullDisk, DiskOfFiles])
async def test_of_a_full_disk_nothing_old_goes_that_need_not(open_device, tmp_path, kind):
    device = await open_device(0, kind(str(tmp_path), 20 * ON_DISK + 4 * 4096), 16 * 4 * ON_DISK)
    for number in range(100, 115):
        await device.tiers.write_through([device.written(number)])
    assert await device.tiers.write_through(chain(device, range(8))) == [None] * 8
    left = sum(device.disk.find(key_of(number)) is not None for number in range(100, 115))
    assert left == 12 if kind is DiskOfFiles else left >= 8, "a pack takes the room of as many as it has"


async def test_what_lies_behind_a_gap_goes_before_what_is_old(open_device, tmp_path, monkeypatch):
    folder = DiskOfFiles(str(tmp_path), 12 * ON_DISK)
    device = await open_device(0, folder)
    await device.tiers.write_through([device.written(100)])
    real, kept = device.disk.giving_way, [key_of(100)]
    device.disk.keep(kept)

    def giving_way(keys):
        device.disk.unkeep(kept)  # once: from here on it could go
        kept.clear()
        return real(keys)

    monkeypatch.setattr(device.disk, "giving_way", giving_way)
    folder.crowded[bytes(content_of(2, 4096))] = 1
    errors = await device.tiers.write_through(chain(device, range(11)))
    assert errors == [None] * 11
    assert device.found(100) == ["disk"]
    errors = await device.tiers.write_through(chain(device, range(12)))
    assert errors == [None] * 12
    assert device.gone == [key_of(100)], "it goes for the chain, as what is old does"


async def test_a_chain_longer_than_the_budget_has_no_gap_though_its_room_was_in_use(open_device, monkeypatch):
    device = await open_device(0, URL, 12 * DiskEntry(key_of(0), None, PAGE).file_bytes)
    await device.demote(*range(100, 104))
    real, kept = device.disk._writer.claim, [key_of(number) for number in range(100, 104)]
    device.disk.keep(kept)

    def claim(entry):
        victims = real(entry)
        if victims is None:  # those in use are free for what comes next
            device.disk.unkeep(kept)
            kept.clear()
        return victims

    monkeypatch.setattr(device.disk._writer, "claim", claim)
    errors = await device.tiers.write_through(chain(device, range(14)))
    assert [error is None for error in errors] == [True] * 12 + [False] * 2
    assert {error.details["cause"] for error in errors[12:]} == {"budget"}
    assert device.found(*range(14)) == ["disk"] * 12 + [None] * 2


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        ("budget", "start the pool with a larger one"),
        ("ENOSPC", "its file system is full, below disk_budget: free space"),
    ],
)
async def test_what_went_for_one_before_it_says_why_and_what_to_do(open_device, tmp_path, monkeypatch, cause, told):
    folder = DiskOfFiles(str(tmp_path), 12 * ON_DISK)
    device = await open_device(0, folder)
    if cause == "ENOSPC":
        folder.crowded[bytes(content_of(2, 4096))] = 1 << 30
    else:
        real = device.disk._writer.claim
        monkeypatch.setattr(device.disk._writer, "claim", lambda entry: None if entry.key == key_of(2) else real(entry))
    errors = await device.tiers.write_through(chain(device, range(12)))
    assert [error is None for error in errors] == [True] * 2 + [False] * 10
    assert {error.details["cause"] for error in errors[2:]} == {cause}
    went = [str(error) for error in errors[2:] if "went for one before it" in str(error)]
    assert went
    assert all(str(tmp_path) in each and told in each for each in went)
    assert device.disk.statistics().evicted_files > 0
    assert device.tiers.displaced == 0, "each of these has an error of its own"


async def test_a_small_one_behind_a_gap_goes_for_a_larger_one(open_device, tmp_path):
    """It takes less than that, but there is room beside it."""
    folder = DiskOfFiles(str(tmp_path), 4 * ON_DISK)
    device = await open_device(0, folder)
    folder.crowded[bytes(content_of(3, 4096))] = 1
    sources = chain(device, range(5))
    sources[4] = sources[4]._replace(size_bytes=PAGE // 2)
    errors = await device.tiers.write_through(sources)
    assert [error is None for error in errors] == [True] * 4 + [False]
    assert device.found(*range(5)) == ["disk"] * 4 + [None]


async def test_what_is_stored_for_itself_alone_gives_no_way(open_device, tmp_path):
    folder = DiskOfFiles(str(tmp_path), 6 * ON_DISK)
    device = await open_device(0, folder)
    folder.crowded[bytes(content_of(2, 4096))] = 1
    errors = await device.tiers.write_through([device.written(number) for number in range(8)])
    assert [error is None for error in errors].count(True) == 6
    assert device.gone == []


async def test_a_disk_that_takes_nothing_more_is_not_asked_forever(open_device, tmp_path):
    folder = DiskOfFiles(str(tmp_path), 12 * ON_DISK)
    device = await open_device(0, folder)
    folder.crowded[bytes(content_of(2, 4096))] = 1 << 30
    errors = await device.tiers.write_through(chain(device, range(12)))
    assert [error is None for error in errors] == [True] * 2 + [False] * 10
    assert device.found(*range(12)) == ["disk"] * 2 + [None] * 10


async def test_a_chain_that_names_a_cache_twice_leaves_nothing_held(open_device, tmp_path):
    """What is behind a gap goes: each once."""
    folder = DiskOfFiles(str(tmp_path), 12 * ON_DISK)
    device = await open_device(0, folder)
    folder.crowded[bytes(content_of(2, 4096))] = 1 << 30
    errors = await device.tiers.write_through(chain(device, (0, 1, 2)) + 2 * chain(device, range(5))[3:])
    assert [error is None for error in errors] == [True] * 2 + [False] * 5
    assert device.found(*range(5)) == ["disk"] * 2 + [None] * 3
    folder.crowded.clear()
    assert await device.tiers.write_through(chain(device, range(5))) == [None] * 5
