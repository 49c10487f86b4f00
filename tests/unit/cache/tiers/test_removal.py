"""What is removed is gone from every tier, also what is on its way at that moment."""

import asyncio
import threading

import pytest
from disk_stores import DEADLINE_S, Faults, FaultyFileSystem, FaultyFolder, arrived, content_of, key_of

from kvpool.cache.disk.file_names import space_name
from kvpool.cache.disk.leftovers import Leftovers
from kvpool.cache.disk.local import LocalFolder
from kvpool.errors import TierError
from kvpool.memory.copying import view_at

PAGE = 64 << 10
URL = "faulty://tier"


def files():
    return sum(name.endswith(".kvcache") for name in FaultyFileSystem.store)


async def test_removed_from_host_and_disk_with_zeroed_memory_and_may_come_anew(open_device, faults):
    device = await open_device(4, URL)
    await device.demote(1, 2, 3)
    await device.tiers.write_through([device.written(2), device.written(9)])
    memory, kept = device.memory_of(1), device.memory_of(3)
    assert bytes(memory) == content_of(1, PAGE)
    assert await device.tiers.remove([key_of(1), key_of(2), key_of(9), key_of(50)]) == 3
    assert not any(memory)
    assert kept == content_of(3, PAGE)
    assert device.found(1, 2, 3, 9) == [None, None, "host", None]
    assert await device.fill(1, 2, 3, 9) == [False, False, True, False]
    assert (device.gone, files()) == ([], 0)
    assert await device.demote(1) == [True]
    assert await device.fill(1) == [True]


async def test_one_that_waits_for_a_buffer_is_not_written_after_it_was_removed(open_device, faults):
    """Without a host tier: eight buffers, all with a store that does not answer yet."""
    device = await open_device(0, URL, patience_s=DEADLINE_S)
    gate = faults.gates["put"] = threading.Event()
    buffers = device.tiers._demotion._staged._buffers
    demotion = asyncio.ensure_future(device.demote(*range(9)))
    async with asyncio.timeout(DEADLINE_S):
        while not (buffers.locked() and buffers._waiters):  # noqa: ASYNC110  all buffers are taken by threads
            await asyncio.sleep(0.001)
    removal = asyncio.ensure_future(device.tiers.remove([key_of(8)]))
    await asyncio.wait((removal,), timeout=0.1)
    gate.set()
    assert await removal == 0
    assert (await demotion)[8] is False
    assert device.found(8) == [None]
    assert await device.fill(8) == [False]


@pytest.mark.parametrize("of", ["keys", "space"])
@pytest.mark.parametrize("pages", [0, 8], ids=["from the device", "from the host tier"])
async def test_a_durable_write_that_is_tried_again_leaves_out_what_was_removed_since(open_device, tmp_path, of, pages):
    """What a full disk refuses together is tried again in parts: between two tries nothing is under way on the rest."""
    faults = Faults()
    device = await open_device(pages, FaultyFolder(str(tmp_path), faults), watermark=1.0)
    full = faults.gates["write"] = threading.Event()
    if pages:
        await device.demote(*range(4))
    sources = [device.written(number) for number in range(4)]
    writing = asyncio.ensure_future(device.tiers.save(None) if pages else device.tiers.write_through(sources))
    await arrived(faults)
    faults.errors["write"] = OSError(28, "No space left on device")
    first_half = faults.gates["write"] = threading.Event()
    full.set()
    await arrived(faults)
    faults.errors.clear()
    removal = device.tiers.remove([key_of(2), key_of(3)]) if of == "keys" else device.tiers.remove_space("default", "f")
    removing = asyncio.ensure_future(removal)
    if of == "keys":
        await removing
    else:  # it waits for the first half, once it has begun
        await asyncio.sleep(0)
    first_half.set()
    await removing
    errors = await writing
    assert device.found(2, 3) == [None, None]
    assert len(device.disk.entries()) == (2 if of == "keys" else 0)
    if pages:
        assert errors == {}, "what was removed is not to be kept"
    else:
        assert [error and error.details["cause"] for error in errors[2:]] == ["removed"] * 2


