"""Growth in place: what is backed of a cache becomes more or less while it is written.

A change that needs memory is decided like a request for a new cache: it evicts on the cache's device, or waits in the
same line with a ticket and a deadline. One that gives memory back waits for nothing, not even for growth of the same
cache that waits: what was said last counts, so it takes what it gives back from that growth, too, which then waits for
less, in its place in the line. One change of a cache is under way at its device at a time, and others stand behind it.
The device is the truth: each of its answers tells all that is backed, and the books follow it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from kvpool.errors import (
    CacheStateError,
    InvalidRequestError,
    InvalidSizeError,
    KvpoolError,
    SealedError,
    UnknownCacheError,
)
from kvpool.memory.extents import Extents, changed, checked, difference, front, pages_touched, total_bytes
from kvpool.memory.packing import shares_pages
from kvpool.pool.allocation import Allocations
from kvpool.pool.client import Backing, Client
from kvpool.pool.device import Device
from kvpool.pool.instructions import Answer, Batch
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model
from kvpool.pool.requests import CacheRequest, Change, Orders
from kvpool.pool.room import Room
from kvpool.pool.stepwise import send_stepwise
from kvpool.pool.validation import check_growth, check_timeout
from kvpool.sizes import format_size

KINDS = ("resize", "back", "unback")


class BackingChanges:
    """Decides on changes of what is backed.

    Parameters
    ----------
    ledger
        The pool's books.
    room
        Finds memory.
    allocations
        Has the line in which to wait.
    """

    def __init__(self, ledger: Ledger, room: Room, allocations: Allocations) -> None:
        self._ledger = ledger
        self._room = room
        self._allocations = allocations
        self._behind: dict[int, deque[CacheRequest]] = {}
        """By cache, the changes that came while one of it was under way."""
        #: By cache: changes that may need memory, and are not answered.
        self._growing: dict[int, list[CacheRequest]] = {}
        allocations.changes = self

    def request(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """Decide on a batch of changes; each is carried out, queued or refused."""
        client = self._ledger.client(client_id)
        requests = []
        for item, content in enumerate(items):
            try:
                request, change = self._validated(client, batch, item, content, now)
            except KvpoolError as error:
                self._ledger.refuse(batch, item, error)
                continue
            self._overtake(change)
            if change.kind != "unback":
                self._growing.setdefault(change.cache_id, []).append(request)
            requests.append(request)
        self._allocations.submit(requests, now)
        for cache_id in {request.change.cache_id for request in requests if request.change is not None}:
            self._hasten(cache_id, now)

    def _overtake(self, change: Change) -> None:
        """Take what a change gives back from those of the same cache that came before it and are not answered."""
        for request in self._growing.get(change.cache_id, ()):
            earlier = request.change
            if earlier is None or change.kind == "back":
                continue
            left = difference(earlier.asked, change.asked)
            if change.kind == "resize":
                left = difference(earlier.asked, left)
            if left != earlier.asked or change.kind == "resize":
                # What a resize would give back, too, is no longer for it to say.
                request.change = earlier._replace(kind="back", asked=left)
                self._room.clearance.changed = True  # it may fit now

    def _hasten(self, cache_id: int, now: float) -> None:
        """Decide at once on changes of a cache that wait, and need no memory any more, or cannot be any more."""
        ready = []
        for request in self._growing.get(cache_id, ()):
            try:
                if request.change is not None:
                    self._measure(request, request.change)
            except KvpoolError:
                request.size_bytes = 0
            if not request.size_bytes:
                ready.append(request)
        self._allocations.decide_waiting(ready, now)

    def sealed(self, cache_ids: Sequence[int], now: float) -> None:
        """Note that caches may be sealed now: what waits to grow them is told."""
        for cache_id in cache_ids:
            self._hasten(cache_id, now)

    def check_waiting(self, request: CacheRequest, change: Change) -> None:
        """Raise what keeps a change that waits from ever being carried out by now."""
        self._measure(request, change)

    def ended(self, request: CacheRequest, change: Change) -> None:
        """Note that a change is answered, or not waited for any more."""
        growing = self._growing.get(change.cache_id, [])
        if request in growing:
            growing.remove(request)
            if not growing:
                del self._growing[change.cache_id]

    def _validated(
        self, client: Client, batch: Batch, item: int, content: tuple[Any, ...], now: float
    ) -> tuple[CacheRequest, Change]:
        sequence, cache_id, kind, ranges, timeout_s, trace = content
        ledger = self._ledger
        check_timeout(timeout_s)
        if kind not in KINDS:
            raise InvalidRequestError(f"a cache is changed by {', '.join(KINDS)}, not by {kind!r}", asked=kind)
        row = self._writable(client, cache_id)
        backing = self.backing(row, cache_id)
        asked = checked(ranges, backing.max_size_bytes)
        if kind == "resize" and asked != front(total_bytes(asked)):
            raise InvalidRequestError("a cache is resized to its first bytes: use back() and unback() for other parts")
        change = Change(cache_id, ledger.index.device[row], kind, asked)
        device = ledger.devices[change.device]
        model = ledger.model_in(ledger.index.space_of(row))
        missing_bytes, _, _ = self._needs(device, model, backing, change)
        request = CacheRequest(
            client, model, sequence, missing_bytes, backing.max_size_bytes, timeout_s, now + timeout_s, batch, item,
            ledger.writers[cache_id].priority, trace, now, change=change,
        )  # fmt: skip
        return request, change

    def _writable(self, client: Client, cache_id: int) -> int:
        """Return the row of a cache that this client writes, or raise what keeps it from being changed."""
        ledger = self._ledger
        row = ledger.row(client, cache_id)
        ledger.check_not_void(row, cache_id)
        if ledger.index.is_sealed(row):
            raise SealedError(
                f"cache {cache_id} is sealed and keeps its size: copy it into a new cache to change it",
                cache_id=cache_id,
            )
        if ledger.writers[cache_id].client != client.id:
            raise UnknownCacheError(f"cache {cache_id} is being written by another client", cache_id=cache_id)
        return row

    def backing(self, row: int, cache_id: int) -> Backing:
        """Return what is backed of a cache that is not sealed."""
        writer = self._ledger.writers[cache_id]
        if writer.backing is not None:
            return writer.backing
        size_bytes = self._ledger.index.asked_bytes[row]
        page_bytes = self._ledger.devices[self._ledger.index.device[row]].page_bytes
        shared = shares_pages(size_bytes, size_bytes, page_bytes)
        backing = Backing(size_bytes, front(size_bytes), front(size_bytes), shared)
        self._ledger.writers[cache_id] = writer._replace(backing=backing)
        return backing

    def _needs(self, device: Device, model: Model, backing: Backing, change: Change) -> tuple[int, int | None, Extents]:
        """Return the bytes of the pages that a change needs beyond those there are, of all then, and what is backed.

        None for all: a cache in shared pages takes the same whatever is backed of it.
        """
        extents = changed(change.kind, backing.planned, change.asked)
        if backing.shared:
            return 0, None, extents
        pages = pages_touched(extents, device.page_bytes)
        all_bytes = len(pages) * device.page_bytes
        if all_bytes > device.capacity_bytes:
            raise InvalidSizeError(
                f"asked for {format_size(all_bytes)} of cache {change.cache_id} to be backed: its device has "
                f"{format_size(device.capacity_bytes)}",
                asked_bytes=all_bytes,
                largest_bytes=device.capacity_bytes,
            )
        missing = pages - pages_touched(backing.planned, device.page_bytes)
        if missing:  # to hold on to what a lowered limit does not allow any more is no growth
            check_growth(self._ledger, model, change.cache_id, all_bytes)
        return len(missing) * device.page_bytes, all_bytes, extents

    def plan(self, request: CacheRequest, change: Change, orders: Orders, now: float) -> bool:
        """Find room for a change and write it into the orders; False if there is none now."""
        if self._under_way(change.cache_id):
            self._behind.setdefault(change.cache_id, deque()).append(request)
            return True
        try:
            row, device, backing, all_bytes, extents = self._measure(request, change)
        except KvpoolError as error:
            self._allocations.deliver_error(request, error, now)
            return True
        times = request.shortages.get(device.number, 0)
        evict = self._room.find_more(device, request.model, request.size_bytes, times)
        if evict is None:
            request.short_of = self._room.at_limit or request.place
            return False
        backing.planned = extents
        backing.under_way = True
        self._enter(row, all_bytes, extents)
        orders.put_change(evict, change, request)
        return True

    def _under_way(self, cache_id: int) -> bool:
        writer = self._ledger.writers.get(cache_id)
        return writer is not None and writer.backing is not None and writer.backing.under_way

    def _measure(self, request: CacheRequest, change: Change) -> tuple[int, Device, Backing, int | None, Extents]:
        """Note what a change needs by now; its cache may have ended or been sealed while it waited."""
        row = self._writable(request.client, change.cache_id)
        device, backing = self._ledger.devices[change.device], self.backing(row, change.cache_id)
        request.size_bytes, all_bytes, extents = self._needs(device, request.model, backing, change)
        return row, device, backing, all_bytes, extents

    def _enter(self, row: int, all_bytes: int | None, extents: Extents) -> None:
        index = self._ledger.index
        index.resize(row, index.size_bytes[row] if all_bytes is None else all_bytes, total_bytes(extents))

    def send(self, change: Change, request: CacheRequest, evict: list[int]) -> None:
        """Tell the device."""
        asked = total_bytes(change.asked) if change.kind == "resize" else change.asked
        operation = change.kind, request.client.id, request.sequence, change.cache_id, asked, evict
        traces = () if request.trace is None else (request.trace,)
        send_stepwise(self._ledger, change.device, operation, partial(self._answered, change, request), traces)

    def _answered(self, change: Change, request: CacheRequest, answer: Answer, now: float) -> None:
        extents = None if answer[0] == "error" else answer[0]
        self._settle(change, extents)
        short = extents is not None and answer[3] is not None
        if short:
            self._allocations.plan_again([request], change.device, answer[3], now)
        elif extents is None:
            self._allocations.deliver(request, answer, now)
        else:
            size_bytes = total_bytes(extents)
            self._allocations.deliver(request, ("changed", change.cache_id, size_bytes, extents, answer[1]), now)
        self._go_on(change.cache_id, now)
        if not short:
            self._allocations.retry(now)  # what it gave back, or was not given

    def _go_on(self, cache_id: int, now: float) -> None:
        """Decide on the changes that came behind one that was under way, up to the next that is."""
        behind = self._behind.get(cache_id)
        while behind and not self._under_way(cache_id):
            request = behind.popleft()
            try:
                if request.change is not None:
                    self._measure(request, request.change)
            except KvpoolError as error:
                self._allocations.deliver_error(request, error, now)
                continue
            self._allocations.submit([request], now)
        if not behind:
            self._behind.pop(cache_id, None)

    def _settle(self, change: Change, extents: Extents | None) -> None:
        """Let the books say what the device says."""
        ledger = self._ledger
        row, writer = ledger.index.live_row(change.cache_id), ledger.writers.get(change.cache_id)
        if row < 0 or writer is None or writer.backing is None:
            return  # it is gone
        backing, device = writer.backing, ledger.devices[change.device]
        backing.under_way = False
        if extents is not None:
            backing.known = extents
        backing.planned = backing.known
        all_bytes = None if backing.shared else len(pages_touched(backing.known, device.page_bytes)) * device.page_bytes
        self._enter(row, all_bytes, backing.known)


def check_sealable(ledger: Ledger, cache_id: int) -> None:
    """Raise :class:`~kvpool.errors.CacheStateError` unless a cache that is not sealed is backed as one front."""
    backing = ledger.writers[cache_id].backing
    if backing is None:
        return
    if backing.under_way:
        raise CacheStateError(
            f"cache {cache_id} is being changed: seal it when that has been answered", cache_id=cache_id
        )
    if not backing.known or backing.known != front(total_bytes(backing.known)):
        raise CacheStateError(
            f"cache {cache_id} is backed at {list(backing.known[:4])} only: what is sealed is its bytes from the "
            "first to the last, so resize() it to those first",
            cache_id=cache_id,
        )
