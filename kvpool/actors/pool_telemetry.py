"""Telemetry of the pool actor: its spans, its metrics, and the loops that keep their snapshot fresh."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.trace import NoOpTracerProvider

from kvpool.actors.metrics import PoolMetrics, PoolSnapshot
from kvpool.actors.protocol import errors_of
from kvpool.actors.spans import BatchSpans, ItemSpan, NoSpans
from kvpool.errors import ConfigError
from kvpool.pool.backing import KINDS
from kvpool.pool.instructions import Answer, Move, Send, Waited
from kvpool.pool.state import PoolState
from kvpool.pool.statistics import HOST_TIER, collect
from kvpool.telemetry.calls import SCOPE
from kvpool.telemetry.sdk import meter_provider, shut_down, tracer_provider
from kvpool.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger("kvpool.pool")

_FRESH_S = 1.0
"""Age of the figures that exporters read, seconds, at most (a device that hangs has none)."""

_CLOSE_S = 2.0
"""How long the last spans and metrics may take to leave when the pool ends, seconds."""

_ALLOCATING = ("request_caches", "request_blocks")

_DEMOTING = {"lower": "eviction", "copy": "ahead"}
"""Why caches go down, by the operation that brings them there."""

_Provider = TypeVar("_Provider", "TracerProvider | None", "MeterProvider | None")


class PoolTelemetry:
    """What the pool actor tells of itself, as far as ``OTEL_*`` variables ask for it.

    Parameters
    ----------
    state
        The pool's state, read in its own event loop only.

    Telemetry that cannot be set up does not keep the pool from working: see :attr:`problems`.
    """

    def __init__(self, state: PoolState) -> None:
        self.problems: list[str] = []
        """What was asked for and is not there, with what to do about it."""
        self._state = state
        self._spans = self._set_up(tracer_provider)
        self._meters = self._set_up(meter_provider)
        self._tracer = (self._spans or NoOpTracerProvider()).get_tracer(SCOPE, __version__)
        self._metrics = PoolMetrics((self._meters or NoOpMeterProvider()).get_meter(SCOPE, __version__))
        self._errors: dict[str, int] = {}
        self._memory: dict[int, dict[str, int]] = {}
        self._loops: list[asyncio.Task[None]] = []

    def _set_up(self, make: Callable[..., _Provider]) -> _Provider | None:
        try:
            return make(self._state.name, **{"kvpool.pool": self._state.name})
        except ConfigError as error:
            logger.warning("pool %s goes on without: %s", self._state.name, error)
            self.problems.append(str(error))
            return None

    # -- what happens ---------------------------------------------------------------------------------------------

    def batch(self, method: str, items: Sequence[tuple[Any, ...]]) -> BatchSpans | NoSpans:
        """Return the spans of an RPC, to be entered."""
        return NoSpans(method, items) if self._spans is None else BatchSpans(self._tracer, method, items)

    def answered(
        self, method: str, items: Sequence[tuple[Any, ...]], answers: Sequence[Answer], duration_s: float
    ) -> None:
        """Note the answers of an RPC, ``duration_s`` after it came.

        One allocation time is recorded for each model, not for each item: they are all answered together.
        """
        if self._meters is None:
            return
        for _, (error_type, *_) in errors_of(answers):
            self._errors[error_type] = self._errors.get(error_type, 0) + 1
        if method in _ALLOCATING:
            granted = {item[1] for item, answer in zip(items, answers, strict=True) if _grants(answer)}
            for model in granted:
                self._metrics.allocated(self._state.ledger.models[model].name, duration_s)

    def timed(self, send: Send, now: float) -> Send:
        """Return the operation, with its time taken if it evicts or brings caches down."""
        if self._meters is None:
            return send
        device = self._state.ledger.devices[send.device].name
        kind = send.operation[0]
        record: Callable[[float], None]
        if _evicts(send.operation):
            # The policy that decided, which may be another when the answer comes.
            record = partial(self._metrics.evicted, device, HOST_TIER, self._state.policy_name)
        elif kind in _DEMOTING:
            record = partial(self._metrics.demoted, device, _DEMOTING[kind])
        else:
            return send
        return send._replace(then=_recorded(send.then, record, now))

    def timed_move(self, move: Move, now: float) -> Move:
        """Return what a device is to move, with its time taken if it brings caches up."""
        if self._meters is None or move.method != "fill":
            return move
        record = partial(self._metrics.filled, self._state.ledger.devices[move.device].name)
        return move._replace(then=_recorded(move.then, record, now))

    def waited(self, wait: Waited, now: float) -> None:
        """Note the end of a wait."""
        ended_ns = time.time_ns()
        name = self._state.ledger.models[wait.model].name
        self._metrics.waited(name, wait.outcome, now - wait.since)
        if wait.outcome == "granted":
            self._metrics.allocated(name, now - wait.asked)
        elif wait.outcome != "cancelled":
            self._errors[wait.outcome] = self._errors.get(wait.outcome, 0) + 1
        if isinstance(wait.trace, ItemSpan):
            began_ns = ended_ns - int((now - wait.since) * 1e9)
            attributes = {"kvpool.outcome": wait.outcome}
            span = self._tracer.start_span(
                "kvpool.pool.wait", wait.trace.context, attributes=attributes, start_time=began_ns
            )
            span.end(ended_ns)

    # -- figures --------------------------------------------------------------------------------------------------

    def follow(self, numbers: Iterable[int], memory: Callable[[int], Any]) -> None:
        """Keep the figures fresh from now on; ``memory`` asks a device for its report, None if it has no answer."""
        if self._meters is None:
            return
        for loop in (*(self._follow(number, memory) for number in numbers), self._count()):
            task = asyncio.create_task(loop)
            task.add_done_callback(_ended)
            self._loops.append(task)

    async def _follow(self, number: int, memory: Callable[[int], Any]) -> None:
        while self._state.ledger.devices[number].lost is None:
            report = await memory(number)
            if report is None:
                self._memory.pop(number, None)
            else:
                self._memory[number] = report
            await asyncio.sleep(_FRESH_S)

    async def _count(self) -> None:
        while True:
            self._take_snapshot()
            await asyncio.sleep(_FRESH_S)

    def _take_snapshot(self) -> None:
        hits: dict[str, int] = {}
        misses: dict[str, int] = {}
        for model in self._state.ledger.models:
            label = self._metrics.model_label(model.name)
            hits[label] = hits.get(label, 0) + model.blocks_hit
            misses[label] = misses.get(label, 0) + model.blocks_looked_up - model.blocks_hit
        statistics = collect(self._state, self._memory)
        self._metrics.snapshot = PoolSnapshot(statistics, hits, misses, dict(self._errors))

    async def close(self) -> None:
        """Let what was recorded leave, and stop."""
        for loop in self._loops:
            loop.cancel()
        if self._meters is not None:
            self._take_snapshot()
        providers = [provider for provider in (self._spans, self._meters) if provider is not None]
        # Whoever should receive it may be gone; the threads that try are daemons.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.gather(*(asyncio.to_thread(shut_down, provider) for provider in providers))


def _ended(loop: asyncio.Task[None]) -> None:
    error = None if loop.cancelled() else loop.exception()
    if error is not None:
        logger.error("some metrics of this pool stand still from now on", exc_info=error)


def _recorded(
    then: Callable[[Answer, float], None], record: Callable[[float], None], began: float
) -> Callable[[Answer, float], None]:
    """Return what goes on with an answer, and records before how long it took, unless it is an error."""

    def recorded(answer: Answer, answered: float) -> None:
        if not isinstance(answer, tuple) or answer[:1] != ("error",):
            record(answered - began)
        then(answer, answered)

    return recorded


def _evicts(operation: tuple[Any, ...]) -> bool:
    return bool(operation[0] in ("evict", "allocate", *KINDS) and operation[-1])  # else it only keeps others in order


def _grants(answer: Answer) -> bool:
    return bool(answer[0] == "granted" or (answer[0] == "blocks" and answer[2]))  # else all were there, or none fits
