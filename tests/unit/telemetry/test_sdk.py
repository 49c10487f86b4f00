"""What the OTEL_* variables ask for."""

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
from click.testing import CliRunner

from kvpool.cli import administration
from kvpool.errors import ConfigError
from kvpool.telemetry import sdk
from kvpool.telemetry.sdk import environment, meter_provider, shut_down, tracer_provider


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """Set variables, in an environment that has none of them."""
    for name in environment():
        monkeypatch.delenv(name)

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"OTEL_{name}", value)

    return set_all


@pytest.fixture
def providers():
    """Make providers; they end with the test."""
    made = []

    def make(which, *arguments, **attributes):
        provider = which(*arguments, **attributes)
        made.append(provider)
        return provider

    yield make
    for provider in made:
        if provider is not None:
            provider.shutdown()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"TRACES_EXPORTER": "none", "METRICS_EXPORTER": "none"},
        {"TRACES_EXPORTER": "", "METRICS_EXPORTER": " "},
        {"TRACES_EXPORTER": "otlp", "METRICS_EXPORTER": "otlp", "SDK_DISABLED": "true"},
        {"SERVICE_NAME": "mine", "EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
    ],
)
def test_nothing_is_set_up_unless_an_exporter_is_asked_for(variables, values):
    variables(**values)
    assert (tracer_provider("pool"), meter_provider("pool")) == (None, None)


def exporters(provider):
    return [type(each.span_exporter).__module__ for each in provider._active_span_processor._span_processors]


def test_otlp_is_http_unless_the_protocol_says_otherwise(variables, providers):
    variables(TRACES_EXPORTER="otlp, console", EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert exporters(providers(tracer_provider, "pool")) == [
        "opentelemetry.exporter.otlp.proto.http.trace_exporter",
        "opentelemetry.sdk.trace.export",
    ]
    variables(EXPORTER_OTLP_TRACES_PROTOCOL="carrier pigeon")
    with pytest.raises(ConfigError, match="http/protobuf or grpc"):
        tracer_provider("pool")


def test_what_is_not_installed_is_told_with_what_to_install(variables, monkeypatch):
    variables(TRACES_EXPORTER="jaeger", METRICS_EXPORTER="jaeger")
    for make in (tracer_provider, meter_provider):
        with pytest.raises(ConfigError, match=r"'jaeger'.*not installed.*otlp.*pip install 'kvpool\[otlp\]'"):
            make("pool")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="opentelemetry-sdk is not installed"):
        tracer_provider("pool")


SPANS = {"TRACES_EXPORTER": "otlp"}
METRICS = {"METRICS_EXPORTER": "otlp"}
UNUSABLE = [
    (tracer_provider, SPANS | {"BSP_MAX_QUEUE_SIZE": "0"}),
    (tracer_provider, SPANS | {"BSP_MAX_EXPORT_BATCH_SIZE": "5000"}),
    (tracer_provider, SPANS | {"BSP_SCHEDULE_DELAY": "0"}),
    (tracer_provider, SPANS | {"SPAN_ATTRIBUTE_COUNT_LIMIT": "abc"}),
    (meter_provider, METRICS | {"METRIC_EXPORT_INTERVAL": "0"}),
    (meter_provider, METRICS | {"METRICS_EXEMPLAR_FILTER": "bogus"}),
]


@pytest.mark.parametrize(("make", "values"), UNUSABLE)
def test_a_value_that_the_sdk_refuses_is_a_config_error_and_leaves_nothing_running(variables, make, values):
    variables(**values)
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match=r"OTEL_\* variables could not be used: ."):
        make("pool")
    assert set(threading.enumerate()) <= before


def test_an_endpoint_that_was_opened_is_closed_if_what_follows_fails(variables):
    port = free_port()
    variables(METRICS_EXPORTER="prometheus", EXPORTER_PROMETHEUS_PORT=port, METRICS_EXEMPLAR_FILTER="bogus")
    with pytest.raises(ConfigError, match="could not be used"):
        meter_provider("pool")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("localhost", int(port)), timeout=60)


