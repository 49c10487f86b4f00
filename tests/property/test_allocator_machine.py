"""GPUMemoryAllocator over real host memory, with clients that really map its pages, against a dict of caches."""

import ctypes
import mmap
import os
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvpool.errors import CapacityError, DoubleReleaseError, StaleCacheError
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.extents import Extents, changed, checked, difference, total_bytes
from kvpool.memory.host import HostBackend

PAGE = 65536
PAGES = 16
#: Each tenant writes bytes of its own, so that one byte tells whose it is.
BYTES = {"a": bytes(range(1, 128)), "b": bytes(range(128, 256))}
TENANTS = st.sampled_from(sorted(BYTES))
CLIENTS = st.sampled_from(["one", "two"])
SIZES = st.sampled_from([1, 5000, 16384, 40_000, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE, 7 * PAGE])


class AllocatorMachine(RuleBasedStateMachine):
    """Two tenants, two clients; memory is short, so that most requests need somebody else's.

    What may be evicted may be moved before, to make room without an eviction.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backend = HostBackend(budget_bytes=PAGES * PAGE)
        self.allocator = GPUMemoryAllocator(
            self.backend, PAGES * PAGE, PAGE, arena_bytes=64 * PAGE, reserve_bytes=10 * PAGE, victims=self, owner=self
        )
        self.now = 0.0
        self.next_id = 0
        #: Caches by id: where, and the byte that fills them. The evictable ones, the first to go first.
        self.live: dict[int, tuple[Allocation, int]] = {}
        self.evictable: list[int] = []
        self.waiting: dict[int, float] = {}
        #: What each client maps, by (client, serial), and the tenant it was mapped for.
        self.views: dict[tuple[str, int], tuple[mmap.mmap, str]] = {}
        self.to_drop: set[tuple[str, int]] = set()
        #: Where clients may still write whose leases were revoked, by (client, serial): parts of the arena.
        self.quarantined: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self.scrubs = 0
        self.scrubbing: dict[int, str] = {}

    def next_victim(self) -> int | None:
        """The allocator asks which cache may go: it is gone for the model from here on."""
        if not self.evictable:
            return None
        victim = self.evictable.pop(0)
        del self.live[victim]
        return victim

    def may_move(self, cache_id: int) -> bool:
        return cache_id in self.evictable

    def moved(self, allocation: Allocation) -> None:
        before, byte = self.live[allocation.cache_id]
        assert allocation.cache_id in self.evictable
        assert allocation._replace(offset=0, pages=()) == before._replace(offset=0, pages=())
        assert self.read(allocation) == bytes([byte]) * allocation.size_bytes
        self.live[allocation.cache_id] = (allocation, byte)

    def read(self, where: Allocation, extents: Extents | None = None) -> bytes:
        address = self.allocator.address + where.offset
        parts = where.extents if extents is None else extents
        return b"".join(ctypes.string_at(address + start, end - start) for start, end in parts)

    def fill(self, where: Allocation, extents: Extents) -> int:
        """Fill parts of a cache with its byte."""
        byte = BYTES[where.tenant][where.cache_id % 127]
        for start, end in extents:
            ctypes.memset(self.allocator.address + where.offset + start, byte, end - start)
        return byte

    def begin(self, where: Allocation) -> None:
        """A cache was allocated: nothing foreign may be in it. Fill it with its byte."""
        assert not self.read(where).translate(None, b"\0" + BYTES[where.tenant])
        self.nobody_may_write(where, 0, where.size_bytes)
        self.live[where.cache_id] = (where, self.fill(where, where.extents))

    def nobody_may_write(self, where: Allocation, start: int, end: int) -> None:
        """Nobody whose lease was revoked may still write to a part of a cache that was just given out."""
        start, end = where.offset + start, where.offset + end
        touched = {serial for index, serial in where.pages if index * PAGE < end and start < (index + 1) * PAGE}
        for (_, serial), parts in self.quarantined.items():
            if serial in touched:
                assert all(last <= start or end <= first for first, last in parts), "someone may write there"

    @rule(
        tenant=TENANTS, size=SIZES, growth=st.sampled_from([None, None, 0, 100, PAGE, 5 * PAGE]), may_go=st.booleans()
    )
    def allocate(self, tenant: str, size: int, growth: int | None, may_go: bool) -> None:
        self.next_id += 1
        maximum = None if growth is None else size + growth
        try:
            where = self.allocator.allocate(self.next_id, size, tenant=tenant, max_size_bytes=maximum)
        except CapacityError as error:
            refused = error
        else:
            refused = None
        if refused is not None:
            assert not self.evictable
            assert maximum not in (None, size) or refused.details["largest_bytes"] < size
            return
        assert (where.tenant, where.size_bytes, where.max_size_bytes) == (tenant, size, maximum or size)
        self.begin(where)
        if may_go:
            self.evictable.append(where.cache_id)

    @rule(tenant=TENANTS, size=SIZES, wait=st.integers(0, 4))
    def request(self, tenant: str, size: int, wait: int) -> None:
        self.next_id += 1
        someone_waits = bool(self.waiting)
        try:
            answer = self.allocator.request(self.next_id, size, tenant=tenant, now=self.now, deadline=self.now + wait)
        except CapacityError:
            assert wait == 0
            return
        if isinstance(answer, Allocation):
            assert not someone_waits
            self.begin(answer)
        else:
            self.waiting[answer] = self.now + wait

    @rule(passed=st.integers(0, 2))
    def poll(self, passed: int) -> None:
        self.now += passed
        answers = self.allocator.poll(self.now)
        granted = [ticket for ticket, answer in answers if isinstance(answer, Allocation)]
        assert granted == sorted(granted)
        for ticket, answer in answers:
            deadline = self.waiting.pop(ticket)
            if isinstance(answer, Allocation):
                assert deadline > self.now
                self.begin(answer)
            else:
                assert isinstance(answer, CapacityError)
                assert deadline <= self.now
        assert all(deadline > self.now for deadline in self.waiting.values())
        assert not granted or min(self.waiting, default=granted[-1]) >= granted[-1]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        cache_id = data.draw(st.sampled_from(sorted(self.live)))
        self.free_one(cache_id)
        with pytest.raises(DoubleReleaseError):
            self.allocator.free(cache_id)

    def free_one(self, cache_id: int) -> None:
        del self.live[cache_id]
        if cache_id in self.evictable:
            self.evictable.remove(cache_id)
        self.allocator.free(cache_id)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), kind=st.sampled_from(["resize", "resize", "back", "unback"]))
    def change(self, data: st.DataObject, kind: str) -> None:
        """A cache grows, shrinks, gets holes, or loses them. Its owner holds it, so it may not go for itself."""
        cache_id = data.draw(st.sampled_from(sorted(self.live)), label="cache")
        if cache_id in self.evictable:
            self.evictable.remove(cache_id)
        before, byte = self.live[cache_id]
        bounds = st.integers(0, min(before.max_size_bytes, 16 * PAGE))
        ranges: list[tuple[int, int]] = []
        for pair in data.draw(st.lists(st.tuples(bounds, bounds), min_size=1, max_size=3), label="ranges"):
            ranges += [(min(pair), max(pair))] if pair[0] != pair[1] else []
        if kind == "resize":
            ranges = [(0, ranges[-1][1])] if ranges else []
        asked = checked(ranges, before.max_size_bytes)
        wanted = changed(kind, before.extents, asked)
        try:
            if kind == "resize":
                after = self.allocator.resize(cache_id, total_bytes(asked))
            else:
                after = getattr(self.allocator, kind)(cache_id, ranges)
        except CapacityError:
            assert kind != "unback"
            assert not self.evictable
            assert self.allocator.allocation(cache_id) == before
            return
        assert after == before._replace(size_bytes=total_bytes(wanted), extents=wanted, pages=after.pages)
        assert {ref for ref in before.pages if ref[0] in dict(after.pages)} <= set(after.pages), (
            "what stays is the same"
        )
        new = difference(wanted, before.extents)
        assert not self.read(after, new).translate(None, b"\0" + BYTES[after.tenant])
        for start, end in new:
            self.nobody_may_write(after, start, end)
        self.fill(after, new)
        self.live[cache_id] = (after, byte)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), client=CLIENTS)
    def revoke(self, data: st.DataObject, client: str) -> None:
        """A client that may write to a cache loses it, and is not asked."""
        cache_id = data.draw(st.sampled_from(sorted(self.live)))
        where, _ = self.live[cache_id]
        self.allocator.quarantine(client, cache_id)
        for _, serial in where.pages:
            if (client, serial) in self.views:
                parts = [(where.offset + start, where.offset + end) for start, end in where.extents]
                self.quarantined.setdefault((client, serial), []).extend(parts)
        if data.draw(st.booleans()):
            self.free_one(cache_id)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def wipe_and_free(self, data: st.DataObject) -> None:
        cache_id = data.draw(st.sampled_from(sorted(self.live)))
        where, _ = self.live[cache_id]
        self.allocator.wipe(cache_id)
        assert not any(self.read(where))
        self.free_one(cache_id)

    @rule(tenant=TENANTS, goes_on=st.booleans())
    def scrub(self, tenant: str, goes_on: bool) -> None:
        """A scrub begins, or one that has begun goes on; the last step leaves nothing but what lives."""
        known = [number for number, whose in self.scrubbing.items() if whose == tenant]
        if not known or not goes_on:
            self.scrubs += 1
            self.scrubbing[self.scrubs] = tenant
            known = [self.scrubs]
        if self.allocator.scrub(tenant, known[0], 2 * PAGE):
            del self.scrubbing[known[0]]

    @rule(tenant=TENANTS)
    def scrub_whole(self, tenant: str) -> None:
        self.scrubs += 1
        while not self.allocator.scrub(tenant, self.scrubs, PAGE):
            pass
        live = sorted((w.offset + start, w.offset + end) for w, _ in self.live.values() for start, end in w.extents)
        for index, page in self.allocator._table._mapped.items():
            if page.tenant != tenant:
                continue
            content = bytearray(ctypes.string_at(self.allocator.address + index * PAGE, PAGE))
            for start, end in live:
                start, end = max(start, index * PAGE), min(end, (index + 1) * PAGE)
                if start < end:
                    content[start - index * PAGE : end - index * PAGE] = bytes(end - start)
            assert not any(content)

    @rule(budget=st.sampled_from([1, PAGE, None]))
    def compact(self, budget: int | None) -> None:
        self.allocator.compact(budget)

    @rule(tenant=st.none() | TENANTS)
    def trim(self, tenant: str | None) -> None:
        before = self.allocator.usage()
        given_bytes = self.allocator.trim(tenant)
        after = self.allocator.usage()
        assert given_bytes == before.reserve_bytes - after.reserve_bytes
        assert given_bytes == after.free_bytes + after.zombie_bytes - before.free_bytes - before.zombie_bytes
        if tenant is None:
            assert self.allocator.usage().reserve_bytes == 0

    @precondition(lambda self: self.live)
    @rule(data=st.data(), client=CLIENTS)
    def map_in_client(self, data: st.DataObject, client: str) -> None:
        where, _ = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        for index, serial in where.pages:
            descriptor = self.allocator.export(client, where.tenant, index, serial)
            if (client, serial) not in self.views:
                self.views[client, serial] = (mmap.mmap(descriptor, PAGE), where.tenant)
            os.close(descriptor)
            with pytest.raises(StaleCacheError):
                self.allocator.export(client, where.tenant, index + 64, serial)

    @rule(client=CLIENTS)
    def drop(self, client: str) -> None:
        for each, serials in self.allocator.take_drops().items():
            self.to_drop.update((each, serial) for serial in serials)
        mine = {(each, serial) for each, serial in self.to_drop if each == client}
        self.unmap(mine)
        self.allocator.dropped(client, [serial for _, serial in mine])

    @rule(client=CLIENTS)
    def die(self, client: str) -> None:
        self.unmap({key for key in self.views if key[0] == client})
        self.allocator.holder_gone(client)

    def unmap(self, keys: set[tuple[str, int]]) -> None:
        for key in keys:
            if key in self.views:
                self.views.pop(key)[0].close()
            self.quarantined.pop(key, None)
        self.to_drop -= keys

    @invariant()
    def the_account_is_right(self) -> None:
        self.allocator.check()
        usage = self.allocator.usage()
        assert usage.live_bytes == sum(where.size_bytes for where, _ in self.live.values())
        assert usage.reserve_bytes <= 10 * PAGE
        states = usage.backed_bytes + usage.reserve_bytes + usage.zombie_bytes + usage.free_bytes
        assert states == usage.capacity_bytes == PAGES * PAGE
        pages = {ref for where, _ in self.live.values() for ref in where.pages}
        assert usage.backed_bytes == len(pages) * PAGE - self.withheld_bytes()
        owned = usage.capacity_bytes - usage.free_bytes - usage.zombie_bytes
        assert self.backend.mem_info().free_bytes <= PAGES * PAGE - owned

    def withheld_bytes(self) -> int:
        """What is free in pages that caches share and a revoked client still maps: nobody gets it."""
        quarantined = {serial for _, serial in self.quarantined}
        free: dict[int, int] = {}
        for where, _ in self.live.values():
            if not where.shared:
                continue
            grows = where.max_size_bytes > where.size_bytes
            size = 1 << (where.max_size_bytes - 1).bit_length() if grows else -(-where.size_bytes // 4096) * 4096
            end = where.offset + max(size, 4096)
            for index, serial in where.pages:
                if serial in quarantined:
                    inside = min(end, (index + 1) * PAGE) - max(where.offset, index * PAGE)
                    free[serial] = free.get(serial, PAGE) - inside
        return sum(free.values())

    @invariant()
    def nobody_sees_what_is_not_theirs(self) -> None:
        places = sorted((where.offset, where.offset + where.max_size_bytes) for where, _ in self.live.values())
        assert all(end <= start for (_, end), (start, _) in pairwise(places))
        for where, byte in self.live.values():
            assert self.allocator.allocation(where.cache_id) == where
            assert self.read(where) == bytes([byte]) * where.size_bytes
        for view, tenant in self.views.values():
            assert not view[:].translate(None, b"\0" + BYTES[tenant])

    def teardown(self) -> None:
        for client in ("one", "two"):
            self.die(client)
        for cache_id in self.live:
            self.allocator.free(cache_id)
        self.allocator.trim()
        assert self.allocator.usage().free_bytes == PAGES * PAGE
        self.allocator.close()
        assert self.backend.mem_info().free_bytes == PAGES * PAGE
        self.backend.close()


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
