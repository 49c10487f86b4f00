"""The simulation against published figures on real traces, and against a search through lists on generated ones."""

from pathlib import Path
from typing import Any

import pytest

from kvpool.errors import InvalidRequestError, UnknownPolicyError
from kvpool.simulate import simulate
from kvpool.workload import TraceRequest, generate, read_trace, unique_blocks

CAPACITIES = (0.01, 0.05, 0.10, 0.25, 0.50)
LEAF_LRU_PERCENT = {
    "mooncake_conversation": (4.29, 10.37, 19.65, 29.56, 33.59),
    "mooncake_synthetic": (3.84, 14.91, 24.52, 45.52, 58.98),
    "lmcache_agent": (18.99, 47.60, 70.01, 88.41, 88.43),
}
"""Prefix hit ratios of strict leaf-first LRU, computed by other code (tail-first touch, share of unique blocks)."""


@pytest.mark.parametrize("trace", LEAF_LRU_PERCENT)
def test_published_hit_ratios_are_reproduced(traces: Path, trace: str) -> None:
    requests = list(read_trace(traces / f"{trace}.jsonl.gz"))
    for capacity, percent in zip(CAPACITIES, LEAF_LRU_PERCENT[trace], strict=True):
        row = simulate(requests, "lru", capacity)
        assert 100 * row["prefix_hit_ratio"] == pytest.approx(percent, abs=0.1), capacity


def by_search(requests: list[TraceRequest], capacity_blocks: int) -> tuple[int, int]:
    """Return hits and evictions of leaf-first LRU, found by searching lists."""
    resident: list[int] = []  # the longest unused first
    parents: dict[int, int] = {}
    hits = evictions = 0
    for request in requests:
        run = 0
        while run < len(request.hash_ids) and request.hash_ids[run] in resident:
            run += 1
        hits += run
        own = list(request.hash_ids[:run])
        for before, block in zip((-1, *request.hash_ids), request.hash_ids, strict=False):
            if block in own:
                continue
            if len(resident) == capacity_blocks:
                with_children = {parents[other] for other in resident}
                leaves = [other for other in resident if other not in with_children and other not in own]
                if not leaves:
                    break
                resident.remove(leaves[0])
                evictions += 1
            parents[block] = before
            resident.append(block)
            own.append(block)
        for block in reversed(own):  # the tail is touched first
            resident.remove(block)
            resident.append(block)
    return hits, evictions


@pytest.mark.parametrize("capacity_blocks", [1, 2, 7, 30, 100, 250, 100_000])
@pytest.mark.parametrize("seed", [1, 2])
def test_hits_and_evictions_are_those_of_a_search(seed: int, capacity_blocks: int) -> None:
    requests = generate(seed, sessions=40, turns=3, system_prompts=3, system_blocks=4, turn_blocks=3)
    row = simulate(requests, "lru", capacity_blocks)
    blocks = sum(len(request.hash_ids) for request in requests)
    hits, evictions = by_search(requests, capacity_blocks)
    assert row["prefix_hit_ratio"] == hits / blocks
    assert row["evictions"] == evictions
    assert (row["requests"], row["blocks"], row["capacity_blocks"]) == (len(requests), blocks, capacity_blocks)
    assert row["accesses_per_s"] > 0


def test_memory_for_everything_hits_all_but_the_first_use() -> None:
    requests = generate(5, sessions=30)
    row = simulate(requests, "lru", 1.0)
    blocks = sum(len(request.hash_ids) for request in requests)
    assert row["prefix_hit_ratio"] == 1 - unique_blocks(requests) / blocks
    assert row["evictions"] == 0


def test_a_request_larger_than_the_pool_is_stored_as_far_as_it_fits() -> None:
    request = TraceRequest(0.0, 1, 1, tuple(range(10)))
    row = simulate([request, request], "lru", 4)
    assert row["prefix_hit_ratio"] == 4 / 20
    assert row["evictions"] == 0, "a request never evicts its own prefix"


def test_progress_ends_at_the_number_of_requests() -> None:
    requests = generate(5, sessions=200)
    reported: list[int] = []
    simulate(requests, "lru", 0.1, reported.append)
    assert reported == sorted(reported)
    assert reported[-1] == len(requests)
    assert len(reported) > 2


@pytest.mark.parametrize("capacity", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, "5", 1e-9])
def test_an_impossible_capacity_is_refused(capacity: Any) -> None:
    with pytest.raises(InvalidRequestError, match="capacity"):
        simulate(generate(1, sessions=2), "lru", capacity)


def test_a_workload_without_blocks_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="of 1 request none names a block"):
        simulate([TraceRequest(0.0, 5, 5, ())])
    with pytest.raises(InvalidRequestError, match="there is no request"):
        simulate([])


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UnknownPolicyError, match="'optimal'"):
        simulate(generate(1, sessions=2), "optimal")
