"""What telemetry costs: two pools in one run, one with and one without, used in turns by a client process each."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import timeit
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

from opentelemetry import trace

from kvpool.actors.cluster import call, kill, make_worker
from kvpool.bench.rows import median, row
from kvpool.client import CachePool, Model
from kvpool.client.temporary import temporary_pool
from kvpool.telemetry.calls import client_call
from kvpool.telemetry.metric import record_metric
from kvpool.telemetry.sdk import adopt, environment, set_up_command_line

SIZE_BYTES = 64 * 1024
MANY = 1000
_ROUNDS = 60
_ROUNDS_OF_EACH = 15
_PRICED = 50_000


class Client:
    """A process that uses a pool; an actor of its own, because a process has telemetry or has not."""

    def __init__(self, variables: dict[str, str]) -> None:
        for name in environment():
            del os.environ[name]
        adopt(variables)
        set_up_command_line()  # as an application would
        self._tracer = trace.get_tracer("bench")
        self._pool: CachePool
        self._model: Model

    async def connect(self, name: str) -> None:
        """Connect to a pool."""
        self._pool = await CachePool.connect(name)
        self._model = await self._pool.model("bench")

    async def untraced(self) -> float:
        """Make many requests at once outside of any trace; returns the seconds until all are granted."""
        return await self._timed(self._model.request_cache)

    async def traced(self) -> float:
        """The same, each request below a sampled span of its own."""

        async def request(size_bytes: int) -> Any:
            with self._tracer.start_as_current_span("bench"):
                return await self._model.request_cache(size_bytes)

        seconds = await self._timed(request)
        flush = getattr(trace.get_tracer_provider(), "force_flush", None)
        if flush is not None:
            await asyncio.to_thread(flush)  # what is left must not burden the round without
        return seconds

    async def price(self) -> tuple[float, float]:
        """Return the microseconds of a span that is not made and of a value that is not recorded."""

        def span() -> None:
            with client_call("kvpool.bench"):
                pass

        def value() -> None:
            record_metric("kvpool.bench", 1.0, "1")

        return _price_us(span), _price_us(value)

    async def close(self) -> None:
        """Leave the pool."""
        await self._pool.close()

    async def _timed(self, request: Any) -> float:
        began = time.perf_counter()
        caches = await asyncio.gather(*(request(SIZE_BYTES) for _ in range(MANY)))
        seconds = time.perf_counter() - began
        await asyncio.gather(*(cache.release() for cache in caches))
        return seconds


def is_measurable() -> bool:
    """Return whether what :func:`rows` needs is installed."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    except ImportError:
        return False
    return True


async def rows() -> list[dict[str, Any]]:
    """Measure on two pools of its own; returns the rows. Ray must be connected."""
    async with _receiver() as port:
        variables = {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_METRICS_EXPORTER": "otlp",
            "OTEL_METRIC_EXPORT_INTERVAL": "5000",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        }
        async with _client({}) as without, _client(variables) as with_telemetry:
            return await _rows(without, with_telemetry, port)


async def _rows(without: Any, with_telemetry: Any, port: int) -> list[dict[str, Any]]:
    began, before = time.perf_counter(), await _receiver_says(port)
    off: list[float] = []
    on: list[float] = []
    for _ in range(_ROUNDS):
        off.append(MANY / await call(without.untraced))
        on.append(MANY / await call(with_telemetry.untraced))
    off_beside_each: list[float] = []
    each: list[float] = []
    for _ in range(_ROUNDS_OF_EACH):
        off_beside_each.append(MANY / await call(without.untraced))
        each.append(MANY / await call(with_telemetry.traced))
    seconds, after = time.perf_counter() - began, await _receiver_says(port)
    span_us, value_us = await call(without.price)
    many = f"{MANY} concurrent, telemetry on"
    return [
        row(f"{many}: rate, beside off", median(on), "1/s", median(off)),
        row(f"{many} and a sampled span around each: rate, beside off", median(each), "1/s", median(off_beside_each)),
        row("OTLP receiver meanwhile: share of a core", (after["cpu_s"] - before["cpu_s"]) / seconds, "1"),
        row("OTLP receiver meanwhile: received", (after["taken_bytes"] - before["taken_bytes"]) / 1024, "KiB"),
        row("no SDK: the span of one call", span_us, "us"),
        row("no SDK: record_metric", value_us, "us"),
    ]


@asynccontextmanager
async def _client(variables: dict[str, str]) -> AsyncIterator[Any]:
    """Give a client of a pool of its own; both have telemetry as these variables say."""
    name = f"bench-{os.getpid()}-{'on' if variables else 'off'}"
    async with AsyncExitStack() as stack:
        with _only(variables):
            pool = await stack.enter_async_context(temporary_pool(name=name, devices="host:1x128MiB"))
        client = make_worker(Client, variables)
        try:
            await call(client.connect, pool.name)
            await call(client.untraced)  # pages are created, mapped and warm from here on
            yield client
            await call(client.close)
        finally:
            kill(client)


@contextmanager
def _only(variables: Mapping[str, str]) -> Iterator[None]:
    """Let the process have these OTEL_* variables and no others while the block runs."""
    before = environment()
    for name in before:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


@asynccontextmanager
async def _receiver() -> AsyncIterator[int]:
    """Run a receiver in a process of its own; gives its port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvpool.bench.receiver", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield int(await process.stdout.readline() if process.stdout else 0)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


async def _receiver_says(port: int) -> dict[str, Any]:
    def ask() -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10) as answer:
            return dict(json.load(answer))

    return await asyncio.to_thread(ask)


def _price_us(work: Any) -> float:
    return 1e6 * min(timeit.repeat(work, number=_PRICED, repeat=5)) / _PRICED
