"""The benchmark of eviction, on a few blocks: it measures what it says."""

import pytest

from kvpool.bench import evict
from kvpool.sizes import MIB


def test_each_policy_is_measured_beside_lru(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evict, "RESIDENT", 300)
    monkeypatch.setattr(evict, "_BLOCKS", 500)
    monkeypatch.setattr(evict, "_POOL_BLOCKS", 600)
    monkeypatch.setattr(evict, "_ROUNDS", 2)
    monkeypatch.setattr(evict, "EVICTED_BYTES", 8 * MIB)
    told: list[int] = []
    rows = evict.run(told.append)["rows"]
    assert told == list(range(1, 1 + 4 * (evict._PARTS + 2) + evict._PARTS))  # progress, to its end
    half = len(rows) // 2
    assert [row["name"].split(", ", 1)[0] for row in rows] == ["lru"] * half + ["adaptive"] * half
    assert all(row["value"] > 0 for row in rows if "own part" not in row["name"])  # of a few blocks it is noise
    whole, own = (row["value"] for row in rows[half : half + 2])
    assert own < whole
    for lru, adaptive in zip(rows[:half], rows[half:], strict=True):
        assert lru["name"].split(", ", 1)[1] == adaptive["name"].split(", ", 1)[1]
        assert (lru["baseline"], adaptive["baseline"]) == (None, lru["value"])


def test_what_is_evicted_is_as_much_as_was_asked_for() -> None:
    pool = evict._Pool("adaptive")
    for number in range(400):
        pool.store(evict._chain(number, 1))
    before = len(pool.state.ledger.index)
    pool.evict(pool.free_bytes + 96 * evict.BLOCK_BYTES)  # whole pages
    assert len(pool.state.ledger.index) == before - 96
    pool.state.check()
