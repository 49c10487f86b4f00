"""Telemetry over process borders: connected traces in a real receiver, metrics in a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from driver import run_driver
from opentelemetry import baggage, trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from otlp_receiver import ReceivedSpan, Receiver, receiving
from pool_actors import DEADLINE_S, kill_device, make_patient, until, until_lost, until_waiting

import kvpool.telemetry.calls
from kvpool import CachePool, ModelSpec, delete, encode_block_id
from kvpool.actors.metrics import PoolMetrics
from kvpool.errors import CapacityError, InvalidRequestError, NotSealedError
from kvpool.telemetry.calls import SCOPE


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver to which the pools of this test send their spans."""
    with receiving() as running:
        for name, value in running.environment().items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Spans of this process, as those of an application that has set up an SDK."""
    spans = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(kvpool.telemetry.calls, "_tracer", provider.get_tracer(SCOPE))
    yield spans
    provider.shutdown()


@pytest.fixture
def tracer(application: InMemorySpanExporter) -> trace.Tracer:
    """Makes the application's own spans."""
    return kvpool.telemetry.calls._tracer


def parents(spans: list[ReceivedSpan]) -> dict[str, str]:
    """Name of each span to the name of its parent."""
    names = {span.id: span.name for span in spans}
    return {span.name: names.get(span.parent, span.parent) for span in spans}


