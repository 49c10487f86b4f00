"""Memory of the host tier: made by dropping, apart by tenant, zero where that was asked for."""

import os

import pytest
from disk_stores import content_of, key_of

from kvpool.cache.host_index import Kind
from kvpool.cache.host_tier import HostTier
from kvpool.errors import BackendError, ConfigError, InvalidSizeError
from kvpool.memory.copying import view_at
from kvpool.memory.host import HostBackend

PAGE = 64 << 10
PART = 4096
COPY, SAVED, SOLE = Kind


@pytest.fixture
def make():
    tiers = []

    def make_it(pages=4, backend=None):
        dropped = []
        backend = backend or HostBackend(1 << 30)
        tier = HostTier(backend, pages * PAGE, PAGE, PART, dropped.append)
        tiers.append((tier, backend))
        return tier, dropped

    yield make_it
    for tier, backend in tiers:
        tier.close()
        backend.close()


def put(tier, number, size=PAGE, kind=SOLE, last=SOLE, tenant="default"):
    memory = tier.allocate(tenant, size, last)
    if memory is None:
        return None
    view_at(memory.address, size)[:] = content_of(number, size)
    return tier.enter(key_of(number, tenant), None, memory, kind)


def numbers(entries):
    return [int.from_bytes(entry.key.block_hash, "big") for entry in entries]


def check(tier):
    """The account is right, and every entry has its bytes."""
    tier.check()
    for entry in tier.index:
        (number,) = numbers([entry])
        assert tier.view(entry) == content_of(number, entry.size_bytes)


def test_what_is_entered_has_its_bytes_and_the_oldest_make_room(make):
    tier, dropped = make()
    for number in range(6):
        assert put(tier, number)
        check(tier)
    assert numbers(dropped) == [0, 1]
    assert tier.index.used_bytes == tier.capacity_bytes


def test_only_kinds_that_may_go_do(make):
    tier, dropped = make()
    for number, kind in enumerate([SOLE, SAVED, COPY, SOLE]):
        put(tier, number, kind=kind)
    assert tier.allocate("default", 3 * PAGE, SAVED) is None
    assert dropped == [], "what cannot make the room is not dropped for it"
    assert put(tier, 4, 2 * PAGE, last=SAVED)
    assert numbers(dropped) == [2, 1]
    assert put(tier, 5, last=SAVED) is None
    assert put(tier, 5, last=SOLE)
    assert numbers(dropped) == [2, 1, 0]
    check(tier)


def test_what_can_never_fit_drops_nothing(make):
    tier, dropped = make()
    put(tier, 0)
    assert tier.allocate("default", 4 * PAGE + 1, SOLE) is None
    assert dropped == []


def test_sizes_count_as_the_memory_they_take(make):
    tier, _ = make()
    assert [tier.room_bytes(size) for size in (1, PART, PART + 1, PAGE - 1, PAGE, PAGE + 1)] == [
        PART,
        PART,
        2 * PART,
        PAGE,
        PAGE,
        2 * PAGE,
    ]
    put(tier, 0, PAGE + 1)
    put(tier, 1, PAGE + 1)
    assert not tier.index.fits(1)
    check(tier)


def test_small_caches_fill_the_pages_to_the_last_part(make):
    tier, dropped = make(1)
    for number in range(PAGE // PART):
        assert put(tier, number, PART)
    assert dropped == []
    put(tier, 99, 100)
    assert numbers(dropped) == [0]
    check(tier)


def test_tenants_share_no_page_and_memory_that_changes_tenant_is_zero(make):
    tier, dropped = make(2)
    first = put(tier, 0, PART, tenant="a")
    second = put(tier, 1, PART, tenant="b")
    assert first.address // PAGE != second.address // PAGE
    # Bytes are free, no page is: one tenant's caches must go until one is.
    assert put(tier, 2, PART, tenant="c")
    assert numbers(dropped) == [0]
    check(tier)
    memory = tier.allocate("d", PAGE, SOLE)
    assert not any(view_at(memory.address, PAGE)), "nothing of b is left for d"
    tier.give_back(memory)


def test_fragmentation_drops_within_bounds_then_gives_up(make):
    tier, dropped = make(8)
    parts = PAGE // PART
    pinned = []
    for number in range(8 * parts):
        entry = put(tier, number, PART)
        if not number % parts:  # one held part in each page: no whole page ever comes free
            tier.index.hold(entry)
            pinned.append(entry)
    assert tier.allocate("default", PAGE, SOLE) is None
    # One page's worth until the bytes would do, then a few pages more.
    assert parts < len(dropped) <= 6 * parts
    check(tier)
    for entry in pinned:
        tier.index.release(entry)
    assert put(tier, 999, PAGE)
    check(tier)


def test_memory_taken_out_is_kept_until_given_back_and_can_be_wiped(make):
    tier, _ = make(1)
    entry = put(tier, 0, PAGE - PART + 1)
    tier.index.hold(entry)
    memory = tier.take_out(entry)
    assert tier.index.get(key_of(0)) is None
    assert tier.allocate("default", PART, SOLE) is None
    assert tier.view(entry) == content_of(0, entry.size_bytes)
    tier.index.release(entry)
    tier.wipe([memory])
    assert not any(view_at(memory.address, PAGE))
    tier.give_back(memory)
    assert put(tier, 1)
    check(tier)


def test_scrubbing_zeroes_what_dropped_ones_left(make):
    tier, _ = make(2)
    kept, gone = put(tier, 0, PART), put(tier, 1, PART)
    left = view_at(gone.address, PART)
    tier.drop(gone)
    assert bytes(left) == content_of(1, PART)
    while not tier.scrub("default", 1, PAGE):
        pass
    assert not any(left)
    assert tier.view(kept) == content_of(0, PART)


def test_a_system_with_less_memory_than_configured_is_room_that_is_not_there(make, caplog):
    class Short(HostBackend):
        def create(self, size_bytes):
            if self._created_bytes >= 2 * PAGE:
                raise BackendError("no more", errno=12)
            return super().create(size_bytes)

    tier, dropped = make(4, Short(1 << 30))
    for number in range(5):
        assert put(tier, number)
    assert numbers(dropped) == [0, 1, 2]
    assert tier.errors == {"12": 3}
    assert len(caplog.messages) == 1
    check(tier)


def test_sizes_that_cannot_be(make):
    with pytest.raises(InvalidSizeError, match="at least one page"):
        HostTier(HostBackend(1 << 20), PAGE - 1, PAGE)
    with pytest.raises(ConfigError):
        HostTier(HostBackend(1 << 20), 4 * PAGE, 3 * PART)
    tier, _ = make()
    with pytest.raises(InvalidSizeError):
        tier.allocate("default", 0, SOLE)


def test_nothing_is_left_open_after_close(make):
    before = len(os.listdir("/proc/self/fd"))
    backend = HostBackend(1 << 20)
    tier = HostTier(backend, 4 * PAGE, PAGE)
    put(tier, 0)
    tier.close()
    backend.close()
    assert len(os.listdir("/proc/self/fd")) == before
