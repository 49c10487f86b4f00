"""The benchmark of compaction, on little memory: what others wrote is compacted as what this process wrote."""

import ctypes

import pytest

from kvpool.bench import compaction
from kvpool.bench.memcpy import Memcpy
from kvpool.memory.backend import Access
from kvpool.sizes import KIB, MIB


def test_memory_that_others_wrote_is_full_and_compacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "_CAPACITY_BYTES", 8 * MIB)
    monkeypatch.setattr(compaction, "_REPEATS", 1)
    row = compaction._elsewhere_row(Memcpy(4 * MIB, 2 * MIB))
    assert row["value"] > 0
    assert row["baseline"] > 0


def test_a_page_of_it_is_written() -> None:
    backend = compaction._WrittenElsewhere()
    address, handle = backend.reserve(64 * KIB, 64 * KIB), backend.create(64 * KIB)
    backend.map(address, handle)
    backend.set_access(address, 64 * KIB, Access.READ)
    assert ctypes.string_at(address, 64 * KIB) == b"\1" * (64 * KIB)
    backend.close()