async def test_one_request_cache_is_one_connected_trace_below_the_callers_span(local_ray, receiver):
    printed = await run_driver(
        """
        import asyncio, logging
        from opentelemetry import metrics, trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from kvpool import CachePool
        from kvpool.sync import CachePool as BlockingPool

        complaints = logging.Handler(logging.WARNING)
        complaints.emit = lambda record: print(record.getMessage())
        logging.getLogger("opentelemetry").addHandler(complaints)
        tracer = trace.get_tracer("application")

        async def main():
            async with await CachePool.create(name="traced", devices="host:1x2MiB", page_size="64KiB") as pool:
                # OTEL_* variables are set, and the application sets no provider: then kvpool sets none for it.
                await (await pool.request_cache("m", size="64KiB")).release()
                assert type(trace.get_tracer_provider()) is trace.ProxyTracerProvider
                assert type(metrics.get_meter_provider()).__name__ == "_ProxyMeterProvider"

                provider = TracerProvider()
                provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
                trace.set_tracer_provider(provider)
                with tracer.start_as_current_span("handle page"):
                    cache = await pool.request_cache("m", size="64KiB")
                await cache.release()  # in no trace of the application's
                with BlockingPool.connect("traced") as blocking, tracer.start_as_current_span("handle page, blocking"):
                    blocking.request_cache("m", size="64KiB").release()

        asyncio.run(main())
        """,
        ray_address=ray.get_runtime_context().gcs_address,
    )
    assert "Overriding" not in printed  # what OpenTelemetry says to whoever sets a second provider
    spans = receiver.trace("handle page", 4)
    assert parents(spans) == {
        "handle page": "",
        "kvpool.request_caches": "handle page",
        "kvpool.pool.request_caches": "kvpool.request_caches",
        "kvpool.device.allocate": "kvpool.pool.request_caches",
    }
    by_name = {span.name: span for span in spans}
    assert by_name["kvpool.pool.request_caches"].resource["service.instance.id"] == "traced"
    assert by_name["kvpool.device.allocate"].resource["service.instance.id"] == "traced/host-0"
    assert not any(span.failed for span in spans)
    assert by_name["handle page"].start_ns <= by_name["kvpool.device.allocate"].start_ns
    assert by_name["kvpool.device.allocate"].end_ns <= by_name["handle page"].end_ns

    # The blocking form runs on another thread.
    spans = receiver.trace("handle page, blocking", 7)
    assert parents(spans)["kvpool.request_caches"] == "handle page, blocking"
    assert parents(spans)["kvpool.release"] == "handle page, blocking"

    # Without a span of the caller the RPC's own is the root.
    def of_a_release(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
        traces = [span.trace for span in spans if span.name == "kvpool.release" and not span.parent]
        return [span for span in spans if span.trace in traces]

    assert parents(of_a_release(receiver.spans(lambda spans: len(of_a_release(spans)) == 3))) == {
        "kvpool.release": "",
        "kvpool.pool.release": "kvpool.release",
        "kvpool.device.release": "kvpool.pool.release",
    }
    await delete("traced")  # its last spans may take longer than its end waits for them


async def test_merged_calls_keep_their_traces_apart(receiver, make_pool, tracer, application):
    pool = await make_pool()
    await pool.model("m")
    application.clear()

    async def traced(number):
        with tracer.start_as_current_span(f"caller {number}"):
            return await pool.request_cache("m", size=4096)

    caches = await asyncio.gather(*(traced(number) for number in range(3)), *(
        pool.request_cache("m", size=4096) for _ in range(5)
    ))  # fmt: skip
    own = application.get_finished_spans()
    traces = {f"{span.context.trace_id:032x}": span.name for span in own if span.name.startswith("caller")}
    (shared,) = [span for span in own if span.parent is None and span.name == "kvpool.request_caches"]
    assert shared.attributes["kvpool.items"] == 5
    assert f"{shared.context.trace_id:032x}" not in traces
    traces[f"{shared.context.trace_id:032x}"] = "the RPC"

    # One operation of the device served them all: it has one span in each trace, all of the same times.
    names = ("kvpool.device.allocate", "kvpool.pool.request_caches")
    spans = receiver.spans(lambda spans: sum(span.name in names for span in spans) == 8)
    on_device = [span for span in spans if span.name == "kvpool.device.allocate"]
    assert {span.trace for span in on_device} == set(traces)
    assert len({(span.start_ns, span.end_ns) for span in on_device}) == 1
    assert on_device[0].attributes["kvpool.caches"] == 8
    in_pool = {span.trace: span for span in spans if span.name == "kvpool.pool.request_caches"}
    assert {traces[each]: span.attributes["kvpool.items"] for each, span in in_pool.items()} == {
        "caller 0": 1, "caller 1": 1, "caller 2": 1, "the RPC": 5,
    }  # fmt: skip
    await asyncio.gather(*(cache.release() for cache in caches))


async def test_a_call_without_sdk_or_span_is_one_trace_of_pool_and_device_and_a_question_is_in_its_callers(
    receiver, make_pool, monkeypatch, tracer
):
    pool = await make_pool()
    with monkeypatch.context() as without:
        without.setattr(kvpool.telemetry.calls, "_tracer", trace.NoOpTracer())
        async with await pool.request_cache("m", size=4096):
            pass
    spans = receiver.trace("kvpool.device.allocate", 2)
    assert parents(spans) == {"kvpool.pool.request_caches": "", "kvpool.device.allocate": "kvpool.pool.request_caches"}

    with tracer.start_as_current_span("router") as router:
        await pool.contains("m", [encode_block_id(1)])
    with tracer.start_as_current_span("mistaken") as mistaken, pytest.raises(InvalidRequestError):
        await pool.contains("absent", [encode_block_id(1)])
    await pool.actor.contains.remote("default", [("m", encode_block_id(1)), ("m", encode_block_id(1), "no context")])
    spans = receiver.spans(lambda spans: sum(span.name == "kvpool.pool.contains" for span in spans) == 3)
    asked = {span.trace: span for span in spans if span.name == "kvpool.pool.contains"}
    traces = [f"{caller.get_span_context().trace_id:032x}" for caller in (router, mistaken)]
    assert [asked.pop(each).attributes for each in traces] == [
        {"kvpool.items": 1},
        {"kvpool.items": 1, "error.type": "InvalidRequestError"},
    ]
    ((_, bare),) = asked.items()
    assert (bare.parent, bare.attributes["kvpool.items"]) == ("", 2)


async def test_a_wait_and_an_error_are_seen(receiver, make_pool, tracer, application):
    pool = await make_pool()
    held = await pool.request_cache("m", size="2MiB")
    with tracer.start_as_current_span("patient"):
        waiting = asyncio.ensure_future(pool.request_cache("m", size="1MiB"))
        await until_waiting(pool, 1)
    await held.release()
    await (await waiting).release()
    spans = receiver.trace("kvpool.pool.wait", 3)
    assert parents(spans)["kvpool.pool.wait"] == "kvpool.pool.request_caches"
    assert parents(spans)["kvpool.device.allocate"] == "kvpool.pool.request_caches"
    (wait,) = [span for span in spans if span.name == "kvpool.pool.wait"]
    (asked,) = [
        span for span in application.get_finished_spans() if span.name == "kvpool.request_caches" and span.parent
    ]
    assert wait.attributes["kvpool.outcome"] == "granted"
    assert asked.start_time <= wait.start_ns < wait.end_ns <= asked.end_time

    held = await pool.request_cache("m", size="2MiB")
    with tracer.start_as_current_span("refused"), pytest.raises(CapacityError):
        await pool.request_cache("m", size="1MiB", timeout_s=0)
    with tracer.start_as_current_span("cancelled"):
        waiting = asyncio.ensure_future(pool.request_cache("m", size="1MiB"))
        await until_waiting(pool, 1)
    waiting.cancel()
    await until_waiting(pool, 0)
    await held.release()
    async with await pool.request_cache("m", size=4096) as cache:
        with tracer.start_as_current_span("pinned too early"), pytest.raises(NotSealedError):
            await cache.pin()
    spans = receiver.spans(lambda spans: any(span.attributes.get("kvpool.outcome") == "cancelled" for span in spans))
    spans = receiver.spans(lambda spans: sum(span.failed for span in spans) == 2)
    assert {(span.name, span.attributes["error.type"]) for span in spans if span.failed} == {
        ("kvpool.pool.request_caches", "CapacityError"),
        ("kvpool.pool.pin", "NotSealedError"),
    }
    own = [span for span in application.get_finished_spans() if span.name.startswith("kvpool.")]
    assert {(span.name, span.attributes["error.type"]) for span in own if span.status.status_code.name == "ERROR"} == {
        ("kvpool.request_caches", "CapacityError"),
        ("kvpool.request_caches", "CancelledError"),
        ("kvpool.pin", "NotSealedError"),
    }


async def test_baggage_passes(receiver, make_pool, tracer):
    pool = await make_pool()

    def listen(actor):
        from opentelemetry import baggage
        from opentelemetry.sdk.trace import SpanProcessor

        class Listener(SpanProcessor):
            def on_start(self, span, parent_context=None):
                heard.append(dict(baggage.get_all(parent_context)))

        heard = actor.heard = []
        (getattr(actor, "_provider", None) or actor._telemetry._spans).add_span_processor(Listener())

    actors = [pool.actor, ray.get_actor(f"kvpool/{pool.name}/host-0", namespace="kvpool")]
    for actor in actors:
        await actor.__ray_call__.remote(listen)
    await pool.model("m")
    token = attach(baggage.set_baggage("tenant.tier", "gold"))
    try:
        cache = await pool.request_cache("m", size=4096)
    finally:
        detach(token)
    for actor in actors:
        assert await actor.__ray_call__.remote(lambda self: self.heard) == [{"tenant.tier": "gold"}]
    await cache.release()


async def test_a_killed_device_breaks_no_exporter(receiver, make_pool, monkeypatch):
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    pool = await make_pool("host:2x1MiB", placement="round_robin")
    caches = [await pool.request_cache("m", size=4096) for _ in range(2)]
    receiver.spans(lambda spans: sum(span.name == "kvpool.device.allocate" for span in spans) == 2)
    await kill_device(pool, 0)
    await until_lost(pool, 0)
    for cache in caches:
        await cache.release()
    receiver.metric_names(bool)
    with receiver._news:
        receiver._spans.clear()
        receiver._metrics.clear()
    async with await pool.request_cache("m", size=4096):
        pass
    spans = receiver.trace("kvpool.device.allocate", 2)
    assert [span.attributes["kvpool.device"] for span in spans if span.name == "kvpool.device.allocate"] == ["host-1"]
    receiver.metric_names(lambda names: "kvpool.memory.live" in names)


async def test_an_application_without_otel_variables_has_no_sdk_and_a_joiner_may_differ(
    receiver, make_pool, monkeypatch
):
    pool = await make_pool()
    for name in receiver.environment():
        monkeypatch.delenv(name)
    async with await CachePool.create(**{k: v for k, v in pool.config.items() if v is not None}):
        pass
    plain = await make_pool()
    assert await plain.actor.__ray_call__.remote(lambda self: (self._telemetry._spans, self._telemetry._meters)) == (
        None,
        None,
    )


async def test_a_receiver_that_is_gone_does_not_hold_anybody_up(make_pool, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    pool = await make_pool()
    async with await pool.request_cache("m", size=4096):
        pass
    async with asyncio.timeout(DEADLINE_S):
        await pool.delete()


# -- Prometheus -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the (one) pool of this test answers Prometheus."""
    port = free_port()
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1")
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", str(port))
    return f"127.0.0.1:{port}"


async def fetch(url: str) -> str:
    def read() -> str:
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(read)


async def test_a_second_pool_on_the_same_port_runs_without_metrics_and_the_endpoint_ends_with_the_first(
    endpoint, make_pool, caplog
):
    first = await make_pool()
    second = await make_pool()
    assert "OTEL_EXPORTER_PROMETHEUS_PORT" in caplog.text
    async with await second.request_cache("m", size=4096):
        pass
    assert "kvpool_memory_live_bytes" in await fetch(f"http://{endpoint}/metrics")
    await first.delete()
    with pytest.raises(urllib.error.URLError):
        await fetch(f"http://{endpoint}/metrics")


@pytest.fixture
def prometheus(endpoint: str, tmp_path: Path) -> Iterator[Callable[[str], Awaitable[list[dict[str, Any]]]]]:
    """A Prometheus that scrapes the pool of this test; gives a function that queries it."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("no prometheus on this machine: apt-get install prometheus (Debian)")
    port = free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(json.dumps({  # which is YAML, too
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
        "scrape_configs": [{"job_name": "kvpool", "static_configs": [{"targets": [endpoint]}]}],
    }))  # fmt: skip
    process = subprocess.Popen(
        [
            binary, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=error",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    async def query(expression: str) -> list[dict[str, Any]]:
        address = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}"
        try:
            answer = json.loads(await fetch(address))
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return []  # it is starting
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    yield query
    process.terminate()
    process.wait(DEADLINE_S)


async def test_a_real_prometheus_answers_for_every_metric_under_load(prometheus, make_pool, tmp_path):
    pool = await make_pool(
        host_memory="128KiB", disk_url=str(tmp_path / "disk"), quotas=[{"tenant": "default", "limit": "100%"}]
    )
    await make_patient(pool)
    most = "1984KiB"  # all but the page of the one that is held
    model = await pool.model(ModelSpec("llm", block_bytes=4096))
    held = await pool.request_cache("m", size=4096)
    stop = asyncio.Event()

    async def load() -> None:
        """Hits, misses, evictions, errors and waits, until told to stop."""
        number = 0
        while not stop.is_set():
            hashes = [encode_block_id(number + each) for each in range(64)]
            async with await model.new_blocks(hashes) as new:
                await new.seal()
            async with await model.match_prefix([*hashes, encode_block_id(1 << 40)]):
                pass
            if number:  # what was there before is below the device now
                async with await model.match_prefix([encode_block_id(number - each) for each in (64, 63)]) as hit:
                    await hit.fetch()
            number += 64
            whole = await pool.request_cache("m", size=most)
            waiting = asyncio.ensure_future(pool.request_cache("m", size=most))
            await until_waiting(pool, 1)
            await whole.release()
            await (await waiting).release()
            with pytest.raises(CapacityError):
                async with await pool.request_cache("m", size=most):
                    await pool.request_cache("m", size=most, timeout_s=0)

    loading = asyncio.ensure_future(load())
    try:
        for expression in EXPRESSIONS:

            async def answered(expression: str = expression) -> bool:
                assert not loading.done(), loading.exception()
                return bool(await prometheus(expression))

            await until(answered, f"an answer to {expression}")
    finally:
        stop.set()
        await loading
        await held.release()
    assert {s["metric"]["tier"] for s in await prometheus("kvpool_lower_used_bytes")} == {"host", "disk"}
    (device,) = {sample["metric"]["tier"] for sample in await prometheus("kvpool_memory_capacity_bytes")}
    assert device == "host"
    assert {sample["metric"]["kvpool_pool"] for sample in await prometheus("kvpool_leases")} == {pool.name}


EXPRESSIONS = [
    "histogram_quantile(0.99, rate(kvpool_allocation_duration_seconds_bucket[5m])) > 0",
    'kvpool_eviction_duration_seconds_count{policy="lru"} > 0',
    'kvpool_wait_duration_seconds_count{outcome="granted"} > 0',
    "kvpool_memory_live_bytes > 0",
    "kvpool_memory_backed_bytes > 0",
    "kvpool_memory_reserved_bytes >= 0",
    "kvpool_memory_pinned_bytes > 0",
    "kvpool_memory_zombie_bytes >= 0",
    "kvpool_memory_capacity_bytes == 2097152",
    "kvpool_memory_utilization > 0",
    "kvpool_memory_fragmentation >= 0",
    'kvpool_cache_hits_total{model="llm"} > 0',
    'kvpool_cache_misses_total{model="llm"} > 0',
    'kvpool_evictions_total{reason="capacity"} > 0',
    "kvpool_leases > 0",
    "kvpool_queue_length >= 0",
    'kvpool_errors_total{error_type="CapacityError"} > 0',
    "kvpool_compaction_moved_bytes_total >= 0",
    "kvpool_compaction_freed_total >= 0",
    'kvpool_quota_limit_bytes{tenant="default"} == 2097152',
    "kvpool_quota_guaranteed_bytes >= 0",
    "kvpool_quota_held_bytes > 0",
    "kvpool_quota_leased_bytes > 0",
    'kvpool_lower_capacity_bytes{tier="host"} == 131072',
    "kvpool_lower_used_bytes > 0",
    "kvpool_lower_caches > 0",
    "kvpool_lower_hits_total > 0",
    "kvpool_lower_misses_total >= 0",
    "kvpool_lower_written_bytes_total > 0",
    "kvpool_lower_read_bytes_total > 0",
    'kvpool_lower_demotions_total{outcome="kept"} > 0',
    "kvpool_lower_demotion_duration_seconds_count > 0",
    "kvpool_lower_fill_duration_seconds_count > 0",
]

AFTER_FAULTS = {"kvpool.lower.errors", "kvpool.lower.removals.pending"}  # shown by the unit tests of the metrics


def test_every_metric_of_the_pool_is_asked_of_prometheus():
    class Meter:
        def __init__(self):
            self.names = []

        def __getattr__(self, _):
            return lambda name, *_, **__: self.names.append(name)

    meter = Meter()
    PoolMetrics(meter)
    for name in set(meter.names) - AFTER_FAULTS:
        assert any(name.replace(".", "_") in expression for expression in EXPRESSIONS), name
