"""Trace ids on the log records of kvpool, in processes that are its own."""

from __future__ import annotations

import logging
from typing import Any

from opentelemetry import trace

_FORMAT = "%(asctime)s %(levelname)s %(name)s%(trace)s %(message)s"

_QUIET_S = 60.0
"""For how long a warning of OpenTelemetry is the only one that is printed, seconds."""

_installed = False


def carry_trace_ids() -> None:
    """Let every record of the ``kvpool`` loggers have ``trace_id`` and ``span_id``, empty outside of a span.

    Changes how this process makes log records, so it is for kvpool's own actors and command line alone.
    """
    global _installed
    if _installed:
        return
    _installed = True
    make = logging.getLogRecordFactory()

    def make_record(*arguments: Any, **keywords: Any) -> logging.LogRecord:
        record = make(*arguments, **keywords)
        if record.name == "kvpool" or record.name.startswith("kvpool."):
            context = trace.get_current_span().get_span_context()
            record.trace_id = f"{context.trace_id:032x}" if context.is_valid else ""
            record.span_id = f"{context.span_id:016x}" if context.is_valid else ""
        return record

    logging.setLogRecordFactory(make_record)


def print_trace_ids() -> None:
    """Print the warnings of the ``kvpool`` loggers with their trace ids, unless this process prints logs already."""
    logger = logging.getLogger("kvpool")
    if logger.handlers or logging.getLogger().handlers:
        return  # Ray's LoggingConfig, say: its handlers see the ids on the records
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(_FORMAT))
    logger.addHandler(handler)
    logger.propagate = False


def tell_briefly() -> None:
    """Let OpenTelemetry's warnings be one line a minute, unless this process prints logs already.

    Where no collector listens each export brings several, some with a traceback.
    """
    logger = logging.getLogger("opentelemetry")
    if not (logger.handlers or logging.getLogger().handlers):
        logger.addHandler(_OneLine())
        logger.propagate = False


class _OneLine(logging.StreamHandler[Any]):
    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)
        self._next_s = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.created < self._next_s:
            return
        self._next_s = record.created + _QUIET_S
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        text = " ".join(record.getMessage().split())
        return f"kvpool: OpenTelemetry: {text} (does a collector listen at OTEL_EXPORTER_OTLP_ENDPOINT?)"


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        trace_id, span_id = getattr(record, "trace_id", ""), getattr(record, "span_id", "")
        record.trace = f" trace_id={trace_id} span_id={span_id}" if trace_id else ""
        return super().format(record)
