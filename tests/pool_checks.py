"""What must hold of a pool, by what its clients know: at any moment, when all is settled, and when all have left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pool_clients import whole
from pool_harness import PAGE
from pool_model import PoolModel

from kvpool.cache.table import KEYED
from kvpool.errors import KvpoolError, LimitError
from kvpool.memory.extents import difference
from kvpool.pool.instructions import Tick
from kvpool.pool.leases import PINNER
from kvpool.pool.requests import CacheRequest


def check(model: PoolModel) -> None:
    """At any moment: the books add up, and nothing that somebody holds is gone, moved or changed."""
    model.scribble()
    model.pool.state.check()
    for quota in model.pool.state.quotas():
        is_draining = any(
            (o.tenant, o.model) == (quota["tenant"], quota["model"]) for o in model.pool.state.ledger.quotas.draining
        )
        assert quota["limit_bytes"] is None or quota["held_bytes"] <= quota["limit_bytes"] or is_draining
    assert model.overcommitted_now() <= model.overcommitted, "leases never take what is guaranteed to others"
    for device in model.pool.live:
        model.pool.stores[device].allocator.check()
    for process in model.clients.values():
        for cache_id in process.sure():
            made, store = model.made[cache_id], model.pool.stores[model.made[cache_id].device]
            leases = store._clients[process.name].leases[cache_id]
            assert leases >= process.held[cache_id] - process.releasing[cache_id]
            index = model.pool.state.ledger.index
            assert index.pins[index.row_of(cache_id)] >= leases
            assert store.allocator.allocation(cache_id).offset == made.offset
            there = made.extents
            if made.changing:  # unbacked where the device has done it, and its maker was not told yet
                there = difference(there, difference(there, store.allocator.allocation(cache_id).extents))
            assert model.read(made, there) == whole(made.written, made.max_size_bytes, there)


def check_quiet(model: PoolModel) -> None:
    """When all is settled: the books say what the devices hold, all is answered, and who waits has to wait."""
    pool, index = model.pool, model.pool.state.ledger.index
    pool.settle()
    while (deadline := pool.state.next_deadline()) is not None and deadline <= pool.now:
        pool.handle(Tick())  # some were put back after their time
        pool.settle()
    assert not pool.open
    for process in model.clients.values():
        for cache_id in [i for i, n in process.held.items() if n < 0]:  # it was no part of the answer in the end
            assert -process.held[cache_id] <= process.guessed[cache_id]
            del process.held[cache_id]
        process.guessed.clear()
    for device in pool.live:
        store = pool.stores[device]
        rows = {i: index.live_row(i) for i in store._caches}
        assert all(row >= 0 and index.device[row] == device for row in rows.values()), "unknown to the books"
        assert sum(index.device[row] == device for row in range(len(index.flags)) if index.flags[row]) == len(rows)
        for cache_id, record in store._caches.items():
            row = rows[cache_id]
            assert index.pins[row] == record.leases
            assert index.asked_bytes[row] == record.size_bytes
            if not store.allocator.allocation(cache_id).shared:
                assert index.size_bytes[row] == len(record.pages) * PAGE
            assert index.is_sealed(row) == record.sealed
            assert index.key_of(row) == (None if record.void else record.key)
            assert record.doomed == record.void
            assert not record.void or (record.leases and cache_id in model.void)
        for name, known in store._clients.items():
            mine = model.clients[name].held if name in model.clients else model.pins[name.removeprefix(PINNER)]
            assert known.leases == {i: n for i, n in mine.items() if n and model.made[i].device == device}
    if waiting := pool.state.allocations.queue:
        first: dict[Any, int] = {}  # of those who lack the same; others may pass while the books take it for placed
        for (_, ticket), _ in sorted(waiting.heads()):
            request = waiting.get(ticket)
            assert request is not None
            first.setdefault(request.short_of or request.place, ticket)
        pool.handle(Tick())
        pool.settle()
        assert model.outcomes.keys().isdisjoint(first.values()), "the first in line waited though there was room"
        for _, request in waiting.items():
            assert not _is_above_a_limit(model, request), "who can never be served waits for nothing"
    for owner in pool.state.ledger.quotas.draining:
        assert not list(_could_go(model, owner.tenant, owner.model)), "what is above a limit goes when nobody holds it"
    check(model)


def _is_above_a_limit(model: PoolModel, request: CacheRequest) -> bool:
    try:
        model.pool.state.allocations._check_waiting(request)
    except LimitError:
        return True
    except KvpoolError:
        pass  # told when it is its turn
    return False


def _could_go(model: PoolModel, tenant: str, name: str | None) -> Iterator[int]:
    index = model.pool.state.ledger.index
    for row in range(len(index.flags)):
        made_for = model.pool.state.ledger.model_of(row) if index.flags[row] else None
        idle = index.flags[row] & KEYED and not index.pins[row] and not index.children[row]
        if idle and made_for is not None and made_for.tenant == tenant and name in (None, made_for.name):
            yield row


def end(model: PoolModel) -> None:
    """All clients give everything back and leave: nothing may remain."""
    pool = model.pool
    check_quiet(model)
    for name in list(model.ghosts):
        model.let_go(name)
    check_quiet(model)
    for name in model.ready():
        process = model.clients[name]
        pins = model.pins[process.tenant]
        model.pin(name, list(pins.elements()), held=False)
        pool.settle()
        model.cancel(name, sorted(process.tickets))
        pool.settle()  # a cancelled request may have stood before others of the same client
        model.cancel(name, sorted(process.tickets))
        while ids := process.sure():
            model.release(name, ids)
            pool.settle()
        assert not process.tickets, "each ticket has an outcome"
    for tenant in [tenant for tenant, pins in model.pins.items() if +pins]:
        model.connect(f"last of {tenant}", tenant)
        pool.settle()
        model.pin(f"last of {tenant}", list(model.pins[tenant].elements()), held=False)
    for name in model.ready():
        model.leave(name)
    check_quiet(model)
    index = pool.state.ledger.index
    assert not any(index.pins[row] for row in range(len(index.flags)) if index.flags[row])
    assert all(not store.leases() for number, store in enumerate(pool.stores) if number in pool.live)
    evict_everything(model)


def evict_everything(model: PoolModel) -> None:
    """A newcomer asks for all memory there is, and gets it, once nothing is guaranteed to others."""
    for tenant, name in model.quotas:
        model.set_quota(tenant, name, 0, None)
    pool = model.pool
    model.connect("newcomer", "newcomers")
    pool.settle()
    capacity_bytes = pool.state.ledger.devices[0].capacity_bytes
    sizes = [(capacity_bytes, capacity_bytes)] * len(pool.live)
    model.request("newcomer", "small", sizes, 1.0)
    pool.settle()
    granted = model.clients["newcomer"].sure()
    assert {model.made[i].device for i in granted} == set(pool.live)
    model.release("newcomer", granted)
    pool.settle()
    assert len(pool.state.ledger.index) == 0
    for device in pool.live:
        allocator = pool.stores[device].allocator
        assert pool.stores[device].caches == 0
        assert (allocator.usage().live_bytes, allocator.usage().backed_bytes) == (0, 0)
        allocator.trim()
        assert allocator.usage().free_bytes == allocator.capacity_bytes
