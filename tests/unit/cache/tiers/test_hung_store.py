"""A store whose calls do not return: nobody waits for it beyond the deadline, and nothing removed is found again."""

import asyncio
import threading

import pytest
from disk_stores import DEADLINE_S, Faults, FaultyFileSystem, FaultyFolder, arrived, key_of
from loop_clock import LONG_S, out_of_time

from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.tier import DEFAULT_THREADS, DiskTier
from kvpool.errors import TierError

URL = "faulty://tier"


async def in_time(call):
    async with asyncio.timeout(DEADLINE_S / 2):  # a gate itself opens by an error after all of it
        return await call


def file_bytes():
    return DiskEntry(key_of(0), None, 64 << 10).file_bytes


async def stored(device, number):
    """Write a cache to the disk."""
    source = device.written(number)
    await device.disk.write_through(source.key, None, source.view())


async def appeared(tmp_path, pattern):
    """Return when a file is there that is written beside the call that was given up."""
    while len(list((tmp_path / "tier").glob(pattern))) != 1:  # noqa: ASYNC110  it comes by a thread
        await asyncio.sleep(0)


def files():
    return sum(name.endswith(".kvcache") for name in FaultyFileSystem.store)


async def test_a_store_that_let_a_deadline_pass_is_waited_for_a_tenth_of_it_until_it_answers(open_device, faults):
    """Each party of a flush waited its whole deadline, until all threads hung."""
    device = await open_device(0, URL, deadline_s=LONG_S)
    gate = faults.gates["put"] = threading.Event()

    async def refused(number):
        (error,) = await out_of_time(device.tiers.write_through([device.written(number)]), arrived(faults))
        return str(error)

    assert f"no answer within {LONG_S:g} s" in await refused(1)
    assert f"no answer within {LONG_S / 10:g} s" in await refused(2)
    late = [device.tiers.late(device.source(number)) for number in (1, 2)]
    gate.set()
    await in_time(asyncio.wait([each for each in late if each is not None]))
    gate.clear()
    assert f"no answer within {LONG_S:g} s" in await refused(3)
    gate.set()


async def test_a_fill_that_hangs_is_a_miss_and_its_memory_is_in_use_until_the_store_lets_go(
    open_device, faults, caplog
):
    device = await open_device(0, URL, deadline_s=LONG_S)
    await device.demote(*range(8))
    gate = faults.gates["get"] = threading.Event()
    targets = [device.source(number, place=number) for number in range(8)]
    assert await out_of_time(device.tiers.fill(targets), arrived(faults, DEFAULT_THREADS)) == [False] * 8
    late = [end for target in targets if (end := device.tiers.late(target)) is not None]
    assert len(late) == DEFAULT_THREADS, "the others had no thread yet"
    # There is no thread left: this would wait for nothing.
    assert await in_time(device.tiers.fill([device.source(7, place=20)])) == [False]
    assert device.tiers.late(device.source(7, place=20)) is None
    gate.set()
    await in_time(asyncio.wait(late))
    assert [device.tiers.late(target) for target in targets] == [None] * 8
    assert await device.fill(*range(8)) == [True] * 8
    assert device.disk.statistics().errors["timeout"] == 9
    assert sum("no answer within" in message for message in caplog.messages) == 1


async def test_a_durable_write_that_hangs_is_an_error_and_may_be_found_when_it_has_come_through(open_device, faults):
    device = await open_device(0, URL, deadline_s=LONG_S)
    gate = faults.gates["put"] = threading.Event()
    source = device.written(1)
    (error,) = await out_of_time(device.tiers.write_through([source]), arrived(faults))
    assert error.details["cause"] == "timeout"
    late = device.tiers.late(source)
    gate.set()
    await in_time(asyncio.wait((late,)))
    assert await device.fill(1) == [True]


@pytest.mark.parametrize("how", ["remove", "remove_space"])
@pytest.mark.parametrize("operation", ["put", "get", "delete"])
async def test_a_removal_that_must_wait_fails_in_time_and_is_remembered(open_device, faults, how, operation):
    device = await open_device(4, URL, deadline_s=LONG_S)
    if operation == "put":
        gate = faults.gates["put"] = threading.Event()
        await out_of_time(device.tiers.write_through([device.written(1)]), arrived(faults))
    else:
        await stored(device, 1)
        gate = faults.gates[operation] = threading.Event()
    if operation == "get":
        await out_of_time(device.fill(1), arrived(faults))

    def remove():
        if how == "remove":
            return device.tiers.remove([key_of(1)])
        return device.tiers.remove_space("default", "f")

    for _ in range(2):
        with pytest.raises(TierError, match="call again"):
            await out_of_time(remove())
        assert device.found(1) == [None]
        assert await device.fill(1) == [False]
        assert await device.demote(1) == [False], "what comes anew could not be told from what is to go"
    gate.set()
    await in_time(device.saved())
    while device.tiers._removal._going:
        await in_time(asyncio.wait(device.tiers._removal._going))
    assert (device.found(1), files()) == ([None], 0)
    await in_time(remove())
    assert await device.demote(1) == [True]
    assert await device.fill(1) == [True]
    device.disk._index.check()


