"""What the pool asks of a device's lower tiers, where the store hangs."""

import asyncio
import ctypes
import threading

import pytest
from disk_stores import DEADLINE_S, Faults, FaultyFileSystem, arrived, content_of, key_of
from loop_clock import LONG_S, out_of_time

from kvpool.actors.lower_operations import LowerOperations
from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.models_file import NotedModel, decode_models
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.host_tier import HostTier
from kvpool.cache.lower_tiers import LowerTiers
from kvpool.cache.source import Source
from kvpool.cache.store import FREED, RELEASED, DeviceStore
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.copying import view_at
from kvpool.memory.host import HostBackend

PAGE = 64 << 10
KEY = key_of(1)


@pytest.fixture
def disk_bytes():
    return 1 << 30


@pytest.fixture
async def device(disk_bytes):
    FaultyFileSystem.faults = Faults()
    backend = HostBackend(1 << 30)
    store = DeviceStore(GPUMemoryAllocator(backend, 4 * PAGE, PAGE))
    tiers = LowerTiers(None, DiskTier(folder_at("faulty://tier"), disk_bytes), lambda keys: None, deadline_s=LONG_S)
    await tiers.start()
    store.apply([("connect", "c", "default", "")])
    yield store, LowerOperations(store, tiers), FaultyFileSystem.faults
    for gate in FaultyFileSystem.faults.gates.values():
        gate.set()
    await tiers.close()
    assert (store.lease_count, store.allocator.usage().live_bytes) == (0, 0)
    store.allocator.close()
    backend.close()
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]


def place(store, cache_id):
    (answer,) = store.apply([("allocate", "c", 0, "default", [cache_id], PAGE, PAGE, [])])
    assert len(answer[0]) == 1


def sealed(store, cache_id):
    place(store, cache_id)
    store.apply([("seal", "c", 0, [cache_id], [KEY.block_hash])])


async def test_memory_that_a_write_hangs_on_is_not_used_again_before_its_end(device):
    store, operations, faults = device
    sealed(store, 1)
    gate = faults.gates["put"] = threading.Event()
    persisting = operations.persist(KEY.tenant, KEY.fingerprint, [(1, KEY.block_hash, None)])
    (answer,) = await out_of_time(persisting, arrived(faults))
    assert answer[1] == "TierError"
    assert store.apply([("release", "c", 0, [1]), ("evict", [1])]) == [[RELEASED], [1]], "held until the store lets go"
    assert store.allocator.usage().live_bytes == PAGE
    gate.set()
    await freed(store)


async def test_memory_that_a_fill_hangs_on_is_not_used_again_before_its_end(device):
    store, operations, faults = device
    sealed(store, 1)
    assert await operations.persist(KEY.tenant, KEY.fingerprint, [(1, KEY.block_hash, None)]) == [True]
    assert store.apply([("release", "c", 0, [1]), ("evict", [1])]) == [[RELEASED], []]
    gate = faults.gates["get"] = threading.Event()
    place(store, 2)
    filling = operations.fill(KEY.tenant, KEY.fingerprint, [(2, KEY.block_hash)])
    assert await out_of_time(filling, arrived(faults)) == [None], "it is there still"
    assert store.apply([("finish", "c", 0, [2], [None])]) == [[RELEASED]]
    assert store.allocator.usage().live_bytes == PAGE
    gate.set()
    await freed(store)
    place(store, 3)
    assert await operations.fill(KEY.tenant, KEY.fingerprint, [(3, KEY.block_hash)]) == [True]
    assert store.apply([("finish", "c", 0, [3], [None])]) == [[FREED]]


