"""Keys by row and rows by key, in spaces, partitions and graves."""

import numpy as np
import pytest

from kvpool.cache.key import SHARDS, encode_block_id
from kvpool.cache.key_table import KeyTable
from kvpool.cache.partitions import Partitions
from kvpool.cache.spaces import Spaces
from kvpool.errors import InvariantError

HASHES = [encode_block_id(number) for number in range(8)]


@pytest.fixture
def keys() -> KeyTable:
    """Rows 0 to 3 have the first keys of space 0, row 4 that of space 1, row 5 none."""
    keys = KeyTable()
    keys.add_spaces(3)
    keys.add_rows(6)
    for row, (space, block_hash) in enumerate([*((0, each) for each in HASHES[:4]), (1, HASHES[0])]):
        keys.rows[space][block_hash[-1] % SHARDS][block_hash] = row
        keys.hashes[row] = block_hash
    return keys


def test_a_key_is_found_in_its_space(keys: KeyTable) -> None:
    assert [keys.find(space, HASHES[0]) for space in range(3)] == [0, 4, -1]
    assert keys.find_all(0, HASHES[2:6]) == [2, 3, -1, -1]
    assert keys.match(0, [HASHES[0], HASHES[1], HASHES[7], HASHES[2]]) == [0, 1]
    assert (len(keys), [keys.is_empty(space) for space in range(3)]) == (5, [False, False, True])
    assert dict(keys.published()) == {0: HASHES[0], 1: HASHES[1], 2: HASHES[2], 3: HASHES[3], 4: HASHES[0]}


def test_keys_are_dropped_one_by_one_and_together(keys: KeyTable) -> None:
    keys.drop(0, 1)
    keys.drop(0, 5)
    assert keys.find_all(0, HASHES[:4]) == [0, -1, 2, 3]
    keys.drop_all(np.array([0, 4, 1]), np.array([0, 1, 0]))
    assert dict(keys.published()) == {2: HASHES[2], 3: HASHES[3]}
    assert (len(keys), keys.is_empty(1)) == (2, True)


def test_keys_move_to_another_space(keys: KeyTable) -> None:
    keys.move([1, 5, 2], 0, 2)
    assert [keys.find_all(space, HASHES[:4]) for space in (0, 2)] == [[0, -1, -1, 3], [-1, 1, 2, -1]]
    with pytest.raises(InvariantError):
        keys.move_all(1, 0)
    keys.add_spaces(4)
    keys.move_all(0, 3)
    assert (keys.is_empty(0), keys.find_all(3, HASHES[:4])) == (True, [0, -1, -1, 3])
    assert [keys.hashes[row] for row in range(6)] == [*HASHES[:4], HASHES[0], None]


@pytest.mark.parametrize("wanted", [[HASHES[5], HASHES[3]], [HASHES[5], HASHES[5]]])
def test_a_key_that_is_taken_or_wanted_twice_is_not_free(keys: KeyTable, wanted: list[bytes]) -> None:
    keys.ensure_free(0, HASHES[4:])
    with pytest.raises(InvariantError, match="key"):
        keys.ensure_free(0, wanted)


def test_a_space_is_a_tenants_and_fingerprints_and_a_grave_is_of_the_same_tenant_and_account() -> None:
    spaces = Spaces()
    assert [spaces.number(tenant, name) for tenant, name in ("ax", "ay", "bx", "ax")] == [0, 1, 2, 0]
    spaces.accounts[1] = 7
    graves = [spaces.add_grave(space) for space in (0, 1)]
    assert (graves, spaces.void, len(spaces)) == ([3, 4], {3, 4}, 5)
    assert [list(spaces.graves(space)) for space in range(3)] == [[3], [4], []]
    assert spaces.accounts == [0, 7, 0, 0, 7]
    assert [spaces.of(tenant) for tenant in ("a", "b", "c", None)] == [[0, 1, 3, 4], [2], [], [0, 1, 2, 3, 4]]


def test_a_partition_is_what_an_account_has_on_a_device() -> None:
    partitions = Partitions()
    for device in range(2):
        partitions.add_device(device)
    assert [partitions.number(*place) for place in ((1, 3), (0, 3), (1, 0), (1, 3))] == [2, 3, 1, 2]
    assert [partitions[number] for number in range(len(partitions))] == [(0, 0), (1, 0), (1, 3), (0, 3)]
    assert [partitions.of(device) for device in range(2)] == [[0, 3], [1, 2]]
    with pytest.raises(InvariantError):
        partitions.add_device(3)
