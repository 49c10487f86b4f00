"""A policy of one's own, kept from doing harm: what it raises or answers wrongly becomes a :class:`PolicyError`.

The index calls its policy in the middle of its own steps, so nothing may come out of such a call that the index did
not expect. What is wrong is told to :attr:`CacheIndex.policy_failed`, which raises it (a simulation ends with it) or
puts another policy in charge (a pool goes on).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from kvpool.cache.eviction import BUILT_IN, CacheEvictionPolicy, find_policy, note_failure, plain_name
from kvpool.cache.key import BlockHash
from kvpool.cache.policy_module import innermost_line
from kvpool.cache.table import KEYED
from kvpool.errors import PolicyError

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex

_HOOKS = (
    "grown", "evictable", "taken", "sheltered", "removed", "victim", "victims", "looked_up", "answered", "admit",
    "stored",
)  # fmt: skip


def make_policy(name: str, index: CacheIndex) -> CacheEvictionPolicy:
    """Return a policy of that name for an index; one that is not built in is guarded.

    Raises
    ------
    UnknownPolicyError
        If there is none of that name.
    PolicyError
        If it cannot be made, or what was made is no policy.
    """
    factory = find_policy(name)
    if factory.__module__ in BUILT_IN:
        return factory(index)
    try:
        policy = factory(index)
    except Exception as error:
        note_failure(name)
        raise PolicyError(
            f"policy {name!r} could not be made: {_text(error, factory.__module__)} (it is made by calling it with the "
            "index)",
            asked=name,
        ) from error
    missing = [hook for hook in _HOOKS if not callable(getattr(policy, hook, None))]
    if missing:
        note_failure(name)
        raise PolicyError(
            f"policy {name!r} could not be made: {policy!r} is no eviction policy, it has no {', '.join(missing)}; "
            "return a LeafFirst, or an instance of a class that inherits CacheEvictionPolicy",
            asked=name,
        )
    return GuardedPolicy(plain_name(name), policy, index, factory.__module__)


class GuardedPolicy(CacheEvictionPolicy):
    """Passes everything on to a policy, and checks what comes back.

    Parameters
    ----------
    name
        Of the policy, for messages.
    policy
        Which decides.
    index
        The index it serves.
    module
        Name of the module that its code is in: of an error, messages tell the line there.
    """

    def __init__(self, name: str, policy: CacheEvictionPolicy, index: CacheIndex, module: str) -> None:
        self._name = name
        self._module = module
        self._policy = policy
        self._index = index
        self._now = 0.0
        self._replaced = 0  # how often another policy took over

    # What is told: the index has changed by then, so that a policy which takes over reads it from the columns.

    def grown(self, rows: int) -> None:
        self._tell("grown", rows)

    def evictable(self, rows: Sequence[int], now: float) -> None:
        self._now = now
        self._tell("evictable", rows, now)

    def taken(self, rows: Sequence[int], now: float) -> None:
        self._now = now
        self._tell("taken", rows, now)

    def removed(self, rows: Sequence[int]) -> None:
        self._tell("removed", rows)

    def looked_up(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> None:
        self._now = now
        self._tell("looked_up", space, hashes, rows, now)

    def answered(
        self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], output_tokens: int, now: float
    ) -> None:
        self._now = now
        self._tell("answered", space, hashes, rows, output_tokens, now)

    def stored(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> None:
        self._now = now
        self._tell("stored", space, hashes, rows, now)

    def _tell(self, hook: str, *arguments: Any) -> None:
        try:
            getattr(self._policy, hook)(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever somebody's code raises
            self._fail(hook, error)

    def sheltered(self, row: int) -> None:
        try:
            self._policy.sheltered(row)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail("sheltered", error)
            self._policy.sheltered(row)  # the child is not in the columns yet

    # What is asked: one that takes over answers in its place.

    def victim(self) -> int:
        wrong: Exception | str
        try:
            row = self._policy.victim()
            wrong = "" if row == -1 else self._why_not(row, lambda row: self._index.children[row])
        except Exception as error:  # noqa: BLE001 - as above
            wrong = error
        if not wrong:
            return row
        self._fail("victim", wrong)
        return self._policy.victim()

    def victims(self, partition: int) -> Iterator[int]:
        index, policy = self._index, self._policy
        gone: set[int] = set()
        children_gone: dict[int, int] = {}
        wrong: Exception | str = ""
        try:
            for row in policy.victims(partition):
                if self._policy is not policy:  # it failed elsewhere since: another one decides here, too
                    break
                wrong = self._why_not(row, lambda row: index.children[row] - children_gone.get(row, 0))
                if not wrong and row in gone:
                    wrong = f"row {row} twice"
                if not wrong and index.partition[row] != partition:
                    wrong = f"row {row}, which lies in partition {index.partition[row]}, for partition {partition}"
                if wrong:
                    break
                gone.add(row)
                above = index.parent[row]
                if above >= 0:
                    children_gone[above] = children_gone.get(above, 0) + 1
                yield row
            else:
                if self._policy is policy:
                    return
        except Exception as error:  # noqa: BLE001 - as above
            wrong = error
        if self._policy is policy:
            self._fail("victims", wrong)
        # Those that were given go before these, so each still goes after its children.
        yield from (row for row in self._policy.victims(partition) if row not in gone)

    def worth(self, row: int) -> tuple[int, tuple[Any, ...]]:
        # What was asked before it failed is not compared with what is asked after that.
        wrong: Exception | str
        try:
            found = self._policy.worth(row)
            wrong = _why_no_worth(found)
        except Exception as error:  # noqa: BLE001 - as above
            wrong = error
        if wrong:
            self._fail("worth", wrong)
            found = self._policy.worth(row)
        return self._replaced, found if isinstance(found, tuple) else (found,)

    def admit(
        self,
        space: int,
        hashes: Sequence[BlockHash],
        rows: Sequence[int],
        partitions: Sequence[int],
        size_bytes: int,
        short: int,
        now: float,
    ) -> int:
        self._now = now
        missing = len(hashes) - len(rows)
        wrong: Exception | str = ""
        try:
            count = self._policy.admit(space, hashes, rows, partitions, size_bytes, short, now)
            if not isinstance(count, int) or not 0 <= count <= missing:
                wrong = f"it returned {count!r}, where 0 to {missing} blocks can be admitted"
        except Exception as error:  # noqa: BLE001 - as above
            wrong = error
        if not wrong:
            return count
        self._fail("admit", wrong)
        return self._policy.admit(space, hashes, rows, partitions, size_bytes, short, now)

    def _why_not(self, row: Any, children_left: Callable[[int], int]) -> str:
        """Say why a row may not go; empty if it may."""
        index = self._index
        if not isinstance(row, int) or not 0 <= row < len(index.flags):
            return f"it gave {row!r}, which is no row"
        if index.pins[row] or not index.flags[row] & KEYED:
            return f"it gave row {row}, which is not evictable"
        if children_left(row):
            return f"it gave row {row} before its children"
        return ""

    def _fail(self, hook: str, wrong: Exception | str) -> None:
        """Report it, once; if that raises nothing, another policy is in charge from now on, here too.

        Raises
        ------
        PolicyError
            Where it was not put in charge yet, or nothing takes its place.
        """
        note_failure(self._name)
        text = wrong if isinstance(wrong, str) else _text(wrong, self._module)
        error = PolicyError(f"policy {self._name!r} failed in {hook}(): {text}", asked=self._name, hook=hook)
        error.__cause__ = wrong if isinstance(wrong, Exception) else None
        if self._index.policy is not self:
            raise error
        self._index.policy_failed(error, self._now)
        self._policy = self._index.policy  # who holds this one goes on with that
        self._replaced += 1


def _why_no_worth(found: Any) -> str:
    """Say why what a policy returned cannot be compared with what others are worth; empty if it can."""
    for part in found if isinstance(found, tuple) else (found,):
        if not isinstance(part, Real):
            return f"it returned {found!r}, where a number or a tuple of numbers is compared with others"
        if part != part:
            return "it returned NaN"
    return ""


def _text(error: Exception, module: str) -> str:
    text = error.message if isinstance(error, PolicyError) else f"{type(error).__name__}: {error}"
    return text + innermost_line(error, module)
