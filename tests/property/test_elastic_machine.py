"""All that a device does with its memory at once, over real bytes, and cut short at any call of any of it.

A device's store, allocator and memory as its actor has them, driven by operations as the pool sends them. Clients map
pages, write to what they hold, and read it through their own mappings. What goes is named by a real policy. Then, at a
call of the memory that Hypothesis chooses, in a move or anywhere else:

- the memory refuses, from there on for the rest of the operation: it is undone, or stays resumable;
- a step of compaction is interrupted: the same;
- the owner's process is killed: its memory is gone, but for what clients map of it; a new one begins with what is left.

A copy may have written any part of its bytes by then. After each step: pages are conserved, nothing overlaps, every
live byte is right, what is leased has not moved, and each reference leads to where its cache is now.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from cut_memory import Cut, CutMemory, Interrupted, Killed, filled, foreign, read, write
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool.cache.index import CacheIndex
from kvpool.cache.store import FREED, RELEASED, DeviceStore, Place
from kvpool.errors import BackendError
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.extents import Extents, changed, checked, difference, front, total_bytes
from kvpool.pool.leases import PINNER

MIN = 256
PAGE = 16 * MIN
PAGES = 12
LEAST_PAGES = 6
RESERVE = 8 * PAGE
#: Several to a page, aligned and not; nearly a page; above one, sharing its last page or not; many pages.
SIZES = st.sampled_from([1, 1, 2, 3, 4, 5, 8, 9, 9, 11, 15, 16, 17, 24, 33, 41, 80]).map(lambda blocks: blocks * MIN)
ODD = st.sampled_from([0, 0, 0, 100])
TENANTS = ("a", "b")
ERRORS = st.sampled_from([BackendError, BackendError, Interrupted, Killed])
SHARES = st.sampled_from([0.0, 0.5, 1.0])
CUTS = st.builds(Cut, st.integers(0, 3) | st.integers(0, 12) | st.integers(0, 40), ERRORS, SHARES, st.booleans())
MAYBE_CUT = st.none() | st.none() | CUTS
#: Steps of compaction: how much each copies, by word or in the background, and whether it comes to its end.
STEPS = st.lists(
    st.tuples(st.sampled_from([1, PAGE, 4 * PAGE, None]), st.booleans(), st.none() | CUTS), min_size=1, max_size=4
)
DEAD = object()
"""The answer of an operation in which the owner's process ended."""


@dataclass(eq=False)
class Cache:
    """What is known of a cache to whoever was answered."""

    id: int
    tenant: str
    seed: int
    """Decides its bytes."""
    extents: Extents
    max_size_bytes: int
    place: Place
    leases: Counter[str] = field(default_factory=Counter)
    """By client, or pinner. Unsealed it has one, its maker's."""
    key: bytes | None = None
    sealed: bool = False
    gone: bool = False
    """Nobody can find it any more: it goes with its last lease."""

    @property
    def size_bytes(self) -> int:
        return total_bytes(self.extents)

    def content(self) -> list[tuple[int, bytes]]:
        """Return what is to be in it: (offset, bytes) of each part, offsets from the arena's start."""
        whole = filled(self.seed, self.tenant, self.extents[-1][1] if self.extents else 0)
        return [(self.place[0] + start, whole[start:end]) for start, end in self.extents]