def test_a_resource_of_the_environment_goes_before_our_own(variables, providers):
    variables(TRACES_EXPORTER="console")
    own = providers(tracer_provider, "p/host-0", **{"kvpool.pool": "p"}).resource.attributes
    assert (own["service.name"], own["service.instance.id"], own["kvpool.pool"]) == ("kvpool", "p/host-0", "p")
    variables(SERVICE_NAME="mine", RESOURCE_ATTRIBUTES="deployment.environment.name=test,service.instance.id=x")
    told = providers(tracer_provider, "p/host-0").resource.attributes
    assert (told["service.name"], told["service.instance.id"]) == ("mine", "x")
    assert told["deployment.environment.name"] == "test"


def test_the_sampler_is_that_of_the_variables(variables, providers):
    variables(TRACES_EXPORTER="console", TRACES_SAMPLER="always_off")
    assert not providers(tracer_provider, "pool").get_tracer("t").start_span("s").is_recording()


def test_an_endpoint_of_prometheus_has_a_registry_of_its_own_and_an_end(variables):
    port = free_port()
    url = f"http://127.0.0.1:{port}/metrics"
    variables(METRICS_EXPORTER="prometheus", EXPORTER_PROMETHEUS_HOST="127.0.0.1", EXPORTER_PROMETHEUS_PORT=port)
    provider = meter_provider("p", **{"kvpool.pool": "p"})
    provider.get_meter("t").create_counter("pages", "{page}", "Pages read").add(2)
    with urllib.request.urlopen(url, timeout=60) as answer:
        text = answer.read().decode()
    assert 'pages_total{kvpool_pool="p"} 2.0' in text
    assert "python_info" not in text  # of the global registry
    with pytest.raises(ConfigError, match=f"{port}.*OTEL_EXPORTER_PROMETHEUS_PORT of its own"):
        meter_provider("q")
    shut_down(provider)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=60)
    variables(EXPORTER_PROMETHEUS_PORT="many")
    with pytest.raises(ConfigError, match="many"):
        meter_provider("p")


def test_only_otel_variables_pass_to_actors(variables, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    variables(SERVICE_NAME="mine")
    assert environment() == {"OTEL_SERVICE_NAME": "mine"}


def run(code, *arguments, returns=0, **variables):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={name: value for name, value in os.environ.items() if not name.startswith("OTEL_")} | variables,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == returns, done.stderr
    return done


COMMAND = """
import sys
from opentelemetry import trace
import kvpool.cli
sys.argv = ["kvpool", "simulate", "--help"]
try:
    kvpool.cli.main()
finally:
    print("provider", type(trace.get_tracer_provider()).__module__)
"""


def test_the_command_line_sets_up_its_own_process_and_a_missing_exporter_does_not_stop_it():
    assert "provider opentelemetry.trace" in run(COMMAND).stdout
    assert "provider opentelemetry.sdk.trace" in run(COMMAND, OTEL_TRACES_EXPORTER="console").stdout
    missing = run(COMMAND, OTEL_TRACES_EXPORTER="jaeger")
    assert "Usage: kvpool simulate" in missing.stdout
    assert "kvpool: not traced: exporter 'jaeger'" in missing.stderr
    # A limit is read as the SDK is imported.
    unusable = run(COMMAND, OTEL_TRACES_EXPORTER="console", OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT="abc")
    assert "Usage: kvpool simulate" in unusable.stdout
    assert "kvpool: not traced: the OTEL_* variables could not be used" in unusable.stderr


FAILING = """
import logging, sys
import click
from opentelemetry import trace
from kvpool import cli
from kvpool.errors import ConfigError
from kvpool.telemetry import sdk

sdk._COMMAND_FLUSH_S = 100.0  # on a busy machine what leaves at the end may need more than a user waits for

@click.command()
def command():
    logging.getLogger("kvpool.client").warning("of the command")
    raise ConfigError("too bad")

sys.modules["command"] = sys.modules["__main__"]
for name in ("status", "bench"):
    cli._COMMANDS[name] = ("command:command", "")
sys.argv = ["kvpool", sys.argv[1]]
cli.main()
"""


def test_a_command_is_a_span_and_its_warnings_have_the_ids_of_it():
    done = run(FAILING, "status", returns=2, OTEL_TRACES_EXPORTER="console")
    assert done.stdout == "", "it is for the answers of commands"
    span = json.loads(done.stderr[done.stderr.index("{") :])
    assert (span["name"], span["parent_id"], span["status"]) == (
        "kvpool.cli.status", None, {"status_code": "ERROR", "description": "too bad"},
    )  # fmt: skip
    trace_id, span_id = span["context"]["trace_id"][2:], span["context"]["span_id"][2:]
    assert f"WARNING kvpool.client trace_id={trace_id} span_id={span_id} of the command" in done.stderr
    assert "kvpool: too bad" in done.stderr
    # Of commands of many calls there is none, which all their calls would be children of.
    assert "kvpool.cli.bench" not in run(FAILING, "bench", returns=2, OTEL_TRACES_EXPORTER="console").stderr
    assert "trace_id" not in run(FAILING, "status", returns=2).stderr


def test_where_no_collector_listens_a_command_says_so_in_one_line():
    endpoint = f"http://127.0.0.1:{free_port()}"
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}  # to try again for
    done = run(FAILING, "status", returns=2, OTEL_TRACES_EXPORTER="otlp", **variables)
    told = [line for line in done.stderr.splitlines() if "of the command" not in line]
    assert told[0] == "kvpool: too bad"
    assert "does a collector listen" in told[1]
    assert len(told) == 2, "no tracebacks, and not each attempt"


