"""Trace ids on log records."""

import io
import logging

import pytest

from kvpool.telemetry import logs


@pytest.fixture
def installed(monkeypatch):
    """Records as the actors make them; afterwards as before."""
    before = logging.getLogRecordFactory()
    monkeypatch.setattr(logs, "_installed", False)
    logs.carry_trace_ids()
    logs.carry_trace_ids()  # once is enough
    yield
    logging.setLogRecordFactory(before)


def test_records_of_kvpool_carry_the_ids_of_the_current_span(installed, provider, caplog):
    with provider.get_tracer("t").start_as_current_span("s") as span:
        logging.getLogger("kvpool.pool").warning("inside")
        logging.getLogger("kvpoolish").warning("not ours")
    logging.getLogger("kvpool.pool").warning("outside")
    inside, other, outside = caplog.records
    assert (inside.trace_id, inside.span_id) == (f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}")
    assert (outside.trace_id, outside.span_id) == ("", "")
    assert not hasattr(other, "trace_id")


def test_the_ids_are_printed_unless_the_process_has_handlers(installed, provider, monkeypatch):
    logger, root = logging.getLogger("kvpool"), logging.getLogger()
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    handlers = list(root.handlers)
    logs.print_trace_ids()
    assert (logger.handlers, logger.propagate) == ([], True)  # pytest's handlers of the root logger do it

    monkeypatch.setattr(root, "handlers", [])
    logs.print_trace_ids()
    (handler,) = logger.handlers
    handler.setStream(printed := io.StringIO())
    with provider.get_tracer("t").start_as_current_span("s") as span:
        logging.getLogger("kvpool.device").warning("inside")
    logging.getLogger("kvpool.device").warning("outside")
    monkeypatch.setattr(root, "handlers", handlers)
    inside, outside = printed.getvalue().splitlines()
    assert f"WARNING kvpool.device trace_id={span.context.trace_id:032x} span_id=" in inside
    assert outside.endswith("WARNING kvpool.device outside")
