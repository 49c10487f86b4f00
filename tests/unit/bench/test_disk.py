"""What ``kvpool bench disk`` leaves behind."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvpool.cli import main


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
