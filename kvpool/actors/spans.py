"""Spans of the pool actor and of the device actors, in the traces that came with the items."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span, SpanKind, Tracer

from kvpool.errors import BackendError
from kvpool.telemetry.calls import fail
from kvpool.telemetry.context import Carrier, extract, inject

Error = tuple[str, str, dict[str, Any]]
"""As :meth:`kvpool.errors.KvpoolError.to_wire` describes it."""


class ItemSpan:
    """The pool's span over those items of an RPC that share a trace. For the pool's decisions it is the *trace*."""

    __slots__ = ("_carrier", "context", "items", "span")

    def __init__(self, span: Span, parent: Context) -> None:
        self.span = span
        self.context = trace.set_span_in_context(span, parent)
        """The span, and the baggage that came with the items."""
        self.items = 0
        self._carrier: Carrier | None = None

    @property
    def carrier(self) -> Carrier:
        """What a device needs to continue the trace."""
        if self._carrier is None:
            self._carrier = inject(self.context) or ()
        return self._carrier


class BatchSpans:
    """The spans of one RPC of a client: one for each trace among its items. Ended when the block that enters it is.

    Parameters
    ----------
    tracer
        Makes them.
    method
        What was called.
    items
        As they came, each with its trace context last.
    """

    def __init__(self, tracer: Tracer, method: str, items: Sequence[tuple[Any, ...]]) -> None:
        self._method = method
        self._spans: dict[Carrier | None, ItemSpan] = {}
        self.items: list[tuple[Any, ...]] = []
        """The items with their spans in place of their trace contexts."""
        carrier: Carrier | None = None
        span: ItemSpan | None = None
        for item in items:
            if span is None or item[-1] is not carrier:  # those that share a span carry the very same one
                carrier = item[-1]
                span = self._spans.get(carrier)
                if span is None:
                    parent = extract(carrier)
                    made = tracer.start_span(f"kvpool.pool.{method}", parent, SpanKind.SERVER)
                    span = self._spans[carrier] = ItemSpan(made, parent)
            span.items += 1
            self.items.append((*item[:-1], span))

    def failed(self, errors: Sequence[tuple[int, Error]]) -> None:
        """Let spans and log tell of errors, each with the number of its item."""
        for item, (error_type, message, _) in errors:
            span = self.items[item][-1]
            fail(span.span, error_type, message)
            _log("kvpool.pool", logging.INFO, span.context, self._method, error_type, message)

    def __enter__(self) -> BatchSpans:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for each in self._spans.values():
            if error is not None:
                fail(each.span, type(error).__name__, str(error))
            each.span.set_attribute("kvpool.items", each.items)
            each.span.end()


class NoSpans:
    """Stands in for :class:`BatchSpans` where nothing is traced: no item has a trace."""

    def __init__(self, method: str, items: Sequence[tuple[Any, ...]]) -> None:
        self._method = method
        traced = any(item[-1] is not None for item in items)
        self.items = [(*item[:-1], None) for item in items] if traced else items

    def failed(self, errors: Sequence[tuple[int, Error]]) -> None:
        """Let the log tell of errors."""
        for _, (error_type, message, _) in errors:
            _log("kvpool.pool", logging.INFO, None, self._method, error_type, message)

    def __enter__(self) -> NoSpans:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


class OperationSpans:
    """The spans of a device's operations, in the order in which they are carried out: one for each trace concerned.

    Parameters
    ----------
    tracer, device
        What makes them, and the device's name.
    traces
        For each operation the contexts of the traces that it belongs to; None: none of them belongs to any.
    """

    def __init__(self, tracer: Tracer, device: str, traces: Sequence[Sequence[Carrier]] | None) -> None:
        self._tracer = tracer
        self._device = device
        self._traces = iter(traces or ())
        self._parents: dict[Carrier, Context] = {}
        self._began_ns = time.time_ns()

    def done(self, operation: tuple[Any, ...], answer: Any) -> None:
        """Note that the next operation is carried out."""
        ended_ns = time.time_ns()
        error = _failure(answer)
        current: Context | None = None
        for carrier in next(self._traces, ()):
            parent = self._parents.get(carrier)
            if parent is None:
                parent = self._parents[carrier] = extract(carrier)
            span = self._tracer.start_span(
                f"kvpool.device.{operation[0]}",
                parent,
                SpanKind.SERVER,
                self._attributes(operation),
                start_time=self._began_ns,
            )
            if error is not None:
                fail(span, error[0], error[1])
            span.end(ended_ns)
            if current is None:
                current = trace.set_span_in_context(span, parent)
        if error is not None:
            # What a client did wrong is told to the client; that the system has less memory than promised is news.
            level = logging.WARNING if error[0] == BackendError.__name__ else logging.INFO
            _log("kvpool.device", level, current, f"{self._device}: {operation[0]}", *error)
        self._began_ns = ended_ns

    def _attributes(self, operation: tuple[Any, ...]) -> dict[str, str | int]:
        attributes: dict[str, str | int] = {"kvpool.device": self._device}
        match operation:
            case ("allocate", _, _, _, ids, size_bytes, _, evict):
                attributes |= {
                    "kvpool.caches": len(ids),
                    "kvpool.cache_bytes": size_bytes,
                    "kvpool.evicted": len(evict),
                }
            case ("lease" | "seal" | "release" | "finish", _, _, ids, *_) | ("evict" | "void", ids, *_):
                attributes["kvpool.caches"] = len(ids)
        return attributes


def _failure(answer: Any) -> tuple[str, str] | None:
    """Return class and message of an operation's error. That a device is short is none: the pool plans again."""
    match answer:
        case ("error", name, message, _):
            return name, message
        case (_, _, {"class": BackendError.__name__ as name, "message": message}):
            return name, message
        case _:
            return None


def _log(logger: str, level: int, context: Context | None, what: str, error_type: str, message: str) -> None:
    """Log an error, with the ids of the span in ``context``."""
    if not logging.getLogger(logger).isEnabledFor(level):
        return
    token = attach(context) if context is not None else None
    try:
        logging.getLogger(logger).log(level, "%s failed: %s: %s", what, error_type, message)
    finally:
        if token is not None:
            detach(token)
