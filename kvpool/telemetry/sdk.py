"""Providers of spans and metrics as the ``OTEL_*`` variables ask for them; without such variables there are none.

They are kvpool's own, handed to its own instruments: what is global belongs to the application. (The SDK's own
configurator sets the global ones, and a Prometheus endpoint that cannot be closed.)
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from opentelemetry import trace

from kvpool.errors import ConfigError
from kvpool.telemetry.logs import carry_trace_ids, print_trace_ids, tell_briefly
from kvpool.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

_PREFIX = "OTEL_"
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
"""Value of OTEL_EXPORTER_OTLP_PROTOCOL to the name under which the exporter is installed."""

_FLUSH_S = 2.0
"""How long the last spans and metrics of an actor may take to leave, seconds."""

_COMMAND_FLUSH_S = 1.0
"""The same of a command, whose user waits for its end."""


def environment() -> dict[str, str]:
    """Return the ``OTEL_*`` variables of this process."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFIX)}


def adopt(variables: Mapping[str, str]) -> None:
    """Take over another process's :func:`environment`; for a process that is ours alone, before anything is set up.

    (An actor inherits the environment of its node's raylet, not that of the process that creates it. Ray's
    ``runtime_env`` would pass it too, but writes it to logs and dashboard, and headers may hold keys.)
    """
    os.environ.update(variables)


def tracer_provider(instance: str, **attributes: str) -> TracerProvider | None:
    """Return a provider of spans for the exporters that ``OTEL_TRACES_EXPORTER`` names, None if it names none.

    Parameters
    ----------
    instance
        Which process this is (``service.instance.id``).
    **attributes
        More of its resource. What ``OTEL_RESOURCE_ATTRIBUTES`` says goes before.

    Raises
    ------
    ConfigError
        If an exporter is not installed or cannot be set up, or the SDK takes a variable amiss.
    """
    names = _exporters("OTEL_TRACES_EXPORTER")
    if not names:
        return None
    with _whole() as made:
        require_sdk()
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporters = []
        for name in names:
            exporters.append(_make("opentelemetry_traces_exporter", _exporter(name, "TRACES")))
            made.callback(_discard, exporters[-1])
        tell_briefly()
        provider = TracerProvider(resource=_resource(instance, attributes), shutdown_on_exit=False)
        made.callback(_discard, provider)
        for exporter in exporters:
            provider.add_span_processor(BatchSpanProcessor(exporter))
        return provider


def meter_provider(instance: str, **attributes: str) -> MeterProvider | None:
    """Return a provider of metrics for the exporters that ``OTEL_METRICS_EXPORTER`` names, None if it names none.

    Takes and raises the same as :func:`tracer_provider`. ``prometheus`` opens its endpoint here.
    """
    names = _exporters("OTEL_METRICS_EXPORTER")
    if not names:
        return None
    with _whole() as made:
        require_sdk()
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader

        readers: list[MetricReader] = []
        for name in names:
            if name == "prometheus":
                readers.append(_prometheus_reader())
            else:
                exporter = _make("opentelemetry_metrics_exporter", _exporter(name, "METRICS"))
                made.callback(_discard, exporter)
                readers.append(
                    exporter if isinstance(exporter, MetricReader) else PeriodicExportingMetricReader(exporter)
                )
            made.callback(_discard, readers[-1])
        tell_briefly()
        resource = _resource(instance, attributes)
        return MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False)


def shut_down(provider: TracerProvider | MeterProvider, within_s: float = _FLUSH_S) -> None:
    """Let what was recorded leave, within ``within_s``, and stop exporting. Blocks: call it off an event loop."""

    def end() -> None:
        provider.force_flush()
        provider.shutdown()

    # The SDK keeps no deadline: without a listener its exporters try again for ten seconds.
    thread = threading.Thread(target=end, name="kvpool-telemetry-end", daemon=True)
    thread.start()
    thread.join(within_s)


def set_up_command_line() -> Callable[[], None] | None:
    """Let this process, which is the command line, trace its command, unless something has set a provider already.

    Returns what lets the spans leave, to be called when the command has ended; None if there are none.
    """
    if not environment():
        return None
    carry_trace_ids()
    print_trace_ids()
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None  # started by opentelemetry-instrument, say
    provider = tracer_provider(f"cli-{os.getpid()}")
    if provider is None:
        return None
    trace.set_tracer_provider(provider)
    return partial(shut_down, provider, _COMMAND_FLUSH_S)


