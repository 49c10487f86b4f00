"""The pool actor: carries out what :class:`~kvpool.pool.state.PoolState` decides.

Its public methods take and return built-in types only, so that any process of the cluster can call the bare handle::

    pool = ray.get_actor("kvpool", namespace="kvpool")
    ray.get(pool.statistics.remote())["utilization"]

Metadata and administration need no more than that; tensors need :meth:`kvpool.CachePool.connect`, because memory can
only be mapped by a process that the devices know. Methods named after a request take a *batch*, a list of items as
:mod:`kvpool.pool.instructions` describes them, and answer each item at once: granted, queued or an error
``("error", class, message, details)``. None of them waits for memory.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from typing import Any

from kvpool.actors.administration import Administration
from kvpool.actors.cluster import end_self, find_actor, join_actor
from kvpool.actors.drain import check_drain_time, drain
from kvpool.actors.executor import Executor
from kvpool.actors.pool_telemetry import PoolTelemetry
from kvpool.actors.priority import run_at_normal_priority
from kvpool.actors.protocol import (
    BLOCKS_ITEM,
    CACHE_ITEM,
    CHANGE_ITEM,
    FETCH_ITEM,
    LEASE_ITEM,
    PREFIX_ITEM,
    PROTOCOL_VERSION,
    SEAL_ITEM,
)
from kvpool.actors.stream import Stream
from kvpool.config import PoolConfig
from kvpool.errors import KvpoolError, PoolBusyError, PoolNotFoundError
from kvpool.pool.instructions import (
    BlocksRequested,
    CachesRequested,
    ChangesRequested,
    PersistRequested,
    PinRequested,
    PrefixesFetched,
    PrefixesLookedUp,
    ReleaseRequested,
    SealRequested,
    TicketsCancelled,
)
from kvpool.pool.state import PoolState
from kvpool.pool.statistics import collect
from kvpool.telemetry.logs import carry_trace_ids, print_trace_ids
from kvpool.telemetry.sdk import adopt, environment
from kvpool.version import __version__

logger = logging.getLogger("kvpool.pool")

_LINGER_S = 1.0
"""How long a deleted pool's actor lives on, seconds: its answer must arrive. Usually the caller kills it before."""


