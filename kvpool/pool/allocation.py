"""Requests for memory: where a new cache goes, what is evicted for it, and who waits.

Placement and eviction are decided together, here, where every lookup and every chain is seen; one operation carries
both to the device. A device may still find less room than the books say (a hole may lie in another tenant's page):
it answers with the shortage, and the rest is planned again with more victims.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from kvpool.errors import (
    InvariantError,
    KvpoolError,
    QueueFullError,
    ensure,
    from_wire,
)
from kvpool.memory.packing import shares_pages
from kvpool.memory.tickets import Rank, Ticket, TicketQueue
from kvpool.pool.capacity_report import capacity_error
from kvpool.pool.device import Device
from kvpool.pool.instructions import Answer, Batch, Failed, Grant, Waited, distinct
from kvpool.pool.ledger import Ledger
from kvpool.pool.precedence import Precedence
from kvpool.pool.quota import Owner
from kvpool.pool.refusals import Refusals
from kvpool.pool.requests import CacheRequest, Orders, Shortage
from kvpool.pool.room import Room
from kvpool.pool.stepwise import send_stepwise, wants_memory
from kvpool.pool.validation import check_limit, check_request
from kvpool.sizes import format_count, format_size

if TYPE_CHECKING:
    from kvpool.pool.backing import BackingChanges

_DEPARTURES = 32
"""From so many ends of waiting it is reckoned when a place in the queue will be free."""

_LEAST_RETRY_S = 0.001


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
        self.precedence = Precedence(ledger, self.queue)
        self._departures: deque[float] = deque(maxlen=_DEPARTURES)
        self._retry_before: Rank | None = None
        self._refusals = Refusals(ledger, self.deliver_error)
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
        run: list[CacheRequest] = []
        for item, (sequence, model, size_bytes, max_size_bytes, timeout_s, priority, trace) in enumerate(items):
            asked = (model, size_bytes, max_size_bytes, timeout_s, priority)
            try:
                request = CacheRequest(
                    client, ledger.model(client, model), sequence, size_bytes, max_size_bytes, timeout_s,
                    now + timeout_s, batch, item, priority, trace, now, born=ledger.invalidations,
                )  # fmt: skip
                if asked != checked:
                    check_request(self._ledger, request)
            except KvpoolError as error:
                self._ledger.refuse(batch, item, error)
                continue
            if asked != checked:
                self._decide_run(run, orders, now)
                checked, run = asked, []
            run.append(request)
        self._decide_run(run, orders, now)
        self._send(orders)

    def _decide_run(self, run: Sequence[CacheRequest], orders: Orders, now: float) -> None:
        """Decide on requests for the same, as many at once as can be: each is planned or waits."""
        position = 0
        while position < len(run):
            request = run[position]
            most = self.precedence.may_pass(request, len(run) - position)
            decided = self._plan_run(run[position : position + most], orders, now) if most else 0
            if not decided:
                self._wait(request, now)
            position += decided or 1

    def _plan_run(self, run: Sequence[CacheRequest], orders: Orders, now: float) -> int:
        """Find room for the first of some requests for the same; returns for how many, none if there is none now.

        As :meth:`_plan` for one after the other, but many are decided at once: what quotas allow, and what goes for
        them, is then asked once and not for each.
        """
        first = run[0]
        planned = 0
        if len(run) > 1:
            try:
                for device, count, evict in self._find_room_for(first, len(run)):
                    self._place(run[planned : planned + count], device, evict, orders, now)
                    planned += count
            except Exception as error:  # noqa: BLE001 - whatever it is
                self._report_bug(run[planned], error, now)
                return planned + 1
        return planned or int(self._plan(first, orders, now))

    def _find_room_for(self, first: CacheRequest, count: int) -> list[tuple[Device, int, list[int]]]:
        """Return where the first of ``count`` requests for the same go: devices, how many there, what goes there."""
        asked = first.client, first.model, first.size_bytes, first.max_size_bytes, count
        if len(first.client.devices) == 1:
            found = self._room.find_run(*asked)
            return [] if found is None else [found]
        # To leave devices to those who wait to grow there takes a closer look.
        return self._room.find_spread(*asked) if not first.avoided else []

    def _place(self, run: Sequence[CacheRequest], device: Device, evict: list[int], orders: Orders, now: float) -> None:
        first, ledger = run[0], self._ledger
        rows = ledger.add_run(
            first.client, first.model.space, device, first.size_bytes, first.max_size_bytes, len(run), now, first.born,
            first.priority,
        )  # fmt: skip
        for request in run:
            request.news = self._room.clearance.news
        orders.put(device.number, evict, [ledger.index.id_of(row) for row in rows], run)

    def _plan(self, request: CacheRequest, orders: Orders, now: float) -> bool:
        """Find room for a request and write it into the orders; False if there is none now."""
        try:
            return self._find_room(request, orders, now)
        except Exception as error:  # noqa: BLE001 - whatever it is
            self._report_bug(request, error, now)
            return True

    def _report_bug(self, request: CacheRequest, error: Exception, now: float) -> None:
        """Answer a request on which no decision could be made.

        Raised further, the error would keep the orders for those before it from being sent, though the books have them,
        and those behind it from being decided on.
        """
        self._ledger.out.append(Failed(("find room",), error))
        wrong = error if isinstance(error, KvpoolError) else InvariantError(f"finding room failed: {error!r}")
        self.deliver_error(request, wrong, now)

    def _find_room(self, request: CacheRequest, orders: Orders, now: float) -> bool:
        if not request.shortages:
            request.news = self._room.clearance.news
        if request.change is not None:
            return self.changes.plan(request, request.change, orders, now)
        found = self._room.find(
            request.client, request.model, request.size_bytes, request.max_size_bytes, request.shortages,
            request.avoided,
        )  # fmt: skip
        if found is None:
            request.short_of = self._room.at_limit or request.place
            return False
        device, evict = found
        index = self._ledger.index
        row = self._ledger.add(
            request.client, request.model.space, device, request.size_bytes, request.max_size_bytes, now, request.born,
            request.priority,
        )  # fmt: skip
        orders.put(device.number, evict, [index.id_of(row)], [request])
        return True

    def _send(self, orders: Orders) -> None:
        for (client, device, size_bytes, max_size_bytes), (ids, requests) in orders.groups.items():
            first = requests[0]
            evict = orders.evict.pop(device, [])
            operation = (
                "allocate", client, first.sequence, first.client.tenant, ids, size_bytes, max_size_bytes, evict,
            )  # fmt: skip
            traces = distinct(request.trace for request in requests)
            send_stepwise(self._ledger, device, operation, partial(self._caches_placed, device, ids, requests), traces)
        for change, request in orders.changes:
            self.changes.send(change, request, orders.evict.pop(change.device, []))

    def _caches_placed(
        self, device: int, ids: list[int], requests: list[CacheRequest], answer: Answer, now: float
    ) -> None:
        if answer[0] == "error":
            for cache_id, request in zip(ids, requests, strict=True):
                self._ledger.forget(cache_id)
                self.deliver(request, answer, now)
            self.retry(now)
            return
        places, _refused, shortage = answer
        self._ledger.counters.grants += len(places)
        for request, cache_id, place in zip(requests, ids, places, strict=False):
            request.model.caches += 1
            answered = ("granted", cache_id, device, request.size_bytes, request.max_size_bytes, place)
            self.deliver(request, answered, now)
        if shortage is None:
            return
        for cache_id in ids[len(places) :]:
            self._ledger.forget(cache_id)
        if not wants_memory(shortage):
            error = from_wire((shortage["class"], shortage["message"], shortage["details"]))
            for request in requests[len(places) :]:
                self.deliver_error(request, error, now)
            self._room.clearance.changed = True
            return
        for request in requests[len(places) :]:
            request.fits[device] = shortage["details"].get("largest_bytes", 0)
        self.plan_again(requests[len(places) :], device, shortage, now)

    def submit(self, requests: Sequence[CacheRequest], now: float) -> None:
        """Decide on requests that came: those that need memory wait behind those that wait."""
        orders = Orders()
        for request in requests:
            must_wait = self.queue and request.size_bytes and self.precedence.must_wait(request)
            if must_wait or not self._plan(request, orders, now):
                self._wait(request, now)
        self._send(orders)

    def decide_waiting(self, requests: Sequence[CacheRequest], now: float) -> None:
        """Decide at once on those of these requests that wait, wherever they stand, and need no memory any more."""
        orders = Orders()
        for request in requests:
            ticket = request.ticket
            if ticket is not None and self.queue.get(ticket) is request and self._plan(request, orders, now):
                self.queue.pop(ticket)
                self._room.clearance.changed = True  # others stood behind it
        self._send(orders)

    def plan_again(
        self, requests: Sequence[CacheRequest], device: int, shortage: Mapping[str, Any], now: float
    ) -> None:
        """Find room for requests for which a device had less than the books say."""
        orders = Orders()
        largest_bytes, page_bytes = shortage["details"].get("largest_bytes", 0), self._ledger.devices[device].page_bytes
        for request in requests:
            whole = request.change is not None or not shares_pages(
                request.size_bytes, request.max_size_bytes, page_bytes
            )
            # Larger holes are no progress for who needs whole pages.
            request.note_shortage(device, largest_bytes // page_bytes * page_bytes if whole else largest_bytes)
            # What lies there is not to make way for who has left.
            if self._ledger.has_left(request.client) or not self._plan(request, orders, now):
                self._wait(request, now)
        self._send(orders)
        if self.queue:
            # Who is first in a line may have passed this device over, because the books gave it to others.
            ranks = [self.precedence.rank_of(request) for request in requests]
            self._retry_before = max(ranks if self._retry_before is None else [self._retry_before, *ranks])

    def deliver(self, request: CacheRequest, answer: Answer, now: float) -> None:
        """Answer a request, where it is waited for."""
        if request.change is not None:
            self.changes.ended(request, request.change)
        if request.batch is None:
            ensure(request.ticket is not None, "a request without a batch has a ticket")
            self._ledger.out.append(Grant(request.client.id, request.ticket or 0, answer))
            self._departures.append(now)
            self._waited(request, answer[1] if answer[0] == "error" else "granted")
        else:
            self._ledger.answer(request.batch, request.item, answer)

    def _waited(self, request: CacheRequest, outcome: str) -> None:
        self._ledger.out.append(Waited(request.model.number, request.asked, request.queued, outcome, request.trace))

    def deliver_error(self, request: CacheRequest, error: KvpoolError, now: float) -> None:
        """Answer a request with an error, and count it."""
        self._ledger.counters.refusals += 1
        self._ledger.count_error(error)
        self.deliver(request, ("error", *error.to_wire()), now)

    # -- waiting --------------------------------------------------------------------------------------------------

    def _wait(self, request: CacheRequest, now: float) -> None:
        request.shortages.clear()
        if request.ticket is not None:
            request.refused, request.short_of = self._room.clearance.news, request.place
        if self._ledger.has_left(request.client):
            # It ended while the device looked for room. Nobody would take what comes, and others stand behind.
            self.deliver(request, ("error", *self._ledger.not_connected(request.client.id).to_wire()), now)
            self._room.clearance.changed = True
            return
        try:
            self._check_waiting(request)  # a limit may have been lowered while the device looked for room
        except KvpoolError as never:
            self.deliver_error(request, never, now)
            self._room.clearance.changed = True
            return
        if request.ticket is not None:  # it waited before: its place in the line is kept
            self.queue.put_back(
                request.ticket, request, request.deadline, request.priority, self.precedence.line_of(request)
            )
            self._room.clearance.changed |= request.news != self._room.clearance.news  # perhaps where it had been short
            return
        self._room.clearance.changed = True
        if request.deadline <= now:
            self._refusals.refuse(request, capacity_error(self._ledger, request, "there is no room now"), now)
            return
        try:
            request.ticket = self.queue.put(
                request, request.deadline, request.priority, self.precedence.line_of(request)
            )
        except QueueFullError:
            retry_after_s = self.retry_after_s(now)
            error = QueueFullError(
                f"asked for {format_size(request.size_bytes)}; there is no room, with "
                f"{format_count(self._queue_limit, 'request')} already waiting: retry in {retry_after_s:.3g} s, "
                "or raise queue_limit",
                asked_bytes=request.size_bytes,
                queue_limit=self._queue_limit,
                retry_after_s=retry_after_s,
            )
            self.deliver_error(request, error, now)
            return
        request.queued = now
        batch, request.batch = request.batch, None
        if batch is not None:
            self._ledger.answer(batch, request.item, ("queued", request.ticket))

    def _check_waiting(self, request: CacheRequest) -> None:
        """Raise what keeps a request from ever being met by now."""
        if request.change is None:
            check_limit(self._ledger, request)
        else:
            self.changes.check_waiting(request, request.change)

    def refuse_above_limits(self, now: float) -> None:
        """Answer those who wait for more than a limit allows by now: they would hold up others for nothing."""
        for ticket, request in list(self.queue.items()):
            try:
                self._check_waiting(request)
            except KvpoolError as error:
                self.queue.pop(ticket)
                self.deliver_error(request, error, now)
                self._room.clearance.changed = True

    def retry_after_s(self, now: float) -> float:
        """Return when a place in the queue may be expected: as fast as the last ones came free, or by a deadline."""
        deadline = self.queue.next_deadline()
        until_s = math.inf if deadline is None else deadline - now
        if self._departures:
            until_s = min(until_s, (now - self._departures[0]) / len(self._departures))
        return max(until_s, _LEAST_RETRY_S)

    def retry(self, now: float) -> None:
        """Grant waiting requests by priority, then in order, as far as memory allows now. Call it when room came free.

        Who waits for its own quota holds up only those who wait for the same, and who waits to grow holds up no new
        cache that has room on another device.
        """
        self._room.clearance.news += 1
        self._try_waiting(now)

    def _try_waiting(self, now: float) -> None:
        if not self.queue:
            return
        orders = Orders()
        heads = self.queue.heads()
        short: set[Shortage] = set()
        while heads:
            (_, ticket), line = heappop(heads)
            request = self.queue.get(ticket)
            if request is None:
                continue
            lacks = self.precedence.lacks(request, short)
            if lacks is not None:
                request.short_of = lacks
            elif self._plan(request, orders, now):
                self.queue.pop(ticket)
                following = self.queue.first(line)
                if following is not None:
                    heappush(heads, (following, line))
            elif request.short_of is not None:
                short.add(request.short_of)
        self._send(orders)

    def _try_heads(self, before: Rank, now: float) -> None:
        """Try the first of each line once a device had no room for one that stands at ``before``.

        Only those that stand before it, or were not refused themselves since room last came free, and only the first
        ones: all of them would take each other's room in turns.
        """
        orders = Orders()
        short: set[Shortage] = set()
        for rank, _ in self.queue.heads():
            request = self.queue.get(rank[1])
            if request is None or self.precedence.lacks(request, short) is not None:
                continue
            may_try = rank < before or request.refused != self._room.clearance.news
            if may_try and self._plan(request, orders, now):
                self.queue.pop(rank[1])
            elif request.short_of is not None:
                short.add(request.short_of)
        self._send(orders)

    def follow_up(self, now: float) -> None:
        """Try who waits again if a decision on somebody else made room on the way. For the end of each event."""
        while self._room.clearance.changed or self._retry_before is not None:
            changed, before = self._room.clearance.changed, self._retry_before
            self._room.clearance.changed, self._retry_before = False, None
            if changed:
                self._try_waiting(now)
            elif before is not None:
                self._try_heads(before, now)
        self._refusals.follow_up(now)

    def expire(self, now: float) -> None:
        """Answer the requests whose deadline has passed."""
        self._refusals.expire(now)
        for _, request in self.queue.expired(now):
            # What is left of a longer wait comes as 0.99984 s.
            timeout_s = round(request.timeout_s, 2) or request.timeout_s
            error = capacity_error(self._ledger, request, f"there was no room within {timeout_s:g} s")
            self._refusals.refuse(request, error, now)

    def next_deadline(self) -> float | None:
        """Return when the next request must be answered, None if none waits."""
        deadlines = (self.queue.next_deadline(), self._refusals.next_deadline())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def cancel(self, client: str, tickets: Sequence[int]) -> None:
        """Forget waiting requests of a client."""
        for ticket in map(Ticket, tickets):
            request = self.queue.get(ticket)
            if request is not None and request.client.id == client:
                self.queue.cancel(ticket)
                self._waited(request, "cancelled")
                if request.change is not None:
                    self.changes.ended(request, request.change)

    def refuse_client(self, client: str, error: KvpoolError, now: float) -> None:
        """Answer all waiting requests of a client with an error."""
        for ticket, request in list(self.queue.items()):
            if request.client.id == client:
                self.queue.pop(ticket)
                self.deliver(request, ("error", *error.to_wire()), now)

    def line_up_anew(self) -> None:
        """Let everyone wait where it belongs once accounts have changed; each keeps its place."""
        for ticket, request in list(self.queue.items()):
            self.queue.pop(ticket)
            self.queue.put_back(ticket, request, request.deadline, request.priority, self.precedence.line_of(request))

    def waiting_of(self, owner: Owner) -> int:
        """Return how many requests wait whose caches an owner's quota would count. O(waiting)."""
        quotas = self._ledger.quotas
        return sum(owner in quotas.account(request.model.space).owners for _, request in self.queue.items())

    def cancel_client(self, client: str) -> None:
        """Forget all waiting requests of a client that is gone."""
        self.cancel(client, [ticket for ticket, request in self.queue.items() if request.client.id == client])
