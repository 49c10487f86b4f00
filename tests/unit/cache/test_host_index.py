"""What the host tier drops first."""

import pytest
from disk_stores import key_of

from kvpool.cache.host_index import HostEntry, HostIndex, Kind
from kvpool.errors import InvariantError

COPY, SAVED, SOLE = Kind


def entry_of(number, kind=SOLE, room_bytes=10):
    return HostEntry(key_of(number), None, room_bytes, room_bytes, kind)


def index_of(*entries, budget_bytes=100):
    index = HostIndex(budget_bytes)
    for entry in entries:
        index.add(entry)
    index.check()
    return index


def drop_order(index, last=SOLE):
    """The numbers of the entries in the order in which they go."""
    order = []
    while (entry := index.oldest(last)) is not None:
        order.append(int.from_bytes(index.drop(entry.key).key.block_hash, "big"))
        index.check()
    return order


def test_copies_go_first_then_what_is_saved_then_sole_ones_each_oldest_first():
    index = index_of(*(entry_of(number, kind) for number, kind in enumerate([SOLE, COPY, SAVED, COPY, SOLE, SAVED])))
    assert drop_order(index, SAVED) == [1, 3, 2, 5]
    assert drop_order(index) == [0, 4]
    assert index.used_bytes == 0


def test_use_makes_the_newest_of_the_same_or_another_kind():
    entries = [entry_of(number) for number in range(4)]
    index = index_of(*entries)
    index.use(entries[0], SOLE)
    index.use(entries[2], COPY)
    assert [index.kind_bytes(kind) for kind in Kind] == [10, 0, 30]
    assert drop_order(index) == [2, 1, 3, 0]


def test_the_oldest_can_be_chosen():
    entries = [entry_of(number) for number in range(3)]
    index = index_of(*entries)
    index.make_oldest(entries[1])
    assert drop_order(index) == [1, 0, 2]


def test_who_is_held_does_not_go_and_is_the_newest_afterwards():
    entries = [entry_of(number) for number in range(3)]
    index = index_of(*entries)
    index.hold(entries[0])
    index.hold(entries[0])
    index.release(entries[0])
    assert index.oldest(SOLE) is entries[1]
    index.use(entries[0], COPY)
    assert index.oldest(COPY) is None
    index.make_oldest(entries[0])
    index.check()
    index.release(entries[0])
    assert index.oldest_of(COPY) is entries[0]
    index.check()
    with pytest.raises(InvariantError):
        index.release(entries[0])


def test_who_was_dropped_while_held_does_not_come_back():
    entry = entry_of(1)
    index = index_of(entry)
    index.hold(entry)
    assert index.drop(entry.key) is entry
    again = entry_of(1)
    index.add(again)
    index.release(entry)
    index.check()
    assert index.get(key_of(1)) is again
    assert drop_order(index) == [1]


def test_room_counts_entries_and_claims():
    index = index_of(entry_of(1, COPY), entry_of(2, SOLE), entry_of(3, SAVED))
    index.claim(40)
    assert (index.used_bytes, index.fits(30), index.fits(31)) == (70, True, False)
    assert [index.could_fit(room, COPY) for room in (40, 41)] == [True, False]
    assert [index.could_fit(room, SAVED) for room in (50, 51)] == [True, False]
    index.hold(index.get(key_of(1)))
    assert not index.could_fit(31, COPY)
    for refused in (lambda: index.claim(31), lambda: index.add(entry_of(4, SOLE, 31)), lambda: index.unclaim(41)):
        with pytest.raises(InvariantError):
            refused()


def test_a_key_is_entered_once():
    index = index_of(entry_of(1))
    with pytest.raises(InvariantError):
        index.add(entry_of(1))
    index.check()
