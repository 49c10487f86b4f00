"""Stores that fail, vanish or are slow: the tier goes on, counts, and logs once for each cause."""

import asyncio
import errno
import os
import shutil
import threading

import pytest
from disk_stores import DEADLINE_S, FaultyFolder, content_of, key_of, read

from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.local import LocalFolder
from kvpool.cache.disk.removal import Removal
from kvpool.cache.disk.tier import DiskTier
from kvpool.errors import TierError

FILE = DiskEntry(key_of(0), None, 5000).file_bytes
URL = "faulty://tier"

FULL = OSError(errno.ENOSPC, "No space left on device")
BROKEN = OSError(errno.EIO, "Input/output error")
DENIED = PermissionError(errno.EACCES, "Permission denied")


class DriverError(Exception):
    """What drivers raise: no OSError."""


class Killed(BaseException):
    """Goes through all that catches errors, like the end of the process."""


def once(caplog, text):
    return sum(text in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("error", "cause"), [(BROKEN, "EIO"), (DENIED, "EACCES"), (DriverError("throttled"), "DriverError")]
)
async def test_a_store_that_takes_nothing(open_tier, faults, caplog, error, cause):
    tier = await open_tier(URL)
    await tier.write_through(key_of(0), None, content_of(0))
    faults.errors["put"] = error
    for number in range(1, 4):
        assert not await tier.write_back(key_of(number), None, content_of(number))
    with pytest.raises(TierError) as caught:
        await tier.write_through(key_of(4), None, content_of(4))
    assert caught.value.details["cause"] == cause
    assert tier.statistics().errors == {cause: 4}
    assert once(caplog, str(error))
    assert [await read(tier, key_of(number)) for number in range(2)] == [content_of(0), None]
    assert (tier.statistics().files, tier.statistics().used_bytes) == (1, FILE)
    faults.errors.clear()
    assert await tier.write_back(key_of(1), None, content_of(1))
    assert await read(tier, key_of(1)) == content_of(1)


async def test_on_a_store_that_is_full_below_the_budget_old_files_go_for_new_ones(open_tier, tmp_path, monkeypatch):
    room_bytes, gone = 3 * FILE, []
    tier = await open_tier(str(tmp_path), on_gone=gone.extend)
    real = os.writev

    def writev(file, parts):
        used_bytes = sum(path.stat().st_size for path in tmp_path.rglob("*.kvcache"))
        if used_bytes + sum(map(len, parts)) > room_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, parts)

    monkeypatch.setattr(os, "writev", writev)
    for number in range(5):
        await tier.write_through(key_of(number), None, content_of(number))
    assert gone == [key_of(0), key_of(1)]
    assert [await read(tier, key_of(number)) for number in range(2, 5)] == [content_of(n) for n in range(2, 5)]
    assert (tier.statistics().errors, tier.statistics().evicted_files) == ({"ENOSPC": 2}, 2)
    room_bytes = 0  # somebody else has taken it all: each write costs one file at most
    with pytest.raises(TierError, match="No space left"):
        await tier.write_through(key_of(5), None, content_of(5))
    assert gone == [key_of(0), key_of(1), key_of(2)]
    assert tier.statistics().used_bytes == 2 * FILE


async def test_a_store_that_gives_nothing_costs_misses_and_no_files(open_tier, faults, caplog):
    tier = await open_tier(URL)
    await tier.write_through(key_of(0), None, content_of(0))
    faults.errors["get"] = DriverError("timed out")
    assert [await read(tier, key_of(0)) for _ in range(3)] == [None] * 3
    assert (tier.statistics().errors, tier.statistics().misses) == ({"DriverError": 3}, 3)
    assert once(caplog, "timed out")
    faults.errors.clear()
    assert await read(tier, key_of(0)) == content_of(0)


async def test_a_put_that_was_done_and_reported_as_failed_does_not_come_back_after_a_removal(open_tier, faults):
    tier = await open_tier(URL)
    faults.errors.update(put_answer=DriverError("connection lost"), delete=DriverError("connection lost"))
    assert not await tier.write_back(key_of(0), None, content_of(0))
    faults.errors.clear()
    assert await tier.remove([key_of(0)]) == 1
    await tier.close()
    tier = await open_tier(URL)
    assert await read(tier, key_of(0)) is None