class PoolActor(Administration):
    """One pool: directory, placement, eviction and the queue, over its device actors.

    Parameters
    ----------
    config
        A :class:`~kvpool.config.PoolConfig` as built-in types.
    environment
        The ``OTEL_*`` variables of the process that creates the pool: this actor and its devices take them over.
    """

    def __init__(self, config: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self._environment = environment or {}
        adopt(self._environment)
        carry_trace_ids()
        print_trace_ids()
        self._config = PoolConfig(**config)
        self._unusable: KvpoolError | None = None
        try:
            self._state = self._make_state(self._config.policy)
        except KvpoolError as error:  # raised from here, it would be told as the traceback of an actor that died
            self._unusable = error
            self._state = self._make_state("lru")
        self._telemetry = PoolTelemetry(self._state)
        self._executor = Executor(self._state, self._telemetry)
        self._fleet = self._executor.fleet
        self._described: list[dict[str, Any]] = []
        self._draining = False
        self._ended = False
        self._started: asyncio.Task[None] | None = None

    # -- the pool as a whole --------------------------------------------------------------------------------------

    async def start(self) -> dict[str, Any]:
        """Start the devices, once; returns :meth:`describe`, and as ``"began"`` whether it was this call that did it.

        Raises
        ------
        UnknownPolicyError, PolicyError
            If the policy is not to be had here.
        """
        began = self._started is None
        return await self._running() | {"began": began}

    async def _running(self) -> dict[str, Any]:
        self._check_not_ended()
        if self._unusable is not None:
            raise self._unusable
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        await self._started
        return await self.describe()

    async def describe(self) -> dict[str, Any]:
        """Return protocol and version, config and devices of this pool, and which telemetry it could not set up."""
        return {
            "protocol": PROTOCOL_VERSION,
            "version": __version__,
            "config": self._config.model_dump(mode="json"),
            "devices": self._described,
            "telemetry_problems": self._telemetry.problems,
        }

    async def statistics(self) -> dict[str, Any]:
        """Return what the pool holds and did: :meth:`kvpool.PoolStatistics.to_dict`."""
        memory = await self._fleet.ask(self._alive(), "memory")
        config = self._config
        return collect(self._state, memory, policy_requested=config.policy, preset=config.preset).to_dict()

    async def delete(self, drain_s: float | None = None, leaving: str | None = None) -> None:
        """End the devices. This actor ends itself shortly afterwards, if the caller does not kill it before.

        Parameters
        ----------
        drain_s
            How long to wait for leases to end; None refuses at once while there are any.
        leaving
            The client that asks, if it is one: its leases end with the pool. So does what was pinned by word.

        Raises
        ------
        PoolBusyError
            If clients hold leases, at once or at the deadline; the pool goes on as before. Also while another
            delete() drains.
        InvalidRequestError
            If ``drain_s`` is no time.
        """
        self._check_not_ended()
        check_drain_time(drain_s)
        if self._draining:
            raise self._busy()
        self._draining = True
        try:
            await drain(self._config.name, self._leased_bytes, drain_s or 0.0, leaving)
        except BaseException:
            self._draining = False
            raise
        self._ended = True
        try:
            await asyncio.gather(self._fleet.end(self._alive()), self._telemetry.close())
        finally:
            end_self(_LINGER_S)  # also when the caller is gone by now: what is left of the pool must not hold its name

    # -- clients --------------------------------------------------------------------------------------------------

    async def connect(self, client: dict[str, Any]) -> dict[str, Any]:
        """Make a client process known; returns :meth:`describe` plus ``reachable``, the numbers of its devices.

        ``client``: ``protocol``, ``id``, ``tenant``, ``host`` and the ``token`` it will show to the page servers; and
        what :meth:`leases` tells of it, ``who``: a dict with ``pid``, ``hostname``, ``job`` and ``node``.
        An error is returned as ``{"error": (class, message, details)}``.
        """
        try:
            self._check_not_ended()
            described = await self._running()
        except KvpoolError as error:
            return {"error": error.to_wire()}
        if client["protocol"] != PROTOCOL_VERSION:
            return described
        if self._draining:
            return {"error": self._busy().to_wire()}
        try:
            known, batch, instructions = self._state.connect(
                client["id"], client["tenant"], client["host"], client["token"], client.get("who"), time.monotonic()
            )
        except KvpoolError as error:
            return {"error": error.to_wire()}
        self._executor.grants[known.id] = Stream()
        await self._executor.finish(batch, instructions)
        return described | {"reachable": known.devices}

    async def disconnect(self, client: str) -> None:
        """End all leases of a client that leaves."""
        batch, instructions = self._state.disconnect(client)
        self._executor.grants.pop(client, None)
        if batch.size:
            await self._executor.finish(batch, instructions)

    async def register_model(self, client: str, spec: dict[str, Any]) -> Any:
        """Return ``("model", number)`` for a model's ``name``, ``identity``, ``block_bytes`` and ``limit_bytes``."""
        try:
            model, instructions = self._state.register_model(client, spec, time.monotonic())
        except KvpoolError as error:
            return ("error", *error.to_wire())
        self._executor.carry_out(instructions)
        return "model", model.number

    async def find_model(self, client: str, spec: dict[str, Any]) -> Any:
        """Return ``("model", number)`` as :meth:`register_model`, number None if nobody has registered it."""
        try:
            found = self._state.find_model(client, spec)
        except KvpoolError as error:
            return ("error", *error.to_wire())
        return "model", None if found is None else found.number

    async def request_caches(self, client: str, items: list[Any]) -> list[Any]:
        """Ask for caches: ``("granted", id, device, size, max_size, place)``, ``("queued", ticket)`` or an error."""
        return await self._lease(CachesRequested, CACHE_ITEM, client, items)

    async def change_backing(self, client: str, items: list[Any]) -> list[Any]:
        """Change what is backed of caches: ``("changed", id, size, extents, place)``, ``("queued", n)`` or an error."""
        return await self._lease(ChangesRequested, CHANGE_ITEM, client, items)

    async def look_up(self, client: str, items: list[Any]) -> list[Any]:
        """Find and lease prefixes: ``("hit", ids, devices, places, sizes, coming)``.

        Sizes only where a model has no blocks. ``coming``: how many blocks behind the hit lie in lower tiers and are on
        their way up; :meth:`fetch` leases them.
        """
        return await self._lease(PrefixesLookedUp, PREFIX_ITEM, client, items)

    async def fetch(self, client: str, items: list[Any]) -> list[Any]:
        """Lease what comes up behind the blocks a client has: a ``hit`` as in :meth:`look_up`, or ``("queued", n)``."""
        return await self._lease(PrefixesFetched, FETCH_ITEM, client, items)

    async def persist(self, client: str, items: list[Any]) -> list[Any]:
        """Write blocks through to disk: ``("persisted", [True or an error for each hash])`` once they are there."""
        return await self._executor.submit(PersistRequested, PREFIX_ITEM, client, items)

    async def request_blocks(self, client: str, items: list[Any]) -> list[Any]:
        """Ask for new blocks: ``("blocks", already resident, ids, devices, places)``, as many as fit."""
        return await self._lease(BlocksRequested, BLOCKS_ITEM, client, items)

    async def seal(self, client: str, items: list[Any]) -> list[Any]:
        """Seal caches: ``("sealed", [True, "duplicate" or an error for each id])``."""
        return await self._executor.submit(SealRequested, SEAL_ITEM, client, items, False)

    async def seal_and_release(self, client: str, items: list[Any]) -> list[Any]:
        """Seal caches and end the client's lease on each, in one step."""
        return await self._executor.submit(SealRequested, SEAL_ITEM, client, items, True)

    async def release(self, client: str, items: list[Any]) -> list[Any]:
        """End leases: ``("released", [True or an error for each id])``."""
        return await self._executor.submit(ReleaseRequested, LEASE_ITEM, client, items)

    async def pin(self, client: str, items: list[Any]) -> list[Any]:
        """Hold sealed caches beyond their leases, by the tenant's word."""
        return await self._executor.submit(PinRequested, LEASE_ITEM, client, items, True)

    async def unpin(self, client: str, items: list[Any]) -> list[Any]:
        """Stop holding pinned caches."""
        return await self._executor.submit(PinRequested, LEASE_ITEM, client, items, False)

    async def cancel(self, client: str, tickets: list[int]) -> list[int]:
        """Stop waiting; returns those of the tickets that still waited. The others' outcomes are on their way."""
        waiting = [ticket for ticket in tickets if self._state.is_waiting(ticket)]
        self._executor.decide(TicketsCancelled(client, waiting))
        return waiting

    async def grants(self, client: str, seen: int, wait_s: float) -> tuple[int, list[Any]]:
        """Return the outcomes of waiting requests after number ``seen`` (long poll of at most ``wait_s``)."""
        ledger = self._state.ledger
        stream = self._executor.grants.get(client)
        if stream is None:
            raise ledger.not_connected(client)
        # A revoked client is told what became of its requests; nothing comes after that.
        last, outcomes = await stream.poll(seen, 0.0 if client in ledger.revoked else wait_s)
        if not outcomes and client in ledger.revoked:
            raise ledger.not_connected(client)
        return last, outcomes

    async def describe_caches(self, client: str, ids: list[int]) -> list[Any]:
        """Return for each id a dict of what the pool knows of it, or an error."""
        now, wall = time.monotonic(), time.time()
        ledger = self._state.ledger
        answers: list[Any] = []
        for cache_id in ids:
            try:
                row = ledger.row(ledger.client(client), cache_id)
            except KvpoolError as error:
                answers.append(("error", *error.to_wire()))
                continue
            index = ledger.index
            answers.append(
                {
                    "id": cache_id,
                    "device": ledger.devices[index.device[row]].name,
                    "size_bytes": index.size_bytes[row],
                    "sealed": index.is_sealed(row),
                    "leases": index.pins[row],
                    "last_accessed": wall - (now - index.last_accessed[row]),
                    "access_count": index.access_count[row],
                }
            )
        return answers

    # -- carrying out ---------------------------------------------------------------------------------------------

    def _make_state(self, policy: str) -> PoolState:
        config = self._config
        return PoolState(config.name, policy, config.placement, config.queue_limit, config.gc_threshold)

    async def _start(self) -> None:
        run_at_normal_priority()
        self._described = await self._fleet.start(self._config, self._environment)
        found = [space for device in self._described for space in device.pop("spaces")]
        unread = [url for device in self._described for url in device.pop("unread")]
        for device in self._described:
            self._state.add_device(
                device["name"],
                device["host"],
                device["capacity_bytes"],
                device["page_bytes"],
                device["min_block_bytes"],
                device["arena_bytes"],
                device["has_lower"],
                device["disk_url"],
            )
        for quota in self._config.quotas:
            await self.set_quota(quota.tenant, quota.model, quota.guaranteed, quota.limit)
        if (warning := self._state.ledger.quotas.warning) is not None:
            logger.warning("pool %s: %s", self._config.name, warning)
        self._executor.carry_out(self._state.restore_models(found, unread, time.monotonic()))
        if unnamed := self._state.ledger.unnamed_below(None):
            logger.warning("pool %s: %s", self._config.name, unnamed)
        # Before the first client: what is invalidated meanwhile could be entered by an answer that is on its way.
        for number, described in enumerate(self._described):
            if described["has_lower"]:
                async for tenant, fingerprint, entries in self._fleet.found(number):
                    self._state.below.add(number, tenant, fingerprint, entries)
        self._telemetry.follow(self._alive(), self._memory_of)
        logger.info("pool %s started: %s", self._config.name, self._described)
        gc.collect()
        gc.freeze()

    async def _lease(self, event: Any, fields: dict[str, Any], client: str, items: list[Any]) -> list[Any]:
        """Submit what takes new leases, unless the pool is being deleted."""
        if self._draining:
            return [("error", *self._busy().to_wire())] * len(items)
        return await self._executor.submit(event, fields, client, items)

    def _busy(self) -> PoolBusyError:
        return PoolBusyError(f"pool {self._config.name!r} is being deleted and gives out no more memory")

    def _check_not_ended(self) -> None:
        if self._ended:
            name = self._config.name
            raise PoolNotFoundError(f"pool {name!r} has been deleted: its name is free in a moment", asked=name)

    async def _memory_of(self, number: int) -> dict[str, int] | None:
        return (await self._fleet.ask([number], "memory")).get(number)


def find_pool(name: str) -> Any:
    """Return the handle of a pool's actor, or raise :class:`~kvpool.errors.PoolNotFoundError`."""
    return find_actor(name)


def make_pool(config: PoolConfig) -> Any:
    """Start the pool actor of that name, or find the one that runs."""
    return join_actor(PoolActor, config.name, config.model_dump(mode="json"), environment())
