"""Spans of a client's calls, made with the tracer of the application.

A call whose caller has a span (or baggage) of its own gets a span, a child of the caller's, and carries its context
with its item. All other calls that leave in one RPC share one span, a root: at the rate of merged calls a span for
each would cost more than the calls.
"""

from __future__ import annotations

from types import TracebackType

from opentelemetry import baggage, trace
from opentelemetry.context import Context, get_current
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from kvpool.errors import KvpoolError
from kvpool.telemetry.context import Carrier, inject
from kvpool.version import __version__

SCOPE = "kvpool"
"""Name of the instrumentation scope of all spans and metrics."""

_tracer = trace.get_tracer(SCOPE, __version__)  # a proxy until the application sets its provider


def fail(span: Span, error_type: str, message: str) -> None:
    """Give a span the status ERROR and the type of the error."""
    span.set_attribute("error.type", error_type)
    span.set_status(Status(StatusCode.ERROR, message))


class ClientCall:
    """A span over a block of code; what the block raises becomes its status. Gives the context to send along."""

    __slots__ = ("_carrier", "_span")

    def __init__(self, span: Span, parent: Context) -> None:
        self._span = span
        self._carrier = inject(trace.set_span_in_context(span, parent))

    def __enter__(self) -> Carrier | None:
        return self._carrier

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        self._span.end()

    def fail(self, error: BaseException) -> None:
        """Note an error that the block does not raise."""
        fail(self._span, type(error).__name__, error.message if isinstance(error, KvpoolError) else str(error))


class UntracedCall:
    """Stands in where a call has no span of its own."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def fail(self, error: BaseException) -> None:
        """Note nothing."""


_UNTRACED = UntracedCall()


def client_call(name: str) -> ClientCall | UntracedCall:
    """Return the span of one call, to be entered, if the caller has a context of its own."""
    parent = get_current()
    if not parent:
        return _UNTRACED
    if not trace.get_current_span(parent).get_span_context().is_valid and not baggage.get_all(parent):
        return _UNTRACED
    return ClientCall(_tracer.start_span(name, parent, SpanKind.CLIENT), parent)


def batch_call(name: str, items: int) -> ClientCall | UntracedCall:
    """Return the span that ``items`` calls share, to be entered: those of one RPC without a context of their own."""
    if not items:
        return _UNTRACED
    # The task that sends was started by some caller, and would pass for part of that one's trace.
    root = Context()
    return ClientCall(_tracer.start_span(name, root, SpanKind.CLIENT, {"kvpool.items": items}), root)