async def test_others_are_removed_while_one_removal_hangs(open_device, faults):
    device = await open_device(0, URL, deadline_s=LONG_S)
    await device.demote(1, 2)
    gate = faults.gates["get"] = threading.Event()
    assert await out_of_time(device.fill(1), arrived(faults)) == [False]
    with pytest.raises(TierError):
        await out_of_time(device.tiers.remove([key_of(1)]))
    assert await in_time(device.tiers.remove([key_of(2)])) == 1
    gate.set()


async def test_what_was_removed_behind_a_pack_that_hangs_is_not_found_by_the_next_start(open_device, tmp_path, faults):
    folder = folder_at(str(tmp_path / "tier"))
    device = await open_device(0, folder, deadline_s=LONG_S)
    gate, real = faults.gates.setdefault("written", threading.Event()), folder.write

    def written_and_hangs(path, parts):
        real(path, parts)
        if path.endswith(".kvpack"):
            faults.check("written")

    folder.write = written_and_hangs
    sources = [device.written(number) for number in range(1, 4)]
    await out_of_time(device.tiers.write_through(sources), arrived(faults))
    with pytest.raises(TierError, match="call again"):
        await out_of_time(device.tiers.remove([key_of(2)]))
    await in_time(appeared(tmp_path, "*.kvremoved"))
    folder.close()  # as the end of the process does: it lets go of the lock
    again = DiskTier(folder_at(str(tmp_path / "tier")), 1 << 30)
    assert [entry.key for entry in await again.start()] == [key_of(1), key_of(3)]
    await again.close()
    gate.set()


async def test_what_was_removed_behind_its_own_eviction_that_hangs_is_not_found_by_the_next_start(
    open_device, tmp_path
):
    """What was going for others was in no list of what lies on disk, and so its removal was not noted."""
    faults = Faults()
    folder = FaultyFolder(str(tmp_path / "tier"), faults)
    device = await open_device(0, folder, budget_bytes=file_bytes(), deadline_s=LONG_S)
    await stored(device, 1)
    gate = faults.gates["remove"] = threading.Event()
    (error,) = await out_of_time(device.tiers.write_through([device.written(2)]), arrived(faults))
    assert error.details["cause"] == "timeout"
    with pytest.raises(TierError, match="call again"):
        await out_of_time(device.tiers.remove([key_of(1)]))
    await in_time(appeared(tmp_path, "*.kvremoved"))
    await in_time(appeared(tmp_path, "*/*.kvcache"))
    folder._folder.close()  # as the end of the process does: it lets go of the lock
    again = DiskTier(folder_at(str(tmp_path / "tier")), 1 << 30)
    assert await again.start() == []
    await again.close()
    gate.set()


async def test_what_was_removed_behind_its_own_eviction_that_hangs_is_gone_when_the_store_answers(open_device, faults):
    device = await open_device(0, URL, budget_bytes=file_bytes(), deadline_s=LONG_S)
    await stored(device, 1)
    gate = faults.gates["delete"] = threading.Event()
    await out_of_time(device.tiers.write_through([device.written(2)]), arrived(faults))
    with pytest.raises(TierError, match="call again"):
        await out_of_time(device.tiers.remove([key_of(1)]))
    assert device.found(1) == [None]
    faults.errors["delete"] = OSError("not now")  # the eviction fails in the end, and what it was of is found again
    gate.set()
    await in_time(device.saved())
    while device.tiers._removal._going:
        await in_time(asyncio.wait(device.tiers._removal._going))
    assert device.found(1) == [None]
    faults.errors.clear()
    await in_time(device.tiers.remove([key_of(1)]))
    assert (device.found(1), files()) == ([None], 0)
    device.disk._index.check()


@pytest.mark.parametrize("operation", ["read", "write"])
async def test_what_was_removed_behind_a_call_that_hangs_is_not_found_by_the_next_start(
    open_device, tmp_path, operation
):
    """The removal is noted on disk before the call is waited for; the process ends while it hangs."""
    faults = Faults()
    folder = FaultyFolder(str(tmp_path / "tier"), faults)
    device = await open_device(0, folder, deadline_s=LONG_S)
    gate = threading.Event()
    if operation == "read":
        await stored(device, 1)
        faults.gates["read"] = gate
        assert await out_of_time(device.fill(1), arrived(faults)) == [False]
    else:
        real, faults.gates["written"] = folder._folder.write, gate

        def written_and_hangs(path, parts):
            real(path, parts)
            if path.endswith(".kvcache"):
                faults.check("written")

        folder._folder.write = written_and_hangs
        await out_of_time(device.tiers.write_through([device.written(1)]), arrived(faults))
    with pytest.raises(TierError, match="call again"):
        await out_of_time(device.tiers.remove([key_of(1)]))
    await in_time(appeared(tmp_path, "*.kvremoved"))
    await in_time(appeared(tmp_path, "*/*.kvcache"))
    folder._folder.close()  # as the end of the process does: it lets go of the lock
    again = DiskTier(folder_at(str(tmp_path / "tier")), 1 << 30)
    assert await again.start() == []
    assert list((tmp_path / "tier").glob("*/*.kvcache")) == []
    await again.close()
    gate.set()
    faults.gates.clear()


