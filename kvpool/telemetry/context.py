"""The W3C trace context of one call, as it travels with an item of a batch."""

from __future__ import annotations

from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Carrier = tuple[tuple[str, str], ...]
"""Names and values of the headers ``traceparent``, ``tracestate`` and ``baggage``. Hashable: batches group by it."""

_MOST_HEADERS = 3
_MOST_CHARACTERS = 8192
"""Of one header: what W3C asks every hop to pass on of a baggage."""

# Not the global propagator: both ends are kvpool's own, and OTEL_PROPAGATORS may differ between their processes.
_PROPAGATOR = CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()])


def inject(context: Context) -> Carrier | None:
    """Return span and baggage of ``context`` as headers, None if it has neither. A baggage too long is left out."""
    headers: dict[str, str] = {}
    _PROPAGATOR.inject(headers, context)
    return tuple((name, value) for name, value in headers.items() if len(value) <= _MOST_CHARACTERS) or None


def extract(carrier: Carrier | None) -> Context:
    """Return the context that :func:`inject` described; an empty one for None, or for headers that make no sense."""
    return _PROPAGATOR.extract(dict(carrier), Context()) if carrier else Context()


def is_carrier(value: object) -> bool:
    """Return whether ``value`` has the form of a :data:`Carrier`, within bounds."""
    return (
        isinstance(value, tuple)
        and len(value) <= _MOST_HEADERS
        and all(
            isinstance(pair, tuple)
            and len(pair) == 2
            and all(isinstance(part, str) and len(part) <= _MOST_CHARACTERS for part in pair)
            for pair in value
        )
    )
