"""Caches that grow and shrink while memory is short, in any interleaving of clients, devices and time."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_checks import check, check_quiet, end
from pool_harness import PAGE, keys_of
from pool_model import PoolModel

pytestmark = pytest.mark.timeout(400)  # to find the smallest example of a failure takes minutes

DEVICE = st.integers(0, 1)
AFTERWARDS = st.sampled_from(["nobody", "first", "second", "all", "all"])
#: Bounds of ranges, in halves of a page; a device has five pages.
BOUND = st.integers(0, 7) | st.integers(0, 16)


class GrowthMachine(RuleBasedStateMachine):
    """Two devices of five pages, two clients of one tenant and one of another, caches of up to eight pages."""

    def __init__(self) -> None:
        super().__init__()
        self.model = PoolModel(devices=2, pages=5, queue_limit=6)
        self.born = 0
        for tenant in ("a", "a", "b"):
            self.be_born(tenant)
        self.model.pool.settle()

    @initialize()
    def begin(self) -> None:
        for name in self.model.ready():
            self.model.request(name, "small", [(PAGE, 8 * PAGE)], 0.0)
        self.model.pool.settle()

    def be_born(self, tenant: str) -> None:
        self.born += 1
        self.model.connect(f"{tenant}-{self.born}", tenant)

    def work(self, who: str) -> None:
        match who:
            case "first":
                self.model.pool.step(0)
            case "second":
                self.model.pool.step(1)
            case "all":
                check_quiet(self.model)

    @precondition(lambda self: self.model.ready())
    @rule(
        data=st.data(),
        halves=st.integers(1, 6),
        most=st.sampled_from([1, 2, 8]),
        timeout_s=st.sampled_from([0.0, 3.0]),
        then=AFTERWARDS,
    )
    def request(self, data: st.DataObject, halves: int, most: int, timeout_s: float, then: str) -> None:
        size_bytes = halves * PAGE // 2
        name = data.draw(st.sampled_from(self.model.ready()), label="who")
        self.model.request(name, "small", [(size_bytes, max(size_bytes, most * PAGE))], timeout_s)
        self.work(then)

    @precondition(lambda self: any(map(self.model.changeable, self.model.ready())))
    @rule(
        data=st.data(),
        changes=st.lists(
            st.tuples(
                st.sampled_from(["resize", "resize", "back", "back", "unback"]),
                st.lists(st.tuples(BOUND, BOUND), min_size=1, max_size=3),
            ),
            min_size=1,
            max_size=3,
        ),
        timeout_s=st.sampled_from([0.0, 2.0, 5.0]),
        then=AFTERWARDS,
    )
    def change(
        self, data: st.DataObject, changes: list[tuple[str, list[tuple[int, int]]]], timeout_s: float, then: str
    ) -> None:
        for kind, pairs in changes:
            names = [name for name in self.model.ready() if self.model.changeable(name)]
            if not names:
                return
            name = data.draw(st.sampled_from(names), label="who")
            cache_id = data.draw(st.sampled_from(self.model.changeable(name)), label="which")
            maximum = self.model.made[cache_id].max_size_bytes
            ranges = [(min(pair) * PAGE // 2, min(max(pair) * PAGE // 2, maximum)) for pair in pairs]
            ranges = [(start, end) for start, end in ranges if start < end]
            if kind == "resize":
                ranges = [(0, end) for _, end in ranges[:1]]
            self.model.change(name, cache_id, kind, ranges, timeout_s)
        self.work(then)

    @precondition(lambda self: any(map(self.model.changeable, self.model.ready())))
    @rule(data=st.data())
    def map(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([n for n in self.model.ready() if self.model.changeable(n)]), label="who")
        self.model.map(name, data.draw(st.sampled_from(self.model.changeable(name)), label="which"))

    @precondition(lambda self: any(map(self.model.unsealed, self.model.ready())))
    @rule(data=st.data(), finish=st.booleans(), then=AFTERWARDS)
    def seal(self, data: st.DataObject, finish: bool, then: str) -> None:
        """Blocks of a quarter of a page: the caches that have just that size."""
        name = data.draw(st.sampled_from([n for n in self.model.ready() if self.model.unsealed(n)]), label="who")
        cache_id = data.draw(st.sampled_from(self.model.unsealed(name)), label="which")
        self.model.seal(name, "small", [cache_id], [keys_of([cache_id % 97])[0]], finish=finish)
        self.work(then)

    @precondition(lambda self: self.model.holders())
    @rule(data=st.data(), then=AFTERWARDS)
    def release(self, data: st.DataObject, then: str) -> None:
        name = data.draw(st.sampled_from(self.model.holders()), label="who")
        self.model.release(name, [data.draw(st.sampled_from(self.model.clients[name].sure()), label="which")])
        self.work(then)

    @rule(data=st.data(), length=st.integers(1, 3), then=AFTERWARDS)
    def store_something_to_evict(self, data: st.DataObject, length: int, then: str) -> None:
        names = self.model.ready()
        if names:
            name = data.draw(st.sampled_from(names), label="who")
            start = data.draw(st.integers(0, 20), label="from")
            self.model.blocks(name, "large", range(start, start + length))
            self.model.pool.settle()
            ids = [i for i in self.model.unsealed(name) if self.model.made[i].model == "large"]
            self.model.seal(name, "large", ids, [self.model.made[i].planned for i in ids], finish=True)
            self.work(then)

    @precondition(lambda self: self.model.ready() and self.model.tickets())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.model.ready()), label="who")
        self.model.cancel(name, self.model.tickets())

    @rule(device=DEVICE, step=st.sampled_from(["carry_out", "deliver", "see_death", "drop_pages", "tell"]))
    def something_happens_at(self, device: int, step: str) -> None:
        getattr(self.model.pool, step)(device)

    @rule(seconds=st.sampled_from([0.0, 1.0, 3.0]), then=AFTERWARDS)
    def time_passes(self, seconds: float, then: str) -> None:
        self.model.advance(seconds)
        self.work(then)

    @precondition(lambda self: self.model.ready())
    @rule(data=st.data(), how=st.sampled_from(["die", "leave", "revoke"]))
    def a_client_ends(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(self.model.ready()), label="who")
        getattr(self.model, how)(name)
        self.be_born(name.partition("-")[0])

    @precondition(lambda self: self.model.ghosts)
    @rule(data=st.data())
    def a_revoked_client_lets_go(self, data: st.DataObject) -> None:
        self.model.let_go(data.draw(st.sampled_from(sorted(self.model.ghosts)), label="who"))

    @rule(really=st.integers(0, 3), model=st.sampled_from(["small", "large"]), then=AFTERWARDS)
    def invalidate(self, really: int, model: str, then: str) -> None:
        if not really:
            self.model.invalidate("a", model, None)
            self.work(then)

    @precondition(lambda self: len(self.model.pool.live) > 1)
    @rule(device=DEVICE, really=st.integers(0, 5))
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


TestGrowthMachine = GrowthMachine.TestCase
TestGrowthMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
