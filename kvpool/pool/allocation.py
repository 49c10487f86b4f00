"""Requests for memory: where a new cache goes, what is evicted for it, and who waits.

Placement and eviction are decided together, here, where every lookup and every chain is seen; one operation carries
both to the device. A device may still find less room than the books say (a hole may lie in another tenant's page):
it answers with the shortage, and the rest is planned again with more victims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kvpool.errors import (
    AddressSpaceError,
    InvalidRequestError,
    InvalidSizeError,
    KvpoolError,
    LimitError,
    QueueFullError,
    ensure,
)
from kvpool.memory.tickets import Ticket, TicketQueue
from kvpool.pool.instructions import Answer, Batch, Grant, Waited, distinct
from kvpool.pool.ledger import Ledger
from kvpool.pool.requests import CacheRequest, Orders
from kvpool.pool.room import Room
from kvpool.sizes import format_size

if TYPE_CHECKING:
    from kvpool.pool.backing import BackingChanges


class Allocations:
    """Decides on requests for memory.

    Parameters
    ----------
    ledger
        The pool's books.
    room
        Finds it.
    queue_limit
        How many requests may wait at once.
    """

    def __init__(self, ledger: Ledger, room: Room, queue_limit: int) -> None:
        self._ledger = ledger
        self._room = room
        self.queue: TicketQueue[CacheRequest] = TicketQueue(queue_limit)
        self._queue_limit = queue_limit
        self._first_to_retry = False
        self.changes: BackingChanges
        """Decides on requests to change a cache; set by itself."""

    # -- whole caches ---------------------------------------------------------------------------------------------

    def request_caches(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """Decide on a batch of asked-for caches; each is granted, queued or refused."""
        ledger = self._ledger
        client = ledger.client(client_id)
        ledger.counters.requests += len(items)
        orders = Orders()
        checked: tuple[Any, ...] | None = None  # what a batch asks for is mostly the same thing many times over
        for item, (sequence, model, size_bytes, max_size_bytes, timeout_s, trace) in enumerate(items):
            asked = (model, size_bytes, max_size_bytes, timeout_s)
            try:
                request = CacheRequest(
                    client, ledger.model(client, model), sequence, size_bytes, max_size_bytes, timeout_s,
                    now + timeout_s, batch, item, trace, now, born=ledger.invalidations,
                )  # fmt: skip
                if asked != checked:
                    self._check(request)
                    checked = asked
            except KvpoolError as error:
                self._ledger.refuse(batch, item, error)
                continue
            if self.queue or not self._plan(request, orders, now):
                self._wait(request, now)
        self._send(orders)

    def _check(self, request: CacheRequest) -> None:
        size_bytes, max_size_bytes, model = request.size_bytes, request.max_size_bytes, request.model
        check_timeout(request.timeout_s)
        if size_bytes <= 0 or max_size_bytes < size_bytes:
            raise InvalidSizeError(
                f"a cache needs 0 < size <= max_size, asked for size={size_bytes}, max_size={max_size_bytes}",
                asked_bytes=size_bytes,
            )
        if model.limit_bytes is not None and max_size_bytes > model.limit_bytes:
            raise LimitError(
                f"asked for {format_size(max_size_bytes)}, but model {model.name!r} may have at most "
                f"{format_size(model.limit_bytes)}: ask for less, or register the model with a higher limit",
                asked_bytes=max_size_bytes,
                limit_bytes=model.limit_bytes,
            )
        devices = self._ledger.usable(request.client)
        largest = max(device.capacity_bytes for device in devices)
        if size_bytes > largest:
            raise InvalidSizeError(
                f"asked for {format_size(size_bytes)}, but the largest device that this process can use has "
                f"{format_size(largest)}: ask for less, or start the pool with larger devices",
                asked_bytes=size_bytes,
                largest_bytes=largest,
            )
        if not any(device.can_grow_to(size_bytes, max_size_bytes) for device in devices):
            raise InvalidSizeError(
                f"asked for addresses to grow to {format_size(max_size_bytes)}, but the devices reserve at most "
                f"{format_size(max(device.arena_bytes for device in devices))}: ask for less, or raise arena_factor",
                asked_bytes=max_size_bytes,
            )

    def _plan(self, request: CacheRequest, orders: Orders, now: float) -> bool:
        """Find room for a request and write it into the orders; False if there is none now."""
        if not request.shortages:
            request.news = self._room.news
        if request.change is not None:
            return self.changes.plan(request, request.change, orders)
        found = self._room.find(request.client, request.size_bytes, request.max_size_bytes, request.shortages)
        if found is None:
            return False
        device, evict = found
        index = self._ledger.index
        row = self._ledger.add(
            request.client, request.model.space, device, request.size_bytes, request.max_size_bytes, -1, now,
            born=request.born,
        )  # fmt: skip
        orders.put(device.number, evict, index.id_of(row), request)
        return True

    def _send(self, orders: Orders) -> None:
        for (client, device, size_bytes, max_size_bytes), (ids, requests) in orders.groups.items():
            first = requests[0]
            evict = orders.evict.pop(device, [])
            operation = (
                "allocate", client, first.sequence, first.client.tenant, ids, size_bytes, max_size_bytes, evict,
            )  # fmt: skip
            traces = distinct(request.trace for request in requests)
            self._ledger.send(device, operation, partial(self._caches_placed, device, ids, requests), traces)
        for change, request in orders.changes:
            self.changes.send(change, request, orders.evict.pop(change.device, []))

    def _caches_placed(
        self, device: int, ids: list[int], requests: list[CacheRequest], answer: Answer, now: float
    ) -> None:
        if answer[0] == "error":
            for cache_id, request in zip(ids, requests, strict=True):
                self._ledger.forget(cache_id)
                self.deliver(request, answer)
            self.retry(now)
            return
        places, _refused, shortage = answer
        self._ledger.counters.grants += len(places)
        for request, cache_id, place in zip(requests, ids, places, strict=False):
            request.model.caches += 1
            self.deliver(request, ("granted", cache_id, device, request.size_bytes, request.max_size_bytes, place))
        if shortage is None:
            return
        for cache_id in ids[len(places) :]:
            self._ledger.forget(cache_id)
        if shortage.get("class") == AddressSpaceError.__name__:  # evicting would free memory, which is not short
            for request in requests[len(places) :]:
                self.deliver_error(request, AddressSpaceError(shortage["message"], **shortage["details"]))
            self._room.changed = True
            return
        self.plan_again(requests[len(places) :], device, now)

    def submit(self, requests: Sequence[CacheRequest], now: float) -> None:
        """Decide on requests that came: those that need memory wait behind those that wait."""
        orders = Orders()
        for request in requests:
            if (self.queue and request.size_bytes) or not self._plan(request, orders, now):
                self._wait(request, now)
        self._send(orders)

    def plan_again(self, requests: Sequence[CacheRequest], device: int, now: float) -> None:
        """Find room for requests for which a device had less than the books say."""
        orders = Orders()
        for request in requests:
            request.shortages[device] = request.shortages.get(device, 0) + 1
            if not self._plan(request, orders, now):
                self._wait(request, now)
        self._send(orders)
        if self.queue:
            # Who is first in line may have passed this device over, because the books gave it to others, behind it.
            first, _ = self.queue.head()
            behind = [r for r in requests if r.ticket is None or r.ticket > first]
            self._first_to_retry |= bool(behind)

    def deliver(self, request: CacheRequest, answer: Answer) -> None:
        """Answer a request, where it is waited for."""
        if request.batch is None:
            ensure(request.ticket is not None, "a request without a batch has a ticket")
            self._ledger.out.append(Grant(request.client.id, request.ticket or 0, answer))
            self._waited(request, answer[1] if answer[0] == "error" else "granted")
        else:
            self._ledger.answer(request.batch, request.item, answer)

    def _waited(self, request: CacheRequest, outcome: str) -> None:
        self._ledger.out.append(Waited(request.model.number, request.asked, request.queued, outcome, request.trace))

    def deliver_error(self, request: CacheRequest, error: KvpoolError) -> None:
        """Answer a request with an error, and count it."""
        self._ledger.counters.refusals += 1
        self._ledger.count_error(error)
        self.deliver(request, ("error", *error.to_wire()))

    # -- waiting --------------------------------------------------------------------------------------------------

    def _wait(self, request: CacheRequest, now: float) -> None:
        request.shortages.clear()
        if self._ledger.clients.get(request.client.id) is not request.client:
            # It ended while the device looked for room. Nobody would take what comes, and others stand behind.
            self.deliver(request, ("error", *self._ledger.not_connected(request.client.id).to_wire()))
            self._room.changed = True
            return
        if request.ticket is not None:  # it waited before: its place in the line is kept
            self.queue.put_back(request.ticket, request, request.deadline)
            self._room.changed |= request.news != self._room.news  # perhaps where it had been short
            return
        self._room.changed = True
        if request.deadline <= now:
            self.deliver_error(request, self._room.capacity_error(request, "there is no room now"))
            return
        try:
            request.ticket = self.queue.put(request, request.deadline)
        except QueueFullError:
            error = QueueFullError(
                f"asked for {format_size(request.size_bytes)}; there is no room, and {self._queue_limit} requests wait "
                "already: retry later, or raise queue_limit",
                asked_bytes=request.size_bytes,
                queue_limit=self._queue_limit,
            )
            self.deliver_error(request, error)
            return
        request.queued = now
        batch, request.batch = request.batch, None
        if batch is not None:
            self._ledger.answer(batch, request.item, ("queued", request.ticket))

    def retry(self, now: float) -> None:
        """Grant waiting requests, first come first served, as far as memory allows now. Call it when room came free."""
        self._room.news += 1
        self._try_waiting(now, self._queue_limit)

    def _try_waiting(self, now: float, most: int) -> None:
        orders = Orders()
        for _ in range(min(most, len(self.queue))):
            ticket, request = self.queue.head()
            if not self._plan(request, orders, now):
                break
            self.queue.pop(ticket)
        self._send(orders)

    def follow_up(self, now: float) -> None:
        """Try who waits again if a decision on somebody else made room on the way. For the end of each event."""
        while self._room.changed or self._first_to_retry:
            most = self._queue_limit if self._room.changed else 1  # all of them would take each other's room in turns
            self._room.changed = self._first_to_retry = False
            self._try_waiting(now, most)

    def expire(self, now: float) -> None:
        """Answer the requests whose deadline has passed."""
        for _, request in self.queue.expired(now):
            error = self._room.capacity_error(request, f"there was no room within {request.timeout_s:g} s")
            self.deliver_error(request, error)

    def cancel(self, client: str, tickets: Sequence[int]) -> None:
        """Forget waiting requests of a client."""
        for ticket in map(Ticket, tickets):
            request = self.queue.get(ticket)
            if request is not None and request.client.id == client:
                self.queue.cancel(ticket)
                self._waited(request, "cancelled")

    def refuse_client(self, client: str, error: KvpoolError) -> None:
        """Answer all waiting requests of a client with an error."""
        for ticket, request in list(self.queue.items()):
            if request.client.id == client:
                self.queue.pop(ticket)
                self.deliver(request, ("error", *error.to_wire()))

    def cancel_client(self, client: str) -> None:
        """Forget all waiting requests of a client that is gone."""
        self.cancel(client, [ticket for ticket, request in self.queue.items() if request.client.id == client])


def check_timeout(timeout_s: float) -> None:
    """Raise :class:`~kvpool.errors.InvalidRequestError` unless somebody can wait so many seconds."""
    if not 0 <= timeout_s < math.inf:
        raise InvalidRequestError(f"a timeout is 0 or more seconds, and ends; asked for {timeout_s}")
