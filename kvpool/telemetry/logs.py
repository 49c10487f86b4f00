"""Trace ids on the log records of kvpool, in processes that are its own."""

from __future__ import annotations

import logging
from typing import Any

from opentelemetry import trace

_FORMAT = "%(asctime)s %(levelname)s %(name)s%(trace)s %(message)s"

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


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        trace_id, span_id = getattr(record, "trace_id", ""), getattr(record, "span_id", "")
        record.trace = f" trace_id={trace_id} span_id={span_id}" if trace_id else ""
        return super().format(record)
