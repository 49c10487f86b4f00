"""What a replay leaves behind."""

import builtins
import json
import os
import sys

import pytest

from kvpool.replay.driver import ReplayResult
from kvpool.replay.report import summary, write
from kvpool.sizes import MIB


@pytest.fixture
def result():
    samples = [
        {
            "seconds": at / 10,
            "requests": at,
            "prefix_hit_ratio": at / 100,
            "memory_bytes": at * MIB,
            "evictions": at // 2,
        }
        for at in range(10)
    ]
    return ReplayResult(
        requests=1234, blocks=2000, blocks_hit=250, blocks_stored=1750, verified_bytes=250 * 65536, wrong_bytes=7,
        evictions=1600, peak_bytes=9 * MIB, capacity_bytes=10 * MIB, seconds=0.5, policy="lru",
        allocations_s=[0.001, 0.002, 0.010], samples=samples,
    )  # fmt: skip


def test_the_table_has_all_figures(result):
    assert dict(summary(result)) == {
        "requests": "1,234",
        "blocks": "2,000",
        "prefix hit ratio": "12.50%",
        "verified bytes": "16,384,000 (15.62 MiB)",
        "wrong bytes": "7",
        "evictions": "1,600",
        "allocation p50 / p99": "2.00 / 10.00 ms",
        "peak memory": "9 MiB of 10 MiB",
        "blocks/s": "4,000 (0.5 s)",
        "eviction policy": "lru",
    }


def test_json_and_plot_are_written_into_a_folder_made_for_them(result, tmp_path):
    folder = tmp_path / "a" / "b"
    written = write(result, folder)
    assert written == [folder / "replay.json", folder / "replay.png"]
    assert json.loads(written[0].read_text(encoding="utf-8")) == result.to_dict()
    image = written[1].read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert image.endswith(b"IEND\xaeB`\x82")


def test_the_plot_draws_the_samples(result, tmp_path):
    write(result, tmp_path)
    first = (tmp_path / "replay.png").read_bytes()
    result.samples[5]["memory_bytes"] = 0
    write(result, tmp_path)
    assert (tmp_path / "replay.png").read_bytes() != first


def test_without_matplotlib_there_is_json_alone(result, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **more)

    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert write(result, tmp_path) == [tmp_path / "replay.json"]
    assert os.listdir(tmp_path) == ["replay.json"]
