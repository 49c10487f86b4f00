"""Chains of a whole table at once, and content that is buried."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvpool.cache.chains import deepest_first, depths, with_descendants
from kvpool.cache.index import CacheIndex
from kvpool.cache.key import encode_block_id
from kvpool.errors import InvariantError


def forest(seed: int) -> tuple[CacheIndex, dict[int, int]]:
    """A random forest in which rows have been used before; returns also the parent of each row that is there."""
    chance = random.Random(seed)
    index = CacheIndex()
    index.add_device(0)
    space = index.space("tenant", "fingerprint")
    parents: dict[int, int] = {}
    for number in range(400):
        leaves = [row for row in parents if row not in parents.values()]
        if leaves and chance.random() < 0.4:
            row = chance.choice(leaves)
            del parents[row]
            index.remove(row)  # its parent is left in the column
        else:
            above = chance.choice([-1, *parents]) if parents else -1
            (row,) = index.add_chain(space, 1, 0, 1, above, now=0.0)
            index.publish(row, encode_block_id(number))
            parents[row] = above
    return index, parents


def ancestors(parents: dict[int, int], row: int) -> list[int]:
    found = []
    while parents[row] >= 0:
        row = parents[row]
        found.append(row)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_descendants_and_depths_are_those_found_by_walking(seed: int) -> None:
    index, parents = forest(seed)
    chance = random.Random(seed)
    first = chance.sample(sorted(parents), min(5, len(parents)))
    found = with_descendants(index, np.array(first, np.int64)).tolist()
    expected = [row for row in parents if row in first or set(first) & set(ancestors(parents, row))]
    assert found == sorted(expected)
    depth = depths(index)
    assert all(depth[row] == len(ancestors(parents, row)) for row in parents)
    order = deepest_first(index, np.array(sorted(parents), np.int64)).tolist()
    assert all(order.index(row) < order.index(above) for row, above in parents.items() if above >= 0)
    index.check()


def test_what_is_buried_is_found_by_nobody_and_its_key_is_free() -> None:
    index = CacheIndex()
    index.add_device(0)
    space = index.space("tenant", "fingerprint")
    rows = index.add_chain(space, 10, 0, 4, now=0.0)
    hashes = [encode_block_id(number) for number in range(4)]
    index.publish_all(rows, hashes)
    index.unpin(rows[:0:-1], now=1.0)  # the root is held
    assert index.bury(space, np.array(rows[2:], np.int64)).tolist() == rows[2:]
    assert index.match(space, hashes) == rows[:2]
    again = index.add_chain(space, 10, 0, 2, rows[1], now=2.0)
    index.publish_all(again, hashes[2:])
    index.check()
    chained = with_descendants(index, np.array(again, np.int64)[:1])
    assert index.bury(space, np.array([*rows[2:], *chained], np.int64)).tolist() == again, "the others were before"
    index.check()
    index.bury_all(space)
    assert index.match(space, hashes) == []
    assert all(map(index.is_void, [*rows, *again]))
    assert (index.published, len(index)) == (6, 6)
    with pytest.raises(InvariantError, match="no holder"):
        index.withdraw(rows[3])
    index.withdraw(rows[0])
    assert (index.key_of(rows[0]), index.is_sealed(rows[0])) == (None, True)
    index.unpin(again, now=3.0)
    index.check()
    for row in deepest_first(index, index.rows_of(*index.spaces.of("tenant"))).tolist():
        index.remove(row)
    index.check()
    before = len(index.spaces.of(None))
    (row,) = index.add_chain(space, 10, 0, 1, now=4.0)
    index.bury_all(space)
    with pytest.raises(InvariantError, match="publishing"):
        index.publish(row, hashes[0])
    assert len(index.spaces.of(None)) == before, "an empty grave is used again"
