"""The benchmark of telemetry, where what it needs is not installed."""

import sys

import pytest

from kvpool.bench import concurrency


async def test_that_telemetry_cannot_be_measured_is_told_before_anything_is_measured(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)

    class Begun(Exception):
        pass

    def begin(**_settings):
        raise Begun

    monkeypatch.setattr(concurrency, "temporary_pool", begin)
    with pytest.raises(Begun):
        await concurrency.measure()
    assert capsys.readouterr().err == "telemetry is not measured: pip install 'kvpool[otlp]'\n"
