"""``kvpool simulate`` as people and programs call it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure

import kvpool
from kvpool.cache.eviction import policy_names
from kvpool.cli import main
from kvpool.simulate import offline_bound, simulate
from kvpool.workload import TraceRequest, generate


@pytest.fixture(scope="module")
def requests() -> list[TraceRequest]:
    return generate(1, sessions=20)


@pytest.fixture
def trace(tmp_path: Path, requests: list[TraceRequest]) -> Path:
    path = tmp_path / "small.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            fields = {
                "timestamp": request.timestamp_ms,
                "input_length": request.input_length,
                "output_length": request.output_length,
                "hash_ids": request.hash_ids,
            }
            file.write(json.dumps(fields) + "\n")
    return path


@pytest.fixture
def own_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of policies in the working directory, which is on no path."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "some_policies.py").write_text(
        "from kvpool.cache.leaf_first import LeafFirst\n"
        "def nothing(index): return None\n"
        "def divides(index): return LeafFirst(index, lambda row, now: 1 / 0)\n"
        "def text(index): return LeafFirst(index, lambda row, now: 'much')\n"
        "def latest(index): return LeafFirst(index, lambda row, now: -now)\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("some_policies", None)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_json_on_standard_output_is_nothing_but_json(
    trace: Path, requests: list[TraceRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpool.cli.output._PROGRESS_AFTER_S", 1e9)  # a busy machine takes longer than a second
    result = call("simulate", trace, "--policy", "lru", "--capacity", "0.05", "--capacity", "40", "--json", "-")
    assert result.exit_code == 0
    assert result.stderr == ""
    payload = json.loads(result.stdout)
    assert list(payload) == ["rows"]
    for row, capacity in zip(payload["rows"], (0.05, 40), strict=True):
        expected = simulate(requests, "lru", capacity)
        assert row.pop("accesses_per_s") > 0
        assert row == {name: value for name, value in expected.items() if name != "accesses_per_s"}


def test_a_table_is_printed_by_default_and_json_goes_to_a_file(trace: Path, tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    result = call("simulate", trace, "--json", written)
    assert (result.exit_code, result.stdout) == (0, "")
    [row] = json.loads(written.read_text(encoding="utf-8"))["rows"]
    assert row["capacity"] == 0.05
    result = call("simulate", trace)
    assert "small.jsonl" in result.stdout
    for text in ("prefix hit ratio", "accesses per s", f"{row['prefix_hit_ratio']:.2%}", f"{row['evictions']:,}"):
        assert text in result.stdout, "nothing is cut off where the output has no width"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "optimal"), "no eviction policy is named 'optimal': there is adaptive, lfu, lru"),
        (("--policy", "lru,adaptve"), "named 'adaptve' (did you mean 'adaptive'?): there is"),
        (("--policy", "absent_policies:x"), "cannot import (ModuleNotFoundError"),
        (("--policy", "absent_policies:x"), "'kvpool simulate' looks on its Python path and in its working dir"),
        (("--policy", "/d/own_rules.py:much"), "names a file: write module:name, as in 'own_rules:much', and call it"),
        (("--policy", "own_rules.py:much"), "names a file: write module:name, as in 'own_rules:much', and call it"),
        (
            ("--policy", "some_policies:nothing"),
            "'some_policies:nothing' could not be made: None is no eviction",
        ),
        (("--policy", "some_policies:newest"), "'some_policies:newest': module 'some_policies' registers none"),
        (("--policy", "some_policies:divides"), "ZeroDivisionError: division by zero ({here}/some_policies.py:3)"),
        (("--policy", "some_policies:divides,lru", "--processes", "2"), "failed in evictable(): ZeroDivisionError"),
        (("--policy", "some_policies:text"), "is 'much': must be real number, not str ({here}/some_policies.py:4)"),
        (("--capacity", "0.0"), "above 0 and at most 1.0"),
        (("--capacity", "1.5"), "above 0 and at most 1.0"),
        (("--capacity", "nan"), "above 0 and at most 1.0"),
        (("--capacity", "-3"), "at least 1, asked for -3"),
        (("--capacity", "0.05", "--capacity", "0"), "--capacity: a capacity in blocks is a whole number of at least 1"),
        (
            ("--host-capacity", "0"),
            "--host-capacity: a capacity in blocks is a whole number of at least 1, asked for 0",
        ),
        (("--host-capacity", "1.5"), "--host-capacity: a capacity is a share of the unique blocks above 0"),
        (("--json", "/does/not/exist/rows.json"), "cannot write JSON to /does/not/exist/rows.json"),
    ],
)
def test_bad_input_is_one_clear_line(trace: Path, own_policies: None, arguments: tuple[str, ...], message: str) -> None:
    result = call("simulate", trace, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message.replace("{here}", str(Path.cwd())) in result.stderr
    *progress, error = result.stderr.splitlines()
    assert error.startswith("kvpool: ")
    assert all(line.startswith("simulating ") for line in progress)  # how far it was, if that took a second


def test_without_a_trace_a_workload_is_generated() -> None:
    result = call("simulate", "--json", "-")
    assert result.exit_code == 0, result.stderr
    [row] = json.loads(result.stdout)["rows"]
    assert row["prefix_hit_ratio"] == simulate(generate(1), "lru", 0.05)["prefix_hit_ratio"]


def test_several_policies_are_compared_beside_the_bound(
    trace: Path, requests: list[TraceRequest], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    arguments = ("--policy", "all", "--capacity", "0.1", "--capacity", "60", "--seeds", 2, "--processes", 2)
    result = call("simulate", trace, *arguments, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert {file.name for file in out.iterdir()} == {"simulate.json", "simulate.md", "simulate.png"}
    payload = json.loads((out / "simulate.json").read_text(encoding="utf-8"))
    assert payload["capacities"] == [0.1, 60]
    by_policy = {row["policy"]: row["percents"] for row in payload["comparison"]}
    assert list(by_policy) == [*policy_names(), "offline bound"]
    expected = [100 * simulate(requests, "lru", capacity)["prefix_hit_ratio"] for capacity in (0.1, 60)]
    assert by_policy["lru"] == pytest.approx(expected), "other processes simulate the same"
    assert by_policy["offline bound"] == pytest.approx([100 * offline_bound(requests, c) for c in (0.1, 60)])
    assert all(
        ratio <= bound
        for row in by_policy.values()
        for ratio, bound in zip(row, by_policy["offline bound"], strict=True)
    )
    assert len(payload["rows"]) == len(policy_names()) * 2 * 2
    table = (out / "simulate.md").read_text(encoding="utf-8")
    assert f"| lru | {expected[0]:.2f} | {expected[1]:.2f} |" in table
    for text in ("offline bound", "10 %", "60 blocks"):
        assert text in result.stdout


def test_a_comparison_says_that_there_is_a_host_tier(trace: Path) -> None:
    arguments = ("--policy", "lru,lfu", "--capacity", "0.1", "--processes", 1)
    assert "host memory" not in call("simulate", trace, *arguments).stdout
    result = call("simulate", trace, *arguments, "--host-capacity", 40)
    assert "by capacity, with 40 blocks of host memory below" in " ".join(result.stdout.split())


def test_the_plot_shows_each_policy_the_bound_and_that_there_is_a_host_tier(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    arguments = ("--policy", "lru,size_aware_lru", "--capacity", 0.1, "--capacity", 1.0, "--processes", 1)
    result = call("simulate", trace, *arguments, "--host-capacity", 40, "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    [figure] = figures
    assert "with 40 blocks of host memory below" in figure.get_suptitle()
    [axes] = figure.axes
    lru, same, bound = (container.lines[0] for container in axes.containers)
    assert list(lru.get_ydata()) == list(same.get_ydata())
    assert (lru.get_linestyle(), lru.get_marker()) != (same.get_linestyle(), same.get_marker())
    assert {lru.get_fillstyle(), same.get_fillstyle()} == {"none"}, "a marker does not hide another"
    assert max(bound.get_ydata()) < 0.96 * axes.get_ylim()[1]


def test_a_policy_in_the_working_directory_is_found_beside_others(trace: Path, own_policies: None) -> None:
    result = call("simulate", trace, "--policy", "some_policies:latest,LRU", "--capacity", "30", "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert [row["policy"] for row in json.loads(result.stdout)["rows"]] == ["some_policies:latest", "lru"]


def test_a_table_is_as_wide_as_the_terminal_and_ratios_are_percent(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("simulate", trace, "--capacity", "30", "--host-capacity", "60")
    ratio = json.loads(call(*arguments, "--json", "-").stdout)["rows"][0]["host_hit_ratio"]
    assert f"{ratio:.2%}" in call(*arguments).stdout
    monkeypatch.setenv("COLUMNS", "90")
    assert max(map(len, call(*arguments).stdout.splitlines())) <= 90


def test_a_table_shows_no_seed_and_no_host_memory_where_there_is_none(trace: Path) -> None:
    arguments = ("simulate", trace, "--capacity", "30")
    assert not {"seed", "host"} & set(call(*arguments).stdout.split())
    assert {"seed", "host"} <= set(call(*arguments, "--seeds", "2", "--host-capacity", "60").stdout.split())


def test_a_report_that_cannot_be_written_is_one_clear_line_before_anything_is_simulated(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpool.cli.simulate.run_cells", None)
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    result = call("simulate", trace, "--capacity", "30", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "cannot write there" in result.stderr


def test_shares_and_numbers_of_blocks_are_told_apart(trace: Path) -> None:
    arguments = ("--policy", "lru,lfu", "--capacity", "0.25", "--capacity", "1", "--processes", 1)
    (_, told), *_ = [part.split("capacity blocks", 1) for part in [call("simulate", trace, *arguments).stdout]]
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in told.splitlines() if line.startswith("│")]
    assert [row[1] for row in rows[:4]] == ["25 %", "1 block"] * 2


def test_an_empty_trace_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    result = call("simulate", tmp_path / "empty.jsonl")
    assert (result.exit_code, result.stderr) == (2, f"kvpool: {tmp_path}/empty.jsonl is empty: no request is in it\n")


def test_a_capacity_that_is_no_number_is_a_usage_error(trace: Path) -> None:
    result = call("simulate", trace, "--capacity", "much")
    assert result.exit_code == 2
    assert "'much' is neither a share" in result.stderr


@pytest.mark.parametrize(
    "command", [["simulate"], ["replay"], ["replay", "--trace"], ["bench", "fragmentation", "--trace"]]
)
@pytest.mark.parametrize("name", ["absent.jsonl", "absent"])
def test_a_missing_file_is_named(tmp_path: Path, command: list[str], name: str) -> None:
    result = call(*command, tmp_path / name)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"kvpool: there is no trace file {tmp_path / name}: a trace is named .jsonl")


def test_a_broken_line_is_named(trace: Path) -> None:
    lines = trace.read_text(encoding="utf-8").splitlines()
    lines[6] = '{"timestamp": 1}'
    trace.write_text("\n".join(lines), encoding="utf-8")
    result = call("simulate", trace)
    assert result.exit_code == 2
    assert f"{trace}, line 7: " in result.stderr


def test_the_group_names_its_commands_and_version() -> None:
    assert "simulate" in call("--help").stdout
    assert kvpool.__version__ in call("--version").stdout
    assert call("no-such-command").exit_code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["simulate", "--help"], ["simulate", "TRACE", "--json", "-"]])
def test_neither_help_nor_simulate_imports_ray_or_torch(trace: Path, arguments: list[str]) -> None:
    program = (
        "import sys; from kvpool.cli import main; code = main(sys.argv[1:], standalone_mode=False); "
        "sys.exit(str({'ray', 'torch'} & set(sys.modules)) if {'ray', 'torch'} & set(sys.modules) else code)"
    )
    arguments = [str(trace) if argument == "TRACE" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
