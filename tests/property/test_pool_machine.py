"""The whole pool, with real stores and real memory, against what its clients may rely on, in any interleaving."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_checks import check, check_quiet, end
from pool_harness import PAGE, keys_of
from pool_model import PoolModel

pytestmark = pytest.mark.timeout(400)  # to find the smallest example of a failure takes minutes

TENANTS = {"ann": "a", "abe": "a", "bob": "b"}
#: Blocks name all before them: two chains with a common beginning, and one alone.
CHAINS = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 14, 15, 16, 17], [21, 22, 23, 24, 25]]
CHAIN = st.sampled_from(CHAINS)
MODEL = st.sampled_from(["small", "small", "small", "large"])
SIZES = st.sampled_from(
    [
        (1, 1),
        (5000, 5000),
        (PAGE // 2, PAGE // 2),
        (5000, PAGE - 1),
        (PAGE, PAGE),
        (PAGE + 1, 4 * PAGE),
        (3 * PAGE, 3 * PAGE),
    ]
)
DEVICE = st.integers(0, 1)
#: Who works after a client has asked for something: nobody yet, one device, or all until nothing is left to do.
AFTERWARDS = st.sampled_from(["nobody", "first", "second", "all", "all"])


class PoolMachine(RuleBasedStateMachine):
    """Two devices of three pages, two tenants, three clients: memory is always short."""

    def __init__(self) -> None:
        super().__init__()
        self.model = PoolModel(devices=2, pages=3, queue_limit=4)
        self.pool = self.model.pool
        self.born = 0
        for person in TENANTS:
            self.be_born(person)
        self.pool.settle()

    @initialize(
        stored=st.lists(st.tuples(st.integers(0, 2), MODEL, CHAIN, st.integers(1, 7), st.booleans()), max_size=4)
    )
    def begin(self, stored: list[tuple[int, str, list[int], int, bool]]) -> None:
        """Some chains are there already, held or not."""
        for who, model, chain, length, finish in stored:
            name = self.model.ready()[who]
            self.model.blocks(name, model, chain[:length])
            self.pool.settle()
            ids = [i for i in self.model.unsealed(name) if self.model.made[i].model == model]
            self.model.seal(name, model, ids, [self.model.made[i].planned for i in ids], finish=finish)
            self.pool.settle()

    def be_born(self, person: str) -> None:
        self.born += 1
        self.model.connect(f"{person}-{self.born}", TENANTS[person])

    def work(self, who: str) -> None:
        match who:
            case "first":
                self.pool.step(0)
            case "second":
                self.pool.step(1)
            case "all":
                check_quiet(self.model)

    def somebody(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(self.model.ready()), label="who")

    def holder(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(self.model.holders()), label="who")

    def some(self, data: st.DataObject, ids: list[int], most: int = 6) -> list[int]:
        return data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=most, unique=True), label="which")

    # -- clients ask --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.ready())
    @rule(
        data=st.data(),
        sizes=st.lists(SIZES, min_size=1, max_size=3),
        timeout_s=st.sampled_from([0.0, 2.0, 5.0]),
        priority=st.sampled_from([0, 0, 1]),
        then=AFTERWARDS,
    )
    def request(
        self, data: st.DataObject, sizes: list[tuple[int, int]], timeout_s: float, priority: int, then: str
    ) -> None:
        self.model.request(self.somebody(data), "small", sizes, timeout_s, priority)
        self.work(then)

    @precondition(lambda self: self.model.ready())
    @rule(data=st.data(), model=MODEL, chain=CHAIN, start=st.sampled_from([0, 0, 0, 1, 3]), then=AFTERWARDS)
    def new_blocks(self, data: st.DataObject, model: str, chain: list[int], start: int, then: str) -> None:
        stop = data.draw(st.integers(start + 1, len(chain)), label="stop")
        self.model.blocks(self.somebody(data), model, chain[start:stop], chain[start - 1] if start else None)
        self.work(then)

    @precondition(lambda self: self.model.ready())
    @rule(data=st.data(), model=MODEL, chain=CHAIN, length=st.integers(1, 7), then=AFTERWARDS)
    def look_up(self, data: st.DataObject, model: str, chain: list[int], length: int, then: str) -> None:
        self.model.look_up(self.somebody(data), model, chain[:length])
        self.work(then)

    @precondition(lambda self: any(map(self.model.unsealed, self.model.ready())))
    @rule(data=st.data(), finish=st.booleans(), again=st.booleans(), then=AFTERWARDS)
    def seal(self, data: st.DataObject, finish: bool, again: bool, then: str) -> None:
        """A client seals blocks it has made, with their keys; caches without a plan get one."""
        name = data.draw(st.sampled_from([n for n in self.model.ready() if self.model.unsealed(n)]), label="who")
        mine, made = self.model.unsealed(name), self.model.made
        ids = [i for i in mine if made[i].model == made[mine[0]].model]
        ids = ids[: data.draw(st.integers(1, len(ids)), label="how many")]
        keys = [made[i].planned or keys_of([99])[0] for i in ids]
        model = made[mine[0]].model
        self.model.seal(name, model, ids, keys, finish=finish)
        self.work(then)
        if again and name in self.model.ready():
            self.model.seal(name, model, ids, keys, finish=False)

    @precondition(lambda self: any(map(self.model.changeable, self.model.ready())))
    @rule(
        data=st.data(),
        kind=st.sampled_from(["resize", "resize", "back", "back", "unback"]),
        timeout_s=st.sampled_from([0.0, 2.0, 5.0]),
        then=AFTERWARDS,
    )
    def change(self, data: st.DataObject, kind: str, timeout_s: float, then: str) -> None:
        """A cache grows, shrinks, gets holes or loses them."""
        name = data.draw(st.sampled_from([n for n in self.model.ready() if self.model.changeable(n)]), label="who")
        cache_id = data.draw(st.sampled_from(self.model.changeable(name)), label="which")
        maximum = self.model.made[cache_id].max_size_bytes
        bounds = st.integers(0, 8).map(lambda eighths: maximum * eighths // 8)
        pairs = data.draw(st.lists(st.tuples(bounds, bounds), min_size=1, max_size=2), label="ranges")
        ranges = [(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]]
        if kind == "resize":
            ranges = [(0, ranges[0][1])] if ranges else []
        self.model.change(name, cache_id, kind, ranges, timeout_s)
        self.work(then)

    @precondition(lambda self: self.model.holders())
    @rule(data=st.data(), everything=st.booleans(), then=AFTERWARDS)
    def release(self, data: st.DataObject, everything: bool, then: str) -> None:
        name = self.holder(data)
        ids = self.model.clients[name].sure()
        self.model.release(name, ids if everything else self.some(data, ids))
        self.work(then)

    @precondition(lambda self: self.model.ready() and self.model.tickets())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.model.cancel(self.somebody(data), self.some(data, self.model.tickets()))

    @precondition(lambda self: self.model.ready() and self.model.made)
    @rule(data=st.data(), held=st.booleans())
    def pin(self, data: st.DataObject, held: bool) -> None:
        name = self.somebody(data)
        self.model.pin(name, self.some(data, sorted(self.model.made), most=3), held=held)

    @precondition(lambda self: self.model.holders())
    @rule(data=st.data())
    def map(self, data: st.DataObject) -> None:
        name = self.holder(data)
        self.model.map(name, data.draw(st.sampled_from(self.model.clients[name].sure()), label="which"))

    # -- clients ask for what is not theirs, or not there any more ----------------------------------------------------

    @precondition(lambda self: self.model.ready() and self.model.made)
    @rule(data=st.data(), twice=st.booleans())
    def release_anything(self, data: st.DataObject, twice: bool) -> None:
        """Of another, released before, released twice at once, evicted long ago."""
        name = self.somebody(data)
        finishing = self.model.clients[name].finishing
        ids = [i for i in sorted(self.model.made) if i not in finishing]
        if ids:
            some = self.some(data, ids, most=3)
            self.model.release(name, some + some[:1] if twice else some)

    @precondition(lambda self: self.model.ready() and self.model.made)
    @rule(data=st.data(), model=MODEL, key=st.sampled_from([1, 2, 14, 99]), its_own=st.booleans(), finish=st.booleans())
    def seal_anything(self, data: st.DataObject, model: str, key: int, its_own: bool, finish: bool) -> None:
        """Another's cache, a sealed one with another key, one that is gone. (One's own unsealed is no mistake.)"""
        name, made = self.somebody(data), self.model.made
        busy = self.model.clients[name]
        ids = [i for i in sorted(made) if made[i].maker != name or made[i].asked]
        ids = [i for i in ids if i not in busy.finishing and not busy.releasing[i]]
        if ids:
            some = self.some(data, ids, most=2)
            keys = [made[i].asked[2] if made[i].asked and its_own else keys_of([key])[0] for i in some]
            self.model.seal(name, made[some[0]].model if its_own else model, some, keys, finish=finish)

    # -- things happen ------------------------------------------------------------------------------------------------

    @rule(device=DEVICE, step=st.sampled_from(["carry_out", "deliver", "see_death", "drop_pages", "tell"]))
    def something_happens_at(self, device: int, step: str) -> None:
        getattr(self.pool, step)(device)

    @rule(device=DEVICE)
    def work_is_done_at(self, device: int) -> None:
        self.pool.step(device)

    @rule(seconds=st.sampled_from([0.0, 1.0, 3.0]), then=AFTERWARDS)
    def time_passes(self, seconds: float, then: str) -> None:
        self.model.advance(seconds)
        self.work(then)

    @precondition(lambda self: self.model.ready())
    @rule(data=st.data(), bye=st.booleans())
    def a_client_ends(self, data: st.DataObject, bye: bool) -> None:
        name = self.somebody(data)
        if bye:
            self.model.leave(name)
        else:
            self.model.die(name)
        self.be_born(name.partition("-")[0])

    @precondition(lambda self: self.model.ready())
    @rule(data=st.data(), then=AFTERWARDS)
    def a_client_is_revoked(self, data: st.DataObject, then: str) -> None:
        name = self.somebody(data)
        for cache_id in self.model.clients[name].sure():
            if data.draw(st.booleans(), label="mapped"):
                self.model.map(name, cache_id)
        self.model.revoke(name)
        self.be_born(name.partition("-")[0])
        self.work(then)

    @precondition(lambda self: self.model.ghosts)
    @rule(data=st.data())
    def a_revoked_client_lets_go(self, data: st.DataObject) -> None:
        self.model.let_go(data.draw(st.sampled_from(sorted(self.model.ghosts)), label="who"))

    @rule(
        tenant=st.sampled_from(["a", "b"]),
        model=st.sampled_from([None, "small", "large"]),
        guaranteed=st.sampled_from([0, 0, PAGE, 2 * PAGE, "30%", "60%"]),
        limit=st.sampled_from([None, None, PAGE, 3 * PAGE, "50%"]),
        then=AFTERWARDS,
    )
    def set_quota(
        self, tenant: str, model: str | None, guaranteed: int | str, limit: int | str | None, then: str
    ) -> None:
        self.model.set_quota(tenant, model, guaranteed, limit)
        self.work(then)

    @rule(
        tenant=st.sampled_from([None, "a", "b"]),
        model=st.sampled_from([None, "small", "large"]),
        pages=st.sampled_from([None, 1, 2]),
        then=AFTERWARDS,
    )
    def evict(self, tenant: str | None, model: str | None, pages: int | None, then: str) -> None:
        self.model.evict(tenant, model, None if pages is None else pages * PAGE)
        self.work(then)

    @rule(
        tenant=st.sampled_from(["a", "b"]),
        model=MODEL,
        keys=st.none() | st.sampled_from([[1], [3, 14], [99], [22, 4]]),
        then=AFTERWARDS,
    )
    def invalidate(self, tenant: str, model: str, keys: list[int] | None, then: str) -> None:
        self.model.invalidate(tenant, model, keys)
        self.work(then)

    @rule(
        tenant=st.sampled_from(["a", "b"]),
        model=MODEL,
        chain=CHAIN,
        position=st.integers(1, 4),
        then=AFTERWARDS,
    )
    def invalidate_twice(self, tenant: str, model: str, chain: list[int], position: int, then: str) -> None:
        """The second, of what leads to the first, before the first has ended."""
        self.model.invalidate(tenant, model, [chain[position]])
        self.model.invalidate(tenant, model, chain[position - 1 : position])
        self.work(then)

    @precondition(lambda self: len(self.pool.live) > 1)
    @rule(device=DEVICE, really=st.integers(0, 3))
    def a_device_is_lost(self, device: int, really: int) -> None:
        if not really:
            self.model.lose(device)

    @invariant()
    def the_books_add_up(self) -> None:
        check(self.model)

    def teardown(self) -> None:
        try:
            end(self.model)
        finally:
            self.model.close()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
