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
import tempfile
import time
from pathlib import Path
from typing import Any

from kvpool.actors.cluster import ActorLost, find_actor, kill, make_actor, node_ids
from kvpool.actors.device_actor import DeviceActor
from kvpool.actors.grants import GrantStream
from kvpool.actors.outbox import Outbox
from kvpool.actors.protocol import NAMESPACE, PROTOCOL_VERSION
from kvpool.config import PoolConfig
from kvpool.errors import ConfigError, DeviceLostError, KvpoolError, PoolBusyError
from kvpool.memory.host import HostBackend
from kvpool.pool.instructions import (
    Batch,
    BatchDone,
    BlocksRequested,
    CachesRequested,
    ClientGone,
    DeviceAnswered,
    DeviceFreed,
    DeviceLost,
    Event,
    Grant,
    Instruction,
    PinRequested,
    PrefixesLookedUp,
    ReleaseRequested,
    SealRequested,
    Send,
    Tick,
    TicketsCancelled,
)
from kvpool.pool.state import PoolState
from kvpool.pool.statistics import collect

logger = logging.getLogger("kvpool.pool")

_POLL_S = 30.0
"""How long the pool's own long polls of the devices wait at most, seconds."""


class PoolActor:
    """One pool: directory, placement, eviction and the queue, over its device actors.

    Parameters
    ----------
    config
        A :class:`~kvpool.config.PoolConfig` as built-in types.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = PoolConfig(**config)
        self._state = PoolState(
            self._config.name, self._config.policy, self._config.placement, self._config.queue_limit
        )
        self._devices: list[Any] = []
        self._described: list[dict[str, Any]] = []
        self._outboxes: list[Outbox] = []
        self._done: dict[Batch, asyncio.Future[list[Any]]] = {}
        self._grants: dict[str, GrantStream] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._watchers: set[asyncio.Task[None]] = set()
        self._draining = False
        self._started: asyncio.Task[None] | None = None

    # -- the pool as a whole --------------------------------------------------------------------------------------

    async def start(self) -> dict[str, Any]:
        """Start the devices, once; returns :meth:`describe`."""
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        await self._started
        return await self.describe()

    async def describe(self) -> dict[str, Any]:
        """Return protocol version, config and devices of this pool."""
        return {
            "protocol": PROTOCOL_VERSION,
            "config": self._config.model_dump(mode="json"),
            "devices": self._described,
        }

    async def statistics(self) -> dict[str, Any]:
        """Return what the pool holds and did: :meth:`kvpool.PoolStatistics.to_dict`."""
        alive = [device.number for device in self._state.ledger.devices if device.lost is None]
        reports = await asyncio.gather(
            *(self._devices[number].memory.remote() for number in alive), return_exceptions=True
        )
        memory = {number: report for number, report in zip(alive, reports, strict=True) if isinstance(report, dict)}
        config = self._config
        return collect(self._state, memory, policy_requested=config.policy_requested, preset=config.preset).to_dict()

    async def leases(self) -> dict[str, int]:
        """Return the bytes that each client holds leased, over all devices."""
        held: dict[str, int] = {}
        for device in self._state.ledger.devices:
            if device.lost is None:
                for client, size_bytes in (await self._devices[device.number].leases.remote()).items():
                    held[client] = held.get(client, 0) + size_bytes
        return held

    async def trim(self) -> int:
        """Give warm pages back to the system; returns their bytes. Pages that clients still map become zombies."""
        given = 0
        for device in self._state.ledger.devices:
            if device.lost is None:
                given += (await self._operate(device.number, ("trim",))) or 0
        return given

    async def delete(self, drain_s: float | None = None) -> None:
        """End the devices. The caller kills this actor afterwards.

        Parameters
        ----------
        drain_s
            How long to wait for leases to end; None refuses at once while there are any.

        Raises
        ------
        PoolBusyError
            If clients hold leases, at once or at the deadline; the pool goes on as before.
        """
        self._draining = True
        try:
            deadline = time.monotonic() + (drain_s or 0.0)
            while held := await self.leases():
                if time.monotonic() >= deadline:
                    who = ", ".join(f"{client}: {size} bytes" for client, size in sorted(held.items())[:8])
                    raise PoolBusyError(
                        f"pool {self._config.name!r} is in use by {len(held)} clients ({who}): release the leases, or "
                        "give delete() a longer time to drain",
                        leases=held,
                    )
                await asyncio.sleep(min(0.05, max(deadline - time.monotonic(), 0.0)))
        except PoolBusyError:
            self._draining = False
            raise
        for task in self._watchers:
            task.cancel()
        for device in self._state.ledger.devices:
            if device.lost is None:
                actor = self._devices[device.number]
                await actor.shutdown.remote()
                kill(actor)

    # -- clients --------------------------------------------------------------------------------------------------

    async def connect(self, client: dict[str, Any]) -> dict[str, Any]:
        """Make a client process known; returns :meth:`describe` plus ``reachable``, the numbers of its devices.

        ``client``: ``protocol``, ``id``, ``tenant``, ``host`` and the ``token`` it will show to the page servers.
        An error is returned as ``{"error": (class, message, details)}``.
        """
        await self.start()
        described = await self.describe()
        if client["protocol"] != PROTOCOL_VERSION:
            return described
        try:
            known, batch, instructions = self._state.connect(
                client["id"], client["tenant"], client["host"], client["token"]
            )
        except KvpoolError as error:
            return {"error": error.to_wire()}
        self._grants[known.id] = GrantStream()
        await self._finish(batch, instructions)
        return described | {"reachable": known.devices}

    async def disconnect(self, client: str) -> None:
        """End all leases of a client that leaves."""
        batch, instructions = self._state.disconnect(client)
        self._grants.pop(client, None)
        if batch.size:
            await self._finish(batch, instructions)

    async def register_model(self, client: str, spec: dict[str, Any]) -> Any:
        """Return ``("model", number)`` for a model's ``name``, ``identity``, ``block_bytes`` and ``limit_bytes``."""
        try:
            return "model", self._state.register_model(client, spec).number
        except KvpoolError as error:
            return ("error", *error.to_wire())

    async def request_caches(self, client: str, items: list[Any]) -> list[Any]:
        """Ask for caches: ``("granted", id, device, size, max_size, place)``, ``("queued", ticket)`` or an error."""
        if self._draining:
            error = PoolBusyError(f"pool {self._config.name!r} is being deleted and gives out no more memory")
            return [("error", *error.to_wire())] * len(items)
        return await self._submit(CachesRequested, client, items)

    async def look_up(self, client: str, items: list[Any]) -> list[Any]:
        """Find and lease prefixes: ``("hit", ids, devices, places)``."""
        return await self._submit(PrefixesLookedUp, client, items)

    async def request_blocks(self, client: str, items: list[Any]) -> list[Any]:
        """Ask for new blocks: ``("blocks", already resident, ids, devices, places)``, as many as fit."""
        return await self._submit(BlocksRequested, client, items)

    async def seal(self, client: str, items: list[Any]) -> list[Any]:
        """Seal caches: ``("sealed", [True, "duplicate" or an error for each id])``."""
        return await self._submit(SealRequested, client, items, False)

    async def seal_and_release(self, client: str, items: list[Any]) -> list[Any]:
        """Seal caches and end the client's lease on each, in one step."""
        return await self._submit(SealRequested, client, items, True)

    async def release(self, client: str, items: list[Any]) -> list[Any]:
        """End leases: ``("released", [True or an error for each id])``."""
        return await self._submit(ReleaseRequested, client, items)

    async def pin(self, client: str, items: list[Any]) -> list[Any]:
        """Hold sealed caches beyond their leases, by the tenant's word."""
        return await self._submit(PinRequested, client, items, True)

    async def unpin(self, client: str, items: list[Any]) -> list[Any]:
        """Stop holding pinned caches."""
        return await self._submit(PinRequested, client, items, False)

    async def cancel(self, client: str, tickets: list[int]) -> list[int]:
        """Stop waiting; returns those of the tickets that still waited. The others' outcomes are on their way."""
        waiting = [ticket for ticket in tickets if ticket in self._state.allocations.queue]
        self._decide(TicketsCancelled(client, waiting))
        return waiting

    async def grants(self, client: str, seen: int, wait_s: float) -> tuple[int, list[Any]]:
        """Return the outcomes of waiting requests after number ``seen`` (long poll of at most ``wait_s``)."""
        stream = self._grants.get(client)
        return await stream.poll(seen, wait_s) if stream else (seen, [])

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

    async def _start(self) -> None:
        config = self._config
        nodes = node_ids()
        epoch = time.time_ns() // 1_000_000
        granularity_bytes = HostBackend().granularity()
        folder = config.socket_dir or Path(tempfile.gettempdir()) / f"kvpool-{config.name}-{epoch:x}"
        try:
            for number, size_bytes in enumerate(config.device_sizes_bytes()):
                page_bytes = config.page_size_bytes(size_bytes, granularity_bytes)
                capacity_bytes = size_bytes - size_bytes % page_bytes
                if not capacity_bytes:
                    raise ConfigError(
                        f"a device of {size_bytes} bytes is smaller than one page ({page_bytes} bytes): make "
                        "the device larger or the page smaller"
                    )
                actor = make_actor(
                    DeviceActor, f"{NAMESPACE}/{config.name}/host-{number}",
                    config.name, f"host-{number}", capacity_bytes, page_bytes, config.min_block,
                    capacity_bytes * config.arena_factor, int(capacity_bytes * config.reserve),
                    str(folder / f"{number}.sock"), epoch,
                    node=nodes[number % len(nodes)],
                )  # fmt: skip
                self._devices.append(actor)
                self._add_device(actor, await actor.start.remote())
        except BaseException:
            for actor in self._devices:
                kill(actor)
            raise
        logger.info("pool %s started: %s", config.name, self._described)
        gc.collect()
        gc.freeze()

    def _add_device(self, actor: Any, described: dict[str, Any]) -> None:
        device = self._state.add_device(
            described["name"],
            described["host"],
            described["capacity_bytes"],
            described["page_bytes"],
            described["min_block_bytes"],
        )
        self._described.append(described)
        self._outboxes.append(self._outbox(actor, device.number))
        watcher = asyncio.create_task(self._watch(device.number))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    def _outbox(self, actor: Any, number: int) -> Outbox:
        def answered(sent: list[Send], answers: list[Any], zombies: tuple[int, int]) -> None:
            self._decide(DeviceAnswered(number, sent, answers, zombies))

        def lost(sent: list[Send], reason: str) -> None:
            self._device_lost(number, reason)
            error = DeviceLostError(f"device host-{number} is gone with all that was only there: {reason}")
            self._carry_out(self._state.fail_operations(sent, error, time.monotonic()))

        return Outbox(actor, answered, lost)

    async def _watch(self, number: int) -> None:
        """Follow what happens at a device until it is lost."""
        seen = 0
        while True:
            try:
                seen, events = await self._devices[number].events.remote(seen, _POLL_S)
            except ActorLost as error:
                self._device_lost(number, str(error))
                return
            for kind, *content in events:
                if kind == "gone":
                    client, ended, freed = content
                    self._grants.pop(client, None)
                    self._decide(ClientGone(client, number, ended, freed))
                else:
                    self._decide(DeviceFreed(number, content[0]))

    def _device_lost(self, number: int, reason: str) -> None:
        if self._state.ledger.devices[number].lost is None:
            logger.error("device host-%d of pool %s is lost: %s", number, self._config.name, reason)
            self._decide(DeviceLost(number, reason))

    async def _submit(self, event: Any, client: str, items: list[Any], *more: Any) -> list[Any]:
        if not items:
            return []
        batch = Batch(len(items))
        now = time.monotonic()
        try:
            instructions = self._state.handle(event(batch, client, items, *more), now)
        except KvpoolError as error:
            return [("error", *error.to_wire())] * len(items)
        return await self._finish(batch, instructions)

    async def _finish(self, batch: Batch, instructions: list[Instruction]) -> list[Any]:
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._done[batch] = future
        self._carry_out(instructions)
        return await future

    async def _operate(self, number: int, operation: tuple[Any, ...]) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._outboxes[number].put(Send(number, operation, lambda answer, _now: future.set_result(answer)))
        return await future

    def _decide(self, event: Event) -> None:
        self._carry_out(self._state.handle(event, time.monotonic()))

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self._outboxes[instruction.device].put(instruction)
                case BatchDone():
                    future = self._done.pop(instruction.batch)
                    if not future.cancelled():
                        future.set_result(instruction.batch.answers)
                case Grant():
                    stream = self._grants.get(instruction.client)
                    if stream is not None:
                        stream.put(instruction.ticket, instruction.answer)
        self._set_timer()

    def _set_timer(self) -> None:
        deadline = self._state.next_deadline()
        if self._timer is not None:
            if deadline is not None and self._timer.when() <= deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            # The loop's clock is time.monotonic(), the clock of all decisions.
            self._timer = asyncio.get_running_loop().call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._decide(Tick())


def find_pool(name: str) -> Any:
    """Return the handle of a pool's actor, or raise :class:`~kvpool.errors.PoolNotFoundError`."""
    return find_actor(name)


def make_pool(config: PoolConfig) -> Any:
    """Start the pool actor of that name, or find the one that runs."""
    return make_actor(PoolActor, config.name, config.model_dump(mode="json"))
