"""Requests that wait in line for a device's memory."""

from __future__ import annotations

from collections.abc import Callable

from kvpool.errors import BackendError, CapacityError, ensure
from kvpool.memory.allocation import Allocation, Request
from kvpool.memory.tickets import Ticket, TicketQueue

Allocate = Callable[[Request], Allocation]


class WaitingLine:
    """Requests in the order they came, each until its deadline. Nobody overtakes who waits.

    Parameters
    ----------
    limit
        Most requests that may wait.
    """

    def __init__(self, limit: int) -> None:
        self._queue: TicketQueue[Request] = TicketQueue(limit)
        self._ids: set[int] = set()
        self.next_deadline = self._queue.next_deadline

    def __len__(self) -> int:
        """How many wait."""
        return len(self._queue)

    def __contains__(self, cache_id: int) -> bool:
        """Whether a request for the cache of that id waits."""
        return cache_id in self._ids

    def put(self, request: Request, deadline: float) -> Ticket:
        """Let a request wait behind all others.

        Raises
        ------
        QueueFullError
            If too many wait already.
        """
        ticket = self._queue.put(request, deadline)
        self._ids.add(request.cache_id)
        return ticket

    def poll(
        self, now: float, allocate: Allocate, refuse: Callable[[Request], CapacityError]
    ) -> list[tuple[Ticket, Allocation | CapacityError | BackendError]]:
        """Refuse those whose deadline has come, then allocate for those that fit, in line; returns the answers."""
        answers: list[tuple[Ticket, Allocation | CapacityError | BackendError]] = []
        for ticket, request in self._queue.expired(now):
            self._ids.remove(request.cache_id)
            answers.append((ticket, refuse(request)))
        while self._queue:
            ticket, request = self._queue.head()
            try:
                answers.append((ticket, allocate(request)))
            except CapacityError:
                break
            except BackendError as error:
                answers.append((ticket, error))
            self._queue.pop(ticket)
            self._ids.remove(request.cache_id)
        return answers

    def cancel(self, ticket: Ticket) -> bool:
        """Leave the line. False if the request was answered before (a race, no error)."""
        request = self._queue.cancel(ticket)
        self._ids.difference_update(() if request is None else (request.cache_id,))
        return request is not None

    def check(self) -> None:
        """Raise InvariantError unless the caches of all that wait are known."""
        self._queue.check()
        ensure(len(self._ids) == len(self._queue), "who waits is in the queue")