async def test_a_folder_removed_under_the_tier(open_tier, tmp_path, caplog):
    gone = []
    folder = tmp_path / "tier"
    tier = await open_tier(str(folder), on_gone=gone.extend)
    for number in range(3):
        await tier.write_through(key_of(number), None, content_of(number))
    shutil.rmtree(folder)
    assert [await read(tier, key_of(number)) for number in range(2)] == [None, None]
    assert gone == [], "its disk may only be away"
    assert not await tier.write_back(key_of(5), None, content_of(5))
    with pytest.raises(TierError):  # it is entered, but no longer there: not acknowledged again
        await tier.write_through(key_of(2), None, content_of(2))
    assert tier.statistics().errors == {"ESTALE": 5}
    assert once(caplog, "not the folder that was opened")
    assert not folder.exists(), "a mount point is not filled while its disk is away"


@pytest.mark.parametrize("instead", ["nothing", "an empty folder", "another tier's folder"])
async def test_what_is_missing_with_its_folder_is_not_forgotten_and_not_removed(open_tier, tmp_path, instead):
    """A removal acknowledged then would not hold: the files come back with the folder."""
    folder, away = tmp_path / "tier", tmp_path / "away"
    gone = []
    tier = await open_tier(str(folder), 3 * FILE, on_gone=gone.extend)
    for number in range(3):
        await tier.write_through(key_of(number), None, content_of(number))
    folder.rename(away)
    if instead == "an empty folder":
        folder.mkdir()
    elif instead == "another tier's folder":
        other = await open_tier(str(folder))
        await other.write_through(key_of(9), None, content_of(9))
    assert [await read(tier, key_of(number)) for number in range(3)] == [None] * 3
    for refused in (
        tier.remove([key_of(0), key_of(8)]),
        tier.remove([key_of(7)]),
        tier.space("default", "f"),
        tier.write_through(key_of(1), None, content_of(1)),
        tier.write_through(key_of(5), None, content_of(5)),
    ):
        with pytest.raises(TierError, match=r"not the folder that was opened|call again"):
            await refused
    assert gone == []
    if folder.exists():
        folder.rename(tmp_path / "other")
    away.rename(folder)
    assert await read(tier, key_of(1)) == content_of(1)
    assert await read(tier, key_of(0)) is None, "hidden, though its removal was not sure"
    await tier.remove([key_of(0)])
    await tier.close()
    tier = await open_tier(str(folder))
    assert [await read(tier, key_of(number)) for number in range(3)] == [None, content_of(1), content_of(2)]


