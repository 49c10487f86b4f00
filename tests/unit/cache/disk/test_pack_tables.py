"""The table at the front of a pack: what it says, and that a change of it is found."""

import pytest

from kvpool.cache.disk.file_names import CacheName
from kvpool.cache.disk.pack import MOST_CACHES, PLACE_BYTES, find_packed, has_others, make_table, parse_table
from kvpool.cache.key import encode_block_id


@pytest.mark.parametrize("count", [2, 63, 64, MOST_CACHES])
def test_a_table_says_what_it_was_made_of(count):
    names = [
        CacheName(encode_block_id(n), None if n % 3 else encode_block_id(n + 1), 1 + 977 * n) for n in range(count)
    ]
    block = make_table([(name, 100 + n) for n, name in enumerate(names)], 17)
    table = parse_table(block + b"the first cache")
    assert (table.written_ns, table.end, table.removed_places) == (17, len(block), [])
    assert [packed.name for packed in table.caches] == names
    assert [packed.header_bytes for packed in table.caches] == [100 + n for n in range(count)]
    assert [packed.start for packed in table.caches] == [len(block), *(packed.end for packed in table.caches[:-1])]
    assert all(find_packed(block, packed.name) == packed for packed in table.caches)
    assert find_packed(block, names[0]._replace(payload_bytes=2)) is None
    assert find_packed(block, CacheName(encode_block_id(9999), None, 1)) is None
    last = [packed.place for packed in table.caches[1:]]
    assert has_others(block + b"x" * 99, last)
    assert not has_others(block + b"x" * 99, [*last, table.caches[0].place])


def test_a_change_of_any_byte_of_a_table_is_found():
    names = [CacheName(encode_block_id(number), None, 5) for number in range(3)]
    block = make_table([(name, 100) for name in names], 17)
    for at in range(4 * PLACE_BYTES):
        changed = bytearray(block)
        changed[at] ^= 1
        assert parse_table(bytes(changed)) is None, at
    assert parse_table(block[: 4 * PLACE_BYTES - 1]) is None
    assert parse_table(b"") is None