class ElasticMachine(RuleBasedStateMachine):
    """Two tenants, clients that come and go, and memory too short for them."""

    def __init__(self) -> None:
        super().__init__()
        self.pages_before = open_and_mapped_pages()
        self.epoch = 0
        self.caches: dict[int, Cache] = {}
        self.references: list[tuple[int, int, Place]] = []
        """Id, epoch, and the place when it was made."""
        self.clients: dict[str, str] = {}
        """Tenant of each."""
        self.views: dict[tuple[int, str, int], mmap.mmap] = {}
        """What clients map, by epoch, client and serial."""
        self.ghosts: dict[str, list[Cache]] = {}
        """By revoked client, what it may go on writing to."""
        self.to_drop: dict[str, set[int]] = {}
        self.held: list[tuple[Cache, int]] = []
        """Caches whose bytes somebody on the device reads, and where he does."""
        self.cut: Cut | None = None
        """Where the next operation ends."""
        self.refuses = False
        """Whether the memory goes on refusing what takes more of it, or writes to it."""
        self.seeds = self.scrubs = self.born = 0

    @initialize(policy=st.sampled_from(["lru", "lfu", "size_aware_lru", "adaptive"]))
    def begin(self, policy: str) -> None:
        self.index = CacheIndex(policy)
        self.be_started(PAGES)

    @rule(
        tenant=st.sampled_from(TENANTS),
        sizes=st.lists(SIZES, min_size=1, max_size=4),
        odd=ODD,
        times=st.integers(4, 16),
        goes=st.integers(2, 4),
        steps=STEPS,
    )
    def churn(self, tenant: str, sizes: list[int], odd: int, times: int, goes: int, steps: Any) -> None:
        """A client stores many sealed caches, and every so many of all there are go: moves close the holes."""
        client = next(name for name, its in self.clients.items() if its == tenant)
        for number in range(times):
            self.request(client, 1, sizes[number % len(sizes)] - odd, 0, seal=True, maps=False)
        ids = [cache.id for cache in self.caches.values() if cache.sealed and not cache.gone][::goes]
        self.forget(ids, self.operate("evict", ids))
        self.compact(steps)

    # -- the device ---------------------------------------------------------------------------------------------------

    def be_started(self, pages: int) -> None:
        """An owner's process begins, and clients come to it."""
        self.memory = CutMemory(pages * PAGE)
        self.allocator = GPUMemoryAllocator(
            self.memory, pages * PAGE, PAGE, MIN, arena_bytes=64 * PAGES * PAGE, reserve_bytes=RESERVE
        )
        self.store = DeviceStore(self.allocator, compaction_step_bytes=PAGE)
        self.index.add_device(self.epoch)
        self.clients = {}
        for tenant in TENANTS:
            assert self.operate("connect", PINNER + tenant, tenant, "") is True
            self.connect(tenant)
        self.connect(TENANTS[0])

    def connect(self, tenant: str) -> None:
        self.born += 1
        name = f"{tenant}-{self.born}"
        assert self.operate("connect", name, tenant, "token") is True
        self.clients[name] = tenant

    def operate(self, *operation: Any, involved: Iterable[int] = ()) -> Any:
        """Let the device carry out an operation, perhaps cut short; returns its answer, or that it died over it."""
        cut, self.cut = self.cut, None
        if cut is not None and cut.error is Interrupted:  # of an operation nobody would know what it did
            cut = cut._replace(error=BackendError)
        self.cut_memory(cut)
        try:
            (answer,) = self.store.apply([operation])
        except Killed:
            self.die(involved)
            return DEAD
        self.cut_memory(None)
        return answer

    def cut_memory(self, cut: Cut | None) -> None:
        """Cut the next calls short; where it refuses everything, a process can end before it does."""
        if self.refuses and (cut is None or cut.error is not Killed):
            cut = Cut(0, BackendError)
        self.memory.cut, self.memory.calls = cut, 0

    @precondition(lambda self: self.refuses)
    @rule()
    def memory_is_there_again(self) -> None:
        self.refuses = False
        self.cut_memory(None)
        self.allocator.finish_move()

    def die(self, involved: Iterable[int] = ()) -> None:
        """The owner's process ends, between two steps of something that was about the caches ``involved``."""
        self.refuses = False
        self.cut_memory(None)
        for cache in self.caches.values():
            if cache.id not in involved:
                self.its_clients_see_it(cache)
        self.memory.close()  # what the system does: no mapping and no descriptor is left
        for cache in self.caches.values():
            if cache.id not in involved:
                self.its_clients_see_it(cache)
        self.index.remove_device(self.epoch)
        self.caches, self.ghosts, self.to_drop, self.held = {}, {}, {}, []
        self.epoch += 1
        if PAGES - self.orphaned_pages() < LEAST_PAGES:
            self.orphans_go()
        self.be_started(PAGES - self.orphaned_pages())

    def orphaned_pages(self) -> int:
        """Pages of owners that are dead, which clients map still: their memory is taken."""
        return len({(epoch, serial) for epoch, _, serial in self.views if epoch != self.epoch})

    def orphans_go(self) -> None:
        """Clients that had caches of an owner that is dead let go of them."""
        for key in [key for key in self.views if key[0] != self.epoch]:
            self.views.pop(key).close()

    # -- what clients do ----------------------------------------------------------------------------------------------

    def perhaps_cut(self, data: st.DataObject) -> None:
        self.cut = data.draw(MAYBE_CUT, label="cut")

    def some_client(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.clients)), label="client")

    def some_cache(self, data: st.DataObject, *, sealed: bool) -> Cache:
        ids = sorted(cache.id for cache in self.caches.values() if cache.sealed == sealed)
        return self.caches[data.draw(st.sampled_from(ids), label="cache")]

    @rule(
        data=st.data(),
        size=SIZES,
        odd=ODD,
        growth=st.sampled_from([None, None, None, 0, MIN, 3 * MIN, PAGE, 5 * PAGE]),
        times=st.integers(1, 6),
        seal=st.booleans(),
        maps=st.booleans(),
    )
    def allocate(
        self, data: st.DataObject, size: int, odd: int, growth: int | None, times: int, seal: bool, maps: bool
    ) -> None:
        self.perhaps_cut(data)
        self.request(self.some_client(data), times, size - odd, growth or 0, seal=seal, maps=maps)

    def request(self, client: str, times: int, size_bytes: int, growth_bytes: int, *, seal: bool, maps: bool) -> None:
        """A client asks for caches of one size; what is worth least goes for them, as long as that may help."""
        tenant, max_size_bytes = self.clients[client], size_bytes + growth_bytes
        space = self.index.space(tenant, "f")
        rows = [self.index.add(space, size_bytes, self.epoch, now=0.0) for _ in range(times)]
        wanted = list(map(self.index.id_of, rows))
        evict: list[int] = []
        while True:
            answer = self.operate("allocate", client, 1, tenant, wanted, size_bytes, max_size_bytes, evict)
            if answer is DEAD:
                return
            places, refused, shortage = answer
            self.forget(evict, refused)
            for cache_id, place in zip(wanted, places, strict=False):
                self.begin_cache(cache_id, client, size_bytes, max_size_bytes, place, seal=seal, maps=maps)
            wanted = wanted[len(places) :]
            if shortage is None:
                assert not wanted
                return
            if shortage["details"].get("compaction_left"):
                evict = []
            elif shortage["class"] != "CapacityError" or (evict := self.victims(size_bytes)) == []:
                break
        for cache_id in wanted:
            self.index.remove(self.index.row_of(cache_id))

    def victims(self, size_bytes: int) -> list[int]:
        """Return what the policy lets go for so many bytes."""
        victims: list[int] = []
        for row in self.index.victims(self.epoch):
            if size_bytes <= 0:
                break
            size_bytes -= self.index.size_bytes[row]
            victims.append(self.index.id_of(row))
        return victims

    def forget(self, ids: Iterable[int], refused: Iterable[int] = ()) -> None:
        """These were told to go; those that the device refused go with their last lease."""
        for cache_id in ids:
            cache = self.caches[cache_id]
            assert (cache_id in refused) == bool(cache.leases or self.is_held(cache))
            self.index.remove(self.index.row_of(cache_id))
            cache.gone = True
            if cache_id not in refused:
                del self.caches[cache_id]

    def is_held(self, cache: Cache) -> bool:
        return any(each is cache for each, _ in self.held)

    def begin_cache(
        self, cache_id: int, client: str, size_bytes: int, max_size_bytes: int, place: Place, *, seal: bool, maps: bool
    ) -> None:
        """A cache was granted: nothing foreign may be in it. Its maker writes to it, and perhaps seals and releases."""
        self.seeds += 1
        cache = self.caches[cache_id] = Cache(
            cache_id, self.clients[client], self.seeds, front(size_bytes), max_size_bytes, place, Counter([client])
        )
        self.references.append((cache_id, self.epoch, place))
        self.fill(cache, cache.extents)
        if maps:
            self.map(client, cache)
        if seal:
            self.finish(client, cache)

    def fill(self, cache: Cache, extents: Extents) -> None:
        """The maker gets parts of a cache, and writes to them."""
        whole = filled(cache.seed, cache.tenant, cache.max_size_bytes)
        for start, end in extents:
            address = self.allocator.address + cache.place[0] + start
            assert not foreign(read(address, end - start), cache.tenant)
            write(address, whole[start:end])

    def map(self, client: str, cache: Cache) -> None:
        for index, serial in cache.place[1]:
            descriptor = self.allocator.export(client, cache.tenant, index, serial)
            if (self.epoch, client, serial) not in self.views:
                self.views[self.epoch, client, serial] = mmap.mmap(descriptor, PAGE)
            os.close(descriptor)

    def finish(self, client: str, cache: Cache) -> None:
        key = cache.id.to_bytes(16)
        backed = cache.size_bytes > 0 and cache.extents == front(cache.size_bytes)
        answer = self.operate("finish", client, 1, [cache.id], [key], involved=[cache.id])
        if answer is DEAD:
            return
        if not self.is_done(answer):
            return
        assert (answer == [RELEASED]) == backed
        if backed:
            row = self.index.row_of(cache.id)
            cache.sealed, cache.key = True, key
            self.index.publish(row, key)
            self.end_lease(client, cache)

    def is_done(self, answer: Any) -> bool:
        """Whether an operation was carried out: it may be refused as a whole while a move cannot be finished."""
        if isinstance(answer, tuple) and answer and answer[0] == "error":
            assert answer[1] == "BackendError", answer
            return False
        return True

    def end_lease(self, client: str, cache: Cache) -> None:
        """A lease ended. Returns nothing: the device has told whether the cache is gone by that."""
        cache.leases[client] -= 1
        cache.leases += Counter()
        row = self.index.live_row(cache.id)
        if row >= 0:
            self.index.unpin([row], now=0.0)
        if not cache.leases and not self.is_held(cache) and (cache.gone or cache.key is None):
            if row >= 0:
                self.index.remove(row)
            del self.caches[cache.id]

    @precondition(lambda self: any(not cache.sealed for cache in self.caches.values()))
    @rule(data=st.data(), kind=st.sampled_from(["resize", "resize", "back", "unback"]))
    def change(self, data: st.DataObject, kind: str) -> None:
        """A cache grows, shrinks, gets holes, or loses them."""
        self.perhaps_cut(data)
        cache = self.some_cache(data, sealed=False)
        (client,) = cache.leases
        bounds = st.integers(0, min(cache.max_size_bytes, 8 * PAGE))
        ranges: list[tuple[int, int]] = []
        for pair in data.draw(st.lists(st.tuples(bounds, bounds), min_size=1, max_size=3), label="ranges"):
            ranges += [(min(pair), max(pair))] if pair[0] != pair[1] else []
        if kind == "resize":
            ranges = [(0, ranges[-1][1])] if ranges else []
        asked = checked(ranges, cache.max_size_bytes)
        wanted = changed(kind, cache.extents, asked)
        more_bytes = max(total_bytes(wanted) - cache.size_bytes, 0)
        evict = self.victims(more_bytes) if self.allocator.usage().free_bytes < more_bytes else []
        what: Any = total_bytes(asked) if kind == "resize" else ranges
        answer = self.operate(kind, client, 1, cache.id, what, evict, involved=[cache.id])
        if answer is DEAD:
            return
        if isinstance(answer, tuple) and answer[0] == "error":
            assert answer[1] in ("InvalidSizeError", "BackendError"), answer
            self.forget(evict)  # first of all, whatever becomes of the rest
            return
        extents, place, refused, shortage = answer
        self.forget(evict, refused)
        if shortage is None:
            assert extents == wanted
            assert place[2] == cache.place[2] + 1
        else:
            assert not difference(cache.extents, extents) or kind in ("resize", "unback")
        assert place[0] == cache.place[0], "it grows in place"
        there = {ref for ref in cache.place[1] if ref[0] in dict(place[1])}
        assert there <= set(place[1]), "what stays is the same"
        new = difference(extents, cache.extents)
        cache.extents, cache.place = extents, place
        self.fill(cache, new)
        if any((self.epoch, client, serial) in self.views for _, serial in place[1]):
            self.map(client, cache)

    @precondition(lambda self: any(not cache.sealed for cache in self.caches.values()))
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """The maker writes anew."""
        cache = self.some_cache(data, sealed=False)
        self.seeds += 1
        cache.seed = self.seeds
        for offset, content in cache.content():
            write(self.allocator.address + offset, content)

    @precondition(lambda self: any(not cache.sealed for cache in self.caches.values()))
    @rule(data=st.data())
    def seal_and_release(self, data: st.DataObject) -> None:
        self.perhaps_cut(data)
        cache = self.some_cache(data, sealed=False)
        (client,) = cache.leases
        self.finish(client, cache)

    @precondition(lambda self: any(cache.sealed for cache in self.caches.values()))
    @rule(data=st.data(), times=st.integers(1, 3), pin=st.booleans(), maps=st.booleans())
    def lease(self, data: st.DataObject, times: int, pin: bool, maps: bool) -> None:
        """A client gets a lease on sealed caches, or they are pinned by the user's word."""
        self.perhaps_cut(data)
        cache = self.some_cache(data, sealed=True)
        clients = sorted(name for name, tenant in self.clients.items() if tenant == cache.tenant)
        client = PINNER + cache.tenant if pin else data.draw(st.sampled_from(clients), label="client")
        ids = [cache.id] * times
        answer = self.operate("lease", client, 1, ids)
        if answer is DEAD or not self.is_done(answer):
            return
        assert (None in answer) == cache.gone
        if cache.gone:
            return
        for place in answer:
            self.follow(cache, place)
            cache.leases[client] += 1
            self.index.pin([self.index.row_of(cache.id)], now=0.0)
        if maps and not pin:
            self.map(client, cache)

    def follow(self, cache: Cache, place: Place) -> None:
        """A cache was found at a place: it is where it was, or moved and has a higher generation."""
        if place != cache.place:
            assert place[2] > cache.place[2]
            assert not cache.leases, "a leased cache never moves"
        cache.place = place
        self.references.append((cache.id, self.epoch, place))

    @precondition(lambda self: any(cache.leases for cache in self.caches.values()))
    @rule(data=st.data(), times=st.integers(1, 5))
    def release(self, data: st.DataObject, times: int) -> None:
        """Leases end; what is not sealed goes."""
        ids = sorted(cache.id for cache in self.caches.values() if cache.leases)
        for cache_id in data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=times, unique=True), label="ids"):
            cache = self.caches.get(cache_id)
            if cache is None:
                return  # the owner died
            self.perhaps_cut(data)
            client = data.draw(st.sampled_from(sorted(cache.leases)), label="client")
            answer = self.operate("release", client, 1, [cache_id], involved=[cache_id])
            if answer is DEAD:
                return
            if not self.is_done(answer):
                continue
            self.end_lease(client, cache)
            assert answer == [RELEASED if cache_id in self.caches else FREED]

    @precondition(lambda self: any(cache.sealed for cache in self.caches.values()))
    @rule(data=st.data(), most=st.integers(1, 4))
    def evict(self, data: st.DataObject, most: int) -> None:
        """The policy's victims go, or whatever the pool names: what is leased is refused."""
        ids = sorted(cache.id for cache in self.caches.values() if cache.sealed and not cache.gone)
        if not ids:
            return
        self.perhaps_cut(data)
        victims = self.victims(PAGE)[:most]
        ids = victims or data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=most, unique=True), label="ids")
        answer = self.operate("evict", ids, involved=ids)
        if answer is not DEAD and self.is_done(answer):
            self.forget(ids, answer)

    @precondition(lambda self: any(cache.sealed for cache in self.caches.values()))
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """Its bytes are read where they are, while anything may happen, until :meth:`unhold`."""
        if self.refuses:
            return
        cache = self.some_cache(data, sealed=True)
        self.store.hold([cache.id])
        record = self.store.record(cache.id)
        assert record is not None
        self.follow(cache, (record.offset, record.pages, record.generation))
        self.held.append((cache, record.offset))
        if not cache.gone:
            self.index.pin([self.index.row_of(cache.id)], now=0.0)

    @precondition(lambda self: self.held)
    @rule()
    def unhold(self) -> None:
        cache, offset = self.held.pop()
        assert cache.place[0] == offset
        self.store.unhold([cache.id])
        cache.leases["held"] += 1
        self.end_lease("held", cache)

    # -- what the device does -----------------------------------------------------------------------------------------

    @rule(steps=STEPS)
    def compact_again(self, steps: Any) -> None:
        """What came between two steps of a plan is between two of its moves, or of one that was cut short."""
        self.compact(steps)

    def compact(self, steps: list[tuple[int | None, bool, Cut | None]]) -> None:
        for budget, by_word, cut in steps:
            self.take_step(budget, by_word, cut)
            self.every_live_byte_is_right()
            if budget is None and cut is None and not self.refuses:
                assert not self.allocator.compact().freed_pages
                if not self.ghosts and not self.held and not any(cache.leases for cache in self.caches.values()):
                    self.nothing_is_wasted()

    def take_step(self, budget: int | None, by_word: bool, cut: Cut | None) -> None:
        self.cut_memory(cut)
        usage, net_pages, epoch = self.allocator.usage(), self.allocator._mover.net_pages, self.epoch
        try:
            if budget is None or by_word:
                self.allocator.compact(budget)
            else:
                self.allocator.compact_a_little(budget)
        except Killed:
            self.die()
        except (BackendError, Interrupted) as error:
            assert cut is not None or self.refuses
            self.refuses |= cut is not None and cut.lasts and isinstance(error, BackendError)
        self.cut_memory(None)
        if epoch == self.epoch:
            after = self.allocator.usage()
            freed_pages = self.allocator._mover.net_pages - net_pages
            assert after.live_bytes == usage.live_bytes
            assert usage.backed_bytes - after.backed_bytes == freed_pages * PAGE
            assert self.allocator.compacted[1] >= self.allocator._mover.net_pages

    def nothing_is_wasted(self) -> None:
        """Where nothing is leased, all that shares pages lies side by side."""
        for tenant in TENANTS:
            small = [self.allocator.allocation(cache.id) for cache in self.caches.values() if cache.tenant == tenant]
            shared = [each for each in small if each.shared]
            used_bytes = sum(self.allocator._shared.part_bytes(tenant, each.offset) for each in shared)
            assert len({ref for each in shared for ref in each.pages}) == -(-used_bytes // PAGE)

    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        """The reserve goes back, and clients let go of what they had of owners that are dead."""
        self.perhaps_cut(data)
        if self.is_done(answer := self.operate("trim")) and answer is not DEAD:
            assert self.allocator.usage().reserve_bytes == 0
        self.orphans_go()

    @precondition(lambda self: any(cache.sealed for cache in self.caches.values()))
    @rule(data=st.data(), whole=st.booleans())
    def void(self, data: st.DataObject, whole: bool) -> None:
        """Content is declared void, and its tenant's memory scrubbed of it, while moves go on."""
        self.perhaps_cut(data)
        cache = self.some_cache(data, sealed=True)
        answer = self.operate("void", [cache.id], PINNER, involved=[cache.id])
        if answer is DEAD or not self.is_done(answer):
            return
        _ended, freed, held = answer
        if (row := self.index.live_row(cache.id)) >= 0:
            self.index.remove(row)
        cache.gone = True
        del cache.leases[PINNER + cache.tenant]
        assert set(held) == set(cache.leases)
        assert (freed == [cache.id]) == (not cache.leases and not self.is_held(cache))
        if freed:
            del self.caches[cache.id]
        self.scrubs += 1
        self.perhaps_cut(data)
        done = self.operate("scrub", cache.tenant, self.scrubs, 2 * PAGE)
        while whole and done is False:
            done = self.operate("scrub", cache.tenant, self.scrubs, PAGE)
        if done is True:
            self.only_what_lives_is_left(cache.tenant)

    def only_what_lives_is_left(self, tenant: str) -> None:
        live = [self.allocator.allocation(each) for each in self.caches]
        parts = sorted((each.offset + start, each.offset + end) for each in live for start, end in each.extents)
        for index, page in self.allocator._table._mapped.items():
            if page.tenant == tenant:
                begin = clean = index * PAGE
                for start, end in [*parts, (begin + PAGE, begin + PAGE)]:
                    start = min(max(start, begin), begin + PAGE)
                    assert clean >= start or not any(read(self.allocator.address + clean, start - clean))
                    clean = max(clean, end)

    # -- how clients end ----------------------------------------------------------------------------------------------

    @rule(data=st.data(), revoked=st.booleans())
    def a_client_ends(self, data: st.DataObject, revoked: bool) -> None:
        """It dies; or its leases are revoked, and it may go on writing to what it had."""
        self.perhaps_cut(data)
        client = self.some_client(data)
        tenant = self.clients[client]
        mine = [cache for cache in self.caches.values() if client in cache.leases]
        involved = [cache.id for cache in mine]
        answer = self.operate("revoke" if revoked else "disconnect", client, involved=involved)
        if answer is DEAD or not self.is_done(answer):
            return
        ended, freed = answer[:2]
        assert Counter(ended) == Counter({cache.id: cache.leases[client] for cache in mine})
        if revoked:
            self.ghosts[client] = [cache for cache in mine if not cache.sealed]
        for cache in mine:
            for _ in range(cache.leases[client]):
                self.end_lease(client, cache)
        assert all((cache.id in freed) == (cache.id not in self.caches) for cache in mine)
        del self.clients[client]
        if not revoked:
            self.let_go(client)
        self.connect(tenant)

    @precondition(lambda self: self.ghosts)
    @rule(data=st.data())
    def a_revoked_client_ends(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted(self.ghosts)), label="ghost")
        if self.operate("disconnect", client) is not DEAD:
            self.let_go(client)
            del self.ghosts[client]

    def let_go(self, client: str) -> None:
        for key in [key for key in self.views if key[:2] == (self.epoch, client)]:
            self.views.pop(key).close()
        self.to_drop.pop(client, None)
        self.allocator.holder_gone(client)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """A client gives back pages that the device has asked for."""
        for name, serials in self.allocator.take_drops().items():
            self.to_drop.setdefault(name, set()).update(serials)
        client = self.some_client(data)
        serials = self.to_drop.pop(client, set())
        for cache in self.caches.values():
            assert client not in cache.leases or serials.isdisjoint(serial for _, serial in cache.place[1])
        for serial in serials:
            if (view := self.views.pop((self.epoch, client, serial), None)) is not None:
                view.close()
        self.allocator.dropped(client, sorted(serials))

    # -- what must hold -----------------------------------------------------------------------------------------------

    def its_clients_see_it(self, cache: Cache) -> None:
        """Whoever has a cache leased and mapped reads its bytes in his own mappings, whatever the owner does."""
        for client in cache.leases:
            views = {index: self.views.get((self.epoch, client, serial)) for index, serial in cache.place[1]}
            if not views or None in views.values():
                continue
            for offset, content in cache.content():
                for index in range(offset // PAGE, -(-(offset + len(content)) // PAGE)):
                    start, end = max(offset, index * PAGE), min(offset + len(content), (index + 1) * PAGE)
                    view = views[index]
                    assert view is not None
                    seen = view[start - index * PAGE : end - index * PAGE]
                    assert seen == content[start - offset : end - offset]

    @invariant()
    def revoked_clients_write_on(self) -> None:
        for client, caches in self.ghosts.items():
            for cache in caches:
                for offset, content in cache.content():
                    for index, serial in cache.place[1]:
                        start, end = max(offset, index * PAGE), min(offset + len(content), (index + 1) * PAGE)
                        view = self.views.get((self.epoch, client, serial))
                        if view is not None and start < end:
                            view[start - index * PAGE : end - index * PAGE] = b"\xff" * (end - start)

    @invariant()
    def pages_are_conserved(self) -> None:
        """Also while a move waits to be finished."""
        self.allocator.check()
        usage = self.allocator.usage()
        states = usage.backed_bytes + usage.reserve_bytes + usage.zombie_bytes + usage.free_bytes
        assert states == usage.capacity_bytes == self.memory.budget_bytes
        assert usage.reserve_bytes <= RESERVE
        leaving = [self.allocator._live.by_id[cache_id] for cache_id in self.store._leaving]
        assert usage.live_bytes == sum(each.size_bytes for each in [*self.caches.values(), *leaving])
        withheld_bytes = self.allocator._shared.withheld_bytes
        assert self.memory.created_bytes == usage.backed_bytes + usage.reserve_bytes + withheld_bytes
        assert self.store.caches == len(self.caches)
        leases = sum(sum(cache.leases.values()) for cache in self.caches.values()) + len(self.held)
        assert self.store.lease_count == leases

    @invariant()
    def every_live_byte_is_right(self) -> None:
        moving = None  # its bytes are neither here nor there, and nobody may see it
        if self.refuses:
            if self.allocator._mover.unfinished is not None:
                moving = self.allocator._mover.unfinished[0].cache_id
        else:
            self.allocator.finish_move()
        places = []
        for cache in self.caches.values():
            where = self.allocator._live.by_id[cache.id]
            record = self.store.record(cache.id)
            assert record is not None
            place = (record.offset, record.pages, record.generation)
            assert (where.offset, where.pages, where.extents) == (*place[:2], cache.extents)
            assert place == cache.place or (place[2] > cache.place[2] and not cache.leases), "leased caches stay"
            cache.place = place
            places.append((where.offset, where.offset + where.max_size_bytes))
            for offset, content in cache.content():
                assert read(self.allocator.address + offset, len(content)) == content or cache.id == moving
            assert cache.id != moving or not cache.leases, "nobody gets a lease on what cannot be seen"
            self.its_clients_see_it(cache)
        assert all(end <= start for (_, end), (start, _) in pairwise(sorted(places))), "nothing overlaps"
        for cache, offset in self.held:
            assert cache.place[0] == offset

    @invariant()
    def references_lead_to_their_caches(self) -> None:
        for cache_id, epoch, place in self.references:
            cache = self.caches.get(cache_id)
            if epoch != self.epoch or cache is None:
                assert self.store.record(cache_id) is None, "what is gone is nobody else"
                continue
            assert cache.place[2] >= place[2]
            if cache.place[2] == place[2]:
                assert cache.place == place
        del self.references[:-50]

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        self.refuses, self.cut = False, None
        self.cut_memory(None)
        while self.held:
            self.unhold()
        for client in [*self.clients, *self.ghosts, *(PINNER + tenant for tenant in TENANTS)]:
            self.operate("disconnect", client)
            self.let_go(client)
        self.operate("evict", list(self.store._caches))
        self.operate("trim")
        self.orphans_go()
        usage = self.allocator.usage()
        assert (self.store.caches, self.store.lease_count, usage.live_bytes) == (0, 0, 0)
        assert usage.free_bytes == usage.capacity_bytes
        assert self.memory.created_bytes == 0
        self.allocator.check()
        self.allocator.close()
        self.memory.close()
        assert open_and_mapped_pages() == self.pages_before


def open_and_mapped_pages() -> tuple[int, int]:
    """Return how many pages this process has open, and mapped."""
    descriptors = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors += "memfd:kvpool-page" in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    with open("/proc/self/maps") as maps:
        return descriptors, maps.read().count("memfd:kvpool-page")


pytestmark = pytest.mark.timeout(400)  # to find the smallest example of a failure takes minutes
TestElasticMachine = ElasticMachine.TestCase
TestElasticMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
