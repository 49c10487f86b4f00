"""Compaction over real bytes: caches come, are written, sealed, read, leased and go while others move, and the memory
refuses now and then between two steps of a move."""

import contextlib
import ctypes
import os
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvpool.errors import BackendError, CapacityError
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.backend import Access, Copy
from kvpool.memory.host import HostBackend

MIN = 4096
PAGE = 16 * MIN
PAGES = 12
TENANTS = st.sampled_from(["a", "b"])
#: Aligned as buddies are, and just above; odd ones; some that own pages, some that share the last one.
BLOCKS = st.sampled_from([1, 1, 2, 3, 4, 5, 8, 9, 9, 11, 15, 16, 17, 32, 33, 41])


class FailingBackend(HostBackend):
    """Host memory that refuses the copy or mapping that comes after ``left`` more; None: none."""

    left: int | None = None

    def _step(self, **details: int) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise BackendError("no more", errno=12, **details)

    def copy(self, copies: Sequence[Copy]) -> None:
        for count, each in enumerate(copies):
            self._step(copied=count)
            destination, source, size_bytes = each
            assert abs(destination - source) >= size_bytes, "what is copied does not overlap"
            super().copy([each])

    def map(self, address: int, handle: int) -> None:
        self._step()
        super().map(address, handle)

    def set_access(self, address: int, size_bytes: int, access: Access) -> None:
        self._step()
        super().set_access(address, size_bytes, access)


