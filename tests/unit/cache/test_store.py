"""What a device answers to each operation, over real memory."""

import pytest

from kvpool.cache.store import FREED, RELEASED, DeviceStore
from kvpool.errors import ProtocolError, from_wire
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.host import HostBackend

PAGE = 64 * 1024
PAGES = 4
KEY, OTHER_KEY = b"k" * 16, b"o" * 16


@pytest.fixture
def store():
    allocator = GPUMemoryAllocator(HostBackend(), PAGES * PAGE, PAGE)
    store = DeviceStore(allocator)
    assert store.apply([("connect", "a", "blue", "secret"), ("connect", "b", "blue", "hidden")]) == [True, True]
    yield store
    allocator.check()
    allocator.close()


def do(store, *operation):
    [answer] = store.apply([operation])
    return answer


def allocate(store, ids, size=PAGE, max_size=None, evict=(), client="a", tenant="blue"):
    return do(store, "allocate", client, 1, tenant, ids, size, max_size or size, evict)


def resident(store, ids, client="a"):
    """Make sealed caches that nobody holds."""
    places, refused, shortage = allocate(store, ids, client=client)
    assert (len(places), refused, shortage) == (len(ids), [], None)
    keys = [bytes([cache_id]) * 16 for cache_id in ids]
    assert do(store, "finish", client, 2, ids, keys) == [RELEASED] * len(ids)


def books(store):
    return store.caches, store.leases(), store.allocator.usage()


def error(answer):
    """The name of an error's class; it is one that the other side can rebuild."""
    assert answer[0] == "error"
    assert type(from_wire(answer[1:])).__name__ == answer[1]
    return answer[1]


# -- allocate ---------------------------------------------------------------------------------------------------------