async def test_a_space_goes_whole_and_others_stay(open_device, faults):
    device = await open_device(8, URL)
    for tiers_call in (device.tiers.demote, device.tiers.write_through):
        for tenant in ("a", "b"):
            sources = [device.written(number, tenant=tenant) for number in (1, 2)]
            await tiers_call([source._replace(key=source.key._replace(fingerprint="g")) for source in sources])
            await tiers_call(sources)
    assert await device.tiers.remove_space("a", "f") == 2
    left = [
        (tenant, fingerprint)
        for tenant in "ab"
        for fingerprint in "fg"
        if device.tiers.find(key_of(1, tenant, fingerprint)) is not None
    ]
    assert left == [("a", "g"), ("b", "f"), ("b", "g")]
    assert files() == 6
    await device.tiers.close()
    again = await open_device(0, URL)
    assert {key[:2] for key in again.restored} == set(left)


async def test_a_space_whose_files_the_index_does_not_know_goes_too(open_device, faults):
    device = await open_device(0, URL)
    faults.errors["put_answer"] = faults.errors["delete"] = OSError(5, "I/O error")
    assert await device.demote(1) == [False]
    assert files() == 1, "the store has taken it, and failed to say so"
    faults.errors.clear()
    assert await device.tiers.remove_space("default", "f") == 0
    assert files() == 0


class Once(dict):
    """Errors of which each is raised once."""

    def __getitem__(self, operation):
        return self.pop(operation)