async def test_a_durable_write_of_what_somebody_deleted_is_written_again(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await tier.write_through(key_of(0), None, content_of(0))
    (tmp_path / tier.find(key_of(0)).path).unlink()
    await tier.write_through(key_of(0), None, content_of(0))
    assert await read(tier, key_of(0)) == content_of(0)


async def test_a_disk_that_cannot_sync_names_acknowledges_nothing(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    faults.errors["sync"] = OSError(errno.EIO, "Input/output error")
    assert await tier.write_back(key_of(0), None, content_of(0))
    for _ in range(2):
        with pytest.raises(TierError):
            await tier.write_through(key_of(0), None, content_of(0))
    faults.errors.clear()
    await tier.write_through(key_of(0), None, content_of(0))


async def test_what_cannot_be_evicted_keeps_its_room_and_goes_first_later(open_tier, faults):
    gone = []
    tier = await open_tier(URL, 2 * FILE, on_gone=gone.extend)
    for number in range(2):
        await tier.write_back(key_of(number), None, content_of(number))
    faults.errors["delete"] = DENIED
    assert not await tier.write_back(key_of(2), None, content_of(2))
    assert (tier.statistics().used_bytes, tier.statistics().evicted_files, gone) == (2 * FILE, 0, [])
    assert await read(tier, key_of(1)) == content_of(1)
    faults.errors.clear()
    assert await tier.write_back(key_of(2), None, content_of(2))
    assert gone == [key_of(0)]


async def test_a_bad_file_that_cannot_be_removed_stays_a_miss(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    await tier.write_through(key_of(0), None, content_of(0))
    (tmp_path / tier.find(key_of(0)).path).write_bytes(b"?" * FILE)
    faults.errors["remove"] = DENIED
    assert [await read(tier, key_of(0)) for _ in range(2)] == [None, None]
    assert (tier.statistics().bad_files, tier.statistics().errors) == ({"foreign": 2}, {"EACCES": 2})


@pytest.mark.parametrize("operation", ["open", "list"])
async def test_a_folder_that_cannot_be_used_fails_the_start_with_its_cause(tmp_path, faults, operation):
    faults.errors[operation] = DENIED
    tier = DiskTier(FaultyFolder(str(tmp_path), faults), 1 << 20)
    with pytest.raises(TierError, match="Permission denied") as caught:
        await tier.start()
    assert caught.value.details["cause"] == "EACCES"
    faults.errors.clear()
    again = DiskTier(folder_at(str(tmp_path)), 1 << 20)
    await again.start()
    await again.close()


async def test_a_start_that_is_cancelled_gives_the_folder_back(open_tier, tmp_path, faults):
    gate = faults.gates["list"] = threading.Event()
    starting = asyncio.ensure_future(DiskTier(FaultyFolder(str(tmp_path), faults), 1 << 20).start())
    await arrival(faults)
    starting.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await open_tier(str(tmp_path))


async def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "tier").write_bytes(b"")
    with pytest.raises(TierError, match="cannot be used"):
        await DiskTier(folder_at(str(tmp_path / "tier")), 1 << 20).start()


# -- removals ---------------------------------------------------------------------------------------------------------


async def test_a_decided_removal_holds_over_a_restart_though_the_files_could_not_be_removed(open_tier, faults):
    tier = await open_tier(URL)
    for number in range(3):
        await tier.write_through(key_of(number), None, content_of(number))
    faults.errors["delete"] = DENIED
    assert await tier.remove([key_of(0), key_of(1)]) == 2
    for _ in range(2):
        assert [await read(tier, key_of(number)) for number in range(3)] == [None, None, content_of(2)]
        assert not await tier.write_back(key_of(0), None, content_of(0)), "the next start would remove it"
        assert (tier.statistics().files, tier.statistics().used_bytes) == (1, 3 * FILE)
        await tier.close()
        tier = await open_tier(URL)
    faults.errors.clear()
    await tier.write_through(key_of(0), None, content_of(0))
    await tier.close()
    tier = await open_tier(URL)
    assert [await read(tier, key_of(number)) for number in range(3)] == [content_of(0), None, content_of(2)]
    assert tier.statistics().used_bytes == 2 * FILE


async def test_a_removal_that_can_neither_be_noted_nor_done_says_so_and_can_be_repeated(open_tier, faults):
    tier = await open_tier(URL)
    await tier.write_through(key_of(0), None, content_of(0))
    faults.errors.update(put=FULL, delete=DENIED)
    for _ in range(2):
        with pytest.raises(TierError, match="call again"):
            await tier.remove([key_of(0)])
        assert await read(tier, key_of(0)) is None
    del faults.errors["delete"]  # a full store still lets things go
    await tier.remove([key_of(0)])
    faults.errors.clear()
    await tier.close()
    tier = await open_tier(URL)
    assert await read(tier, key_of(0)) is None


async def test_a_crash_between_deciding_and_removing_is_made_good_by_the_next_start(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    for number in range(3):
        await tier.write_through(key_of(number), None, content_of(number))
    folder = FaultyFolder(str(tmp_path), faults)
    removal = Removal(0, [tier.find(key_of(0)), tier.find(key_of(1))])
    removal.decide(folder)
    faults.errors["remove"] = Killed()
    with pytest.raises(Killed):
        removal.complete(folder)
    await tier.close()
    tier = await open_tier(str(tmp_path))
    assert [await read(tier, key_of(number)) for number in range(3)] == [None, None, content_of(2)]


@pytest.mark.parametrize("together", [False, True], ids=["files", "pack"])
async def test_what_the_start_could_not_read_is_looked_for_by_a_removal(open_tier, tmp_path, monkeypatch, together):
    """It is not in the index, but the next start would find it."""
    tier = await open_tier(str(tmp_path))
    for numbers in [range(4)] if together else [[number] for number in range(4)]:
        await asyncio.gather(*(tier.write_through(key_of(number), None, content_of(number)) for number in numbers))
    await tier.close()
    real = LocalFolder.list

    def unreadable(folder, path):
        if path:
            raise BROKEN
        return real(folder, path)

    monkeypatch.setattr(LocalFolder, "list", unreadable)
    tier = await open_tier(str(tmp_path))
    assert (tier.statistics().files, tier.statistics().errors) == (0, {"EIO": 1})
    for refused in (tier.remove([key_of(0)]), tier.space("default", "f")):
        with pytest.raises(TierError):
            await refused
    monkeypatch.setattr(LocalFolder, "list", real)
    assert await tier.remove([key_of(0)]) == 1
    assert await tier.space("default", "f") == {key_of(number) for number in range(1, 4)}
    await tier.close()
    tier = await open_tier(str(tmp_path))
    assert [await read(tier, key_of(number)) for number in range(4)] == [None] + [content_of(n) for n in range(1, 4)]


async def test_a_corrupt_note_of_a_removal_is_counted_and_goes(open_tier, tmp_path):
    (tmp_path / "3.kvremoved").write_bytes(b"kvpool removal 1\nx" + bytes(16))
    tier = await open_tier(str(tmp_path))
    assert tier.statistics().bad_files == {"removal": 1}
    assert not (tmp_path / "3.kvremoved").exists()


# -- slow stores ------------------------------------------------------------------------------------------------------


async def arrival(faults):
    assert await asyncio.to_thread(faults.arrived.acquire, True, DEADLINE_S)


async def test_a_slow_store_costs_caches_never_the_event_loop(open_tier, faults, caplog):
    tier = await open_tier(URL, threads=2, queue_limit=4)
    gate = faults.gates["put"] = threading.Event()
    writes = [asyncio.ensure_future(tier.write_back(key_of(n), None, content_of(n))) for n in range(4)]
    for _ in range(2):
        await arrival(faults)
    durable = asyncio.ensure_future(tier.write_through(key_of(8), None, content_of(8)))
    for number in (9, 10):
        assert not await tier.write_back(key_of(number), None, content_of(number))
    assert tier.statistics().given_up == {"queue_full": 2}
    assert once(caplog, "queue_full")
    assert tier.statistics().waiting_writes == 4
    assert not durable.done()
    gate.set()
    assert await asyncio.gather(*writes) == [True] * 4
    await durable
    assert tier.statistics().files == 5
    assert tier.statistics().waiting_writes == 0


async def test_reads_do_not_wait_behind_slow_writes_and_are_bounded(open_tier, faults):
    tier = await open_tier(URL, threads=1, queue_limit=2)
    await tier.write_through(key_of(0), None, content_of(0))
    gate = faults.gates["put"] = threading.Event()
    write = asyncio.ensure_future(tier.write_back(key_of(1), None, content_of(1)))
    await arrival(faults)
    assert await read(tier, key_of(0)) == content_of(0)
    gate.set()
    assert await write
    gate = faults.gates["get"] = threading.Event()
    reads = [asyncio.ensure_future(read(tier, key_of(n))) for n in (0, 1)]
    await arrival(faults)
    assert await read(tier, key_of(0)) is None, "as many reads wait as may"
    gate.set()
    assert await asyncio.gather(*reads) == [content_of(0), content_of(1)]


async def test_a_cancelled_call_keeps_the_memory_until_its_thread_is_done(open_tier, faults):
    tier = await open_tier(URL, threads=1)
    gate = faults.gates["put"] = threading.Event()
    running, waiting = [
        asyncio.ensure_future(tier.write_through(key_of(number), None, content_of(number))) for number in range(2)
    ]
    await arrival(faults)
    for write in (running, waiting):
        write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not running.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [await read(tier, key_of(number)) for number in range(2)] == [content_of(0), None]
    assert tier.statistics().waiting_writes == 0


async def test_a_removal_outlasts_a_write_of_the_same_key_that_is_under_way_and_one_that_waits(open_tier, faults):
    tier = await open_tier(URL, threads=1)
    gate = faults.gates["put"] = threading.Event()
    under_way = asyncio.ensure_future(tier.write_through(key_of(0), None, content_of(0)))
    await arrival(faults)
    waits = asyncio.ensure_future(tier.write_through(key_of(0), None, content_of(0)))
    await asyncio.sleep(0)
    removal = asyncio.ensure_future(tier.remove([key_of(0)]))
    await asyncio.sleep(0)
    later = asyncio.ensure_future(tier.write_back(key_of(0), None, content_of(0)))
    gate.set()
    await under_way
    with pytest.raises(TierError, match="removed meanwhile"):
        await waits
    assert await removal == 1
    assert await later, "a write that was asked for after the removal holds"
    assert await read(tier, key_of(0)) == content_of(0)


async def test_a_file_being_read_is_not_evicted(open_tier, faults):
    tier = await open_tier(URL, 2 * FILE)
    for number in range(2):
        await tier.write_back(key_of(number), None, content_of(number))
    gate = faults.gates["get"] = threading.Event()
    reading = asyncio.ensure_future(read(tier, key_of(0)))
    await arrival(faults)
    assert await tier.write_back(key_of(2), None, content_of(2))
    assert tier.find(key_of(1)) is None, "the least recently used that nobody reads"
    gate.set()
    assert await reading == content_of(0)


async def test_closing_finishes_what_runs_and_gives_up_what_waits(open_tier, faults):
    tier = await open_tier(URL, threads=1)
    gate = faults.gates["put"] = threading.Event()
    writes = [asyncio.ensure_future(tier.write_back(key_of(n % 2), None, content_of(n % 2))) for n in range(4)]
    await arrival(faults)
    closing = asyncio.ensure_future(tier.close())
    await asyncio.sleep(0)
    gate.set()
    await closing
    assert await asyncio.gather(*writes) == [True, False, False, False]
    assert tier.statistics().given_up == {"closed": 3}


@pytest.mark.parametrize("size_bytes", [5000, 5001])  # the second takes the place of another
@pytest.mark.parametrize("local", [True, False])
async def test_a_durable_write_that_closing_has_waited_for_is_done(open_tier, tmp_path, faults, local, size_bytes):
    where = FaultyFolder(str(tmp_path), faults) if local else URL
    tier = await open_tier(where, threads=1)
    if size_bytes != 5000:
        await tier.write_through(key_of(0), None, content_of(0))
    gate = faults.gates["write" if local else "put"] = threading.Event()
    writing = asyncio.ensure_future(tier.write_through(key_of(0), None, content_of(0, size_bytes)))
    await arrival(faults)
    closing = asyncio.ensure_future(tier.close())
    await asyncio.sleep(0)
    gate.set()
    await closing
    await writing
    assert await read(await open_tier(where), key_of(0)) == content_of(0, size_bytes)


# -- what is said of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (FULL, "free space there"),
        (PermissionError(errno.EPERM, "Operation not permitted"), "chattr -i"),
        (DENIED, "read and write there"),
        (BROKEN, "replace it"),
        (DriverError("throttled"), "disk_url"),
    ],
)
async def test_an_error_says_which_folder_and_what_to_do(open_tier, tmp_path, faults, error, advice):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    faults.errors["write"] = error
    with pytest.raises(TierError) as caught:
        await tier.write_through(key_of(0), None, content_of(0))
    problem = tier.statistics().problem
    for told in (str(caught.value), problem):
        assert str(tmp_path) in told
        assert str(error) in told
        assert advice in told


async def test_a_problem_is_told_until_the_store_works_again(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    assert (tier.statistics().problem, tier.statistics().lost) == (None, False)
    await tier.write_through(key_of(0), None, content_of(0))
    faults.errors["write"] = DENIED
    assert not await tier.write_back(key_of(1), None, content_of(1))
    assert await read(tier, key_of(0)) == content_of(0)
    assert "Permission denied" in tier.statistics().problem, "that it can be read does not mean that it can be written"
    faults.errors.clear()
    assert await tier.write_back(key_of(1), None, content_of(1))
    assert tier.statistics().problem is None
    faults.errors["read"] = BROKEN
    assert await read(tier, key_of(0)) is None
    assert "Input/output" in tier.statistics().problem
    faults.errors.clear()
    assert await read(tier, key_of(0)) == content_of(0)
    assert tier.statistics().problem is None
    assert tier.statistics().errors == {"EACCES": 1, "EIO": 1}


@pytest.mark.parametrize("use", ["read", "check_there"])
async def test_a_folder_that_is_lost_is_told_until_it_is_back(open_tier, tmp_path, use):
    tier = await open_tier(str(tmp_path / "tier"))
    await tier.write_through(key_of(0), None, content_of(0))
    (tmp_path / "tier").rename(tmp_path / "elsewhere")
    with pytest.raises(TierError, match="mount its disk again"):
        await tier.write_through(key_of(1), None, content_of(1))
    with pytest.raises(TierError, match="cannot be counted on"):
        await tier.check_there()
    figures = tier.statistics()
    assert figures.lost
    assert f"{tmp_path}/tier is not the folder that was opened" in figures.problem
    (tmp_path / "elsewhere").rename(tmp_path / "tier")
    await (tier.check_there() if use == "check_there" else read(tier, key_of(0)))
    assert (tier.statistics().problem, tier.statistics().lost) == (None, False)
