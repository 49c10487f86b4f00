"""The module of a policy of one's own, whose file changes while its policy decides."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.cache import eviction, policy_module
from kvpool.cache.eviction import find_policy, load_present_code, policy_names, register_policy
from kvpool.cache.guarded_policy import make_policy
from kvpool.cache.index import CacheIndex
from kvpool.cache.lru import LeafFirstLRU
from kvpool.errors import ConfigError, PolicyError, UnknownPolicyError
from kvpool.pool.state import PoolState
from kvpool.simulate import simulate
from kvpool.workload import generate

HEAD = "from kvpool.cache.eviction import register_policy\nfrom kvpool.cache.leaf_first import LeafFirst\n"
CRASH = HEAD + "@register_policy('crash')\ndef crash(index): return LeafFirst(index, lambda row, now: {})\n"
BROKEN, MENDED = CRASH.format("1 / 0"), CRASH.format("now")


class Written:
    """A file of policies that is written now and then, each time with another time of change."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.py"
        self._times = 0

    def write(self, text: str) -> None:
        self.path.write_text(text, encoding="utf-8")
        self._times += 1
        os.utime(self.path, (10**9 + self._times, 10**9 + self._times))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Written]:
    policy_names()
    monkeypatch.setattr(eviction, "_POLICIES", dict(eviction._POLICIES))
    monkeypatch.setattr(policy_module, "_imported", {})
    monkeypatch.syspath_prepend(tmp_path)
    yield Written(tmp_path, "told_policies")
    for name in ("told_policies", "told_helper", "told_others"):
        sys.modules.pop(name, None)


@pytest.fixture
def state(file: Written) -> PoolState:
    """A pool with a cache that nobody holds: what takes over is told of it at once."""
    pool = PoolState("p", "lru", "least_loaded", queue_limit=1, gc_threshold=1.0)
    index = pool.ledger.index
    index.add_device(0)
    row = index.add(index.space("t", "f"), 1, 0, now=0.0)
    index.publish(row, b"16 bytes of hash")
    index.unpin([row], now=0.0)
    return pool


@pytest.mark.parametrize("name", ["told_policies:crash", "told_policies:Crash", "crash"])
def test_a_policy_whose_file_was_mended_is_the_mended_one(file: Written, state: PoolState, name: str) -> None:
    file.write(BROKEN)
    with pytest.raises(PolicyError, match="ZeroDivisionError"):
        state.set_policy("told_policies:crash", 1.0)
    assert state.policy_name == "lru"
    file.write(MENDED)
    state.set_policy(name, 1.0)
    assert state.policy_name == name


def test_what_the_file_no_longer_registers_is_gone(file: Written, state: PoolState) -> None:
    file.write(MENDED)
    state.set_policy("told_policies:crash", 1.0)
    file.write(MENDED.replace("'crash'", "'other'").replace("def crash", "def other"))
    with pytest.raises(UnknownPolicyError, match="registers none of that name"):
        state.set_policy("told_policies:crash", 1.0)
    assert state.policy_name == "told_policies:crash"
    state.set_policy("told_policies:other", 1.0)


def test_a_class_of_another_name_can_take_over_what_it_registers(file: Written, state: PoolState) -> None:
    file.write(MENDED)
    state.set_policy("told_policies:crash", 1.0)
    file.write(MENDED.replace("def crash", "def renamed"))
    state.set_policy("told_policies:crash", 1.0)
    assert find_policy("told_policies:crash").__name__ == "renamed"  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", ["1 / 0\n", "def:\n", "import no_such_module\n", None])
def test_a_file_that_cannot_be_imported_changes_nothing(file: Written, state: PoolState, wrong: str | None) -> None:
    file.write(MENDED)
    state.set_policy("told_policies:crash", 1.0)
    factory, module, deciding = find_policy("crash"), sys.modules["told_policies"], state.ledger.policy
    if wrong is None:
        file.path.unlink()
    else:
        file.write(MENDED.replace("def crash", "def half_way") + wrong)
    with pytest.raises(UnknownPolicyError, match="'told_policies'"):
        state.set_policy("told_policies:crash", 1.0)
    assert (find_policy("crash"), sys.modules["told_policies"]) == (factory, module)
    assert (state.policy_name, state.ledger.policy) == ("told_policies:crash", deciding)
    file.write(MENDED)
    state.set_policy("told_policies:crash", 1.0)
    assert find_policy("crash") is not factory


def test_a_file_that_fails_when_it_is_first_imported_leaves_nothing(file: Written, state: PoolState) -> None:
    file.write(MENDED + "1 / 0\n")
    with pytest.raises(UnknownPolicyError, match="ZeroDivisionError"):
        state.set_policy("told_policies:crash", 1.0)
    assert "told_policies:crash" not in policy_names()


