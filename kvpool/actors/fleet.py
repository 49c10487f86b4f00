"""The device actors of one pool: started, given their operations, watched, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from kvpool.actors.cluster import ActorLost, actors_below, end, kill, make_actor, node_ids, submit
from kvpool.actors.device_actor import DeviceActor
from kvpool.actors.outbox import Outbox
from kvpool.actors.protocol import NAMESPACE
from kvpool.config import PoolConfig
from kvpool.errors import DeviceLostError, InvariantError
from kvpool.memory.host import HostBackend
from kvpool.pool.instructions import Move, Send

logger = logging.getLogger("kvpool.pool")

_POLL_S = 30.0
"""How long a long poll of a device waits at most, seconds."""

_ANSWER_S = 10.0
"""How long a device may take to answer a question, seconds; it is left out of what is told then."""

_FOUND_S = 120.0
"""How long a device may take for each part of what it found on disk, seconds."""

_PAUSE_S = 1.0
"""How long to wait after a long poll that failed, seconds, before the next."""


class Fleet:
    """The devices of a pool, by number.

    Parameters
    ----------
    answered
        Called with a device's number, the operations sent, their answers and its zombie figure.
    happened
        Called with a device's number and an event it told (:meth:`DeviceActor.events`).
    lost
        Called with a device's number, the operations it will never answer, and the reason.
    """

    def __init__(
        self,
        answered: Callable[[int, list[Send], list[Any], tuple[int, int]], None],
        happened: Callable[[int, tuple[Any, ...]], None],
        lost: Callable[[int, list[Send], str], None],
    ) -> None:
        self._answered = answered
        self._happened = happened
        self._lost = lost
        self._actors: dict[int, Any] = {}
        self._sockets: dict[int, Path] = {}
        self._outboxes: dict[int, Outbox] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self._moves: set[asyncio.Task[None]] = set()
        self._killed: set[int] = set()

    async def start(self, config: PoolConfig, environment: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Start the devices that ``config`` names, spread over the nodes; returns what each says of itself.

        ``environment``: variables that their processes take over.

        Raises
        ------
        ConfigError
            If a device is smaller than a page.
        SystemLimitError
            If a limit of a device's node is too low for it. None is left running then.
        """
        nodes = node_ids()
        epoch = time.time_ns() // 1_000_000
        plans = config.device_plans(HostBackend().granularity())
        prefix = device_prefix(config.name)
        await end_orphans(config.name)
        described: list[dict[str, Any]] = []
        promised_bytes = dict.fromkeys(nodes, 0)
        try:
            for number, (capacity_bytes, page_bytes) in enumerate(plans):
                self._sockets[number] = config.socket_path(number, epoch)
                node = nodes[number % len(nodes)]
                actor = self._actors[number] = make_actor(
                    DeviceActor, f"{prefix}host-{number}",
                    config.name, f"host-{number}", capacity_bytes, page_bytes, config.min_block,
                    capacity_bytes * config.arena_factor, int(capacity_bytes * config.reserve),
                    str(self._sockets[number]), epoch, promised_bytes[node], dict(environment or {}),
                    config.tier_plan(f"host-{number}")._asdict(),
                    (config.compaction_threshold, config.compaction_share), config.idle_trim_s,
                    node=node,
                )  # fmt: skip
                promised_bytes[node] += capacity_bytes + (config.host_memory or 0)
                described.append(await submit(actor.start))
        except BaseException:
            await self.end(list(range(len(described))))
            raise
        for number, actor in self._actors.items():
            self._outboxes[number] = self._outbox(number, actor)
            watcher = asyncio.create_task(self._watch(number, actor))
            self._watchers.add(watcher)
            watcher.add_done_callback(self._watchers.discard)
        return described

    def put(self, send: Send) -> None:
        """Give a device an operation, after all that it was given before."""
        self._outboxes[send.device].put(send)

    def move(self, move: Move, then: Callable[[Move, Any], None]) -> None:
        """Let a device move bytes, and go on with its answer, or with the error that kept it from moving them."""
        task = asyncio.create_task(self._move(move, then))
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)

    async def _move(self, move: Move, then: Callable[[Move, Any], None]) -> None:
        try:
            answer = await submit(getattr(self._actors[move.device], move.method), *move.arguments)
        except ActorLost as error:
            in_short = str(error).partition("\n")[0]  # as where an operation is lost
            answer = ("error", *DeviceLostError(f"device {move.device} is gone: {in_short}").to_wire())
        except Exception as error:  # a bug there must not keep those waiting who count on an answer
            logger.exception("device %d could not %s", move.device, move.method)
            answer = ("error", *InvariantError(f"device {move.device} could not {move.method}: {error}").to_wire())
        try:
            then(move, answer)
        except Exception:
            logger.exception("what follows on %r of device %d could not be decided", move.method, move.device)

    async def operate(self, number: int, operation: tuple[Any, ...]) -> Any:
        """Give a device an operation and return its answer."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def then(answer: Any, _now: float) -> None:
            if not future.done():  # whoever asked may have been cancelled meanwhile
                future.set_result(answer)

        self.put(Send(number, operation, then))
        return await future

    async def ask(self, numbers: list[int], method: str) -> dict[int, Any]:
        """Call a method without arguments on several devices; those that are gone, or do not answer, are left out."""
        reports = await asyncio.gather(
            *(_ask(self._actors[number], method) for number in numbers), return_exceptions=True
        )
        return {
            number: report
            for number, report in zip(numbers, reports, strict=True)
            if not isinstance(report, BaseException)
        }

    async def found(self, number: int) -> AsyncIterator[tuple[str, str, list[Any]]]:
        """Yield what a device found below it when it started: ``(tenant, fingerprint, entries)``.

        However long it takes: there may be a million. A device that is lost, or has no answer, is logged.
        """
        more = True
        while more:
            try:
                async with asyncio.timeout(_FOUND_S):
                    spaces, more = await submit(self._actors[number].found)
            except Exception:
                logger.exception(
                    "device %d did not tell what it found on disk: what it has not told yet is found by the next start",
                    number,
                )
                return
            for space in spaces:
                yield space

    async def end(self, numbers: list[int]) -> None:
        """Let these devices give their memory back, and end all."""
        for task in (*self._watchers, *self._moves):
            task.cancel()
        closed: dict[int, Any] = {}
        try:
            closed = await self.ask(numbers, "shutdown")
        finally:
            for actor in self._actors.values():
                kill(actor)
        for number, path in self._sockets.items():
            if number not in closed:  # it died, hangs or did not start, and left its socket (if it ran on this host)
                path.unlink(missing_ok=True)
        for folder in {path.parent for path in self._sockets.values()}:
            with contextlib.suppress(OSError):  # the last device took it along, or it is not empty: not ours alone
                folder.rmdir()

    def _device_lost(self, number: int, sent: list[Send], reason: str) -> None:
        if number not in self._killed:
            self._killed.add(number)
            # It may only have been out of reach: given up by the pool, it must not keep memory and socket for ever.
            kill(self._actors[number])
        self._lost(number, sent, reason)

    def _outbox(self, number: int, actor: Any) -> Outbox:
        def answered(sent: list[Send], answers: list[Any], zombies: tuple[int, int]) -> None:
            self._answered(number, sent, answers, zombies)

        def lost(sent: list[Send], reason: str) -> None:
            self._device_lost(number, sent, reason)

        return Outbox(actor, answered, lost)

    async def _watch(self, number: int, actor: Any) -> None:
        """Follow what happens at a device until it is lost."""
        seen = 0
        while True:
            try:
                seen, events = await submit(actor.events, seen, _POLL_S)
            except ActorLost as error:
                self._device_lost(number, [], str(error))
                return
            except Exception:
                # Whatever it was, the watch goes on: without it the next client's death would go unseen.
                logger.exception("device %d could not be asked for events", number)
                await asyncio.sleep(_PAUSE_S)
                continue
            for event in events:
                try:
                    self._happened(number, event)
                except Exception:
                    # A bug in a decision must not end the watch: the next client's death would go unseen.
                    logger.exception("device %d told %s, which could not be handled", number, event)


def device_prefix(pool: str) -> str:
    """Return what the names of a pool's device actors begin with."""
    return f"{NAMESPACE}/{pool}/"


async def end_orphans(pool: str) -> None:
    """End the devices of a pool of that name whose actor died without them."""
    orphans = actors_below(device_prefix(pool))
    if orphans:
        logger.warning("ending %d devices whose pool actor is gone (%s…)", len(orphans), device_prefix(pool))
    # Asked first, so that they take their sockets along; those that do not answer are killed all the same.
    await asyncio.gather(*(_ask(orphan, "shutdown") for orphan in orphans), return_exceptions=True)
    await asyncio.gather(*(end(orphan) for orphan in orphans))


async def _ask(actor: Any, method: str) -> Any:
    async with asyncio.timeout(_ANSWER_S):
        return await submit(getattr(actor, method))
