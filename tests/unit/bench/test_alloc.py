"""The benchmark of the allocators, on few pairs: it measures what it says, and tells how far it is."""

import pytest

from kvpool.bench import alloc


def test_each_row_has_a_baseline_and_progress_goes_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alloc, "_PAIRS", 4000)
    steps = alloc.STEPS // alloc._ROUNDS
    monkeypatch.setattr(alloc, "_ROUNDS", 1)
    told: list[int] = []
    rows = alloc.run(told.append)["rows"]
    assert told == list(range(1, steps + 1))
    assert len({row["name"] for row in rows}) == len(rows) == 10
    assert all(row["value"] > 0 and row["baseline"] > 0 for row in rows)