@pytest.mark.parametrize("disk_bytes", [3 * PAGE])  # two files, with their headers
@pytest.mark.parametrize("chained", [True, False])
async def test_what_one_call_makes_durable_does_not_go_for_the_rest_of_it(device, chained):
    store, operations, _ = device
    keys = [key_of(number) for number in range(4)]
    entries = [(n, key.block_hash, keys[n - 1].block_hash if n and chained else None) for n, key in enumerate(keys)]
    for number, key in enumerate(keys):
        place(store, number)
        store.apply([("seal", "c", 0, [number], [key.block_hash])])
    answers = await operations.persist(KEY.tenant, KEY.fingerprint, entries)
    assert answers[:2] == [True, True]
    assert [answer[3]["cause"] for answer in answers[2:]] == ["budget", "budget"]
    assert len((await operations._tiers.on_disk(None))[0]) == 2
    assert [operations._tiers.find(key) for key in keys[:2]] == ["disk", "disk"]
    # By another call the last may go, not what it hangs on.
    (answer,) = await operations.persist(KEY.tenant, KEY.fingerprint, [entries[3]])
    assert answer is True
    assert [operations._tiers.find(key) for key in keys] == [
        "disk" if chained else None,
        None if chained else "disk",
        None,
        "disk",
    ]
    store.apply([("release", "c", 0, list(range(4))), ("evict", list(range(4)))])


async def test_a_removal_that_hangs_is_told_as_an_error(device):
    store, operations, faults = device
    sealed(store, 1)
    await operations.persist(KEY.tenant, KEY.fingerprint, [(1, KEY.block_hash, None)])
    store.apply([("release", "c", 0, [1]), ("evict", [1])])
    faults.gates["delete"] = threading.Event()
    name = (1, KEY.tenant, KEY.fingerprint)
    assert await operations.carry_out(("forget", *name, [KEY.block_hash])) is True
    answer = await out_of_time(operations.forgotten(*name))
    assert answer[:2] == ("error", "TierError")


async def test_models_are_noted_beside_what_is_written_for_them(device):
    store, operations, _ = device
    noted = ("m", "1", PAGE, None)
    assert await operations.carry_out(("name", KEY.tenant, KEY.fingerprint, [noted])) is True
    sealed(store, 1)
    assert await operations.persist(KEY.tenant, KEY.fingerprint, [(1, KEY.block_hash, None)]) == [True]
    (names,) = [name for name in FaultyFileSystem.store if name.endswith(".kvmodels")]
    content = FaultyFileSystem.store[names].getvalue()
    assert decode_models(content, KEY.tenant, KEY.fingerprint) == [NotedModel(*noted)]
    store.apply([("release", "c", 0, [1]), ("evict", [1])])


