"""The next victims of several partitions, in one order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heapreplace
from typing import Any

from kvpool.cache.eviction import CacheEvictionPolicy
from kvpool.cache.table import NO_ROW


class Heads:
    """The next victim of several partitions, and those behind it; falsy when there is none.

    Parameters
    ----------
    policy
        Ranks them.
    partitions
        Whose victims.
    """

    def __init__(self, policy: CacheEvictionPolicy, partitions: Iterable[int]) -> None:
        self._policy = policy
        self._heads: list[tuple[Any, int, int, Iterator[int]]] = []
        for partition in partitions:
            rows = policy.victims(partition)
            row = next(rows, NO_ROW)
            if row >= 0:
                self._heads.append((policy.worth(row), row, partition, rows))
        heapify(self._heads)

    def __bool__(self) -> bool:
        return bool(self._heads)

    @property
    def row(self) -> int:
        """The one that goes first."""
        return self._heads[0][1]

    @property
    def worth(self) -> Any:
        """What it is worth to the policy."""
        return self._heads[0][0]

    def next(self) -> None:
        """Go on behind it."""
        _, _, partition, rows = self._heads[0]
        row = next(rows, NO_ROW)
        if row >= 0:
            heapreplace(self._heads, (self._policy.worth(row), row, partition, rows))
        else:
            heappop(self._heads)

    def leave(self) -> None:
        """Pass over it and all behind it in its partition."""
        heappop(self._heads)


def victims_of(policy: CacheEvictionPolicy, partitions: Iterable[int]) -> Iterator[int]:
    """Yield the rows of some partitions in the order in which they would go."""
    heads = Heads(policy, partitions)
    while heads:
        yield heads.row
        heads.next()