def test_allocate_places_in_order_and_leases_each_to_the_client(store):
    places, refused, shortage = allocate(store, [1, 2], size=PAGE + 1)
    assert (refused, shortage) == ([], None)
    for offset, pages, generation in places:
        assert [index for index, _ in pages] == [offset // PAGE, offset // PAGE + 1]
        assert generation == 0
    assert {index for _, pages, _ in places for index, _ in pages} == {0, 1, 2}, (
        "the second begins where the first ended"
    )
    assert store.leases() == {"a": 2 * (PAGE + 1)}
    assert store.caches == 2


def test_what_does_not_fit_is_left_out_with_the_figures_of_the_shortage(store):
    places, refused, shortage = allocate(store, [1, 2, 3, 4, 5, 6])
    assert (len(places), refused) == (PAGES, [])
    assert (shortage["details"]["asked_bytes"], shortage["details"]["free_bytes"]) == (PAGE, 0)
    assert store.caches == PAGES
    store.allocator.check()


def test_allocate_evicts_first_and_uses_what_came_free(store):
    resident(store, [1, 2, 3, 4])
    _, second, third, _ = (store.allocator.allocation(cache_id).offset for cache_id in (1, 2, 3, 4))
    places, refused, shortage = allocate(store, [5, 6], evict=[2, 3])
    assert {place[0] for place in places} == {second, third}
    assert (refused, shortage) == ([], None)
    assert [place is None for place in do(store, "lease", "a", 3, [1, 2, 3, 4])] == [False, True, True, False]


def test_the_victims_of_an_unknown_client_go_all_the_same(store):
    # The pool has forgotten them, so that nobody else could ever free them.
    resident(store, [1, 2])
    assert error(allocate(store, [3], evict=[1, 2], client="nobody")) == "ProtocolError"
    assert store.caches == 0
    assert store.allocator.usage().live_bytes == 0


def test_a_size_above_the_device_is_an_error_and_changes_nothing(store):
    before = books(store)
    assert error(allocate(store, [1], size=PAGES * PAGE + 1)) == "InvalidSizeError"
    assert books(store) == before


def test_an_id_that_lives_already_leaves_nothing_of_its_batch(store):
    allocate(store, [7])
    before = store.caches, store.leases(), store.allocator.usage().live_bytes
    assert error(allocate(store, [8, 9, 7], client="b")) == "CacheStateError"
    assert (store.caches, store.leases(), store.allocator.usage().live_bytes) == before


def test_one_operation_that_fails_does_not_keep_the_others_from_being_carried_out(store):
    answers = store.apply(
        [
            ("allocate", "a", 1, "blue", [1], PAGE, PAGE, []),
            ("release", "a", 2, [99]),
            ("seal", "nobody", 3, [1], [KEY]),
            ("release", "a", 4, [1]),
        ]
    )
    assert answers[0][2] is None
    assert error(answers[1][0]) == "UnknownCacheError"
    assert error(answers[2]) == "ProtocolError"
    assert answers[3] == [FREED]


# -- lease ------------------------------------------------------------------------------------------------------------


def test_a_sealed_cache_is_leased_where_it_lies_as_often_as_asked(store):
    [place], _, _ = allocate(store, [1])
    assert do(store, "seal", "a", 2, [1], [KEY]) == [True]
    assert do(store, "lease", "b", 1, [1, 1]) == [place, place]
    assert store.leases() == {"a": PAGE, "b": PAGE}
    assert do(store, "release", "b", 2, [1]) == [RELEASED]
    assert store.leases() == {"a": PAGE, "b": PAGE}
    assert do(store, "release", "b", 3, [1]) == [RELEASED]
    assert store.leases() == {"a": PAGE}


def test_what_is_unsealed_unknown_or_of_another_tenant_cannot_be_leased(store):
    store.apply([("connect", "c", "red", "t")])
    allocate(store, [1])
    resident(store, [2])
    before = books(store)
    assert do(store, "lease", "b", 1, [1, 99]) == [None, None]
    assert do(store, "lease", "c", 1, [2]) == [None]
    assert error(do(store, "lease", "nobody", 1, [2])) == "ProtocolError"
    assert books(store) == before


# -- seal, release, finish --------------------------------------------------------------------------------------------


def test_sealing_again_with_the_same_key_is_no_error_with_another_it_is(store):
    allocate(store, [1, 2])
    assert do(store, "seal", "a", 2, [1, 2], [KEY, None]) == [True, True]
    same, other, without = do(store, "seal", "a", 3, [1, 1, 2], [KEY, OTHER_KEY, KEY])
    assert same is True
    assert error(other) == error(without) == "SealedError"
    assert do(store, "release", "a", 4, [1]) == [RELEASED], "it is still found by its first key"


def test_only_its_holder_seals_a_cache(store):
    allocate(store, [1])
    assert [error(answer) for answer in do(store, "seal", "b", 1, [1, 99], [KEY, KEY])] == [
        "DoubleReleaseError",
        "UnknownCacheError",
    ]
    assert do(store, "release", "a", 2, [1]) == [FREED], "it was not sealed"


@pytest.mark.parametrize("seal", [None, ("seal", "a", 2, [1], [None])], ids=["unsealed", "sealed without a key"])
def test_what_nobody_could_find_again_is_freed_with_its_last_lease(store, seal):
    allocate(store, [1])
    if seal:
        assert do(store, *seal) == [True]
    assert do(store, "release", "a", 3, [1]) == [FREED]
    assert (store.caches, store.allocator.usage().live_bytes) == (0, 0)


def test_a_second_release_is_an_error_item_by_item_and_changes_nothing(store):
    resident(store, [1])
    allocate(store, [2])
    assert do(store, "release", "a", 3, [2]) == [FREED]
    before = books(store)
    answers = do(store, "release", "a", 4, [1, 2, 99])
    assert [error(answer) for answer in answers] == ["DoubleReleaseError", "UnknownCacheError", "UnknownCacheError"]
    assert books(store) == before


def test_finish_seals_before_it_releases(store):
    places, _, _ = allocate(store, [1, 2])
    assert do(store, "finish", "a", 2, [1, 2], [KEY, None]) == [RELEASED, FREED]
    assert do(store, "lease", "b", 1, [1, 2]) == [places[0], None]


def test_finish_keeps_the_lease_of_what_it_could_not_seal(store):
    allocate(store, [1, 2])
    do(store, "seal", "a", 2, [1], [KEY])
    failed, released, unknown = do(store, "finish", "a", 3, [1, 2, 99], [OTHER_KEY, OTHER_KEY, None])
    assert (error(failed), released, error(unknown)) == ("SealedError", RELEASED, "UnknownCacheError")
    assert store.leases() == {"a": PAGE}


def test_a_bug_in_one_operation_is_its_answer_and_the_others_are_carried_out(store, device_bugs, monkeypatch):
    def wrong():
        raise ZeroDivisionError("division by zero")

    monkeypatch.setitem(store._handlers, "compact", wrong)
    before, bug, after = store.apply([("trim",), ("compact",), ("trim",)])
    assert (before, after) == (0, 0)
    assert bug[:2] == ("error", "InvariantError")
    assert "ZeroDivisionError" in bug[2]
    assert "Traceback" in device_bugs.pop()


# -- evict and trim ---------------------------------------------------------------------------------------------------


def test_eviction_frees_what_nobody_holds_and_passes_over_what_is_gone(store):
    resident(store, [1, 2])
    assert do(store, "evict", [1, 99]) == []
    assert do(store, "evict", [1]) == []
    assert store.caches == 1


def test_a_leased_cache_is_not_evicted_but_doomed(store):
    resident(store, [1])
    [place] = do(store, "lease", "b", 1, [1])
    assert do(store, "evict", [1]) == [1]
    assert do(store, "lease", "a", 3, [1]) == [None], "the pool has forgotten it"
    assert store.allocator.allocation(1).offset == place[0], "its holder still reads it"
    assert do(store, "release", "b", 2, [1]) == [FREED]
    assert store.caches == 0


def test_a_doomed_cache_goes_with_the_last_of_its_leases(store):
    resident(store, [1])
    do(store, "lease", "a", 3, [1])
    do(store, "lease", "b", 1, [1])
    assert allocate(store, [2], evict=[1])[1] == [1]
    assert do(store, "release", "a", 4, [1]) == [RELEASED]
    assert store.disconnect("b") == ([1], [1])
    assert store.caches == 1


def test_trim_gives_back_what_is_kept_warm(store):
    resident(store, [1, 2])
    do(store, "evict", [1, 2])
    assert store.allocator.usage().reserve_bytes == 2 * PAGE
    assert do(store, "trim") == 2 * PAGE
    assert do(store, "trim") == 0
    assert store.allocator.usage().free_bytes == PAGES * PAGE


# -- clients ----------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_ends_its_leases_each_as_often_as_it_held_it(store):
    allocate(store, [1, 2])
    do(store, "seal", "a", 2, [1], [KEY])
    do(store, "lease", "a", 3, [1, 1])
    do(store, "lease", "b", 1, [1])
    assert do(store, "disconnect", "a") == ([1, 1, 1, 2], [2])
    assert store.leases() == {"b": PAGE}
    assert do(store, "disconnect", "a") == ([], []), "idempotent"
    assert error(do(store, "release", "a", 4, [1])) == "ProtocolError"


def test_a_client_connects_once(store):
    assert error(do(store, "connect", "a", "red", "forged")) == "ProtocolError"
    assert store.authorize("a", "secret") == "blue"
    store.disconnect("a")
    assert do(store, "connect", "a", "red", "new") is True
    assert store.authorize("a", "new") == "red"


@pytest.mark.parametrize("token", ["", "hidden", "secre", "secret ", "geheimnis-ü", "\ud800"])
def test_another_token_opens_nothing(store, token):
    with pytest.raises(ProtocolError, match="'a'"):
        store.authorize("a", token)


def test_a_client_without_a_token_is_never_authorized(store):
    store.apply([("connect", "quiet", "blue", "")])
    for client in ("quiet", "nobody"):
        with pytest.raises(ProtocolError, match=client):
            store.authorize(client, "")
    assert do(store, "release", "quiet", 1, []) == [], "it is connected all the same"


# -- compact ----------------------------------------------------------------------------------------------------------


def test_compact_moves_what_nobody_has_leased_and_the_next_lease_gives_its_new_place(store):
    size = PAGE // 2 + 4096
    resident(store, [1, 2, 3])
    assert do(store, "evict", [1, 2, 3]) == []
    places, _, _ = allocate(store, [4, 8, 9, 5, 6, 7], size=size)
    assert do(store, "finish", "a", 2, [5, 6, 7], [bytes([i]) * 16 for i in (5, 6, 7)]) == [RELEASED] * 3
    assert do(store, "release", "a", 9, [8, 9]) == [FREED, FREED]
    before = store.allocator.usage().backed_bytes
    moved_bytes, freed_pages, more = do(store, "compact", 100 * PAGE)
    assert (freed_pages, more) == (1, False)
    assert moved_bytes >= size
    assert store.allocator.usage().backed_bytes == before - PAGE
    found = do(store, "lease", "a", 3, [5, 6, 7])
    assert [generation for _, _, generation in found] != [0, 0, 0]
    for cache_id, (offset, pages, _) in zip((5, 6, 7), found, strict=True):
        assert (offset, pages) == store.allocator.allocation(cache_id)[2:7:4]
    assert store.allocator.allocation(4).offset == places[0][0], "a leased cache does not move"


def test_compaction_makes_room_without_evicting(store):
    size = PAGE // 2 + 4096
    resident_ids = [1, 2, 3, 4]
    allocate(store, resident_ids, size=size)
    do(store, "finish", "a", 2, resident_ids, [bytes([i]) * 16 for i in resident_ids])
    places, refused, shortage = allocate(store, [9], size=PAGE)
    assert (len(places), refused, shortage) == (1, [], None)
    assert None not in do(store, "lease", "a", 3, resident_ids), "nothing was evicted for it"
