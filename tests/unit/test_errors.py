"""The tree of errors, as drawn and as it crosses process borders."""

import json
import pickle
import re

import pytest

from kvpool import errors
from kvpool.errors import InvariantError, KvpoolError, ensure, from_wire

CLASSES = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, KvpoolError)]


def drawn() -> dict[str, tuple[str | None, set[str]]]:
    """The tree of the module's docstring: class to its parent there and the builtins in parentheses."""
    found: dict[str, tuple[str | None, set[str]]] = {}
    path: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)(?: \((\w+)\))?", line)
        if match is None:
            continue
        depth = len(match.group(1))
        path = [(at, name) for at, name in path if at < depth]
        found[match.group(2)] = (path[-1][1] if path else None, {match.group(3)} - {None})
        path.append((depth, match.group(2)))
    return found


def test_every_class_is_drawn_below_its_parent_and_nothing_else_is():
    tree = {}
    for each in CLASSES:
        own = [base for base in each.__bases__ if issubclass(base, KvpoolError)]
        builtin = {base.__name__ for base in each.__bases__ if base not in own} - {"Exception"}
        tree[each.__name__] = (own[0].__name__ if own else None, builtin)
    assert drawn() == tree
    assert tree["KvpoolError"] == (None, set())


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_arrives_as_it_was_sent(kind):
    error = kind("asked for 3, there are 2: ask for less", asked_bytes=3, pinned_by={"a": 1})
    over_json = from_wire(json.loads(json.dumps(error.to_wire())))
    for arrived in (from_wire(error.to_wire()), over_json, pickle.loads(pickle.dumps(error))):
        assert type(arrived) is kind
        assert str(arrived) == str(error) == "asked for 3, there are 2: ask for less"
        assert arrived.details == {"asked_bytes": 3, "pinned_by": {"a": 1}}


def test_what_a_newer_peer_calls_its_error_is_still_one_of_ours():
    arrived = from_wire(("ErrorOfTomorrow", "no", {"figure": 1}))
    assert type(arrived) is KvpoolError
    assert (str(arrived), arrived.details) == ("no", {"figure": 1})


def test_ensure_raises_only_when_broken_and_with_the_figures():
    ensure(1, "never shown")
    with pytest.raises(InvariantError, match="pages are counted") as caught:
        ensure([], "pages are counted", pages=3)
    assert caught.value.details == {"pages": 3}
