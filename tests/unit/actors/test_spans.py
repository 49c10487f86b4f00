"""Spans of pool and devices: one for each trace among what was merged."""

import logging

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvpool.actors.protocol import errors_of
from kvpool.actors.spans import BatchSpans, NoSpans, OperationSpans
from kvpool.errors import BackendError, LimitError, UnknownCacheError
from kvpool.telemetry import logs
from kvpool.telemetry.context import inject


@pytest.fixture
def finished():
    return InMemorySpanExporter()


@pytest.fixture
def tracer(finished):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(finished))
    yield provider.get_tracer("t")
    provider.shutdown()


@pytest.fixture(autouse=True)
def _records(monkeypatch):
    """Log records as the actors make them."""
    before = logging.getLogRecordFactory()
    monkeypatch.setattr(logs, "_installed", False)
    logs.carry_trace_ids()
    yield
    logging.setLogRecordFactory(before)


def traces_of(caplog):
    return [int(record.trace_id or "0", 16) for record in caplog.records]


def carrier(number):
    return (("traceparent", f"00-{number:032x}-{number:016x}-01"),)


def by_trace(finished):
    spans = {}
    for span in finished.get_finished_spans():
        spans.setdefault(span.context.trace_id, []).append(span)
    return spans


def test_items_of_one_trace_share_a_span(tracer, finished):
    items = [("a", carrier(1)), ("b", None), ("c", carrier(1)), ("d", carrier(2)), ("e", None)]
    with BatchSpans(tracer, "release", items) as spans:
        assert [item[0] for item in spans.items] == ["a", "b", "c", "d", "e"]
        traces = [item[-1] for item in spans.items]
        assert len(set(traces)) == 3
        assert (traces[0], traces[1]) == (traces[2], traces[4])
        spans.failed(errors_of([("released", [True])] * 5))
    found = by_trace(finished)
    assert len(found) == 3
    assert {trace: [span.attributes["kvpool.items"] for span in found[trace]] for trace in (1, 2)} == {1: [2], 2: [1]}
    assert found[1][0].parent.span_id == 1
    assert {span.name for span in finished.get_finished_spans()} == {"kvpool.pool.release"}


def test_an_error_is_in_the_span_of_its_item_alone(tracer, finished):
    refused, unknown = LimitError("too much").to_wire(), UnknownCacheError("none").to_wire()
    with BatchSpans(tracer, "seal", [("a", carrier(1)), ("b", carrier(2)), ("c", carrier(3))]) as spans:
        spans.failed(
            errors_of([("error", *refused), ("sealed", [True, "duplicate"]), ("sealed", [True, ("error", *unknown)])])
        )
    types = {trace: span.attributes.get("error.type") for trace, (span,) in by_trace(finished).items()}
    assert types == {1: "LimitError", 2: None, 3: "UnknownCacheError"}


def test_what_the_pool_refuses_is_logged_within_its_span(tracer, caplog):
    error = ("error", *LimitError("too much").to_wire())
    with caplog.at_level(logging.INFO, "kvpool.pool"):
        with BatchSpans(tracer, "seal", [("a", carrier(1)), ("b", carrier(2))]) as spans:
            spans.failed(errors_of([("sealed", [True]), error]))
        NoSpans("seal", [("a", None)]).failed(errors_of([error]))
    assert traces_of(caplog) == [2, 0]
    assert caplog.messages == ["seal failed: LimitError: too much"] * 2


def test_a_bug_ends_the_spans(tracer, finished):
    with pytest.raises(ZeroDivisionError), BatchSpans(tracer, "seal", [("a", None)]):
        raise ZeroDivisionError
    (span,) = finished.get_finished_spans()
    assert span.attributes["error.type"] == "ZeroDivisionError"


def test_nothing_traced_means_no_trace_for_the_decisions():
    assert NoSpans("seal", [("a", carrier(1)), ("b", None)]).items == [("a", None), ("b", None)]


def test_a_device_continues_each_trace_with_times_of_the_operation(tracer, finished):
    operations = [("allocate", "c", 1, "t", [1, 2], 4096, 4096, [7]), ("release", "c", 2, [3]), ("trim",)]
    spans = OperationSpans(tracer, "host-0", [(carrier(1), carrier(2)), (carrier(2),), ()])
    for operation in operations:
        spans.done(operation, [])
    first, second, third = finished.get_finished_spans()
    assert [span.context.trace_id for span in (first, second, third)] == [1, 2, 2]
    assert (first.start_time, first.end_time) == (second.start_time, second.end_time)
    assert third.start_time == first.end_time
    assert first.attributes == {
        "kvpool.device": "host-0", "kvpool.caches": 2, "kvpool.cache_bytes": 4096, "kvpool.evicted": 1,
    }  # fmt: skip
    assert (third.name, third.attributes["kvpool.caches"]) == ("kvpool.device.release", 1)


@pytest.mark.parametrize(
    ("operation", "caches"),
    [
        (("lease", "c", 1, [3, 4]), 2),
        (("seal", "c", 1, [3], [b""]), 1),
        (("finish", "c", 1, [3], [b""]), 1),
        (("evict", [3, 4, 5]), 3),
        (("void", [3], "pin:"), 1),
        (("scrub", "tenant", 1, 4096), None),
        (("connect", "c", "tenant", "token"), None),
        (("revoke", "c"), None),
        (("trim",), None),
    ],
)
def test_caches_are_counted_of_operations_that_concern_caches(tracer, finished, operation, caches):
    OperationSpans(tracer, "host-0", [(carrier(1),)]).done(operation, True)
    (span,) = finished.get_finished_spans()
    assert span.attributes.get("kvpool.caches") == caches


def test_a_failed_operation_is_logged_within_its_span(tracer, finished, caplog):
    with caplog.at_level(logging.INFO, "kvpool.device"):
        spans = OperationSpans(tracer, "host-0", [(carrier(1),), ()])
        spans.done(("release", "c", 1, [3]), ("error", *UnknownCacheError("none").to_wire()))
        name, message, details = BackendError("no memory").to_wire()
        shortage = {"class": name, "message": message, "details": details}
        spans.done(("allocate", "c", 1, "t", [1], 1, 1, []), ([], [], shortage))
    assert traces_of(caplog) == [1, 0]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    (span,) = finished.get_finished_spans()
    assert span.attributes["error.type"] == "UnknownCacheError"


def test_that_a_device_is_short_is_no_error(tracer, finished, caplog):
    shortage = {"class": "CapacityError", "message": "short", "details": {}}
    with caplog.at_level(logging.INFO, "kvpool.device"):
        OperationSpans(tracer, "host-0", [(carrier(1),)]).done(
            ("allocate", "c", 1, "t", [1], 1, 1, []), ([], [], shortage)
        )
    (span,) = finished.get_finished_spans()
    assert "error.type" not in span.attributes
    assert caplog.text == ""


def test_what_the_pool_gives_a_device_is_its_own_span_and_the_baggage(tracer):
    with BatchSpans(tracer, "seal", [("a", (*carrier(5), ("baggage", "tier=gold")))]) as spans:
        passed = dict(spans.items[0][-1].carrier)
    assert passed["baggage"] == "tier=gold"
    assert passed["traceparent"].startswith(f"00-{5:032x}-")
    assert inject(spans.items[0][-1].context) == spans.items[0][-1].carrier