@pytest.mark.parametrize("listing", [True, False])
async def test_a_space_goes_with_what_was_to_make_room_and_could_not(open_device, faults, listing):
    """While its file is being removed for another, a cache is not found; then the store refuses to, and it is again."""
    device = await open_device(0, URL, PAGE + PAGE // 2)
    assert await device.demote(1) == [True]
    gate = faults.gates["delete"] = threading.Event()
    faults.errors = Once(delete=OSError(5, "I/O error"))
    if not listing:
        device.disk._removals._doubtful.add(space_name("default", "f"))
        faults.errors["list"] = OSError(5, "I/O error")
    coming = asyncio.ensure_future(device.demote(2))
    await arrived(faults)
    removal = asyncio.ensure_future(device.tiers.remove_space("default", "f"))
    await asyncio.wait((removal,), timeout=0.1)  # it has looked at what there is by now
    del faults.gates["delete"]
    gate.set()
    assert await coming == [False]
    if listing:
        assert await removal == 0
    else:
        with pytest.raises(TierError):
            await removal
    assert device.found(1) == [None]
    assert await device.fill(1) == [False]
    assert files() == 0


async def test_what_is_to_make_room_is_still_known_as_a_descendant(open_device, faults):
    device = await open_device(0, URL, PAGE + PAGE // 2)
    child = device.written(2)._replace(parent=key_of(1).block_hash)
    assert await device.tiers.demote([child]) == [True]
    gate = faults.gates["delete"] = threading.Event()
    coming = asyncio.ensure_future(device.demote(3))
    await arrived(faults)
    try:
        assert device.tiers.with_descendants([key_of(1)]) == {key_of(1), child.key}
    finally:
        gate.set()
    assert await coming == [True]
    assert device.tiers.with_descendants([key_of(1)]) == {key_of(1)}


@pytest.mark.parametrize("how", ["remove", "remove_space"])
async def test_what_is_being_demoted_or_copied_ends_without_a_trace(open_device, copies, how, monkeypatch):
    device = await open_device(8)
    touched, real = [], device.host.allocate

    def allocate(*args):
        memory = real(*args)
        touched.append(memory.address)
        return memory

    monkeypatch.setattr(device.host, "allocate", allocate)
    demoting = asyncio.create_task(device.tiers.demote([device.written(1), device.written(2)]))
    copying = asyncio.create_task(device.tiers.copy_ahead([device.written(3), device.written(4)]))
    await copies.reached()
    if how == "remove":
        removal = asyncio.create_task(device.tiers.remove([key_of(1), key_of(3)]))
    else:
        removal = asyncio.create_task(device.tiers.remove_space("default", "f"))
    await asyncio.sleep(0)
    assert not removal.done()
    copies.open()
    kept = how == "remove"
    assert await demoting == [False, kept]
    assert await copying == [False, kept]
    assert await removal == 0
    assert device.found(1, 2, 3, 4) == [None, "host" if kept else None] * 2
    assert device.host.index.used_bytes == 2 * PAGE * kept
    left = [bytes(view_at(address, 8)) for address in touched]
    assert [content_of(number, 8) in left for number in (1, 2, 3, 4)] == [False, kept] * 2
    assert await device.demote(1) == [True]
    assert await device.fill(1) == [True]


async def test_a_fill_whose_cache_is_removed_is_a_miss_and_the_memory_is_zeroed_after_it(open_device, copies):
    device = await open_device(8)
    copies.open()
    await device.demote(1, 2)
    memory = device.memory_of(1)
    copies.close()
    filling = asyncio.create_task(device.fill(1, 2))
    await copies.reached()
    removal = asyncio.create_task(device.tiers.remove([key_of(1)]))
    await asyncio.sleep(0)
    assert device.found(1, 2) == [None, "host"]
    assert memory == content_of(1, PAGE), "it is being read"
    assert await device.tiers.demote([device.written(1)]) == [False], "not before it is removed"
    assert await device.fill(1) == [False]
    copies.open()
    assert await filling == [False, True]
    assert await removal == 1
    assert not any(memory)


async def test_a_fill_from_disk_whose_cache_is_removed_is_a_miss(open_device, faults):
    device = await open_device(0, URL)
    await device.demote(*range(20))
    gate = faults.gates["get"] = threading.Event()
    filling = asyncio.create_task(device.fill(*range(20)))
    await arrived(faults)
    removal = asyncio.create_task(device.tiers.remove([key_of(number) for number in range(20)]))
    await asyncio.sleep(0)
    assert device.found(0, 19) == [None, None]
    gate.set()
    assert await filling == [False] * 20
    assert await removal == 20
    assert files() == 0


@pytest.mark.parametrize("pages", [0, 8])
async def test_writes_to_the_disk_of_what_is_removed_leave_nothing(open_device, faults, pages):
    device = await open_device(pages, URL, watermark=0.1, patience_s=20.0)
    gate = faults.gates["put"] = threading.Event()
    numbers = range(7)
    demoting = asyncio.create_task(device.tiers.demote([device.written(number) for number in numbers]))
    through = [asyncio.create_task(device.tiers.write_through([device.written(number)])) for number in range(7, 40)]
    await arrived(faults)
    if pages:
        assert await demoting == [True] * 7
    removal = asyncio.create_task(device.tiers.remove([key_of(number) for number in range(40)]))
    await asyncio.sleep(0)
    gate.set()
    await removal
    assert pages or await demoting == [False] * 7
    for (error,) in await asyncio.gather(*through):
        assert isinstance(error, TierError)
    assert device.found(*range(40)) == [None] * 40
    await device.saved()
    assert files() == 0
    assert await device.tiers.write_through([device.written(3)]) == [None]
    assert device.found(3) == ["disk"]


async def test_a_disk_that_cannot_say_so_is_an_error_and_the_rest_is_removed(open_device, faults):
    device = await open_device(4, URL)
    await device.demote(1)
    memory = device.memory_of(1)
    await device.tiers.write_through([device.written(1)])
    faults.errors["delete"] = faults.errors["put"] = PermissionError(13, "Permission denied")
    with pytest.raises(TierError, match="call again"):
        await device.tiers.remove([key_of(1)])
    assert device.found(1) == [None]
    assert not any(memory)
    with pytest.raises(TierError, match="call again"):
        await device.tiers.remove_space("default", "f")
    faults.errors.clear()
    await device.tiers.remove_space("default", "f")
    assert files() == 0


async def test_a_disk_that_could_not_be_used_is_not_sure_either(open_device, faults):
    faults.errors["list"] = PermissionError(13, "Permission denied")
    device = await open_device(4, URL)
    await device.demote(1)
    with pytest.raises(TierError, match="may be left"):
        await device.tiers.remove([key_of(1)])
    assert device.found(1) == [None]


async def test_a_removal_goes_on_when_its_caller_is_cancelled(open_device, copies):
    device = await open_device(8)
    demoting = asyncio.create_task(device.tiers.demote([device.written(1)]))
    await copies.reached()
    removal = asyncio.create_task(device.tiers.remove([key_of(1)]))
    await asyncio.sleep(0)
    removal.cancel()
    await asyncio.sleep(0)
    assert not removal.done()
    copies.open()
    with pytest.raises(asyncio.CancelledError):
        await removal
    assert await demoting == [False]
    assert device.found(1) == [None]


async def test_closing_waits_for_a_removal(open_device, copies):
    device = await open_device(8)
    demoting = asyncio.create_task(device.tiers.demote([device.written(1)]))
    await copies.reached()
    removal = asyncio.create_task(device.tiers.remove([key_of(1)]))
    closing = asyncio.create_task(device.tiers.close())
    await asyncio.sleep(0)
    copies.open()
    await asyncio.gather(removal, closing)
    assert await demoting == [False]


@pytest.mark.parametrize("all_of_it", [True, False])
async def test_what_is_removed_goes_from_folders_of_devices_that_are_no_more(open_device, tmp_path, all_of_it):
    """Else it would be found when there are as many devices again."""
    before = await open_device(0, f"{tmp_path}/host-1")
    await before.tiers.write_through([before.written(1)])
    await before.tiers.close()
    device = await open_device(0, f"{tmp_path}/host-0", leftovers=Leftovers(str(tmp_path), 1))
    assert device.tiers.statistics()["leftover_folders"] == [f"{tmp_path}/host-1"]
    await (device.tiers.remove_space("default", "f") if all_of_it else device.tiers.remove([key_of(1)]))
    again = await open_device(0, f"{tmp_path}/host-1")
    assert again.restored == []


@pytest.mark.parametrize("all_of_it", [True, False])
async def test_what_its_own_disk_refuses_goes_from_folders_of_earlier_devices_all_the_same(
    open_device, tmp_path, all_of_it
):
    before = await open_device(0, f"{tmp_path}/host-1")
    await before.tiers.write_through([before.written(1)])
    await before.tiers.close()
    device = await open_device(0, f"{tmp_path}/host-0", leftovers=Leftovers(str(tmp_path), 1))
    await device.tiers.write_through([device.written(1)])
    (tmp_path / "host-0").rename(tmp_path / "away")
    with pytest.raises(TierError, match="host-0"):
        await (device.tiers.remove_space("default", "f") if all_of_it else device.tiers.remove([key_of(1)]))
    assert not list((tmp_path / "host-1").rglob("*.kvcache"))
    assert device.tiers.statistics()["leftover_removals"] == 0


async def test_removals_from_folders_of_earlier_devices_go_on_until_the_end(open_device, tmp_path):
    before = await open_device(0, f"{tmp_path}/host-1")
    await before.tiers.write_through([before.written(1)])
    await before.tiers.close()
    device = await open_device(0, f"{tmp_path}/host-0", leftovers=Leftovers(str(tmp_path), 1), deadline_s=0.2)
    assert device.tiers.unread == []
    other = LocalFolder(f"{tmp_path}/host-1")
    other.open()  # as another pool has it, say
    with pytest.raises(TierError, match="no answer within"):
        await device.tiers.remove_space("default", "f")
    assert device.tiers.statistics()["leftover_removals"] == 1
    other.close()
    await asyncio.wait_for(device.tiers.close(), DEADLINE_S)
    assert not list((tmp_path / "host-1").rglob("*.kvcache"))


async def test_nobody_waits_at_the_end_for_who_has_a_folder_of_an_earlier_device(open_device, tmp_path):
    before = await open_device(0, f"{tmp_path}/host-1")
    await before.tiers.write_through([before.written(1)])
    await before.tiers.close()
    device = await open_device(0, f"{tmp_path}/host-0", leftovers=Leftovers(str(tmp_path), 1), deadline_s=0.2)
    other = LocalFolder(f"{tmp_path}/host-1")
    other.open()
    with pytest.raises(TierError, match="no answer within"):
        await device.tiers.remove_space("default", "f")
    await asyncio.wait_for(device.tiers.close(), DEADLINE_S)
    other.close()


async def test_a_model_whose_removal_is_not_sure_is_not_found_in_this_life(open_device, tmp_path):
    folder = tmp_path / "tier"
    device = await open_device(0, str(folder))
    await device.tiers.write_through([device.written(1)])
    folder.rename(tmp_path / "away")
    with pytest.raises(TierError, match=r"not the folder that was opened|call again"):
        await device.tiers.remove_space("default", "f")
    (tmp_path / "away").rename(folder)
    assert device.found(1) == [None]
    await device.tiers.remove_space("default", "f")
    await device.tiers.close()
    assert (await open_device(0, str(folder))).restored == []
