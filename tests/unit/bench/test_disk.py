"""How rounds of a disk become one figure, and what is left behind."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvpool.bench.disk import _compared
from kvpool.cli import main
from kvpool.sizes import MIB


def test_each_round_is_compared_with_its_own_neighbours_and_the_first_warms_up():
    slow_disk = [(4.0, 3.0), (8.0, 6.0), (40.0, 30.0)]  # each three quarters of what stands beside it
    found = _compared("x", [(100.0, 1.0), *slow_disk, (1.0, 3.0)], 8 * MIB)
    assert found["ratio"] == 0.75
    assert found["ratios"] == [0.75, 0.75, 0.75, 3.0]
    assert found["value"] == pytest.approx(1.0)
    assert found["unit"] == "MiB/s"


def test_a_benchmark_that_is_ended_takes_its_files_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def measure(folder: Path) -> None:
        (folder / "file").write_bytes(b"much")
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    monkeypatch.setattr("kvpool.bench.disk.measure", measure)
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(main, ["bench", "disk", "--folder", str(tmp_path)])
    assert result.exit_code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
