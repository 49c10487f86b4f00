"""What the help of the benchmarks says."""

import re

import pytest
from click.testing import CliRunner

from kvpool.cli import main
from kvpool.cli.bench import bench

DURATION = re.compile(r"\b[0-9.]+ (s|min)\b")


@pytest.mark.parametrize("name", sorted(bench.commands))
def test_each_benchmark_says_how_long_it_lasts(name: str) -> None:
    told = CliRunner().invoke(main, ["bench", name, "--help"], terminal_width=200).stdout
    [lasts] = [line for line in told.splitlines() if line.strip().startswith("Lasts about")]
    duration = DURATION.search(lasts)
    assert duration is not None
    of_all = CliRunner().invoke(main, ["bench", "--help"], terminal_width=200).stdout
    [line] = [line for line in of_all.splitlines() if line.split()[:1] == [name]]
    assert line.endswith(f"({duration[0]}).")
