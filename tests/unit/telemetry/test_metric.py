"""Metrics of applications: no value without a unit, no name with two."""

import math

import numpy as np
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from kvpool import record_metric
from kvpool.errors import InvalidRequestError
from kvpool.telemetry import metric


@pytest.fixture
def reader(monkeypatch):
    """What a provider of the application's would export."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    monkeypatch.setattr(metric.metrics, "get_meter", provider.get_meter)
    monkeypatch.setattr(metric, "_known", {})
    yield reader
    provider.shutdown()


def exported(reader):
    data = reader.get_metrics_data()
    return {
        metric.name: metric
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def test_values_of_a_name_make_a_histogram_with_unit_and_description(reader):
    for value in (0.002, 3):
        record_metric("ocr.page.duration", value, "s", {"model": "ocr"}, description="Reading one page")
    record_metric("ocr.page.size", 4096, "By")
    metrics = exported(reader)
    duration = metrics["ocr.page.duration"]
    assert (duration.unit, duration.description) == ("s", "Reading one page")
    (point,) = duration.data.data_points
    assert (point.count, point.sum, point.attributes) == (2, 3.002, {"model": "ocr"})
    assert point.explicit_bounds[0] < 0.002  # not OpenTelemetry's own, made for milliseconds
    assert (metrics["ocr.page.size"].unit, metrics["ocr.page.size"].description != "") == ("By", True)


@pytest.mark.parametrize("unit", ["", None, 1, "seconds per page", "s" * 64, "µs"])
def test_a_missing_unit_is_refused(reader, unit):
    with pytest.raises(InvalidRequestError, match="needs a unit"):
        record_metric("pages", 1, unit)
    assert exported(reader) == {}


def test_a_unit_left_out_is_refused(reader):
    with pytest.raises(InvalidRequestError, match="needs a unit"):
        record_metric("pages", 1)


def test_a_name_keeps_its_unit(reader):
    record_metric("pages", 1, "{page}")
    with pytest.raises(InvalidRequestError, match=r"has unit '\{page\}', not '1'"):
        record_metric("pages", 1, "1")
    record_metric("pages", 2, "{page}")
    (point,) = exported(reader)["pages"].data.data_points
    assert point.count == 2


def test_numbers_of_numpy_are_values(reader):
    for value in (np.float32(0.5), np.int64(3), np.float64(0.25)):
        record_metric("pages", value, "{page}")
    (point,) = exported(reader)["pages"].data.data_points
    assert (point.count, point.sum, type(point.sum)) == (3, 3.75, float)


@pytest.mark.parametrize(
    "value", [-1, math.nan, math.inf, "3", None, True, 10**400, np.float32("inf"), np.True_, np.array([1.0, 2.0])]
)
def test_what_is_no_value_is_refused(reader, value):
    with pytest.raises(InvalidRequestError, match="finite number"):
        record_metric("pages", value, "{page}")
    assert exported(reader) == {}


@pytest.mark.parametrize("name", ["", "9lives", "with space", "n" * 256, None])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(InvalidRequestError, match="name"):
        record_metric(name, 1, "1")