class CompactionMachine(RuleBasedStateMachine):
    """An owner of caches in short memory: those not leased may move or be evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = FailingBackend(budget_bytes=PAGES * PAGE)
        self.allocator = GPUMemoryAllocator(self.backend, PAGES * PAGE, PAGE, MIN, owner=self)
        self.next_id = 0
        self.places: dict[int, Allocation] = {}
        self.contents: dict[int, bytes] = {}
        self.leased: set[int] = set()
        self.scrubs = 0
        #: Pages that a revoked client maps (serials).
        self.mapped: set[int] = set()

    # -- what the allocator asks its owner ---------------------------------------------------------------------------

    def may_move(self, cache_id: int) -> bool:
        return cache_id not in self.leased

    def moved(self, allocation: Allocation) -> None:
        before = self.places[allocation.cache_id]
        assert allocation.cache_id not in self.leased, "a leased cache never moves"
        assert allocation._replace(offset=0, pages=()) == before._replace(offset=0, pages=())
        assert self.read(allocation) == self.contents[allocation.cache_id], "it is whole when its owner is told"
        self.places[allocation.cache_id] = allocation

    def read(self, where: Allocation) -> bytes:
        return ctypes.string_at(self.allocator.address + where.offset, where.size_bytes)

    def grant(self, where: Allocation) -> None:
        content = os.urandom(where.size_bytes)
        ctypes.memmove(self.allocator.address + where.offset, content, len(content))
        self.places[where.cache_id], self.contents[where.cache_id] = where, content
        self.leased.add(where.cache_id)

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.places)))

    # -- what happens -------------------------------------------------------------------------------------------------

    @rule(
        tenant=TENANTS, blocks=BLOCKS, odd=st.sampled_from([0, 0, 100]), times=st.integers(1, 6), sealed=st.booleans()
    )
    def allocate(self, tenant: str, blocks: int, odd: int, times: int, sealed: bool) -> None:
        for _ in range(times):
            self.next_id += 1
            with contextlib.suppress(CapacityError):
                self.grant(self.allocator.allocate(self.next_id, blocks * MIN - odd, tenant=tenant))
                if sealed:
                    self.leased.discard(self.next_id)

    @rule(tenant=TENANTS, blocks=st.integers(1, 14))
    def allocate_what_may_grow(self, tenant: str, blocks: int) -> None:
        self.next_id += 1
        with contextlib.suppress(CapacityError):
            size = blocks * MIN
            self.grant(self.allocator.allocate(self.next_id, size, tenant=tenant, max_size_bytes=size + MIN))

    @precondition(lambda self: self.places)
    @rule(data=st.data(), times=st.integers(1, 5))
    def free(self, data: st.DataObject, times: int) -> None:
        for _ in range(min(times, len(self.places))):
            cache_id = self.pick(data)
            self.allocator.free(cache_id)
            del self.places[cache_id], self.contents[cache_id]
            self.leased.discard(cache_id)

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def seal_or_lease(self, data: st.DataObject) -> None:
        cache_id = self.pick(data)
        self.leased ^= {cache_id}

    @rule()
    def seal_all(self) -> None:
        self.leased.clear()

    @rule(budget=st.sampled_from([1, PAGE, 4 * PAGE, None]))
    def compact(self, budget: int | None) -> None:
        usage = self.allocator.usage()
        done = self.allocator.compact(budget)
        after = self.allocator.usage()
        assert after.live_bytes == usage.live_bytes
        assert usage.backed_bytes - after.backed_bytes == done.freed_pages * PAGE
        if budget is None:
            assert not self.allocator.compact().freed_pages
            if not self.leased and not self.mapped:
                self.nothing_is_wasted()

    @rule(budget=st.sampled_from([1, 3 * MIN, 4 * PAGE]), times=st.integers(1, 4))
    def compact_a_little(self, budget: int, times: int) -> None:
        for _ in range(times):
            usage = self.allocator.usage()
            done = self.allocator.compact_a_little(budget)
            assert usage.backed_bytes - self.allocator.usage().backed_bytes == done.freed_pages * PAGE

    def nothing_is_wasted(self) -> None:
        for tenant in ("a", "b"):
            small = [each for each in self.places.values() if each.tenant == tenant and each.shared]
            used = sum(self.allocator._shared.part_bytes(tenant, each.offset) for each in small)
            pages = {ref for each in small for ref in each.pages}
            assert len(pages) == -(-used // PAGE)

    @rule(fails_after=st.integers(0, 40), budget=st.sampled_from([PAGE, None]))
    def compact_until_the_memory_refuses(self, fails_after: int, budget: int | None) -> None:
        self.backend.left = fails_after
        with contextlib.suppress(BackendError):
            self.allocator.compact(budget)
        self.backend.left = None

    @rule(tenant=TENANTS, blocks=BLOCKS, fails_after=st.integers(0, 10))
    def allocate_until_the_memory_refuses(self, tenant: str, blocks: int, fails_after: int) -> None:
        self.next_id += 1
        self.backend.left = fails_after
        with contextlib.suppress(BackendError, CapacityError):
            self.grant(self.allocator.allocate(self.next_id, blocks * MIN, tenant=tenant))
        self.backend.left = None

    @rule(tenant=TENANTS, goes_on=st.booleans())
    def scrub(self, tenant: str, goes_on: bool) -> None:
        self.scrubs += 1
        while not self.allocator.scrub(tenant, self.scrubs, PAGE) and goes_on:
            pass

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        """Somebody maps a cache's pages, and loses his leases: nothing may come there before he has dropped them."""
        where = self.places[self.pick(data)]
        for index, serial in where.pages:
            os.close(self.allocator.export("revoked", where.tenant, index, serial))
            self.mapped.add(serial)
        self.allocator.quarantine("revoked", where.cache_id)

    @rule()
    def drop(self) -> None:
        self.allocator.take_drops()
        self.allocator.holder_gone("revoked")
        self.mapped.clear()

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def every_live_byte_is_right(self) -> None:
        self.allocator.finish_move()
        for cache_id, where in self.places.items():
            assert self.allocator.allocation(cache_id) == where
            assert self.read(where) == self.contents[cache_id]
        places = sorted((each.offset, each.offset + each.max_size_bytes) for each in self.places.values())
        assert all(end <= start for (_, end), (start, _) in pairwise(places))

    @invariant()
    def pages_are_conserved(self) -> None:
        self.allocator.check()
        usage = self.allocator.usage()
        assert usage.backed_bytes + usage.reserve_bytes + usage.zombie_bytes + usage.free_bytes == PAGES * PAGE

    def teardown(self) -> None:
        self.drop()
        for cache_id in self.places:
            self.allocator.free(cache_id)
        self.allocator.trim()
        assert self.allocator.usage().free_bytes == PAGES * PAGE
        self.allocator.close()
        assert self.backend.mem_info().free_bytes == PAGES * PAGE
        self.backend.close()


TestCompactionMachine = CompactionMachine.TestCase
TestCompactionMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
