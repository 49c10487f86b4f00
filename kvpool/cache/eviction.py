"""What every eviction policy answers, and the names under which policies are known.

The index tells the policy which caches may go; the policy says which of them is worth least. Mechanism (tables, keys,
pins) stays in the index, worth stays in the policy, so a new policy is one function or class with one name::

    @register_policy("mru")
    def most_recent_first(index: CacheIndex) -> CacheEvictionPolicy:
        return LeafFirst(index, worth=lambda row, now: -now)
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

from kvpool.cache.key import BlockHash
from kvpool.cache.policy_module import has_changed, import_own, innermost_line, was_imported
from kvpool.errors import ConfigError, UnknownPolicyError

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex


class CacheEvictionPolicy(Protocol):
    """Ranks the caches that may go. Made with the index it serves, whose columns it may read at any time.

    One of your own is asked through :class:`~kvpool.cache.guarded_policy.GuardedPolicy`, which checks what it answers.

    It hears of a row only while the row is *evictable*: published under a key and held by no lease. A victim is
    evictable and has no resident child, for a child without its parent could never be hit again.
    Rows come in batches in the order of the chain: tail first when they become evictable, so that a chain loses its
    tail before its root; times (``now``) are seconds of the caller's clock and never decrease.
    """

    @abstractmethod
    def grown(self, rows: int) -> None:
        """The index's table has ``rows`` rows from now on."""
        ...

    @abstractmethod
    def evictable(self, rows: Sequence[int], now: float) -> None:
        """These rows lost their last pin.

        A policy that takes over from another one is given all that is evictable in one batch, in order of last access.
        """
        ...

    @abstractmethod
    def taken(self, rows: Sequence[int], now: float) -> None:
        """These evictable rows are pinned again."""
        ...

    @abstractmethod
    def sheltered(self, row: int) -> None:
        """This evictable row got a resident child that is not evictable."""
        ...

    @abstractmethod
    def removed(self, rows: Sequence[int]) -> None:
        """These rows, evictable or not, have left the table. Their columns can still be read; counts are up to date."""
        ...

    @abstractmethod
    def victim(self) -> int:
        """Return the row worth least of all that may go, or -1. Changes nothing."""
        ...

    @abstractmethod
    def victims(self, partition: int) -> Iterator[int]:
        """Yield the rows of one partition in the order in which they would go.

        A partition (the column of that name) is a device, or what a model or tenant with a quota has there; a chain
        never lies in two partitions of one device. Each row may go once those before it have gone. Nothing is changed,
        and nothing may change while it is consumed.
        """
        ...

    @abstractmethod
    def worth(self, row: int) -> Any:
        """Return what orders the next victims of different partitions: a number, or a tuple of numbers.

        The lowest goes first.
        """
        ...

    # Requests. Who ranks caches without regard to them inherits the answers below.

    def looked_up(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> None:
        """A request asks for the chain ``hashes``, whose leading run lies in ``rows``; these are about to be pinned."""
        return

    def answered(
        self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], output_tokens: int, now: float
    ) -> None:
        """The request for the chain ``hashes``, whose leading run lies in ``rows``, got an answer of so many tokens."""
        return

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
        """Return how many of the chain's missing blocks are worth the room.

        ``rows`` is its leading run, pinned; each of the blocks behind it takes ``size_bytes`` in one of ``partitions``,
        where memory for the last ``short`` of them can only be had from victims.
        """
        return len(hashes) - len(rows)

    def stored(self, space: int, hashes: Sequence[BlockHash], rows: Sequence[int], now: float) -> None:
        """The new caches in ``rows`` are blocks of the chain ``hashes``; they are pinned until they are sealed."""
        return


PolicyFactory = Callable[["CacheIndex"], CacheEvictionPolicy]
_Factory = TypeVar("_Factory", bound=PolicyFactory)

BUILT_IN = (
    "kvpool.cache.adaptive",
    "kvpool.cache.lfu",
    "kvpool.cache.lru",
    "kvpool.cache.size_aware_lru",
)
"""Modules of policies, imported when policies are first asked for: they import this one."""


class _Named(NamedTuple):
    """What makes the policy of a name, and whether one that it made, or should have made, failed."""

    factory: PolicyFactory
    failed: bool = False


_POLICIES: dict[str, _Named] = {}

_WHERE_MODULES_LIE = (
    "'kvpool simulate' looks on its Python path and in its working directory; for a pool it must be installed or on "
    "the PYTHONPATH of Ray's processes (the caller's does not count, nor its directory)"
)


def register_policy(name: str) -> Callable[[_Factory], _Factory]:
    """Class decorator: make a policy known under ``name`` (compared without case).

    One of the same module and class name takes the place of that before (a cell of a notebook that is run again).

    Raises
    ------
    ConfigError
        If another policy has that name.
    """

    def register(factory: _Factory) -> _Factory:
        before = _POLICIES.get(name.lower())
        if before is not None and _origin(before.factory) != _origin(factory):
            raise ConfigError(
                f"an eviction policy named {name!r} exists already, in module {_origin(before.factory)[0]!r}: choose "
                "another name",
                asked=name,
            )
        if before is None or before.factory is not factory:  # else it fails as before, if it did
            _POLICIES[name.lower()] = _Named(factory)
        return factory

    return register


