"""A larger pool in a random life that its seed decides: many clients, many devices, deaths and losses."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from pool_checks import check, check_quiet, end
from pool_harness import PAGE, keys_of
from pool_model import PoolModel

from kvpool.workload import TraceRequest, generate

DEVICES = 8
PAGES = 6
TENANTS = ("a", "b", "c")
CLIENTS = 20
EVENTS = 4000
CHECK_EVERY = 100
QUIET_EVERY = 1000
WHOLE_CACHES = [100, 5000, PAGE // 3, PAGE - 1, PAGE, 2 * PAGE + 1, 5 * PAGE]

#: What happens, and how often.
WEIGHTS = {
    "serve": 20,
    "finish": 16,
    "release": 16,
    "request": 6,
    "pin": 1,
    "unpin": 1,
    "map": 4,
    "mistake": 2,
    "cancel": 1,
    "device": 60,
    "time": 3,
    "end": 1,
    "evict": 1,
    "invalidate": 1,
    "revoke": 0.5,
    "let_go": 0.5,
    "set_quota": 1,
}


class Simulation:
    """Clients serve a generated workload, chain by chain, and do what else they may, in no order at all."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.model = PoolModel(
            DEVICES, PAGES, queue_limit=50, placement=self.chance.choice(["least_loaded", "round_robin"])
        )
        self.trace: Iterator[TraceRequest] = iter(
            generate(seed, sessions=400, system_prompts=4, system_blocks=3, turn_blocks=2.0)
        )
        self.born = 0
        for _ in range(CLIENTS):
            self.be_born()
        self.model.pool.settle()
        self.losses = {EVENTS // 3, 2 * EVENTS // 3}

    def be_born(self) -> None:
        self.model.connect(f"client-{self.born}", TENANTS[self.born % len(TENANTS)])
        self.born += 1

    def run(self) -> None:
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        for event in range(EVENTS):
            getattr(self, self.chance.choices(names, weights)[0])()
            if event in self.losses:
                self.model.lose(self.chance.choice(self.model.pool.live))
            if event % CHECK_EVERY == 0:
                check(self.model)
            if event % QUIET_EVERY == 0:
                check_quiet(self.model)
        end(self.model)

    def somebody(self, names: list[str]) -> str | None:
        return self.chance.choice(names) if names else None

    def some(self, ids: list[int], most: int) -> list[int]:
        return self.chance.sample(ids, self.chance.randint(1, min(most, len(ids))))

    # -- clients ------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Look a prompt up, and ask for the blocks that may be missing."""
        name, request = self.somebody(self.model.ready()), next(self.trace, None)
        if name is None or request is None:
            return
        model, blocks = self.chance.choice(["small", "small", "large"]), list(request.hash_ids)[:12]
        self.model.look_up(name, model, blocks)
        if self.chance.random() < 0.7:
            self.model.blocks(name, model, blocks)
        elif len(blocks) > 1:
            self.model.blocks(name, model, blocks[1:], blocks[0])

    def finish(self) -> None:
        name = self.somebody([name for name in self.model.ready() if self.model.unsealed(name)])
        if name is None:
            return
        made, mine = self.model.made, self.model.unsealed(name)
        ids = [i for i in mine if made[i].model == made[mine[0]].model]
        keys = [made[i].planned or keys_of([10**9 + self.chance.randrange(5)])[0] for i in ids]
        self.model.seal(name, made[ids[0]].model, ids, keys, finish=self.chance.random() < 0.7)

    def release(self) -> None:
        name = self.somebody(self.model.holders())
        if name is not None:
            ids = self.model.clients[name].sure()
            self.model.release(name, ids if self.chance.random() < 0.8 else self.some(ids, 5))

    def request(self) -> None:
        name = self.somebody(self.model.ready())
        if name is not None:
            sizes = [self.chance.choice(WHOLE_CACHES) for _ in range(self.chance.randint(1, 4))]
            grown = [(size, size * self.chance.choice([1, 1, 1, 3])) for size in sizes]
            self.model.request(
                name, "small", grown, self.chance.choice([0.0, 1.0, 5.0, 30.0]), self.chance.choice([0, 0, 1])
            )

    def pin(self) -> None:
        name = self.somebody(self.model.holders())
        if name is not None:
            self.model.pin(name, self.some(self.model.clients[name].sure(), 3), held=True)

    def unpin(self) -> None:
        tenant = self.chance.choice(TENANTS)
        name = self.somebody([n for n in self.model.ready() if self.model.clients[n].tenant == tenant])
        if name is not None and +self.model.pins[tenant]:
            self.model.pin(name, self.some(sorted(+self.model.pins[tenant]), 5), held=False)

    def map(self) -> None:
        name = self.somebody(self.model.holders())
        if name is not None:
            for cache_id in self.model.clients[name].sure():
                self.model.map(name, cache_id)

    def mistake(self) -> None:
        """Release what is another's or long gone."""
        name = self.somebody(self.model.ready())
        ids = [i for i in self.model.made if name is not None and i not in self.model.clients[name].finishing]
        if name is not None and ids:
            self.model.release(name, self.some(ids, 3))

    def cancel(self) -> None:
        name = self.somebody(self.model.ready())
        if name is not None:
            self.model.cancel(name, sorted(self.model.clients[name].tickets))

    # -- what happens to them -----------------------------------------------------------------------------------------

    def device(self) -> None:
        pool = self.model.pool
        step = self.chance.choice([pool.carry_out, pool.deliver, pool.tell, pool.see_death, pool.drop_pages, pool.step])
        step(self.chance.randrange(DEVICES))

    def time(self) -> None:
        self.model.advance(self.chance.choice([0.1, 1.0, 3.0]))

    def evict(self) -> None:
        self.model.evict(
            self.chance.choice([None, *TENANTS]),
            self.chance.choice([None, "small"]),
            self.chance.choice([PAGE, 3 * PAGE]),
        )

    def invalidate(self) -> None:
        """Some content of a tenant that is there, or all of a model's."""
        tenant, model = self.chance.choice(TENANTS), self.chance.choice(["small", "large"])
        index = self.model.pool.state.ledger.index
        there = [
            m for m in self.model.made.values() if (m.tenant, m.model) == (tenant, model) and m.planned is not None
        ]
        known = [int.from_bytes(m.planned or b"") for m in there[-200:] if index.live_row(m.id) >= 0]
        some = self.some(known, 3) if known and self.chance.random() < 0.9 else None
        self.model.invalidate(tenant, model, some)
        if some is not None and self.chance.random() < 0.5:  # what leads there as well, before that has ended
            self.model.invalidate(tenant, model, some + self.some(known, 10))

    def revoke(self) -> None:
        name = self.somebody(self.model.holders())
        if name is not None:
            for cache_id in self.model.clients[name].sure():
                self.model.map(name, cache_id)
            self.model.revoke(name)
            self.be_born()

    def set_quota(self) -> None:
        """Mostly small guarantees and wide limits, now and then a narrow one; often none at all."""
        self.model.set_quota(
            self.chance.choice(TENANTS),
            self.chance.choice([None, "small", "large"]),
            self.chance.choice([0, "5%", "20%", 4 * PAGE]),
            self.chance.choice([None, None, "30%", "70%", 5 * PAGE]),
        )

    def let_go(self) -> None:
        name = self.somebody(sorted(self.model.ghosts))
        if name is not None:
            self.model.let_go(name)

    def end(self) -> None:
        name = self.somebody(self.model.ready())
        if name is not None:
            self.chance.choice([self.model.die, self.model.leave])(name)
            self.be_born()


@pytest.mark.parametrize("seed", [0, 1, 18, 35, 44, 55, 142])  # each has found something
def test_nothing_is_lost_or_mixed_up(seed: int) -> None:
    simulation = Simulation(seed)
    try:
        simulation.run()
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise
    finally:
        simulation.model.close()
    counters = simulation.model.pool.state.ledger.counters
    assert simulation.model.hits > 100  # else it showed nothing
    assert simulation.model.grants > 30
    assert counters.evictions > 100
    assert counters.duplicates > 0
    assert all(counters.evictions_by_reason.values()), counters.evictions_by_reason
    assert simulation.model.revocations > 0
    assert len(simulation.model.invalidated) > 20