def test_a_policy_that_decides_keeps_its_globals(file: Written, state: PoolState) -> None:
    file.write(HEAD + "WORTH = 7\ndef own(index): return LeafFirst(index, lambda row, now: WORTH)\n")
    index = CacheIndex("told_policies:own")
    file.write(HEAD + "WORTH = None\ndef own(index): return LeafFirst(index, lambda row, now: WORTH)\n")
    with pytest.raises(PolicyError):
        state.set_policy("told_policies:own", 1.0)
    index.add_device(0)
    row = index.add(index.space("t", "f"), 1, 0, now=0.0)
    index.publish(row, b"16 bytes of hash")
    index.unpin([row], now=0.0)
    assert index.policy.worth(row)[1][0] == 7


def test_a_file_that_has_not_changed_is_not_run_again(file: Written, state: PoolState) -> None:
    file.write(MENDED)
    state.set_policy("told_policies:crash", 1.0)
    module = sys.modules["told_policies"]
    state.set_policy("told_policies:crash", 1.0)
    assert sys.modules["told_policies"] is module


def test_what_another_module_imported_is_what_its_file_says_once_it_is_named(file: Written, state: PoolState) -> None:
    helper = Written(file.path.parent, "told_helper")
    helper.write(BROKEN)
    file.write("import told_helper\n" + MENDED.replace("crash", "other"))
    state.set_policy("told_policies:other", 1.0)
    helper.write(MENDED)
    state.set_policy("told_helper:crash", 1.0)


def test_kvpools_own_modules_stay_as_they_are(file: Written, state: PoolState) -> None:
    before = sys.modules["kvpool.cache.lru"]
    state.set_policy("kvpool.cache.lru:lru", 1.0)
    assert sys.modules["kvpool.cache.lru"] is before


def test_only_the_same_class_of_the_same_module_takes_the_place_of_one(file: Written) -> None:
    file.write(MENDED)
    find_policy("told_policies:crash")
    Written(file.path.parent, "told_others").write(MENDED)
    with pytest.raises(UnknownPolicyError, match="'crash' exists already, in module 'told_policies'"):
        find_policy("told_others:crash")

    def define() -> type[LeafFirstLRU]:
        return register_policy("again")(type("Again", (LeafFirstLRU,), {"__module__": "told_cell"}))

    define()
    latest = define()
    assert find_policy("again") is latest, "as when a cell of a notebook is run again"
    with pytest.raises(ConfigError, match="exists already, in module 'told_cell'"):
        register_policy("again")(type("Another", (LeafFirstLRU,), {"__module__": "told_cell"}))


def test_names_are_told_as_they_are_to_be_given(file: Written) -> None:
    file.write(MENDED)
    find_policy("told_policies:crash")
    assert policy_names() == ["adaptive", "lfu", "lru", "size_aware_lru", "told_policies:crash"]
    with pytest.raises(UnknownPolicyError, match=r"there is adaptive, lfu, lru, size_aware_lru, told_policies:crash$"):
        find_policy("foo")
    with pytest.raises(UnknownPolicyError, match="did you mean 'told_policies:crash'"):
        find_policy("crasch")


def test_what_failed_or_may_be_gone_is_not_suggested(file: Written) -> None:
    def suggested(name: str) -> bool:
        with pytest.raises(UnknownPolicyError) as caught:
            find_policy(name)
        return "did you mean" in caught.value.message

    file.write(HEAD + "@register_policy('nothing')\ndef nothing(index): return None\n")
    find_policy("told_policies:nothing")
    assert suggested("nothin")
    with pytest.raises(PolicyError):
        make_policy("told_policies:nothing", CacheIndex())
    assert not suggested("nothin")
    file.write(MENDED)
    load_present_code("told_policies:crash")
    find_policy("told_policies:crash")
    assert suggested("crasch")
    file.write(HEAD)
    assert not suggested("crasch"), "its module says something else by now"


def test_a_policy_that_fails_is_told_with_its_line(file: Written) -> None:
    helper = Written(file.path.parent, "told_helper")
    helper.write("def worth(row, now): return 1 / 0\n")
    file.write(HEAD + "import told_helper\ndef own(index):\n  return LeafFirst(index, told_helper.worth)\n\n"
               "def inside(index):\n  return LeafFirst(index, lambda row, now: told_helper.worth(row, now))\n"
               "def makes(index):\n  return 1 / 0\n")  # fmt: skip
    requests = generate(1, sessions=3)
    for policy, where in (("inside", f"{file.path}:8"), ("own", f"{helper.path}:1"), ("makes", f"{file.path}:10")):
        with pytest.raises(PolicyError) as caught:
            simulate(requests, f"told_policies:{policy}", 0.1)
        assert f"ZeroDivisionError: division by zero ({where})" in caught.value.message


def test_a_module_that_cannot_be_imported_is_told_with_its_line_and_whose_path_counts(file: Written) -> None:
    file.write("import sys\nimport no_such_module\n")
    with pytest.raises(UnknownPolicyError) as caught:
        find_policy("told_policies:x")
    assert f"No module named 'no_such_module' ({file.path}:2)" in caught.value.message
    assert "it must be installed or on the PYTHONPATH of Ray" in caught.value.message
    file.write("\n\n1 / 0\n")
    with pytest.raises(UnknownPolicyError) as caught:
        find_policy("told_policies:x")
    assert caught.value.message.endswith(f"it is imported: ZeroDivisionError: division by zero ({file.path}:3)")
