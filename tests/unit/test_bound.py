"""The offline bound: published figures, an exhaustive search on small workloads, and that no policy passes it."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.bound import most_prefix_hits
from kvpool.cache.eviction import policy_names
from kvpool.simulate import offline_bound, simulate
from kvpool.workload import TraceRequest, generate, read_trace

PUBLISHED_PERCENT = {
    "mooncake_conversation": {0.01: 18.20, 0.05: 32.23, 0.10: 34.02, 0.50: 34.02},
    "mooncake_synthetic": {0.01: 16.41, 0.10: 49.91, 0.25: 62.61},
    "lmcache_agent": {0.01: 27.01, 0.05: 62.72, 0.10: 82.56, 0.25: 88.43},
}
"""Exact offline bounds for prefix hits on these traces, computed by other code."""


@pytest.mark.parametrize("trace", PUBLISHED_PERCENT)
def test_published_bounds_are_reproduced(traces: Path, trace: str) -> None:
    requests = list(read_trace(traces / f"{trace}.jsonl.gz"))
    for capacity, percent in PUBLISHED_PERCENT[trace].items():
        assert 100 * offline_bound(requests, capacity) == pytest.approx(percent, abs=0.005), capacity


def by_exhaustion(chains: list[list[int]], capacity: int) -> int:
    """Return the most prefix hits, by trying everything that could be kept after each request."""
    best = {frozenset[int](): 0}
    for chain in chains:
        after: dict[frozenset[int], int] = {}
        for kept, hits in best.items():
            run = len(list(itertools.takewhile(kept.__contains__, chain)))
            for size in range(capacity + 1):
                for choice in itertools.combinations(sorted(kept | set(chain)), size):
                    after[frozenset(choice)] = max(after.get(frozenset(choice), 0), hits + run)
        best = after
    return max(best.values())


@given(
    st.lists(st.sampled_from([[1], [1, 2], [1, 2, 3], [1, 4], [5], [5, 6]]), min_size=1, max_size=7), st.integers(1, 3)
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_best_of_all_that_could_be_kept(chains: list[list[int]], capacity: int) -> None:
    assert most_prefix_hits(chains, capacity) == by_exhaustion(chains, capacity)


@pytest.mark.parametrize("capacity_blocks", [3, 30, 200])
def test_no_policy_passes_it(capacity_blocks: int) -> None:
    requests = generate(3, sessions=60)
    bound = offline_bound(requests, capacity_blocks)
    assert 0 < bound < 1
    for policy in policy_names():
        assert simulate(requests, policy, capacity_blocks)["prefix_hit_ratio"] <= bound, policy


def test_of_a_chain_no_more_is_hit_than_fits_on_the_device_however_large_the_host() -> None:
    requests = [TraceRequest(float(time_ms), 1, 1, (1, 2, 3, 4, 5)) for time_ms in range(4)]
    assert offline_bound(requests, 2, 100) == 3 * 2 / 20, "it was 3 * 5 / 20"
    assert offline_bound(requests, 2) == 3 * 2 / 20
    assert offline_bound(requests, 5, 100) == 3 * 5 / 20


@pytest.mark.parametrize("capacity_blocks", [3, 30])
def test_no_policy_passes_it_with_a_host_tier(capacity_blocks: int) -> None:
    requests = generate(3, sessions=60)
    bound = offline_bound(requests, capacity_blocks, 200)
    for policy in policy_names():
        row = simulate(requests, policy, capacity_blocks, host_capacity=200)
        assert row["prefix_hit_ratio"] <= bound, policy


def test_room_for_everything_hits_every_use_but_the_first() -> None:
    assert most_prefix_hits([[1, 2], [1, 2], [1, 3]], 3) == 3
    assert most_prefix_hits([[1, 2], [1, 2], [1, 3]], 0) == 0
    assert most_prefix_hits([], 5) == 0
