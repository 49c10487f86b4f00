"""Requests for memory: where a new cache goes, what is evicted for it, and who waits.

Placement and eviction are decided together, here, where every lookup and every chain is seen; one operation carries
both to the device. A device may still find less room than the books say (a hole may lie in another tenant's page):
it answers with the shortage, and the rest is planned again with more victims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvpool.errors import (
    CapacityError,
    InvalidRequestError,
    InvalidSizeError,
    KvpoolError,
    LimitError,
    ParentNotResidentError,
    ProtocolError,
    QueueFullError,
    ensure,
)
from kvpool.memory.tickets import Ticket, TicketQueue
from kvpool.pool.fanout import nothing_more
from kvpool.pool.instructions import Answer, Batch, Grant
from kvpool.pool.ledger import Client, Device, Ledger, Model
from kvpool.sizes import format_size

HASH_BYTES = 16
MOST_BLOCKS = 1 << 16
"""Blocks of one request at most (a bound on the work one item can ask for)."""


@dataclass(slots=True, eq=False)
class CacheRequest:
    """One asked-for cache, on its way to an answer or waiting."""

    client: Client
    model: Model
    sequence: int
    size_bytes: int
    max_size_bytes: int
    timeout_s: float
    deadline: float
    batch: Batch | None
    item: int
    ticket: Ticket | None = None
    shortages: dict[int, int] = field(default_factory=dict)
    """How often each device had less room than the books say, since the request was last tried anew."""
    news: int = 0
    """How often room had come free when it was last tried anew."""


@dataclass(slots=True, eq=False)
class BlocksRequest:
    """New blocks of one chain: the rows made for them, and their places as the devices answer."""

    client: Client
    sequence: int
    model: Model
    batch: Batch
    item: int
    resident: int
    ids: list[int]
    devices: list[int]
    places: list[Any]
    open_operations: int = 0


class _Orders:
    """What the devices will be asked for: one operation for each client, device and size.

    The operations of one device leave in the order of their making, and the first carries all its evictions: a later
    request may have been planned into room that an earlier one's eviction made.
    """

    def __init__(self) -> None:
        self.evict: dict[int, list[int]] = {}
        self.groups: dict[tuple[str, int, int, int], tuple[list[int], list[CacheRequest]]] = {}

    def put(self, device: int, evict: list[int], cache_id: int, request: CacheRequest) -> None:
        """Add a request that was given room on a device, and what goes there for it."""
        if evict:
            self.evict.setdefault(device, []).extend(evict)
        key = (request.client.id, device, request.size_bytes, request.max_size_bytes)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = ([], [])
        group[0].append(cache_id)
        group[1].append(request)


class Allocations:
    """Decides on requests for memory.

    Parameters
    ----------
    ledger
        The pool's books.
    queue_limit
        How many requests may wait at once.
    """

    def __init__(self, ledger: Ledger, queue_limit: int) -> None:
        self._ledger = ledger
        self.queue: TicketQueue[CacheRequest] = TicketQueue(queue_limit)
        self._queue_limit = queue_limit
        self._news = 0  # how often room came free so far
        self._to_retry = False  # it came free in a decision on somebody else, and may be enough for who waits
        self._first_to_retry = False

    # -- whole caches ---------------------------------------------------------------------------------------------

    def request_caches(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """Decide on a batch of asked-for caches; each is granted, queued or refused."""
        ledger = self._ledger
        client = ledger.client(client_id)
        ledger.counters.requests += len(items)
        orders = _Orders()
        for item, (sequence, model, size_bytes, max_size_bytes, timeout_s, _trace) in enumerate(items):
            try:
                request = CacheRequest(
                    client, ledger.model(client, model), sequence, size_bytes, max_size_bytes, timeout_s,
                    now + timeout_s, batch, item,
                )  # fmt: skip
                self._check_size(request)
            except KvpoolError as error:
                self._refuse(batch, item, error)
                continue
            if self.queue or not self._plan(request, orders, now):
                self._wait(request, now)
        self._send(orders)

    def _check_size(self, request: CacheRequest) -> None:
        size_bytes, max_size_bytes, model = request.size_bytes, request.max_size_bytes, request.model
        if size_bytes <= 0 or max_size_bytes < size_bytes:
            raise InvalidSizeError(
                f"a cache needs 0 < size <= max_size, asked for size={size_bytes}, max_size={max_size_bytes}",
                asked_bytes=size_bytes,
            )
        if model.limit_bytes is not None and size_bytes > model.limit_bytes:
            raise LimitError(
                f"asked for {format_size(size_bytes)}, but model {model.name!r} may have at most "
                f"{format_size(model.limit_bytes)}: ask for less, or register the model with a higher limit",
                asked_bytes=size_bytes,
                limit_bytes=model.limit_bytes,
            )
        devices = [self._ledger.devices[number] for number in request.client.devices]
        largest = max((device.capacity_bytes for device in devices if device.lost is None), default=0)
        if size_bytes > largest:
            raise InvalidSizeError(
                f"asked for {format_size(size_bytes)}, but the largest device that this process can use has "
                f"{format_size(largest)}: ask for less, or start the pool with larger devices",
                asked_bytes=size_bytes,
                largest_bytes=largest,
            )

    def _plan(self, request: CacheRequest, orders: _Orders, now: float) -> bool:
        """Find room for a request and write it into the orders; False if there is none now."""
        if not request.shortages:
            request.news = self._news
        found = self._find_room(request.client, request.size_bytes, request.max_size_bytes, request.shortages)
        if found is None:
            return False
        device, evict = found
        index = self._ledger.index
        footprint_bytes = device.footprint_bytes(request.size_bytes, request.max_size_bytes)
        row = self._ledger.add(request.client, request.model.space, footprint_bytes, device.number, -1, now)
        orders.put(device.number, evict, index.id_of(row), request)
        return True

    def _send(self, orders: _Orders) -> None:
        for (client, device, size_bytes, max_size_bytes), (ids, requests) in orders.groups.items():
            first = requests[0]
            evict = orders.evict.pop(device, [])
            operation = (
                "allocate", client, first.sequence, first.client.tenant, ids, size_bytes, max_size_bytes, evict,
            )  # fmt: skip
            self._ledger.send(device, operation, partial(self._caches_placed, device, ids, requests))

    def _caches_placed(
        self, device: int, ids: list[int], requests: list[CacheRequest], answer: Answer, now: float
    ) -> None:
        if answer[0] == "error":
            for cache_id, request in zip(ids, requests, strict=True):
                self._ledger.forget(cache_id)
                self._deliver(request, answer)
            self.retry(now)
            return
        places, _refused, shortage = answer
        self._ledger.counters.grants += len(places)
        for request, cache_id, place in zip(requests, ids, places, strict=False):
            request.model.caches += 1
            self._deliver(request, ("granted", cache_id, device, request.size_bytes, request.max_size_bytes, place))
        if shortage is None:
            return
        for cache_id in ids[len(places) :]:
            self._ledger.forget(cache_id)
        orders = _Orders()
        for request in requests[len(places) :]:
            request.shortages[device] = request.shortages.get(device, 0) + 1
            if not self._plan(request, orders, now):
                self._wait(request, now)
        self._send(orders)
        if self.queue:
            # Who is first in line may have passed this device over, because the books gave it to others, behind it.
            first, _ = self.queue.head()
            behind = [r for r in requests[len(places) :] if r.ticket is None or r.ticket > first]
            self._first_to_retry |= bool(behind)

    def _deliver(self, request: CacheRequest, answer: Answer) -> None:
        if request.batch is None:
            ensure(request.ticket is not None, "a request without a batch has a ticket")
            self._ledger.out.append(Grant(request.client.id, request.ticket or 0, answer))
        else:
            self._ledger.answer(request.batch, request.item, answer)

    def _refuse(self, batch: Batch, item: int, error: KvpoolError) -> None:
        counters = self._ledger.counters
        counters.refusals += 1
        counters.errors[type(error).__name__] = counters.errors.get(type(error).__name__, 0) + 1
        self._ledger.answer(batch, item, ("error", *error.to_wire()))

    # -- waiting --------------------------------------------------------------------------------------------------

    def _wait(self, request: CacheRequest, now: float) -> None:
        request.shortages.clear()
        if self._ledger.clients.get(request.client.id) is not request.client:
            # It ended while the device looked for room. Nobody would take what comes, and others stand behind.
            self._deliver(request, ("error", *ProtocolError(f"client {request.client.id!r} is gone").to_wire()))
            self._to_retry = True
            return
        if request.ticket is not None:  # it waited before: its place in the line is kept
            self.queue.put_back(request.ticket, request, request.deadline)
            self._to_retry |= request.news != self._news  # on a device, perhaps, that it had found short before
            return
        self._to_retry = True
        if request.deadline <= now:
            self._deliver(request, ("error", *self.capacity_error(request, "there is no room now").to_wire()))
            self._ledger.counters.refusals += 1
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
            self._ledger.counters.refusals += 1
            self._deliver(request, ("error", *error.to_wire()))
            return
        batch, request.batch = request.batch, None
        if batch is not None:
            self._ledger.answer(batch, request.item, ("queued", request.ticket))

    def retry(self, now: float) -> None:
        """Grant waiting requests, first come first served, as far as memory allows now. Call it when room came free."""
        self._news += 1
        self._try_waiting(now, self._queue_limit)

    def _try_waiting(self, now: float, most: int) -> None:
        orders = _Orders()
        for _ in range(min(most, len(self.queue))):
            ticket, request = self.queue.head()
            if not self._plan(request, orders, now):
                break
            self.queue.pop(ticket)
        self._send(orders)

    def follow_up(self, now: float) -> None:
        """Try who waits again if a decision on somebody else made room on the way. For the end of each event."""
        while self._to_retry or self._first_to_retry:
            most = self._queue_limit if self._to_retry else 1  # all of them would take each other's room in turns
            self._to_retry = self._first_to_retry = False
            self._try_waiting(now, most)

    def expire(self, now: float) -> None:
        """Answer the requests whose deadline has passed."""
        for ticket, request in self.queue.expired(now):
            self._ledger.counters.refusals += 1
            error = self.capacity_error(request, f"there was no room within {request.timeout_s:g} s")
            self._ledger.out.append(Grant(request.client.id, ticket, ("error", *error.to_wire())))

    def cancel(self, client: str, tickets: Sequence[int]) -> None:
        """Forget waiting requests of a client."""
        for ticket in map(Ticket, tickets):
            request = self.queue.get(ticket)
            if request is not None and request.client.id == client:
                self.queue.cancel(ticket)

    def cancel_client(self, client: str) -> None:
        """Forget all waiting requests of a client that is gone."""
        self.cancel(client, [ticket for ticket, request in self.queue.items() if request.client.id == client])

    # -- blocks of a chain ----------------------------------------------------------------------------------------

    def request_blocks(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """Decide on batches of new blocks; each stores as much of its chain as fits."""
        client = self._ledger.client(client_id)
        for item, (sequence, model, hashes, parent, _trace) in enumerate(items):
            try:
                self._request_chain(
                    batch, item, client, sequence, self._ledger.model(client, model), hashes, parent, now
                )
            except KvpoolError as error:
                self._refuse(batch, item, error)

    def _request_chain(
        self,
        batch: Batch,
        item: int,
        client: Client,
        sequence: int,
        model: Model,
        joined: bytes,
        parent: bytes | int | None,
        now: float,
    ) -> None:
        index = self._ledger.index
        hashes = split_hashes(joined)
        if model.block_bytes is None:
            raise InvalidRequestError(
                f"model {model.name!r} was registered without a block size: give ModelSpec block_shape and dtype, or "
                "block_bytes"
            )
        parent_row = self._parent_row(client, model, parent)
        resident = index.match(model.space, hashes)
        previous = resident[-1] if resident else parent_row
        request = BlocksRequest(client, sequence, model, batch, item, len(resident), [], [], [])
        # The resident run is pinned while victims are chosen, so that making room never cuts the chain in front of
        # the new blocks; a new block then protects its parent as a resident child.
        guard = resident if resident or parent_row < 0 else [parent_row]
        index.pin(guard, now=now)
        positions: dict[int, list[int]] = {}
        evictions: dict[int, list[int]] = {}
        for position in range(len(hashes) - len(resident)):
            found = self._find_room(client, model.block_bytes, model.block_bytes, {})
            if found is None:
                break
            device, evict = found
            footprint = device.footprint_bytes(model.block_bytes, model.block_bytes)
            previous = self._ledger.add(client, model.space, footprint, device.number, previous, now)
            request.ids.append(index.id_of(previous))
            request.devices.append(device.number)
            request.places.append(None)
            positions.setdefault(device.number, []).append(position)
            evictions.setdefault(device.number, []).extend(evict)
        index.unpin(guard[::-1], now=now)
        if not request.ids:
            self._ledger.answer(batch, item, ("blocks", len(resident), [], [], []))
            return
        for number, wanted in positions.items():
            self._ask_blocks(request, number, wanted, evictions[number], 0)

    def _parent_row(self, client: Client, model: Model, parent: bytes | int | None) -> int:
        """Return the row of a parent: -1 for a root, a hash, or the id of a block that ``client`` is writing."""
        if parent is None:
            return -1
        ledger = self._ledger
        if isinstance(parent, int):
            row = ledger.row(client, parent)
            if ledger.index.space_of(row) == model.space:
                return row
        else:
            row = ledger.index.find(model.space, parent)
            if row >= 0:
                return row
        name = parent if isinstance(parent, int) else parent.hex()
        raise ParentNotResidentError(
            f"parent {name} of new blocks is not in the pool: store the chain from its root, or from the end of the "
            "prefix that match_prefix finds",
            parent=name,
        )

    def _ask_blocks(
        self, request: BlocksRequest, number: int, positions: list[int], evict: list[int], attempts: int
    ) -> None:
        ids = [request.ids[position] for position in positions]
        size_bytes = request.model.block_bytes
        client = request.client
        operation = ("allocate", client.id, request.sequence, client.tenant, ids, size_bytes, size_bytes, evict)
        request.open_operations += 1
        self._ledger.send(number, operation, partial(self._blocks_placed, request, number, positions, attempts))

    def _blocks_placed(
        self, request: BlocksRequest, number: int, positions: list[int], attempts: int, answer: Answer, now: float
    ) -> None:
        request.open_operations -= 1
        if answer[0] != "error":
            places, _refused, shortage = answer
            for position, place in zip(positions, places, strict=False):
                request.places[position] = place
            missing = positions[len(places) :]
            if shortage is not None and missing:
                device = self._ledger.devices[number]
                need_bytes = request.model.block_bytes or 0
                evict = self._evict_from(device, len(missing) * need_bytes << attempts)
                if evict:
                    self._ask_blocks(request, number, missing, evict, attempts + 1)
        if request.open_operations:
            return
        kept = request.places.index(None) if None in request.places else len(request.places)
        for position in range(len(request.ids) - 1, kept - 1, -1):
            self._drop_block(request, position)
        self._ledger.counters.blocks_stored += kept
        answered = ("blocks", request.resident, request.ids[:kept], request.devices[:kept], request.places[:kept])
        self._ledger.answer(request.batch, request.item, answered)
        self._to_retry |= kept < len(request.ids)

    def _drop_block(self, request: BlocksRequest, position: int) -> None:
        """Give up a block behind one that found no room: it could never be hit."""
        cache_id = request.ids[position]
        if request.places[position] is not None:
            operation = ("release", request.client.id, request.sequence, [cache_id])
            self._ledger.send(request.devices[position], operation, nothing_more)
        self._ledger.forget(cache_id)

    # -- room -----------------------------------------------------------------------------------------------------

    def _find_room(
        self, client: Client, size_bytes: int, max_size_bytes: int, shortages: Mapping[int, int]
    ) -> tuple[Device, list[int]] | None:
        """Return a device with room and the ids evicted there for it, or None.

        The books of a device that was found short are not believed: others come first, then room is made there by
        eviction, twice as much each time.
        """
        ledger = self._ledger
        devices = [ledger.devices[number] for number in client.devices]
        fitting = []
        for device in devices:
            free_bytes = ledger.free_bytes(device)
            fits = free_bytes >= device.footprint_bytes(size_bytes, max_size_bytes)
            fitting.append(free_bytes if fits and device.number not in shortages else -1)
        chosen = ledger.placement.choose(fitting, size_bytes)
        if chosen >= 0:
            return devices[chosen], []
        worth_least = ledger.policy.victim()
        if worth_least < 0:
            return None
        first = ledger.index.device[worth_least]
        for device in sorted(devices, key=lambda device: device.number != first):
            if device.lost is not None:
                continue
            need_bytes = device.footprint_bytes(size_bytes, max_size_bytes)
            times = shortages.get(device.number, 0)
            short_bytes = need_bytes << times if times else need_bytes - max(ledger.free_bytes(device), 0)
            if not times and ledger.index.evictable_bytes[device.number] < short_bytes:
                continue
            evicted = self._evict_from(device, short_bytes)
            if evicted:
                return device, evicted
        return None

    def _evict_from(self, device: Device, short_bytes: int) -> list[int]:
        """Take the caches worth least off a device's books until ``short_bytes`` are found; returns their ids."""
        ledger = self._ledger
        index, counters = ledger.index, ledger.counters
        evicted: list[int] = []
        found_bytes = 0
        while found_bytes < short_bytes:
            row = next(iter(ledger.policy.victims(device.number)), -1)
            if row < 0:
                break
            found_bytes += index.size_bytes[row]
            evicted.append(index.id_of(row))
            index.remove(row)
        if evicted:
            self._news += 1
            self._to_retry = True  # room elsewhere, too: what sheltered a parent on another device is gone
        counters.evictions += len(evicted)
        counters.evicted_bytes += found_bytes
        device.evictions += len(evicted)
        return evicted

    def capacity_error(self, request: CacheRequest, why: str) -> CapacityError:
        """Return the error that explains with all figures why a request was not met."""
        ledger = self._ledger
        devices = [ledger.devices[n] for n in request.client.devices if ledger.devices[n].lost is None]
        free = {device.number: max(ledger.free_bytes(device), 0) for device in devices}
        evictable = {device.number: ledger.index.evictable_bytes[device.number] for device in devices}
        pinned = {d.number: ledger.index.resident_bytes[d.number] - evictable[d.number] for d in devices}
        zombie_bytes = sum(device.zombie_bytes for device in devices)
        largest = max((free[number] + evictable[number] for number in free), default=0)
        return CapacityError(
            f"asked for {format_size(request.size_bytes)} and {why}: {format_size(sum(free.values()))} free and "
            f"{format_size(sum(evictable.values()))} evictable on {len(devices)} devices, "
            f"{format_size(sum(pinned.values()))} pinned by leases, {format_size(zombie_bytes)} zombie; at most "
            f"{format_size(largest)} would have fitted: release leases, wait longer (timeout), or add memory",
            asked_bytes=request.size_bytes,
            free_bytes=sum(free.values()),
            evictable_bytes=sum(evictable.values()),
            pinned_bytes=sum(pinned.values()),
            zombie_bytes=zombie_bytes,
            largest_bytes=largest,
        )


def split_hashes(joined: bytes) -> list[bytes]:
    """Return the 16-byte hashes that a message carries joined.

    Raises
    ------
    InvalidRequestError
        If they are not whole, or too many.
    """
    count, rest = divmod(len(joined), HASH_BYTES)
    if rest or not 0 < count <= MOST_BLOCKS:
        raise InvalidRequestError(
            f"hashes come as {HASH_BYTES} bytes each, 1 to {MOST_BLOCKS} of them; got {len(joined)} bytes"
        )
    return [joined[start : start + HASH_BYTES] for start in range(0, len(joined), HASH_BYTES)]
