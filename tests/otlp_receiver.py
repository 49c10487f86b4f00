"""A receiver of OTLP over HTTP on the loopback interface, that keeps what it was sent."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

DEADLINE_S = 60.0
"""Tells a hang from an answer."""


def values(attributes: Any) -> dict[str, Any]:
    """Attributes as a dict."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@dataclass(frozen=True)
class ReceivedSpan:
    trace: str
    id: str
    parent: str
    name: str
    start_ns: int
    end_ns: int
    failed: bool
    attributes: dict[str, Any]
    resource: dict[str, Any] = field(hash=False)


class Receiver:
    """What came so far, and a way to wait for more."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.endpoint = f"http://127.0.0.1:{port}"
        self._news = threading.Condition()
        self._spans: list[ReceivedSpan] = []
        self._metrics: list[tuple[dict[str, Any], str]] = []

    def environment(self, **more: str) -> dict[str, str]:
        """The variables that let a process send its spans here, soon."""
        return {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            **more,
        }

    def spans(self, enough: Callable[[list[ReceivedSpan]], Any]) -> list[ReceivedSpan]:
        """All spans, as soon as ``enough`` of them are here."""
        with self._news:
            assert self._news.wait_for(lambda: enough(self._spans), DEADLINE_S), [span.name for span in self._spans]
            return list(self._spans)

    def trace(self, of: str, count: int) -> list[ReceivedSpan]:
        """The spans of the trace in which the (first) span named ``of`` is, when ``count`` of them are here."""

        def found(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
            traces = [span.trace for span in spans if span.name == of]
            return [span for span in spans if traces and span.trace == traces[0]]

        return found(self.spans(lambda spans: len(found(spans)) >= count))

    def metric_names(self, enough: Callable[[set[str]], Any]) -> set[str]:
        """Names of all metrics that came, as soon as ``enough`` are here."""
        with self._news:
            assert self._news.wait_for(lambda: enough({name for _, name in self._metrics}), DEADLINE_S), self._metrics
            return {name for _, name in self._metrics}

    def take(self, path: str, body: bytes) -> None:
        """Keep the content of one request."""
        with self._news:
            if path.endswith("/v1/traces"):
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    of = values(resource.resource.attributes)
                    self._spans += [received(span, of) for scope in resource.scope_spans for span in scope.spans]
            elif path.endswith("/v1/metrics"):
                for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    of = values(resource.resource.attributes)
                    self._metrics += [(of, metric.name) for scope in resource.scope_metrics for metric in scope.metrics]
            self._news.notify_all()


def received(span: Any, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name,
        span.start_time_unix_nano, span.end_time_unix_nano,
        span.status.code == span.status.STATUS_CODE_ERROR, values(span.attributes), resource,
    )  # fmt: skip


@contextmanager
def receiving() -> Iterator[Receiver]:
    """Run a receiver while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            receiver.take(self.path, body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver = Receiver(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