def _origin(factory: PolicyFactory) -> tuple[str | None, str | None]:
    return getattr(factory, "__module__", None), getattr(factory, "__qualname__", None)


def policy_names() -> list[str]:
    """Return the names of all eviction policies as they are to be given, sorted: ``module:name`` if not built in."""
    for module in BUILT_IN:
        import_module(module)
    origins = {name: _origin(named.factory)[0] for name, named in _POLICIES.items()}
    return sorted(
        (name if origin is None or origin in BUILT_IN else f"{origin}:{name}" for name, origin in origins.items()),
        key=lambda name: (":" in name, name),
    )


def plain_name(name: str) -> str:
    """Return the name by which a policy is shown and compared: ``ADAPTIVE`` is ``adaptive``."""
    return name if ":" in name else name.lower()


def load_present_code(name: str) -> None:
    """Import the module of that policy once more if its file has changed since it was imported.

    What it registered before is forgotten; policies that were made of it are not touched. Modules that it imports
    stay as they are.

    Raises
    ------
    UnknownPolicyError
        If it can no longer be imported; what it registered before stays.
    """
    module = name.rpartition(":")[0]
    if not module and name.lower() in _POLICIES:
        origin = _origin(_POLICIES[name.lower()].factory)[0]
        module = origin if origin is not None and was_imported(origin) else ""
    if has_changed(module):
        _import(name, module)


def find_policy(name: str) -> PolicyFactory:
    """Return what makes the policy of that name.

    A name of the form ``module:name`` imports the module first, which registers the policy; so one that is not built in
    is known wherever its module can be imported, in the pool actor too. Where the module registers none of that name,
    its attribute of that name is the factory. A module that is imported is taken as it is: see
    :func:`load_present_code`.

    Raises
    ------
    UnknownPolicyError
        If there is none; names those that exist.
    """
    module, _, name_there = name.rpartition(":")
    attribute = None
    if module:
        attribute = getattr(sys.modules[module] if module in sys.modules else _import(name, module), name_there, None)
    names = policy_names()
    named = _POLICIES.get(name_there.lower())
    if named is not None:
        return named.factory
    if callable(attribute):
        return cast(PolicyFactory, attribute)
    if module:
        raise UnknownPolicyError(
            f"no eviction policy is named {name!r}: module {module!r} registers none of that name, and has no such "
            "attribute that could make one",
            asked=name,
            possible=names,
        )
    bare = {known.rpartition(":")[2]: known for known in names if _may_be_meant(known)}
    near = get_close_matches(name_there.lower(), bare, 1)
    raise UnknownPolicyError(
        f"no eviction policy is named {name!r}{f' (did you mean {bare[near[0]]!r}?)' if near else ''}: there is "
        f"{', '.join(names)}",
        asked=name,
        possible=names,
    )


def note_failure(name: str) -> None:
    """Note that the policy of that name failed, or could not be made."""
    known = name.rpartition(":")[2].lower()
    if known in _POLICIES:
        _POLICIES[known] = _POLICIES[known]._replace(failed=True)


def _may_be_meant(name: str) -> bool:
    """Whether a policy is worth suggesting: it did not fail, and what its module's file says now was imported."""
    module, _, name_there = name.rpartition(":")
    return not _POLICIES[name_there].failed and not (module and has_changed(module))


def _import(name: str, module: str) -> ModuleType:
    """Import the module of a policy; if that fails, what it registered before is all that is left of it."""
    if "/" in module or module.endswith(".py"):
        stem = module.rpartition("/")[2].removesuffix(".py")
        raise UnknownPolicyError(
            f"policy {name!r} names a file: write module:name, as in '{stem}:{name.rpartition(':')[2]}', and call it "
            f"where the module lies: {_WHERE_MODULES_LIE}",
            asked=name,
        )
    before = _registered_by(module)
    for known in before:
        del _POLICIES[known]
    try:
        return import_own(module)
    except Exception as error:
        for known in _registered_by(module):
            del _POLICIES[known]
        _POLICIES.update(before)
        why = f"{type(error).__name__}: {error}{innermost_line(error, module)}"
        if not isinstance(error, ImportError):
            why = f"which fails as it is imported: {why}"
        else:
            why = f"which the process that decides by it cannot import ({why}): {_WHERE_MODULES_LIE}"
        raise UnknownPolicyError(f"policy {name!r} needs module {module!r}, {why}", asked=name) from error


def _registered_by(module: str) -> dict[str, _Named]:
    return {known: named for known, named in _POLICIES.items() if _origin(named.factory)[0] == module}
