"""One process's connection to a pool: merged calls, waiting requests, and the memory of its devices."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import uuid
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet, WeakValueDictionary

from kvpool.actors.cluster import call, context, ensure_ray
from kvpool.actors.handshake import shake_hands
from kvpool.actors.pool_actor import find_pool
from kvpool.actors.protocol import PROTOCOL_VERSION, host_identity
from kvpool.client.lane import ANSWER_S, Lane, note_errors
from kvpool.client.lease import Lease
from kvpool.client.waiting import WaitingRequests
from kvpool.errors import (
    CacheStateError,
    DeviceLostError,
    ForkedHandleError,
    InvalidRequestError,
    KvpoolError,
    LeaseRevokedError,
    PoolUnavailableError,
    StaleCacheError,
    from_wire,
)
from kvpool.memory.backend import Access
from kvpool.memory.client_arena import ClientArena
from kvpool.memory.fork import watch_forks
from kvpool.memory.host import HostBackend
from kvpool.sizes import format_count

logger = logging.getLogger("kvpool.client")

Place = tuple[int, Sequence[tuple[int, int]], int]


class Follower(Protocol):
    """A cache that is being written, and follows what becomes of it."""

    id: int
    changing: asyncio.Lock

    async def follow(self, answer: Any) -> None:
        """Take a ``changed`` answer in, unless a later one came before."""
        ...


class Connection:
    """What the handles of one :class:`~kvpool.CachePool` share. Made by :meth:`open`."""

    def __init__(self, actor: Any, client: str, tenant: str, token: str, described: dict[str, Any]) -> None:
        self.actor = actor
        self.client = client
        self.tenant = tenant
        self.config: dict[str, Any] = described["config"]
        self.devices: list[dict[str, Any]] = described["devices"]
        self.reachable: list[int] = described["reachable"]
        self.leases: WeakSet[Lease] = WeakSet()
        self.loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._inherited = False
        watch_forks(self)  # asked with every call, for which a system call for the process id would be too slow
        self._sequence = itertools.count(1)
        self._closed = False
        self._revoked = False
        self._exiting = False
        self._unmapped = False
        self._waiting = WaitingRequests(actor, client, self._abandoned)
        self._background: set[asyncio.Task[Any]] = set()
        self.followers: WeakValueDictionary[int, Follower] = WeakValueDictionary()
        """By id, caches that are told of a change whose caller was cancelled."""
        self.caches = Lane("request_caches", actor, client, self._abandoned)
        self.changes = Lane("change_backing", actor, client, self._abandoned)
        self.prefixes = Lane("look_up", actor, client, self._abandoned)
        self.fetches = Lane("fetch", actor, client, self._abandoned)
        self.persists = Lane("persist", actor, client, self._abandoned)
        self.blocks = Lane("request_blocks", actor, client, self._abandoned)
        self.seals = Lane("seal", actor, client, self._abandoned)
        self.finishes = Lane("seal_and_release", actor, client, self._abandoned)
        self.releases = Lane("release", actor, client, self._abandoned)
        self.pins = Lane("pin", actor, client, self._abandoned)
        self.unpins = Lane("unpin", actor, client, self._abandoned)
        self.questions = Lane("contains", actor, tenant, self._abandoned)
        self._lanes = (
            self.caches, self.changes, self.prefixes, self.fetches, self.blocks, self.seals, self.finishes,
            self.persists, self.pins, self.unpins, self.questions, self.releases,
        )  # fmt: skip
        """Releases come last: answers to the others may give something back."""
        self.arenas: dict[int, ClientArena] = {}
        self._probe()
        try:
            for number in self.reachable:
                device = self.devices[number]
                self.arenas[number] = ClientArena(
                    HostBackend(),
                    Path(device["socket_path"]),
                    client,
                    token,
                    device["arena_bytes"],
                    device["page_bytes"],
                    _pages(device),
                    self._note_revoked,
                )
        except BaseException:
            for arena in self.arenas.values():
                arena.close()
            raise

    @classmethod
    async def open(cls, name: str, tenant: str) -> Connection:
        """Connect this process to a running pool.

        Raises
        ------
        PoolNotFoundError
            If no pool of that name runs.
        ProtocolError
            If it speaks another version, or has no device on this host.
        DeviceLostError
            If all its devices are lost.
        SystemLimitError
            If this process may not map as many pages as the pool has.
        """
        ensure_ray()
        actor = await shake_hands(lambda: find_pool(name), name, timeout_s=ANSWER_S)
        client, token = f"{os.getpid()}-{uuid.uuid4().hex[:12]}", secrets.token_hex(16)
        described = await call(
            actor.connect,
            {
                "protocol": PROTOCOL_VERSION,
                "id": client,
                "tenant": tenant,
                "host": host_identity(),
                "token": token,
                "who": context(),
            },
            timeout_s=ANSWER_S,
        )
        if "error" in described:
            raise from_wire(described["error"])
        try:
            return cls(actor, client, tenant, token, described)
        except BaseException:
            await call(actor.disconnect, client, timeout_s=ANSWER_S)
            raise

    def _probe(self) -> None:
        """Check the limits of this process for all its devices together; each arena knows of its own pages only."""
        devices = [self.devices[number] for number in self.reachable]
        if devices:
            HostBackend().probe(
                pages=0,
                mapped_pages=2 * sum(_pages(device) for device in devices),  # two views
                page_size_bytes=max(device["page_bytes"] for device in devices),
            )

    def after_fork_in_child(self) -> None:
        """Refuse all use in a forked child: the connection is its parent's."""
        self._inherited = True

    def check_usable(self) -> None:
        """Raise unless this connection can be used here: not in a forked child, not after :meth:`close`."""
        if self._inherited:
            raise ForkedHandleError(
                f"this handle belongs to process {self._pid}; mappings are not inherited by forks: connect again in "
                "the forked child"
            )
        if self._closed:
            raise CacheStateError("this connection to the pool is closed: connect again")

    def check_not_revoked(self) -> None:
        """Raise :class:`LeaseRevokedError` if an administrator ended this connection's leases."""
        if self._revoked:
            raise LeaseRevokedError(
                f"an administrator of pool {self.config['name']!r} ended the leases of this process (client "
                f"{self.client}): connect again, and look up or ask for what is still needed",
                client=self.client,
            )

    def check_loop(self) -> None:
        """Raise unless :meth:`check_usable` and running on the event loop that this connection belongs to."""
        self.check_usable()
        if asyncio.get_running_loop() is not self.loop:
            raise CacheStateError(
                "this connection to the pool belongs to another event loop: connect in this one, or use kvpool.sync"
            )

    @property
    def closed(self) -> bool:
        """Whether the connection has ended or was revoked, and every lease with it."""
        return self.ended or self._revoked

    @property
    def ended(self) -> bool:
        """Whether it was closed, or its process ends: nothing is left to be released or unmapped."""
        return self._closed or self._exiting

    def next_sequence(self) -> int:
        """Return a number that tells this client's requests apart."""
        return next(self._sequence)

    # -- calls ----------------------------------------------------------------------------------------------------

    async def request_cache(
        self, model: int, size_bytes: int, max_size_bytes: int, timeout_s: float, priority: int
    ) -> Any:
        """Ask for a cache and wait for memory up to ``timeout_s``; returns the ``granted`` answer."""
        self.check_loop()
        self.check_not_revoked()
        with self.caches.call() as trace:
            item = (self.next_sequence(), model, size_bytes, max_size_bytes, timeout_s, priority)
            answer = await self.caches.ask(item, trace)
            return answer if answer[0] == "granted" else await self._waiting.wait(answer[1])

    async def change(self, cache: Follower, kind: str, ranges: Sequence[tuple[int, int]], timeout_s: float) -> None:
        """Change what is backed of a cache, waiting for memory up to ``timeout_s``.

        Changes of one cache reach the pool one after the other; one that has to wait there lets others pass.
        """
        self.check_loop()
        self.check_not_revoked()
        with self.changes.call() as trace:
            async with cache.changing:
                item = (self.next_sequence(), cache.id, kind, list(ranges), timeout_s)
                answer = await self.changes.ask(item, trace)
                if answer[0] == "changed":
                    await cache.follow(answer)
                    return
            await cache.follow(await self._waiting.wait(answer[1]))

    async def fetch(self, model: int, hashes: bytes, first: int, timeout_s: float) -> Any:
        """Lease what comes up behind the ``first`` blocks of a chain; returns the ``hit`` answer."""
        self.check_loop()
        self.check_not_revoked()
        with self.fetches.call() as trace:
            answer = await self.fetches.ask((self.next_sequence(), model, hashes, first, timeout_s), trace)
            return answer if answer[0] == "hit" else await self._waiting.wait(answer[1])

    async def ask(self, lane: Lane, *content: Any) -> Any:
        """Submit one item to a lane and return its answer."""
        self.check_loop()
        self.check_not_revoked()
        span = lane.call()
        with span as trace:
            answer = await lane.ask((self.next_sequence(), *content), trace)
            if trace is not None:
                note_errors(span, [answer])
            return answer

    async def contains(self, model: Any, hashes: bytes) -> dict[str, Any]:
        """Ask how much of a chain is resident; concurrent questions leave in one call."""
        self.check_loop()
        self.check_not_revoked()
        with self.questions.call() as trace:
            _, found = await self.questions.ask((model, hashes), trace)
            return dict(found)

    async def call(self, method: Any, *arguments: Any, timeout_s: float = ANSWER_S) -> Any:
        """Call a method of the pool actor that is not merged."""
        self.check_loop()
        self.check_not_revoked()
        return await call(method, *arguments, timeout_s=timeout_s)

    async def release(self, ids: Sequence[int]) -> None:
        """End one lease on each id; raises the first error among the answers. What is lost needs no release."""
        if self._revoked:
            return
        with self.releases.call() as trace:
            try:
                _, outcomes = await self.releases.ask((self.next_sequence(), list(ids)), trace)
            except LeaseRevokedError:
                return
            except StaleCacheError:  # a leased cache is gone only with its device; others of these may lie elsewhere
                if len(ids) > 1:
                    await asyncio.gather(*(self.release([cache_id]) for cache_id in ids))
                return
            for outcome in outcomes:
                if outcome is not True and outcome[1] != DeviceLostError.__name__:
                    raise from_wire(outcome[1:])

    def release_soon(self, ids: Sequence[int]) -> None:
        """End leases without waiting for it, from any thread."""
        if self.closed or self._inherited:
            return  # they ended with the connection, or are the parent's
        try:
            self.loop.call_soon_threadsafe(self._start_release, list(ids))
        except RuntimeError:  # the loop is closed: the process or its use of the pool ends, and the leases with it
            logger.debug("leases on %s left to the end of this process", ids)

    def _start_release(self, ids: list[int]) -> None:
        if not self._closed:
            self.spawn(partial(self.release, ids), f"releasing {ids}")

    def spawn(self, make: Callable[[], Coroutine[Any, Any, Any]], what: str) -> None:
        """Run a coroutine function that nobody waits for; the log tells if it fails.

        (A function, because a loop that ends cancels its tasks before their first step: a coroutine that was made by
        then would never be awaited.)
        """

        async def logged() -> None:
            try:
                await make()
            except KvpoolError as error:
                logger.log(logging.DEBUG if self._exiting else logging.WARNING, "%s: %s", what, error)
            except Exception:  # a bug, or what the application hung into this process
                logger.exception("%s", what)

        task = self.loop.create_task(logged())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def run_soon(self, make: Callable[[], Coroutine[Any, Any, None]], what: str, after_s: float = 0.0) -> None:
        """Run a coroutine function on the connection's event loop, as :meth:`spawn` does. Any thread."""

        def start() -> None:
            if not self.closed:
                self.spawn(make, what)

        try:
            if after_s:
                self.loop.call_soon_threadsafe(self.loop.call_later, after_s, start)
            else:
                self.loop.call_soon_threadsafe(start)
        except RuntimeError:  # the loop is closed: the process or its use of the pool ends
            logger.debug("%s: left to the end of this process", what)

    async def in_thread(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run a function in a thread, off the event loop.

        Raises
        ------
        CacheStateError
            If the process ends, and starts no threads any more. The connection is closed from then on.
        """
        try:
            running = self.loop.run_in_executor(None, partial(function, *arguments))
        except RuntimeError as error:
            # Nothing else tells: the main thread is alive, and the interpreter not finalizing, when this begins.
            if "shutdown" not in str(error):
                raise
            self._exiting = True
            raise CacheStateError("this process ends: nothing can be mapped any more") from error
        await running

    def _abandoned(self, answer: Any) -> None:
        """Give back what came for a caller that no longer wants it."""
        match answer[0]:
            case "granted":
                self._start_release([answer[1]])
            case "hit" if answer[1]:
                self._start_release(answer[1])
            case "blocks" if answer[2]:
                self._start_release(answer[2])
            case "queued":
                self._waiting.give_up(answer[1])
            case "changed" if (cache := self.followers.get(answer[1])) is not None and not self._closed:
                self.spawn(partial(cache.follow, answer), f"following the growth of cache {answer[1]}")

    # -- memory ---------------------------------------------------------------------------------------------------

    async def map(self, devices: Sequence[int], places: Sequence[Place], access: Access) -> None:
        """Map the pages of these places; off the event loop when the owner must be asked."""
        wanted: dict[int, dict[tuple[int, int], None]] = {}
        for device, place in zip(devices, places, strict=True):
            wanted.setdefault(device, {}).update(dict.fromkeys(place[1]))
        for device, pages in wanted.items():
            await self.map_pages(device, list(pages), access)

    async def map_pages(self, device: int, pages: Sequence[tuple[int, int]], access: Access) -> None:
        """Map these pages of one device, each named once."""
        arena = self.arenas[device]
        try:
            if not arena.is_mapped(pages, access):
                await self.in_thread(arena.ensure, pages, access)
        except InvalidRequestError:  # the arenas are closed
            self.check_not_revoked()
            raise

    # -- leases that an administrator ended -----------------------------------------------------------------------

    def _note_revoked(self) -> None:
        """The owner of some device says so. In the thread that reads its messages."""
        self._revoked = True
        self.lease_unused()

    def lease_unused(self) -> None:
        """A lease may have come out of use: the last one lets a revoked connection unmap everything. Any thread."""
        if self._revoked and not self._closed and not self._inherited:
            try:
                self.loop.call_soon_threadsafe(self._unmap_revoked)
            except RuntimeError:  # the loop is closed: all is unmapped with the end of this process
                logger.debug("revoked, and left to the end of this process")

    def _unmap_revoked(self) -> None:
        # A view that is opened now finds the connection revoked after it was counted (open_view), so none is missed.
        if not self._closed and not self._unmapped and not any(lease.in_use for lease in list(self.leases)):
            self._unmapped = True
            for arena in self.arenas.values():
                self.spawn(partial(self.in_thread, arena.close), "unmapping what was revoked")

    # -- the end --------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End all leases and unmap all memory.

        Raises
        ------
        CacheStateError
            If tensors over pool memory are still alive; nothing is closed then.
        """
        if self._closed or self._inherited:
            return
        self.check_loop()
        self.check_no_views()
        for lane in self._lanes:
            await lane.drain()
        if self._closed:
            return  # by another close() meanwhile
        self.check_no_views()  # others went on while the lanes drained
        self._closed = True
        self._waiting.close()
        try:
            await call(self.actor.disconnect, self.client, timeout_s=ANSWER_S)
        except PoolUnavailableError as error:
            logger.info("leaving a pool that cannot be told: %s", error)  # its devices are, or it is gone
        for arena in self.arenas.values():
            await asyncio.to_thread(arena.close)

    def check_no_views(self) -> None:
        """Raise :class:`CacheStateError` if tensors over pool memory are alive in this process."""
        views = sum(lease.views for lease in self.leases)
        if views:
            raise CacheStateError(
                f"still in use in this process: {format_count(views, 'tensor')} over memory of pool "
                f"{self.config['name']!r}, which closing would unmap: drop what is left (del) first",
                views=views,
            )


def _pages(device: dict[str, Any]) -> int:
    return -(-int(device["capacity_bytes"]) // int(device["page_bytes"]))