async def test_two_removals_of_one_key_behind_a_call_that_hangs_leave_nothing(open_device, faults):
    device = await open_device(0, URL, deadline_s=DEADLINE_S)
    await device.demote(1)
    gate = faults.gates["get"] = threading.Event()
    reading = asyncio.create_task(device.disk.read_into(key_of(1), device.source(1).view()))
    await arrived(faults)
    removals = [asyncio.create_task(device.disk.remove([key_of(1)])) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    await reading
    assert sorted(await asyncio.gather(*removals)) == [0, 0, 1]
    assert list(FaultyFileSystem.store) == []
    assert device.disk.statistics().used_bytes == 0
    assert await device.demote(1) == [True]


async def test_a_start_that_hangs_is_done_without_the_disk(open_device, faults, caplog):
    gate = faults.gates["list"] = threading.Event()
    device = await out_of_time(open_device(4, URL, start_deadline_s=LONG_S), arrived(faults))
    assert "no answer within" in device.tiers.statistics()["disk_problem"]
    assert await device.demote(1) == [True]
    with pytest.raises(TierError, match="may be left"):
        await device.tiers.remove([key_of(1)])
    gate.set()
    async with asyncio.timeout(DEADLINE_S):
        while device.tiers._closing is None:  # noqa: ASYNC110  it comes by a thread
            await asyncio.sleep(0)
        await device.tiers._closing


async def test_of_a_party_that_hangs_in_part_the_rest_is_done_and_free(open_device, tmp_path, faults):
    folder = folder_at(str(tmp_path / "tier"))
    device = await open_device(0, folder, deadline_s=LONG_S)
    gate, real = faults.gates.setdefault("write", threading.Event()), folder.write

    def hangs_for_one_tenant(path, parts):
        if "@b" in path:
            faults.check("write")
        real(path, parts)

    async def hangs_for_it_alone():
        await arrived(faults)
        while under_way.keys_of("a", "f"):  # noqa: ASYNC110  they come by a thread
            await asyncio.sleep(0)

    folder.write = hangs_for_one_tenant
    under_way = device.tiers._contents.under_way
    sources = [device.written(number, tenant="ab"[number % 2]) for number in range(6)]
    outcomes = await out_of_time(device.tiers.write_through(sources), in_time(hangs_for_it_alone()))
    assert [error and error.details["cause"] for error in outcomes] == [None, "timeout"] * 3
    assert [device.tiers.late(source) is not None for source in sources] == [False, True] * 3
    assert await in_time(device.tiers.remove([key_of(0, "a")])) == 1, "nobody holds its key any more"
    late = [device.tiers.late(source) for source in sources[1::2]]
    gate.set()
    await in_time(asyncio.wait(late))
    assert device.tiers.late(sources[1]) is None


async def test_one_of_a_party_that_waits_behind_a_store_that_hangs_is_removed_at_once(open_device, tmp_path, faults):
    device = await open_device(0, FaultyFolder(str(tmp_path / "tier"), faults), deadline_s=DEADLINE_S)
    gate = faults.gates["write"] = threading.Event()
    hanging = []
    for first in range(0, 2 * DEFAULT_THREADS, 2):
        sources = [device.written(first), device.written(first + 1)]
        hanging.append(asyncio.ensure_future(device.tiers.write_through(sources)))
        await arrived(faults)
    del faults.gates["write"]
    waiting = asyncio.ensure_future(device.tiers.write_through([device.written(20), device.written(21)]))
    await asyncio.sleep(0)
    assert await in_time(device.tiers.remove([key_of(20)])) == 0
    gate.set()
    assert [await in_time(each) for each in hanging] == [[None, None]] * DEFAULT_THREADS
    removed, kept = await in_time(waiting)
    assert (removed.details["cause"], kept) == ("removed", None)
    assert device.found(20, 21) == [None, "disk"]


async def test_a_party_that_hangs_in_one_thread_leaves_the_others_to_the_rest(open_device, tmp_path, faults):
    """Each of its caches was counted as one that has a thread, so nothing else was read until the store answered."""
    folder = folder_at(str(tmp_path / "tier"))
    device = await open_device(0, folder, deadline_s=LONG_S)
    assert await device.demote(*range(8)) == [True] * 8
    await stored(device, 20)
    gate, real = faults.gates.setdefault("read", threading.Event()), folder.read_packed

    def hangs(pack, reads):
        faults.check("read")
        return real(pack, reads)

    folder.read_packed = hangs
    targets = [device.source(number) for number in range(8)]
    assert await out_of_time(device.tiers.fill(targets), arrived(faults)) == [False] * 8
    late = [device.tiers.late(target) for target in targets]
    assert all(late)
    assert await in_time(device.fill(20)) == [True]
    gate.set()
    await in_time(asyncio.wait(late))
