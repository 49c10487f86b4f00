"""Waiting lines: by priority, then first come, first served; with a deadline for each and a bound for all."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from kvpool.errors import ConfigError, QueueFullError, UnknownCacheError, ensure

T = TypeVar("T")

#: Names one waiting request. Ascending, never used for another.
Ticket: TypeAlias = int


Rank: TypeAlias = tuple[int, Ticket]
"""Where a ticket stands: by priority, the highest first, then in the order they came. The lower goes first."""


class _Waiting(NamedTuple, Generic[T]):
    item: T
    deadline: float
    rank: Rank
    line: Hashable


class TicketQueue(Generic[T]):
    """Items in lines, by priority and in the order they came, each until its deadline.

    O(log n) or less, but for :meth:`items`, and O(lines) for :meth:`heads`.

    Parameters
    ----------
    limit
        Most items that may wait.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ConfigError(f"a queue needs a limit of at least 1, not {limit}", limit=limit)
        self.limit = limit
        self._next = 1
        self._items: dict[Ticket, _Waiting[T]] = {}
        #: Heaps of ranks, by line, and of (deadline, ticket). What left the queue stays in them until it surfaces, or
        #: until such entries outnumber the others.
        self._lines: dict[Hashable, list[Rank]] = {}
        self._deadlines: list[tuple[float, Ticket]] = []

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._items

    def put(self, item: T, deadline: float, priority: int = 0, line: Hashable = None) -> Ticket:
        """Let ``item`` wait in a line until ``deadline`` (seconds, on the caller's clock), behind its equals.

        Raises
        ------
        QueueFullError
            If ``limit`` items wait already.
        """
        if len(self._items) >= self.limit:
            raise QueueFullError(
                f"{len(self._items)} requests wait already, the limit is {self.limit}: try again later",
                waiting=len(self._items),
                limit=self.limit,
            )
        ticket = self._next
        self._next += 1
        self._insert(_Waiting(item, deadline, (-priority, ticket), line))
        return ticket

    def put_back(self, ticket: Ticket, item: T, deadline: float, priority: int = 0, line: Hashable = None) -> None:
        """Let an item that was popped wait again, in its old place. The limit does not count for it.

        Raises
        ------
        UnknownCacheError
            If the ticket was never given out.
        """
        if not 0 < ticket < self._next:
            raise UnknownCacheError(f"ticket {ticket} was never given out here", ticket=ticket)
        self._insert(_Waiting(item, deadline, (-priority, ticket), line))

    def next_rank(self, priority: int) -> Rank:
        """Return where the next one of a priority would stand."""
        return -priority, self._next

    def heads(self) -> list[tuple[Rank, Hashable]]:
        """Return the first of each line, with its line, in order."""
        found = [(self.first(line), line) for line in list(self._lines)]
        return sorted(((rank, line) for rank, line in found if rank is not None), key=lambda head: head[0])

    def first(self, line: Hashable) -> Rank | None:
        """Return who is first in a line, None if nobody waits there."""
        ranks = self._lines.get(line)
        while ranks:
            if ranks[0][1] in self._items:
                return ranks[0]
            heapq.heappop(ranks)
        self._lines.pop(line, None)
        return None

    def head(self) -> tuple[Ticket, T]:
        """Return the item that is first of all that wait, and leave it there. Somebody must wait."""
        heads = self.heads()
        ensure(heads, "somebody waits")
        ticket = heads[0][0][1]
        return ticket, self._items[ticket].item

    def get(self, ticket: Ticket) -> T | None:
        """Return the item of ``ticket``, ``None`` if it does not wait."""
        found = self._items.get(ticket)
        return None if found is None else found.item

    def items(self) -> Iterator[tuple[Ticket, T]]:
        """Iterate over all that wait, in no particular order. O(n)."""
        return ((ticket, waiting.item) for ticket, waiting in self._items.items())

    def pop(self, ticket: Ticket) -> T:
        """Remove the item of ``ticket`` and return it.

        Raises
        ------
        UnknownCacheError
            If it does not wait (any more).
        """
        try:
            return self._items.pop(ticket).item
        except KeyError:
            raise UnknownCacheError(
                f"ticket {ticket} does not wait: it was served, cancelled, expired or never given out", ticket=ticket
            ) from None

    def cancel(self, ticket: Ticket) -> T | None:
        """Remove the item of ``ticket``; ``None`` if it left before (served or expired: a race, no error)."""
        found = self._items.pop(ticket, None)
        return None if found is None else found.item

    def expired(self, now: float) -> list[tuple[Ticket, T]]:
        """Remove and return what waited until its deadline, ``deadline <= now``, earliest deadline first."""
        late = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            _, ticket = heapq.heappop(self._deadlines)
            late.append((ticket, self._items.pop(ticket).item))
        return late

    def next_deadline(self) -> float | None:
        """Return the earliest deadline of all that wait, or ``None``."""
        while self._deadlines and not self._is_current(*self._deadlines[0]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def check(self) -> None:
        """Prove that whatever waits is in the line and has its deadline.

        Raises
        ------
        InvariantError
            If not.
        """
        lines = {line: set(ranks) for line, ranks in self._lines.items()}
        ensure(all(each.rank in lines[each.line] for each in self._items.values()), "each item is in its line")
        known = set(self._deadlines)
        ensure(all((w.deadline, each) in known for each, w in self._items.items()), "each item has its deadline")

    def _insert(self, waiting: _Waiting[T]) -> None:
        ticket = waiting.rank[1]
        self._items[ticket] = waiting
        ranks = self._lines.setdefault(waiting.line, [])
        heapq.heappush(ranks, waiting.rank)
        heapq.heappush(self._deadlines, (waiting.deadline, ticket))
        bound = 2 * len(self._items) + 64
        if len(ranks) > bound:
            ranks[:] = sorted({rank for rank in ranks if rank[1] in self._items})  # sorted is a heap
        if len(self._deadlines) > bound:
            self._deadlines = sorted((w.deadline, each) for each, w in self._items.items())

    def _is_current(self, deadline: float, ticket: Ticket) -> bool:
        found = self._items.get(ticket)
        return found is not None and found.deadline == deadline
