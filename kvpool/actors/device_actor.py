"""The actor that owns one device's memory: a thin shell around :class:`~kvpool.cache.store.DeviceStore`.

It carries out the pool's operations, serves pages to clients over a Unix socket, watches their processes, and tells
the pool through :meth:`DeviceActor.events` what happened here: a client died, zombie pages are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import NoOpTracerProvider

from kvpool.actors.lower_operations import KINDS, LowerOperations, open_tiers
from kvpool.actors.priority import run_at_normal_priority
from kvpool.actors.protocol import host_identity
from kvpool.actors.spans import OperationSpans
from kvpool.actors.stream import Stream
from kvpool.actors.upkeep import keep_up
from kvpool.cache.key import CacheKey
from kvpool.cache.lower_tiers import LowerTiers
from kvpool.cache.store import DeviceStore, Operation
from kvpool.config import TierPlan, private_folder
from kvpool.errors import ConfigError, ProtocolError, TierError
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.host import HostBackend
from kvpool.memory.limits import require_memory
from kvpool.memory.pacer import IDLE_S, CompactionPacer
from kvpool.memory.page_server import PageServer
from kvpool.memory.socket_path import clear_abandoned
from kvpool.sizes import MIB
from kvpool.telemetry.calls import SCOPE
from kvpool.telemetry.context import Carrier
from kvpool.telemetry.logs import carry_trace_ids, print_trace_ids
from kvpool.telemetry.sdk import adopt, shut_down, tracer_provider
from kvpool.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger("kvpool.device")

_FOUND_AT_ONCE = 20_000
"""Caches told in one answer: 50 ms of the event loop, and two megabytes."""
_TRIM_BYTES = 64 * MIB
"""Idle memory that is given back in one step: about 10 ms."""

_TRIMS = 4
"""How often memory is looked for in the time after which it counts as idle."""

_REMOVALS_S = 5.0
"""How long after a removal from the disk was refused it is tried again: by then its content is hidden, no more."""

_LEFTOVERS_S = 60.0
"""The same in folders of devices that are no more, each of which is opened for it, and logs anew what refuses it."""

_FLUSH_S = 2.0
"""How long the last spans may take to leave when the device ends, seconds."""


class DeviceActor:
    """Owner of one host-memory device.

    Parameters
    ----------
    pool, name
        Names of the pool and of this device.
    capacity_bytes, page_bytes, min_block_bytes, arena_bytes, reserve_bytes
        Memory to hand out at most; page size; smallest block; reserved addresses; warm pages kept at most.
    socket_path
        Where clients fetch pages.
    epoch
        Incarnation of this actor.
    beside_bytes
        Capacity of the pool's other devices on the same node, which are promised the same memory.
    environment
        Variables that this process takes over: ``OTEL_*`` of the process that created the pool.
    tiers
        The fields of a :class:`~kvpool.config.TierPlan`: what lies below this device. None: nothing.
    compaction
        Threshold and share of time of a :class:`~kvpool.memory.pacer.CompactionPacer`.
    idle_trim_s
        Warm pages that nobody used for so many seconds go back to the system.
    """

    def __init__(
        self,
        pool: str,
        name: str,
        capacity_bytes: int,
        page_bytes: int,
        min_block_bytes: int,
        arena_bytes: int,
        reserve_bytes: int,
        socket_path: str,
        epoch: int,
        beside_bytes: int = 0,
        environment: dict[str, str] | None = None,
        tiers: dict[str, Any] | None = None,
        compaction: tuple[float, float] = (1.0, 0.1),
        idle_trim_s: float = math.inf,
    ) -> None:
        adopt(environment or {})
        carry_trace_ids()
        print_trace_ids()
        self._pool, self._name, self._epoch = pool, name, epoch
        self._capacity_bytes, self._page_bytes, self._arena_bytes = capacity_bytes, page_bytes, arena_bytes
        self._min_block_bytes, self._reserve_bytes = min_block_bytes, reserve_bytes
        self._beside_bytes = beside_bytes
        self._socket_path = Path(socket_path)
        self._plan = TierPlan(**tiers) if tiers else TierPlan(0, None, 0, "none")
        self._tiers: LowerTiers | None = None
        self._lower: LowerOperations | None = None
        self._found: Sequence[CacheKey] = ()
        self._started = False
        self._pacer = CompactionPacer(*compaction)
        self._compacting: asyncio.Task[None] | None = None
        self._provider = self._make_provider()
        self._tracer = (self._provider or NoOpTracerProvider()).get_tracer(SCOPE, __version__)
        self._allocator: GPUMemoryAllocator
        self._store: DeviceStore
        self._server: PageServer
        self._events = Stream()
        self._stamp = 0
        self._idle_trim_s = idle_trim_s
        self._trimmer: asyncio.Task[None] | None = None
        self._removers: list[asyncio.Task[None]] = []

    async def start(self) -> dict[str, Any]:
        """Reserve the arena and open the socket; return what clients and the pool must know of this device.

        For the pool alone are ``spaces``, ``(tenant, fingerprint, models)`` of all of which something was found below,
        with a model as ``(name, revision, block bytes, limit bytes)``, and none where that is not known; and
        ``unread``, the folders of which not even that is known.

        Raises
        ------
        SystemLimitError
            If this system's limits do not allow so many pages or so much memory.
        ProtocolError
            If it has been started before.
        """
        if self._started:
            raise ProtocolError(f"device {self._name} of pool {self._pool!r} is started already: it serves one pool")
        self._started = True
        run_at_normal_priority()
        backend = HostBackend()
        pages = self._capacity_bytes // self._page_bytes
        below_pages = self._plan.host_bytes // self._page_bytes
        # Memory is taken as it is used, so what the devices started before were promised still counts as free.
        beside_pages = self._beside_bytes // self._page_bytes
        require_memory(pages + below_pages + beside_pages, self._page_bytes, backend.mem_info())
        both = pages + below_pages
        backend.probe(pages=both, mapped_pages=both, page_size_bytes=self._page_bytes)
        self._allocator = GPUMemoryAllocator(
            backend,
            self._capacity_bytes,
            self._page_bytes,
            min_block_bytes=self._min_block_bytes,
            arena_bytes=self._arena_bytes,
            reserve_bytes=self._reserve_bytes,
        )
        self._store = DeviceStore(self._allocator)
        self._server = PageServer(
            self._socket_path, self, self._store.authorize, self._client_gone, self._client_connected
        )
        opened = await open_tiers(self._plan, self._page_bytes, self._tell_gone)
        if opened is not None:
            self._tiers, self._found = opened
            self._lower = LowerOperations(self._store, self._tiers)
        if self._socket_path.parent.name == private_folder(self._pool, self._epoch):
            await asyncio.to_thread(clear_abandoned, self._socket_path.parent)
        await self._server.start()
        me = f"of device {self._name} of pool {self._pool}"
        self._compacting = asyncio.create_task(keep_up(f"compaction {me}", self._compact, IDLE_S))
        if self._idle_trim_s < math.inf:
            self._trimmer = asyncio.create_task(keep_up(f"trimming {me}", self._trim_idle, self._idle_trim_s / _TRIMS))
        if self._tiers is not None:
            # Apart: a folder that hangs keeps no other from it.
            self._removers = [
                asyncio.create_task(keep_up(f"removals {me}", self._complete_removals, _REMOVALS_S)),
                asyncio.create_task(keep_up(f"older removals {me}", self._remove_from_leftovers, _LEFTOVERS_S)),
            ]
        gc.collect()
        gc.freeze()
        return {
            "name": self._name,
            "host": host_identity(),
            "epoch": self._epoch,
            "socket_path": str(self._socket_path),
            "capacity_bytes": self._capacity_bytes,
            "page_bytes": self._page_bytes,
            "arena_bytes": self._arena_bytes,
            "min_block_bytes": self._min_block_bytes,
            "has_lower": self._lower is not None,
            "spaces": self._spaces(),
            "unread": self._tiers.unread if self._tiers is not None else [],
            "disk_url": self._plan.disk_url if self._plan.write_policy != "none" else None,
        }

    def _spaces(self) -> list[tuple[str, str, list[tuple[Any, ...]]]]:
        spaces = self._tiers.spaces() if self._tiers is not None else []
        return [(tenant, fingerprint, [tuple(model) for model in models]) for tenant, fingerprint, models in spaces]

    async def found(self) -> tuple[list[tuple[str, str, list[tuple[bytes, bytes | None, int]]]], bool]:
        """Return a part of what was found below when it started, each once, and whether there is more.

        By tenant and fingerprint ``(hash, parent, bytes)``.
        """
        part, self._found = self._found[:_FOUND_AT_ONCE], self._found[_FOUND_AT_ONCE:]
        spaces: dict[tuple[str, str], list[tuple[bytes, bytes | None, int]]] = {}
        for key in part:
            known = self._tiers.locate(key) if self._tiers is not None else None
            if known is not None:
                space = spaces.setdefault((key.tenant, key.fingerprint), [])
                space.append((key.block_hash, known.parent, known.size_bytes))
        return [(*space, entries) for space, entries in spaces.items()], bool(self._found)

    def _make_provider(self) -> TracerProvider | None:
        try:
            return tracer_provider(f"{self._pool}/{self._name}", **{"kvpool.pool": self._pool})
        except ConfigError as error:
            logger.warning("device %s of pool %s goes on without: %s", self._name, self._pool, error)
            return None

    async def apply(
        self, operations: list[Operation], traces: list[tuple[Carrier, ...]] | None = None
    ) -> tuple[list[Any], tuple[int, int]]:
        """Carry out a batch of operations in order; returns the answers and ``(stamp, bytes of zombie pages)``.

        ``traces`` has for each operation the contexts of the traces that it belongs to.
        The stamp orders these figures: the answer and an event may overtake each other on their way to the pool.
        """
        spans = OperationSpans(self._tracer, self._name, traces)
        answers: list[Any] = []
        waiting: list[Operation] = []
        for operation in operations:
            if self._lower is None or operation[0] not in KINDS:
                waiting.append(operation)
                continue
            # The pool has one call of this kind in flight, so nothing of what it decided comes in between.
            answers += self._apply(waiting, spans)
            waiting = []
            answers.append(await self._lower.carry_out(operation))
            spans.done(operation, answers[-1])
        answers += self._apply(waiting, spans)
        self._pacer.operated(time.monotonic())
        self._request_drops()
        return answers, self._zombies()

    def _apply(self, operations: list[Operation], spans: OperationSpans) -> list[Any]:
        """Carry out operations that wait for nothing."""
        answers = self._store.apply(operations, time.monotonic(), spans.done)
        for place, operation in enumerate(operations):
            if operation[0] == "revoke":  # before anything is awaited: the client may ask for pages meanwhile
                self._server.revoke(operation[1])
            elif operation == ("trim",) and self._tiers is not None:
                answers[place] += self._tiers.trim()
        return answers

    async def _compact(self) -> float:
        """Take a step of compaction, if it is worth its time; returns how long to wait before the next, seconds.

        Where one fails nothing is lost, and the next begins with what it left.
        """
        if not self._pacer.due(self._allocator.usage().fragmentation):
            return IDLE_S
        began = time.monotonic()
        done = self._allocator.compact_a_little(self._pacer.step_bytes)
        self._request_drops()
        fragmentation = self._allocator.usage().fragmentation
        return self._pacer.stepped(began, time.monotonic(), fragmentation, done)

    async def fill(self, tenant: str, fingerprint: str, entries: list[tuple[int, bytes]]) -> list[bool | None]:
        """Bring content up from below; see :meth:`LowerOperations.fill`."""
        return await self._operations().fill(tenant, fingerprint, entries)

    async def persist(self, tenant: str, fingerprint: str, entries: list[tuple[int, bytes, bytes | None]]) -> list[Any]:
        """Write caches through to the disk; see :meth:`LowerOperations.persist`."""
        if self._lower is None or self._plan.disk_url is None or self._plan.write_policy == "none":
            needed = "set disk_url" if self._plan.disk_url is None else "set write_policy to something else than 'none'"
            error = TierError(f"this pool writes to no disk: {needed} to have durable content", cause="no_disk")
            return [("error", *error.to_wire())] * len(entries)
        return await self._lower.persist(tenant, fingerprint, entries)

    async def save(
        self, tenant: str | None, since: int = 0, again: Sequence[tuple[str, str, bytes]] = ()
    ) -> dict[str, Any]:
        """Write what lies in host memory through to the disk; see :meth:`LowerOperations.save`."""
        return await self._operations().save(tenant, since, again)

    async def forgotten(self, number: int, tenant: str, fingerprint: str) -> Any:
        """Wait for a removal from below; see :meth:`LowerOperations.forgotten`."""
        return await self._operations().forgotten(number, tenant, fingerprint)

    def _operations(self) -> LowerOperations:
        if self._lower is None:
            raise ProtocolError(f"device {self._name} has no lower tiers: the pool asks it for what it does not have")
        return self._lower

    async def events(self, seen: int, wait_s: float) -> tuple[int, list[tuple[Any, ...]]]:
        """Return what happened after event number ``seen``, waiting for it up to ``wait_s``.

        Events are ``("gone", client, ended ids, freed ids)``, ``("freed", (stamp, zombie bytes))`` and ``("lower_gone",
        [(tenant, fingerprint, hash), …], stamp)``. Those up to ``seen`` are forgotten: the pool has them.
        """
        return await self._events.poll(seen, wait_s)

    async def memory(self) -> dict[str, Any]:
        """Return this device's bytes (live, backed, reserve, zombie, free, largest), its caches and leases.

        Also ``compacted``: bytes moved and pages freed by compaction so far.
        And ``lower``: the figures of its lower tiers, None if it has none.
        """
        usage = self._allocator.usage()
        return {
            "live": usage.live_bytes,
            "backed": usage.backed_bytes,
            "reserve": usage.reserve_bytes,
            "zombie": usage.zombie_bytes,
            "free": usage.free_bytes,
            "largest": usage.largest_bytes,
            "caches": self._store.caches,
            "leases": self._store.lease_count,
            "compacted": self._allocator.compacted,
            "lower": None if self._tiers is None else self._tiers.statistics(),
        }

    async def leases(self) -> dict[str, int]:
        """Return the bytes that each client holds leased here."""
        return self._store.leases()

    async def holders(self) -> dict[str, tuple[int, int, float]]:
        """Return for each client that holds leases here: caches, bytes, seconds since the oldest began."""
        return self._store.holders(time.monotonic())

    async def shutdown(self) -> None:
        """Close the socket and give all memory back. The actor is of no use afterwards."""
        if self._compacting is not None:
            self._compacting.cancel()
        if self._trimmer is not None:
            self._trimmer.cancel()
        for remover in self._removers:
            remover.cancel()
        await self._server.close()
        if self._tiers is not None:
            await self._tiers.close()
        self._allocator.close()
        with contextlib.suppress(OSError):  # not empty while other devices of the pool still have their sockets in it
            self._socket_path.parent.rmdir()
        if self._provider is not None:
            with contextlib.suppress(TimeoutError):  # whoever should receive the last spans may be gone
                async with asyncio.timeout(_FLUSH_S):
                    await asyncio.to_thread(shut_down, self._provider)

    # -- what the page server asks of its source ------------------------------------------------------------------

    def export(self, client: str, tenant: str, index: int, serial: int) -> int:
        """Return a descriptor of a page for a client of the page's tenant."""
        return self._allocator.export(client, tenant, index, serial)

    def dropped(self, client: str, serials: list[int]) -> None:
        """Enter that a client has unmapped these pages."""
        zombie_bytes = self._allocator.usage().zombie_bytes
        self._allocator.dropped(client, serials)
        self._tell_if_freed(zombie_bytes)

    async def _trim_idle(self) -> float:
        """Give back pages that nobody used for long; returns how long to wait before the next time, seconds."""
        zombie_bytes = self._allocator.usage().zombie_bytes
        try:
            while self._allocator.trim_idle(time.monotonic(), self._idle_trim_s, _TRIM_BYTES):
                self._request_drops()
                await asyncio.sleep(0)  # others wait no longer than for a step
        finally:
            if self._allocator.usage().zombie_bytes != zombie_bytes:
                self._tell(("freed", self._zombies()))
        return self._idle_trim_s / _TRIMS

    async def _complete_removals(self) -> float:
        """Try again the removals that the disk has refused; returns how long to wait before the next time, seconds."""
        if self._tiers is not None:
            await self._tiers.complete_removals()
        return _REMOVALS_S

    async def _remove_from_leftovers(self) -> float:
        """The same where devices that are no more had their disks."""
        if self._tiers is not None:
            await self._tiers.remove_from_leftovers()
        return _LEFTOVERS_S

    def _client_connected(self, client: str) -> None:
        if self._store.is_revoked(client):  # before it came here for the first time
            self._server.revoke(client)

    def _client_gone(self, client: str) -> None:
        zombie_bytes = self._allocator.usage().zombie_bytes
        ended, freed = self._store.disconnect(client)
        self._allocator.holder_gone(client)
        self._tell(("gone", client, ended, freed))
        self._tell_if_freed(zombie_bytes)
        self._request_drops()

    def _request_drops(self) -> None:
        alive = self._server.clients()
        for client, serials in self._allocator.take_drops().items():
            if client in alive:  # else its process is dead, and its mappings with it
                self._server.request_drop(client, serials)

    def _tell_if_freed(self, zombie_bytes_before: int) -> None:
        zombie_bytes = self._allocator.usage().zombie_bytes
        if zombie_bytes < zombie_bytes_before:
            self._tell(("freed", self._zombies()))

    def _zombies(self) -> tuple[int, int]:
        self._stamp += 1
        return self._stamp, self._allocator.usage().zombie_bytes

    def _tell_gone(self, keys: Sequence[CacheKey]) -> None:
        self._stamp += 1
        self._tell(("lower_gone", [tuple(key) for key in keys], self._stamp))

    def _tell(self, event: tuple[Any, ...]) -> None:
        self._events.put(event)