async def freed(store):
    async with asyncio.timeout(DEADLINE_S):
        while store.allocator.usage().live_bytes:  # noqa: ASYNC110  it comes by a thread
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("kind", "name"), [("lower", "demote"), ("copy", "copy_ahead")])
async def test_compaction_does_not_move_what_is_on_its_way_down(kind, name, monkeypatch):
    """It runs on the same loop, while an operation with the addresses in its hands waits for its turn."""
    size, count = PAGE // 4, 32
    store = DeviceStore(GPUMemoryAllocator(HostBackend(1 << 30), 8 * PAGE, PAGE))
    tiers = LowerTiers(HostTier(HostBackend(1 << 30), 16 * PAGE, PAGE), None, lambda keys: None)
    await tiers.start()
    operations = LowerOperations(store, tiers)
    ids = list(range(count))
    places = store.apply([("connect", "c", "default", ""), ("allocate", "c", 0, "default", ids, size, size, [])])[1][0]
    for number, (offset, *_) in zip(ids, places, strict=True):
        view_at(store.allocator.address + offset, size)[:] = content_of(number, size)
    store.apply([("finish", "c", 0, ids, [key_of(number).block_hash for number in ids])])
    store.apply([("evict", [number for number in ids if number % 3])])
    down = ids[count // 2 - count // 2 % 3 + 3 :: 3]
    move = getattr(tiers, name)

    async def beside_compaction(sources):
        assert store.allocator.compact().moved_bytes, "others move"
        there = [store.allocator.address + store.record(number).offset for number in down]
        assert [source.address for source in sources] == there
        return await move(sources)

    monkeypatch.setattr(tiers, name, beside_compaction)
    entries = [(number, key_of(number).block_hash, None) for number in down]
    assert await operations.carry_out((kind, KEY.tenant, KEY.fingerprint, entries)) == [True] * len(down)
    assert store.apply([("evict", down)]) == [[]], "held only while they were read"
    assert store.lease_count == 0
    ((places, *_),) = store.apply([("allocate", "c", 0, "default", [-1], size, size, [])])
    target = store.allocator.address + places[0][0]
    for number in down:
        assert await tiers.fill([Source(key_of(number), None, target, size)]) == [True]
        assert view_at(target, size) == content_of(number, size)
    await tiers.close()
    store.allocator.close()


async def test_what_lies_in_a_folder_that_is_gone_is_not_counted_as_on_disk(tmp_path):
    """Nothing is to be written, so nothing else would tell."""
    store = DeviceStore(GPUMemoryAllocator(HostBackend(1 << 30), 4 * PAGE, PAGE))
    disk = DiskTier(folder_at(str(tmp_path / "tier")), 1 << 30)
    tiers = LowerTiers(None, disk, lambda keys: None)
    await tiers.start()
    for number in range(3):
        await disk.write_through(key_of(number), None, content_of(number))
    await disk.write_through(key_of(9, "other"), None, content_of(9))
    operations = LowerOperations(store, tiers)
    there = await operations.save("default")
    assert (there["caches"], there["failed"], there["error"]) == (3, [], None)
    (tmp_path / "tier").rename(tmp_path / "elsewhere")
    gone = await operations.save("default")
    assert (gone["caches"], gone["bytes"]) == (0, 0)
    assert sorted(gone["failed"]) == [tuple(key_of(number)) for number in range(3)]
    kind, name, message, details = gone["error"]
    assert (kind, name, details["cause"]) == ("error", "TierError", "ESTALE")
    assert f"{tmp_path}/tier" in message
    (tmp_path / "elsewhere").rename(tmp_path / "tier")
    assert (await operations.save(None))["caches"] == 4
    await tiers.close()
    store.allocator.close()


async def test_what_the_budget_has_no_room_for_is_no_failure_of_a_save():
    faults = FaultyFileSystem.faults = Faults()
    store = DeviceStore(GPUMemoryAllocator(HostBackend(1 << 30), 4 * PAGE, PAGE))
    host, disk = HostTier(HostBackend(1 << 30), 8 * PAGE, PAGE), DiskTier(folder_at("faulty://tier"), 3 * PAGE)
    tiers = LowerTiers(host, disk, lambda keys: None, watermark=1.0)
    await tiers.start()
    memory = bytearray(PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    parent = None
    for number in range(5):
        assert await tiers.demote([Source(key_of(number), parent, address, PAGE)]) == [True]
        parent = key_of(number).block_hash
    operations = LowerOperations(store, tiers)
    answer = await operations.save(None)
    assert (answer["caches"], answer["failed"], answer["error"]) == (2, [], None)
    assert sorted(answer["refused"]) == [tuple(key_of(number)) for number in range(2, 5)]
    assert answer["evicted"] == answer["evicted_before"]
    assert (await operations.save(None, answer["mark"]))["refused"] == [], "nothing has come since"
    faults.errors["put"] = OSError(28, "No space left on device")
    answer = await operations.save(None, answer["mark"], [tuple(key_of(2))])
    assert (answer["refused"], answer["failed"]) == ([tuple(key_of(2))], [])
    await tiers.remove([key_of(number) for number in range(2)])
    answer = await operations.save(None)
    assert (len(answer["failed"]), answer["error"][3]["cause"]) == (2, "ENOSPC")
    faults.errors.clear()
    await tiers.close()
    store.allocator.close()
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]


async def test_a_store_that_does_not_say_what_it_has_is_not_waited_for_for_ever(device):
    store, operations, _ = device
    sealed(store, 1)
    await operations.persist(KEY.tenant, KEY.fingerprint, [(1, KEY.block_hash, None)])
    gate = threading.Event()
    folder, arrived_there = operations._tiers._contents.disk._folder, threading.Semaphore(0)
    folder.sync = lambda path: (arrived_there.release(), gate.wait(DEADLINE_S))

    async def asked():
        assert await asyncio.to_thread(arrived_there.acquire, timeout=DEADLINE_S)

    answer = await out_of_time(operations.save(None), asked())
    gate.set()
    assert (answer["caches"], answer["error"][3]["cause"]) == (0, "timeout")
    del folder.sync
    store.apply([("release", "c", 0, [1]), ("evict", [1])])
