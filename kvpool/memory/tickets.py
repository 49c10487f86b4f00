"""The waiting line: first come, first served, with a deadline for each and a bound for all."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeAlias, TypeVar

from kvpool.errors import ConfigError, QueueFullError, UnknownCacheError, ensure

T = TypeVar("T")

#: Names one waiting request. Ascending, never used for another.
Ticket: TypeAlias = int


class TicketQueue(Generic[T]):
    """Items in the order they came, each until its deadline. O(log n) or less, but for :meth:`items`.

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
        self._items: dict[Ticket, tuple[T, float]] = {}
        #: Heaps of tickets and of (deadline, ticket). What left the queue stays in them until it surfaces, or until
        #: such entries outnumber the others.
        self._line: list[Ticket] = []
        self._deadlines: list[tuple[float, Ticket]] = []

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._items

    def put(self, item: T, deadline: float) -> Ticket:
        """Append ``item``, to wait until ``deadline`` (seconds, on the caller's clock).

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
        self._insert(ticket, item, deadline)
        return ticket

    def put_back(self, ticket: Ticket, item: T, deadline: float) -> None:
        """Let an item that was popped wait again, in its old place. The limit does not count for it.

        Raises
        ------
        UnknownCacheError
            If the ticket was never given out.
        """
        if not 0 < ticket < self._next:
            raise UnknownCacheError(f"ticket {ticket} was never given out here", ticket=ticket)
        self._insert(ticket, item, deadline)

    def head(self) -> tuple[Ticket, T]:
        """Return the item that came first of those that wait, and leave it there. Somebody must wait."""
        ensure(self._items, "somebody waits")
        while self._line[0] not in self._items:
            heapq.heappop(self._line)
        return self._line[0], self._items[self._line[0]][0]

    def get(self, ticket: Ticket) -> T | None:
        """Return the item of ``ticket``, ``None`` if it does not wait."""
        found = self._items.get(ticket)
        return None if found is None else found[0]

    def items(self) -> Iterator[tuple[Ticket, T]]:
        """Iterate over all that wait, in no particular order. O(n)."""
        return ((ticket, item) for ticket, (item, _) in self._items.items())

    def pop(self, ticket: Ticket) -> T:
        """Remove the item of ``ticket`` and return it.

        Raises
        ------
        UnknownCacheError
            If it does not wait (any more).
        """
        try:
            return self._items.pop(ticket)[0]
        except KeyError:
            raise UnknownCacheError(
                f"ticket {ticket} does not wait: it was served, cancelled, expired or never given out", ticket=ticket
            ) from None

    def cancel(self, ticket: Ticket) -> T | None:
        """Remove the item of ``ticket``; ``None`` if it left before (served or expired: a race, no error)."""
        found = self._items.pop(ticket, None)
        return None if found is None else found[0]

    def expired(self, now: float) -> list[tuple[Ticket, T]]:
        """Remove and return what waited until its deadline, ``deadline <= now``, earliest deadline first."""
        late = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            _, ticket = heapq.heappop(self._deadlines)
            late.append((ticket, self._items.pop(ticket)[0]))
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
        ensure(self._items.keys() <= set(self._line), "each item is in the line")
        known = set(self._deadlines)
        ensure(all((when, each) in known for each, (_, when) in self._items.items()), "each item has its deadline")

    def _insert(self, ticket: Ticket, item: T, deadline: float) -> None:
        self._items[ticket] = (item, deadline)
        heapq.heappush(self._line, ticket)
        heapq.heappush(self._deadlines, (deadline, ticket))
        bound = 2 * len(self._items) + 64
        if len(self._line) > bound:
            self._line = sorted(self._items)  # sorted is a heap
        if len(self._deadlines) > bound:
            self._deadlines = sorted((when, each) for each, (_, when) in self._items.items())

    def _is_current(self, deadline: float, ticket: Ticket) -> bool:
        found = self._items.get(ticket)
        return found is not None and found[1] == deadline