def require_sdk() -> None:
    """Raise :class:`~kvpool.errors.ConfigError` unless OpenTelemetry's SDK is installed here."""
    try:
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"OTEL_* variables ask for telemetry, but opentelemetry-sdk is not installed ({error}): "
            "pip install 'kvpool[otlp]' or 'kvpool[prometheus]', or set OTEL_SDK_DISABLED=true"
        ) from None


@contextmanager
def _whole() -> Iterator[ExitStack]:
    """Let a block make all or nothing: the callbacks that it registers run if it fails, then with a ConfigError."""
    with ExitStack() as made:
        try:
            yield made
        except ConfigError:
            raise
        except Exception as error:  # the SDK raises what it likes, some of it as it is imported
            raise ConfigError(f"the OTEL_* variables could not be used: {error}") from error
        made.pop_all()


def _discard(made: Any) -> None:
    """Shut down an exporter, reader or provider that will not be used."""
    with suppress(Exception):  # the error that is being told says more than that of a thing half made
        made.shutdown()


def _exporters(variable: str) -> list[str]:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    names = [name.strip().lower() for name in os.environ.get(variable, "").split(",")]
    return [name for name in dict.fromkeys(names) if name not in ("", "none")]


def _exporter(name: str, signal: str) -> str:
    """Return the name under which an exporter is installed: that of ``otlp`` depends on the protocol."""
    if name != "otlp":
        return name
    for variable in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(variable, "").strip()
        if protocol:
            if protocol not in _OTLP:
                raise ConfigError(f"{variable}={protocol!r} is not possible: {' or '.join(_OTLP)}", asked=protocol)
            return _OTLP[protocol]
    return _OTLP["http/protobuf"]


def _make(group: str, name: str) -> Any:
    found = next(iter(entry_points(group=group, name=name)), None)
    if found is None:
        known = sorted({entry.name for entry in entry_points(group=group)} | {"otlp"})
        raise ConfigError(
            f"exporter {name!r} is asked for by OTEL_* variables but not installed here (possible: "
            f"{', '.join(known)}): pip install 'kvpool[otlp]' for otlp over HTTP, else the exporter's own package",
            asked=name,
        )
    try:
        # Standard output is for what a command answers: JSON that a program reads, say.
        return found.load()(**({"out": sys.stderr} if name == "console" else {}))
    except Exception as error:
        raise ConfigError(f"exporter {name!r} could not be set up: {error}", asked=name) from error


def _prometheus_reader() -> Any:
    try:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise ConfigError(
            f"OTEL_METRICS_EXPORTER asks for prometheus, which is not installed here ({error}): "
            "pip install 'kvpool[prometheus]'"
        ) from None

    host = os.environ.get("OTEL_EXPORTER_PROMETHEUS_HOST", "").strip() or "localhost"
    port = os.environ.get("OTEL_EXPORTER_PROMETHEUS_PORT", "").strip() or "9464"
    # A registry of its own: the global one is the application's, or Ray's.
    registry = CollectorRegistry()
    try:
        server, _ = start_http_server(int(port), host, registry)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"the Prometheus endpoint cannot listen on {host}:{port} ({error}): give each pool of a node an "
            "OTEL_EXPORTER_PROMETHEUS_PORT of its own",
            asked=port,
        ) from error

    class Reader(PrometheusMetricReader):
        def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
            server.shutdown()
            server.server_close()
            super().shutdown(timeout_millis, **kwargs)

    # All metrics are of one scope; that of several pools' metrics is told by the label kvpool_pool.
    return Reader(
        registry=registry, scope_info_enabled=False, resource_attribute_filter=lambda name: name == "kvpool.pool"
    )


def _resource(instance: str, attributes: Mapping[str, str]) -> Resource:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    own = {"service.name": "kvpool", "service.version": __version__, "service.instance.id": instance}
    return Resource.create({**own, **attributes, **OTELResourceDetector().detect().attributes})
