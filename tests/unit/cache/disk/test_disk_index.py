"""The order in which files go, and the sums of the budget."""

import random
from collections import OrderedDict

import pytest

from kvpool.cache.disk.index import DiskEntry, DiskIndex
from kvpool.cache.key import CacheKey, encode_block_id
from kvpool.errors import InvariantError

PAYLOAD = 100
FILE = DiskEntry(CacheKey("t", "f", bytes(16)), None, PAYLOAD).file_bytes


def entry(number, size_bytes=PAYLOAD, above=None):
    parent = None if above is None else encode_block_id(above)
    return DiskEntry(CacheKey("t", "f", encode_block_id(number)), parent, size_bytes)


def numbers(entries):
    return [int.from_bytes(each.key.block_hash, "big") for each in entries]


def filled(count, budget_bytes, **options):
    index = DiskIndex(budget_bytes, **options)
    for number in range(count):
        index.add(entry(number))
    return index


def never(key):
    return False


def test_the_least_recently_used_go_first_and_no_more_than_needed():
    index = filled(5, 5 * FILE)
    index.touch(entry(0).key)
    assert numbers(index.victims(FILE, never)) == [1]
    assert numbers(index.victims(2 * FILE - 1, never)) == [1, 2]
    assert index.victims(5 * FILE + 1, never) is None
    assert len(index) == 5, "asking changes nothing"


def test_a_header_counts_against_the_budget():
    index = filled(1, 2 * FILE - 1)
    assert numbers(index.victims(FILE, never)) == [0]
    assert index.used_bytes == FILE > PAYLOAD


def test_what_is_in_use_stays_and_when_nothing_else_is_left_nothing_goes():
    index = filled(3, 3 * FILE)
    assert numbers(index.victims(FILE, lambda key: key == entry(0).key)) == [1]
    assert index.victims(2 * FILE, lambda key: key != entry(2).key) is None


def test_the_number_of_files_is_bounded_too():
    index = filled(4, 100 * FILE, most_files=4)
    assert numbers(index.victims(FILE, never)) == [0]
    index.claim(entry(9))
    assert numbers(index.victims(FILE, never)) == [0, 1]


def test_claimed_room_is_room_that_others_cannot_have():
    index = filled(2, 3 * FILE)
    index.claim(entry(7))
    assert numbers(index.victims(FILE, never)) == [0]
    assert index.get(entry(7).key) is None
    index.unclaim(entry(7).key)
    assert index.victims(FILE, never) == []


def test_what_could_not_be_removed_goes_first_next_time():
    index = filled(4, 4 * FILE)
    gone = [index.drop(entry(number).key) for number in (1, 2)]
    index.restore(gone)
    assert numbers(index) == [1, 2, 0, 3]
    with pytest.raises(InvariantError):
        index.add(entry(3))


def test_it_agrees_with_a_plain_lru_over_random_operations():
    rng = random.Random(5)
    index, model = DiskIndex(20 * FILE), OrderedDict()
    for _ in range(3000):
        each = entry(rng.randrange(40), rng.randrange(1, 3 * PAYLOAD))
        known = index.get(each.key)
        if known is not None and rng.random() < 0.5:
            index.touch(each.key)
            model.move_to_end(each.key)
        elif known is not None:
            assert index.drop(each.key) == model.pop(each.key)
        else:
            for victim in index.victims(each.file_bytes, never):
                key, expected = model.popitem(last=False)
                assert (victim.key, index.drop(victim.key)) == (key, expected)
            index.add(each)
            model[each.key] = each
        index.check()
        assert list(index) == list(model.values())
        assert index.used_bytes <= index.budget_bytes


def test_what_hangs_on_another_goes_before_it_and_keeps_it_while_it_is_written_or_in_use():
    index = DiskIndex(5 * FILE)
    for number, above in ((0, None), (1, 0), (2, 1), (9, None)):
        index.add(entry(number, above=above))
    assert numbers(index.victims(4 * FILE, never)) == [2, 1, 0]
    assert numbers(index.victims(2 * FILE, lambda key: key == entry(2).key)) == [9]
    assert index.victims(3 * FILE, lambda key: key == entry(2).key) is None
    index.claim(entry(3, above=2))
    assert numbers(index.victims(FILE, never)) == [9]
    assert index.victims(2 * FILE, never) is None, "what is being written keeps what it hangs on"
    index.unclaim(entry(3).key)
    assert numbers(index.oldest(FILE + 1, never)) == [2, 1]
    index.check()


def test_it_agrees_with_a_plain_search_of_leaves_over_random_chains():
    rng = random.Random(7)
    index, order = DiskIndex(20 * FILE), []  # least recently used first
    for _ in range(2000):
        number = rng.randrange(1, 60)
        above = number // 2 if number > 1 else None  # a tree
        known = index.get(entry(number).key)
        if known is not None and rng.random() < 0.7:
            index.touch(known.key)
            order.remove(known)
            order.append(known)
        elif known is not None:
            index.drop(known.key)
            order.remove(known)
        else:
            new = entry(number, rng.randrange(1, 3 * PAYLOAD), above)
            excess = sum(each.file_bytes for each in order) + new.file_bytes - index.budget_bytes
            expected = []
            while excess > 0:
                parents = {each.parent for each in order}
                leaf = next(each for each in order if each.key.block_hash not in parents)
                order.remove(leaf)
                expected.append(leaf)
                excess -= leaf.file_bytes
            victims = index.victims(new.file_bytes, never)
            assert victims == expected
            for victim in victims:
                index.drop(victim.key)
            index.add(new)
            order.append(new)
        index.check()
        assert list(index) == order