def test_the_end_does_not_wait_for_what_does_not_leave():
    let_go = threading.Event()

    class Stuck:
        def force_flush(self):
            let_go.wait()

        def shutdown(self):
            ended.set()

    ended = threading.Event()
    shut_down(Stuck(), within_s=0.01)
    assert not ended.is_set()
    let_go.set()
    assert ended.wait(60)
    ended.clear()
    shut_down(Stuck(), within_s=10)
    assert ended.is_set()


def test_a_question_of_the_command_line_carries_its_trace(provider, monkeypatch):
    asked = []

    def ask(_name, _method, _tenant, questions):
        asked.extend(questions)
        return [("contains", {"blocks": 0, "devices": {}})]

    monkeypatch.setattr(administration, "ask", ask)
    with provider.get_tracer("t").start_as_current_span("kvpool.cli.contains") as span:
        done = CliRunner().invoke(administration.contains, ["--model", "m", "key"])
    assert done.output == "0 of 1 in the pool\n"
    ((_, _, carrier),) = asked
    assert dict(carrier)["traceparent"].split("-")[2] == f"{span.context.span_id:016x}"


def test_a_library_user_gets_no_sdk_and_no_global_provider():
    code = """
import json, sys
from opentelemetry import metrics, trace
import kvpool, kvpool.client, kvpool.sync, kvpool.actors.pool_actor
kvpool.record_metric("a", 1, "1")
print(json.dumps([
    type(trace.get_tracer_provider()).__name__, type(metrics.get_meter_provider()).__name__,
    [name for name in sys.modules if name.startswith("opentelemetry.sdk.trace")],
]))
"""
    variables = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_METRICS_EXPORTER": "prometheus"}
    assert json.loads(run(code, **variables).stdout) == ["ProxyTracerProvider", "_ProxyMeterProvider", []]


def test_the_sdk_of_the_actors_is_never_global(variables, providers):
    variables(TRACES_EXPORTER="console", METRICS_EXPORTER="console")
    from opentelemetry import metrics, trace

    before = trace.get_tracer_provider(), metrics.get_meter_provider()
    providers(tracer_provider, "p")
    providers(meter_provider, "p")
    assert (trace.get_tracer_provider(), metrics.get_meter_provider()) == before
    assert sdk.environment()
