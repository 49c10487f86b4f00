"""The W3C context of a call, as it travels with an item."""

import pytest
from opentelemetry import baggage, trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from kvpool.actors.protocol import LEASE_ITEM, check_items
from kvpool.errors import InvalidRequestError
from kvpool.telemetry.context import extract, inject, is_carrier

SPAN = SpanContext(0xABC, 0xDEF, False, TraceFlags(TraceFlags.SAMPLED), TraceState([("vendor", "1")]))


def in_span() -> Context:
    return trace.set_span_in_context(NonRecordingSpan(SPAN), Context())


def test_span_and_baggage_travel_in_the_headers_of_w3c():
    carrier = inject(baggage.set_baggage("tier", "gold", in_span()))
    assert dict(carrier) == {
        "traceparent": f"00-{0xABC:032x}-{0xDEF:016x}-01",
        "tracestate": "vendor=1",
        "baggage": "tier=gold",
    }
    assert is_carrier(carrier)
    context = extract(carrier)
    found = trace.get_current_span(context).get_span_context()
    assert (found.trace_id, found.span_id, found.trace_flags) == (SPAN.trace_id, SPAN.span_id, SPAN.trace_flags)
    assert found.is_remote
    assert found.trace_state.get("vendor") == "1"
    assert baggage.get_all(context) == {"tier": "gold"}


def test_who_is_in_no_trace_has_no_carrier():
    assert inject(Context()) is None
    assert extract(None) == Context()


def test_headers_that_make_no_sense_begin_a_new_trace():
    context = extract((("traceparent", "nonsense"),))
    assert not trace.get_current_span(context).get_span_context().is_valid


def test_a_baggage_too_long_for_any_hop_is_left_out():
    carrier = inject(baggage.set_baggage("much", "x" * 8190, in_span()))
    assert [name for name, _ in carrier] == ["traceparent", "tracestate"]
    assert is_carrier(carrier)


@pytest.mark.parametrize(
    "trace_context",
    [
        "00-0-0-01",
        {"traceparent": "x"},
        [("traceparent", "x")],
        (("traceparent", "x", "y"),),
        (["traceparent", "x"],),
        (("traceparent", 1),),
        (("traceparent", "x" * 8193),),
        (("a", "b"),) * 4,
    ],
)
def test_a_batch_whose_trace_context_is_none_is_refused(trace_context):
    check_items([(1, [1], None), (2, [1], (("traceparent", "x"),))], LEASE_ITEM)
    with pytest.raises(InvalidRequestError, match="trace context"):
        check_items([(1, [1], None), (2, [1], trace_context)], LEASE_ITEM)
