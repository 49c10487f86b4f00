"""Two tenants on one device, of which a client is stopped: what it maps is nobody's, and nothing else is kept from
the other tenant, whatever was stored, moved, asked back and freed before, in whatever order."""

import os
import random
from typing import Any

import pytest
from interleaved_pool import InterleavedPool
from pool_harness import PAGE

from kvpool.pool.instructions import CachesRequested, ReleaseRequested, SealRequested, Tick

PAGES = 16
SIZES = [4096, 16384, 20480, 36864, 65536, 100_000, 262_144]
TENANTS = {"stopped": "red", "red": "red", "blue": "blue"}


class Tenants:
    """Three clients that map what they are granted, and drop it when they are asked and run."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.pool = InterleavedPool(1, PAGES, lambda client, ticket, answer: self.answered(client, answer))
        self.allocator = self.pool.stores[0].allocator
        self.held: dict[str, dict[int, int]] = {client: {} for client in TENANTS}
        self.last: dict[str, Any] = {}
        self.sequence = 0
        for client, tenant in TENANTS.items():
            _, batch, instructions = self.pool.state.connect(client, tenant, "here", f"token of {client}")
            self.pool.open[batch] = lambda answers: None
            self.pool.take(instructions)
        self.settle()
        self.models = {
            (client, size): self.pool.model(client, f"of {size}", size) for client in TENANTS for size in SIZES
        }

    def settle(self, seconds: float = 0.0) -> None:
        self.pool.now += seconds
        self.pool.handle(Tick())
        while self.pool.step(0):
            pass

    def answered(self, client: str, answer: Any) -> None:
        if answer[0] == "granted":
            self.held[client][answer[1]] = answer[3]
            for index, serial in answer[-1][1]:
                os.close(self.allocator.export(client, TENANTS[client], index, serial))
        if answer[0] != "queued":
            self.last[client] = answer[0]

    def request(self, client: str, size_bytes: int, timeout_s: float) -> None:
        self.sequence += 1
        item = (self.sequence, self.models[client, size_bytes], size_bytes, size_bytes, timeout_s, 0, ())
        self.pool.submit(CachesRequested, client, [item], lambda answers: self.answered(client, answers[0]))

    def end(self, client: str, ids: list[int], keep: bool) -> None:
        """Release caches, or finish them: they stay then, evictable, and may move."""
        self.sequence += 1
        for cache_id in ids:
            size_bytes = self.held[client].pop(cache_id)
            if keep:
                key = cache_id.to_bytes(16, "little")
                item = (self.sequence, self.models[client, size_bytes], [cache_id], [key], ())
                self.pool.submit(SealRequested, client, [item], lambda answers: None, True)
            else:
                self.pool.submit(ReleaseRequested, client, [(self.sequence, [cache_id], ())], lambda answers: None)

    def churn(self, clients: list[str], rounds: int) -> None:
        for _ in range(rounds):
            client = self.rng.choice(clients)
            held = self.held[client]
            if held and self.rng.random() < 0.5:
                self.end(client, [self.rng.choice(list(held))], self.rng.random() < 0.6)
            else:
                self.request(client, self.rng.choice(SIZES), 0.05)
            for step in self.rng.choices(["carry_out", "deliver", "drop_pages", "tell"], k=self.rng.randrange(6)):
                getattr(self.pool, step)(0)
            if self.rng.random() < 0.2:
                self.pool.now += 0.06
                self.pool.handle(Tick())
        self.settle()
        self.settle(1.0)
        for client in clients:
            self.end(client, list(self.held[client]), False)
        self.settle()

    def take_all(self, client: str) -> int:
        taken = 0
        while True:
            self.last.pop(client, None)
            self.request(client, PAGE, 3.0)
            self.settle()
            if client not in self.last:
                self.settle(4.0)
            if self.last[client] == "error":
                return taken
            taken += 1


@pytest.mark.parametrize("seed", range(40))
def test_only_what_a_stopped_client_maps_is_kept_from_the_other_tenant(seed):
    tenants = Tenants(seed)
    tenants.churn(["stopped", "red", "blue"], 60)
    tenants.pool.revoked.add("stopped")  # it drops nothing any more
    tenants.churn(["red", "blue"], tenants.rng.randrange(40))
    taken = tenants.take_all("blue")
    assert taken * PAGE + tenants.allocator.held_bytes("stopped") == PAGES * PAGE
    tenants.pool.check()
    tenants.pool.revoked.clear()
    tenants.settle()
    assert (taken + tenants.take_all("blue")) * PAGE == PAGES * PAGE
    tenants.pool.close()
