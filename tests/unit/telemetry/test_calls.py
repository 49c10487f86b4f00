"""Spans of a client's calls: each its own below the caller's, else one for the RPC."""

import asyncio
from types import SimpleNamespace

import pytest
from opentelemetry import baggage, trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, TraceFlags

from kvpool.client.lane import Lane
from kvpool.errors import InvalidSizeError, LimitError
from kvpool.telemetry import calls
from kvpool.telemetry.calls import SCOPE, UntracedCall, client_call
from kvpool.telemetry.context import extract


class Actor:
    """Answers every item by what it is, but refuses the numbers below 0; keeps the trace contexts."""

    def __init__(self):
        self.ask = SimpleNamespace(remote=self._ask)
        self.carriers = {}

    async def _ask(self, _client, items):
        self.carriers |= dict(items)
        return [
            ("error", *InvalidSizeError("below 0").to_wire()) if number < 0 else ("granted", number)
            for number, _ in items
        ]


@pytest.fixture
def tracer(provider, monkeypatch):
    monkeypatch.setattr(calls, "_tracer", provider.get_tracer(SCOPE))
    return provider.get_tracer("application")


@pytest.fixture
def actor():
    return Actor()


@pytest.fixture
def lane(actor):
    return Lane("ask", actor, "c", lambda _answer: None)


async def call(lane, number):
    with lane.call() as carrier:
        return await lane.ask((number,), carrier)


def span_of(carrier):
    return trace.get_current_span(extract(carrier)).get_span_context()


async def test_a_call_below_a_span_carries_a_context_of_its_own(tracer, lane, actor, finished):
    with tracer.start_as_current_span("caller") as caller:
        await call(lane, 1)
    own, _ = finished.get_finished_spans()
    assert (own.name, own.parent.span_id, own.kind.name) == ("kvpool.ask", caller.context.span_id, "CLIENT")
    assert span_of(actor.carriers[1]).span_id == own.context.span_id


async def test_calls_without_a_context_share_the_span_of_their_rpc(tracer, lane, actor, finished):
    async def traced():
        with tracer.start_as_current_span("caller"):
            return await call(lane, 1)

    # The caller in a trace comes first: its context is that of the task that sends.
    await asyncio.gather(traced(), call(lane, 2), call(lane, 3))
    (shared,) = [span for span in finished.get_finished_spans() if span.parent is None and span.name == "kvpool.ask"]
    assert shared.attributes == {"kvpool.items": 2}
    assert actor.carriers[2] is actor.carriers[3]
    assert span_of(actor.carriers[2]).span_id == shared.context.span_id
    assert span_of(actor.carriers[1]).trace_id != shared.context.trace_id


async def test_errors_are_in_the_spans_of_those_who_get_them(tracer, lane, finished):
    with tracer.start_as_current_span("caller"), pytest.raises(InvalidSizeError):
        await call(lane, -1)
    own, _ = finished.get_finished_spans()
    assert (own.status.status_code, own.status.description) == (StatusCode.ERROR, "below 0")
    assert own.attributes == {"error.type": "InvalidSizeError"}
    finished.clear()
    outcomes = await asyncio.gather(call(lane, -1), call(lane, 1), return_exceptions=True)
    assert [type(each) for each in outcomes] == [InvalidSizeError, tuple]
    (shared,) = finished.get_finished_spans()
    assert shared.attributes == {"kvpool.items": 2, "error.type": "InvalidSizeError"}


async def test_an_rpc_that_fails_is_an_error_of_its_span(tracer, finished):
    async def remote(_client, _items):
        raise LimitError("too much")

    lane = Lane("ask", SimpleNamespace(ask=SimpleNamespace(remote=remote)), "c", lambda _answer: None)
    with pytest.raises(LimitError):
        await call(lane, 1)
    (shared,) = finished.get_finished_spans()
    assert shared.attributes["error.type"] == "LimitError"


async def test_a_span_that_cannot_be_started_is_told_to_the_callers_at_once(provider, tracer, lane):
    class Broken(SpanProcessor):
        def on_start(self, span, parent_context=None):
            raise ZeroDivisionError("of the application")

    provider.add_span_processor(Broken())
    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(call(lane, 1), call(lane, 2), return_exceptions=True)
    assert [type(each) for each in outcomes] == [ZeroDivisionError] * 2
    async with asyncio.timeout(60):
        await lane.drain()


async def test_a_trace_that_is_not_sampled_is_passed_on_as_such(tracer, lane, actor, finished):
    parent = NonRecordingSpan(SpanContext(1, 2, False, TraceFlags(TraceFlags.DEFAULT)))
    with trace.use_span(parent):
        await call(lane, 1)
    passed = span_of(actor.carriers[1])
    assert (passed.trace_id, passed.trace_flags.sampled) == (1, False)
    assert finished.get_finished_spans() == ()


async def test_without_an_sdk_a_callers_context_still_passes(lane, actor):
    await call(lane, 1)
    assert actor.carriers[1] is None
    with trace.use_span(NonRecordingSpan(SpanContext(1, 2, False, TraceFlags(TraceFlags.SAMPLED)))):
        await call(lane, 2)
    assert (span_of(actor.carriers[2]).trace_id, span_of(actor.carriers[2]).span_id) == (1, 2)
    token = attach(baggage.set_baggage("tier", "gold"))
    await call(lane, 3)
    detach(token)
    assert actor.carriers[3] == (("baggage", "tier=gold"),)


def test_a_caller_without_a_context_costs_no_span(tracer):
    assert isinstance(client_call("kvpool.ask"), UntracedCall)
