"""A store whose memory refuses something in the middle: what was told to go goes, and what is left is whole."""

from collections.abc import Iterator
from typing import Any

import pytest
from cut_memory import Cut, CutMemory

from kvpool.cache.store import FREED, DeviceStore
from kvpool.errors import BackendError
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.pool.leases import PINNER

MIN = 256
PAGE = 16 * MIN
PAGES = 8
NEVER = Cut(0, BackendError)


@pytest.fixture
def memory() -> Iterator[CutMemory]:
    memory = CutMemory(PAGES * PAGE)
    yield memory
    memory.close()


@pytest.fixture
def store(memory: CutMemory) -> Iterator[DeviceStore]:
    store = DeviceStore(GPUMemoryAllocator(memory, PAGES * PAGE, PAGE, MIN))
    assert do(store, "connect", "a", "blue", "token") is True
    yield store
    store.allocator.check()
    store.allocator.close()


def do(store: DeviceStore, *operation: Any) -> Any:
    [answer] = store.apply([operation])
    return answer


def keep(store: DeviceStore, cache_id: int, size_bytes: int) -> None:
    """Make a sealed cache that nobody holds."""
    assert len(do(store, "allocate", "a", 1, "blue", [cache_id], size_bytes, size_bytes, [])[0]) == 1
    do(store, "finish", "a", 2, [cache_id], [bytes([cache_id]) * 16])


def leave_a_move_half_way(store: DeviceStore, memory: CutMemory) -> int:
    """Let a cache slide over a part of its own place, and memory refuse to go on; returns its id."""
    for cache_id in range(16):
        keep(store, cache_id, (3 * MIN, 11 * MIN - 100)[cache_id % 2])
    assert do(store, "evict", list(range(0, 16, 2))) == []
    for after in range(20):
        memory.cut, memory.calls = Cut(after, BackendError, 0.5), 0
        do(store, "compact", None)
        unfinished = store.allocator._mover.unfinished
        if unfinished is not None:
            memory.cut = NEVER
            return unfinished[0].cache_id
    raise AssertionError("nothing slides over itself")


def test_void_content_that_could_not_be_zeroed_is_gone_and_its_memory_follows(
    store: DeviceStore, memory: CutMemory
) -> None:
    """It had left the store and stayed in memory, for good."""
    keep(store, 1, PAGE)
    memory.cut = NEVER
    assert do(store, "void", [1], PINNER) == ([], [1], {})
    assert do(store, "lease", "a", 3, [1]) == [None]
    assert (store.caches, store.allocator.usage().live_bytes) == (0, PAGE)
    memory.cut = None
    store.apply([])
    assert store.allocator.usage().live_bytes == 0


@pytest.mark.parametrize("moving", [True, False])
def test_what_goes_while_a_move_cannot_be_finished_goes_with_it(
    store: DeviceStore, memory: CutMemory, moving: bool
) -> None:
    moved = leave_a_move_half_way(store, memory)
    gone = moved if moving else next(cache_id for cache_id in store._caches if cache_id != moved)
    before = store.allocator.usage().live_bytes
    assert do(store, "evict", [gone]) == []
    assert store.record(gone) is None
    memory.cut = None
    store.apply([])
    assert store.allocator.usage().live_bytes == before - (11 * MIN - 100)
    assert do(store, "evict", list(store._caches)) == []
    assert store.allocator.usage().backed_bytes == 0


def test_nobody_gets_a_lease_on_what_is_half_way(store: DeviceStore, memory: CutMemory) -> None:
    moved = leave_a_move_half_way(store, memory)
    assert do(store, "lease", "a", 3, [moved])[:2] == ("error", "BackendError")
    assert store.lease_count == 0
    before = store._caches[moved].generation
    memory.cut = None
    ((offset, _, generation),) = do(store, "lease", "a", 4, [moved])
    assert (offset, generation) == (store.allocator.allocation(moved).offset, before + 1)


def test_what_is_refused_as_a_whole_has_not_begun(store: DeviceStore, memory: CutMemory) -> None:
    do(store, "allocate", "a", 1, "blue", [50, 51], MIN, MIN, [])
    leave_a_move_half_way(store, memory)
    assert do(store, "seal", "a", 3, [50, 51], [b"5" * 16, b"6" * 16])[:2] == ("error", "BackendError")
    assert do(store, "revoke", "a")[:2] == ("error", "BackendError")
    assert not any(store._caches[cache_id].sealed for cache_id in (50, 51))
    memory.cut = None
    assert do(store, "seal", "a", 4, [50, 51], [b"5" * 16, b"6" * 16]) == [True, True]
    assert do(store, "revoke", "a")[0] == [50, 51]


def test_a_lease_that_ends_while_a_move_cannot_be_finished_has_ended(store: DeviceStore, memory: CutMemory) -> None:
    do(store, "allocate", "a", 1, "blue", [50], MIN, MIN, [])
    leave_a_move_half_way(store, memory)
    assert do(store, "release", "a", 3, [50]) == [FREED]
    assert (store.record(50), store.lease_count) == (None, 0)
