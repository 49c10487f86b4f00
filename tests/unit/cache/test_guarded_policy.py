"""Policies of one's own that do what no policy may: each is named, and nothing is half done."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvpool.cache import eviction
from kvpool.cache.eviction import CacheEvictionPolicy, policy_names, register_policy
from kvpool.cache.index import CacheIndex
from kvpool.cache.key import encode_block_id
from kvpool.cache.leaf_first import LeafFirst
from kvpool.cache.lru import LeafFirstLRU
from kvpool.errors import PolicyError, UnknownPolicyError
from kvpool.simulate import simulate
from kvpool.workload import generate

FAILURES = [
    *(("evictable", after) for after in (0, 1, 700)),
    *((hook, 0) for hook in ("taken", "sheltered", "victim", "looked_up")),
    *((hook, after) for hook in ("removed", "victims", "stored") for after in (0, 1)),
    ("grown", 1),  # LRU grows as it is made
]
"""Hooks, and how many calls of each go well before one fails."""


@pytest.fixture(autouse=True)
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    policy_names()
    monkeypatch.setattr(eviction, "_POLICIES", dict(eviction._POLICIES))
    return lambda factory: register_policy("own")(factory) and None


def failing_in(hook: str, after: int = 0) -> type[LeafFirstLRU]:
    """LRU that divides by zero in one hook, after so many calls that went well."""
    left = [after]

    def fail(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ZeroDivisionError("division by zero")
        return getattr(LeafFirstLRU, hook)(self, *arguments)

    return type("Failing", (LeafFirstLRU,), {hook: fail})


def lru_takes_over(index: CacheIndex, failures: list[str]) -> None:
    def failed(error: PolicyError, now: float) -> None:
        failures.append(str(error))
        index.replace_policy("lru", now=now)

    index.policy_failed = failed


def use(index: CacheIndex) -> list[int]:
    """Store chains until the table has grown, look one up, branch off it, and evict 10; returns what is left, by id."""
    space = index.space("tenant", "fingerprint")
    now = 0.0
    for first in range(0, 4200, 6):
        now += 1
        hashes = [encode_block_id(first + place) for place in range(6)]
        rows = index.add_chain(space, 1, 0, 6, now=now, chain=hashes)
        index.publish_all(rows, hashes)
        index.unpin(rows[::-1], now=now)
    rows = index.look_up(space, [encode_block_id(place) for place in range(3)], now=now + 1)
    index.pin(rows, now=now + 1)
    index.unpin(rows[::-1], now=now + 1)
    branch = index.add(space, 1, 0, rows[-1], now=now + 2)
    index.publish(branch, encode_block_id(10**6))
    index.remove_all([row for row, _ in zip(index.policy.victims(0), range(9), strict=False)])
    index.remove(index.policy.victim())
    index.unpin([branch], now=now + 3)
    index.check()
    order = list(index.policy.victims(0))
    index.remove_all(order)  # leaves first, each once, all of them
    index.check()
    assert len(index) == 0
    return order


@pytest.mark.parametrize(("hook", "after"), FAILURES)
def test_whatever_fails_lru_takes_over_in_the_middle_of_it(register, hook: str, after: int) -> None:
    register(failing_in(hook, after))
    index, failures = CacheIndex("lru"), []
    index.add_device(0)
    expected = use(index)
    index = CacheIndex("own")
    index.add_device(0)
    lru_takes_over(index, failures)
    assert use(index) == expected
    assert len(failures) == 1
    line = failing_in.__code__.co_firstlineno + 7
    assert failures[0] == f"policy 'own' failed in {hook}(): ZeroDivisionError: division by zero ({__file__}:{line})"


class BrokenInside(LeafFirstLRU):
    """Gives some victims, and fails then."""

    def victims(self, device: int) -> Iterator[int]:
        for number, row in enumerate(super().victims(device)):
            if number == 4:
                raise KeyError("four")
            yield row


class RootsFirst(LeafFirstLRU):
    def victims(self, device: int) -> Iterator[int]:
        return reversed(list(super().victims(device)))


class Twice(LeafFirstLRU):
    def victims(self, device: int) -> Iterator[int]:
        for row in super().victims(device):
            yield from (row, row)


class NoRow(LeafFirstLRU):
    def victims(self, device: int) -> Iterator[Any]:
        yield "a row"


class ElsewhereToo(LeafFirstLRU):
    def victims(self, device: int) -> Iterator[int]:
        return super().victims(1 - device)


class Pinned(LeafFirstLRU):
    def victims(self, device: int) -> Iterator[int]:
        yield 4000


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (BrokenInside, "KeyError: 'four'"),
        (RootsFirst, "before its children"),
        (Twice, "twice"),
        (NoRow, "'a row', which is no row"),
        (ElsewhereToo, "lies in partition 1, for partition 0"),
        (Pinned, "not evictable"),
    ],
)
def test_victims_that_cannot_go_are_never_given(register, policy: Any, message: str) -> None:
    register(policy)
    index, failures = CacheIndex("own"), []
    lru_takes_over(index, failures)
    for device in range(2):
        index.add_device(device)
        for chain in range(3):
            hashes = [encode_block_id(100 * device + 10 * chain + place) for place in range(3)]
            rows = index.add_chain(index.space("t", "f"), 1, device, 3, now=float(chain))
            index.publish_all(rows, hashes)
            index.unpin(rows[::-1], now=float(chain))
    order = list(index.policy.victims(0))
    assert len(failures) == 1
    assert message in failures[0]
    assert len(set(order)) == len(order) == 9
    index.remove_all(order)
    index.check()


def test_a_worth_that_is_not_a_number_is_a_failure(register) -> None:
    for wrong in (math.nan, None, "much"):  # of which the frames of the traceback tell nothing: all are kvpool's
        register_policy(f"own-{wrong}".lower())(lambda index, wrong=wrong: LeafFirst(index, lambda row, now: wrong))
        with pytest.raises(PolicyError, match=rf"(?i)policy 'own-{wrong}' failed in evictable\(\): ") as caught:
            simulate(generate(1, sessions=3), f"own-{wrong}", 0.1)
        assert ("NaN" if wrong is math.nan else f"is {wrong!r}: must be real number") in str(caught.value)
        assert f"({__file__}:" in str(caught.value), "where the function is that gave it"


def test_more_blocks_than_are_missing_cannot_be_admitted(register) -> None:
    class Greedy(LeafFirstLRU):
        def admit(self, *_: Any) -> int:
            return 10**6

    register(Greedy)
    with pytest.raises(PolicyError, match=r"failed in admit\(\): it returned 1000000"):
        simulate(generate(1, sessions=3), "own", 0.1)


class Bare(CacheEvictionPolicy):
    pass


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda index: None, "None is no eviction policy, it has no grown, evictable,"),
        (lambda index: "text", "'text' is no eviction policy"),
        (lambda: None, "TypeError: .*takes 0 positional arguments.*made by calling it with the index"),
        (lambda index: 1 / 0, "ZeroDivisionError: division by zero"),
        (Bare, "abstract"),
    ],
)
def test_what_is_no_policy_is_refused_and_nothing_changes(register, factory: Any, message: str) -> None:
    register(factory)
    with pytest.raises(PolicyError, match=f"policy 'own' could not be made: .*{message}"):
        CacheIndex("own")
    index = CacheIndex("lru")
    before = index.policy
    with pytest.raises(PolicyError, match=message):
        index.replace_policy("own", now=0.0)
    assert index.policy is before


def test_a_policy_that_fails_as_it_takes_over_is_refused(register) -> None:
    register(failing_in("evictable"))
    index = CacheIndex("lru")
    index.add_device(0)
    row = index.add(index.space("t", "f"), 1, 0, now=0.0)
    index.publish(row, encode_block_id(1))
    index.unpin([row], now=0.0)
    before = index.policy
    with pytest.raises(PolicyError, match=r"failed in evictable\(\): ZeroDivisionError"):
        index.replace_policy("own", now=1.0)
    assert index.policy is before
    assert index.policy.victim() == row


def test_a_module_that_fails_as_it_is_imported_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_policies.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "plain_policies.py").write_text(
        "from kvpool.cache.lru import LeafFirstLRU\nclass Mine(LeafFirstLRU): pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownPolicyError, match=r"'broken_policies'.*ZeroDivisionError: division by zero"):
        CacheIndex("broken_policies:mine")
    assert CacheIndex("plain_policies:Mine").policy.victim() == -1, "an attribute will do, if none is registered"
    with pytest.raises(UnknownPolicyError, match="'plain_policies:Other'"):
        CacheIndex("plain_policies:Other")


def test_a_policy_that_fails_as_rows_change_their_partitions_is_given_up_once_and_the_next_has_each_row_once(
    register,
) -> None:
    register(failing_in("taken"))
    index, failures = CacheIndex("own"), []
    lru_takes_over(index, failures)
    index.add_device(0)
    spaces = [index.space("t", name) for name in "ab"]
    for space in spaces:
        hashes = [encode_block_id(place) for place in range(3)]
        rows = index.add_chain(space, 1, 0, 3, now=0.0)
        index.publish_all(rows, hashes)
        index.unpin(rows[::-1], now=0.0)
    index.set_accounts({spaces[0]: 1}, now=1.0)
    assert len(failures) == 1
    index.policy.check()
    for partition in range(2):
        order = list(index.policy.victims(partition))
        assert [index.partition[row] for row in order] == [partition] * 3
        index.remove_all(order)
    index.check()
