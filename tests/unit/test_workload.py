"""Reading traces: what is read, and that each way a line can be wrong is named with its file and number."""

import gzip
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvpool.errors import InvalidRequestError, TraceFormatError
from kvpool.workload import TraceRequest, generate, read_trace, unique_blocks

GOOD: dict[str, Any] = {"timestamp": 5, "input_length": 1000, "output_length": 7, "hash_ids": [0, 1]}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: object, name: str = "trace.jsonl") -> Path:
        path = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        return path

    return write


def test_an_error_names_one_line_that_of_the_file(write: Write) -> None:
    with pytest.raises(TraceFormatError) as caught:
        list(read_trace(write(GOOD, "{")))
    assert re.findall(r"line \d+", str(caught.value)) == ["line 2"]
    assert "line 2: it is not JSON" in str(caught.value)


def test_a_trace_is_read_in_order(write: Write) -> None:
    later = {"timestamp": 5.5, "input_length": 0, "output_length": 0, "hash_ids": [], "session": 3}
    path = write(GOOD, later)
    assert list(read_trace(path)) == [TraceRequest(5.0, 1000, 7, (0, 1)), TraceRequest(5.5, 0, 0, ())]
    assert list(read_trace(str(path))) == list(read_trace(path))


def test_a_packed_trace_reads_as_the_plain_one(write: Write) -> None:
    plain = write(GOOD, GOOD)
    packed = plain.with_name("trace.jsonl.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_trace(packed)) == list(read_trace(plain))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1], "JSON object"),
        *[({k: v for k, v in GOOD.items() if k != name}, f"'{name}' is missing") for name in GOOD],
        ({**GOOD, "timestamp": "5"}, "'timestamp'"),
        ({**GOOD, "timestamp": True}, "'timestamp'"),
        ({**GOOD, "timestamp": -1}, "'timestamp'"),
        (json.dumps(GOOD).replace("5", "NaN", 1), "'timestamp'"),
        (json.dumps(GOOD).replace("5", "1" + "0" * 400, 1), "'timestamp'"),
        ({**GOOD, "input_length": 1.5}, "'input_length'"),
        ({**GOOD, "input_length": -1}, "'input_length'"),
        ({**GOOD, "output_length": None}, "'output_length'"),
        ({**GOOD, "hash_ids": 7}, "'hash_ids' must be a list"),
        ({**GOOD, "hash_ids": [0, "1"]}, "one is '1'"),
        ({**GOOD, "hash_ids": [0, True]}, "one is True"),
        ({**GOOD, "hash_ids": [-1]}, "one is -1"),
        ({**GOOD, "hash_ids": [2**128]}, "'hash_ids'"),
        ({**GOOD, "hash_ids": [0, 1, 0]}, "block 0 repeats"),
        ({**GOOD, "hash_ids": [0, 2, 1]}, "block 1 follows block 2 here, but block 0 earlier"),
        ({**GOOD, "hash_ids": [1]}, "block 1 follows the start here, but block 0 earlier"),
        ({**GOOD, "hash_ids": [3, 0]}, "block 0 follows block 3 here, but the start earlier"),
        ({**GOOD, "timestamp": 4}, "before that of the line above: sort the trace by time"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(write: Write, line: object, reason: str) -> None:
    path = write(GOOD, line, GOOD)
    requests = read_trace(path)
    assert next(requests).hash_ids == (0, 1), "what comes before is good"
    with pytest.raises(TraceFormatError, match=reason) as caught:
        next(requests)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert caught.value.details["file"] == str(path)
    assert caught.value.details["line"] == 2
    assert len(str(caught.value)) < len(str(path)) + 250, "a long line is not repeated in full"


def test_the_line_that_the_documentation_shows_is_one(write: Write) -> None:
    text = Path(__file__).parents[2].joinpath("docs", "eviction.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^```json\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    (request,) = read_trace(write(line))
    assert request == TraceRequest(27482.0, 1100, 52, (46, 47, 2353))
    assert -(-request.input_length // 512) == len(request.hash_ids)


@pytest.mark.parametrize("lines", [(), ("TIMESTAMP,ContextTokens,GeneratedTokens",)])
def test_a_file_without_a_request_is_told(write: Write, lines: tuple[str, ...]) -> None:
    path = write(*lines, name="empty.csv" if lines else "empty.jsonl")
    with pytest.raises(InvalidRequestError, match=r"empty\.(csv|jsonl) is empty: no request is in it"):
        list(read_trace(path))


def test_bytes_that_are_no_text_are_named(write: Write) -> None:
    path = write(GOOD)
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    with pytest.raises(TraceFormatError, match=r"line 2: .*UTF-8"):
        list(read_trace(path))


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"plain text", lambda data: data[:60] + b"?"])
def test_a_damaged_file_is_named(write: Write, damage: Callable[[bytes], bytes]) -> None:
    plain = write(*[{**GOOD, "input_length": number} for number in range(1000)])
    path = plain.with_name("trace.jsonl.gz")
    path.write_bytes(damage(gzip.compress(plain.read_bytes())))
    with pytest.raises(TraceFormatError, match=r"trace\.jsonl\.gz, line \d+: .*unpacked"):
        list(read_trace(path))


def test_an_azure_trace_has_arrivals_and_lengths(write: Write) -> None:
    path = write(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        "2023-11-16 18:17:05.0000000,3180,8",
        name="azure.csv",
    )
    first, second = read_trace(path)
    assert first == TraceRequest(0.0, 4808, 10, ())
    assert second.timestamp_ms == pytest.approx(1020.04)
    assert second[1:] == (3180, 8, ())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("2023-11-16 18:17:04,3180", "two whole numbers"),
        ("yesterday,3180,8", "two whole numbers"),
        ("2023-11-16 18:17:04,many,8", "two whole numbers"),
        ("2023-11-16 18:17:04+01:00,3180,8", "two whole numbers"),
        ("2023-11-16 18:17:04,-1,8", "not be negative"),
        ("2023-11-16 18:17:02,3180,8", "before that of the line above"),
    ],
)
def test_an_azure_line_that_cannot_be_used_is_named(write: Write, line: str, reason: str) -> None:
    path = write(
        "TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.9799600,4808,10", line, name="azure.csv"
    )
    with pytest.raises(TraceFormatError, match=f"line 3: .*{reason}"):
        list(read_trace(path))


def test_an_azure_trace_needs_its_columns(write: Write) -> None:
    path = write("TIMESTAMP,ContextTokens", "2023-11-16 18:17:03.9799600,4808", name="azure.csv")
    with pytest.raises(TraceFormatError, match=r"line 1: .*GeneratedTokens"):
        list(read_trace(path))


def test_a_file_that_is_no_trace_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.jsonl").mkdir()
    for name, reason in (
        ("absent.jsonl", r"there is no trace file .*absent\.jsonl: .*\.jsonl .* or \.csv .*\.gz"),
        ("absent", r"there is no trace file .*absent: "),  # it was told to be named otherwise
        ("notes.txt/trace.jsonl", "there is no trace file"),
        ("x" * 300 + ".jsonl", "File name too long"),
        ("notes.txt", r"cannot read .*notes\.txt, by its name: a trace is named \.jsonl"),
        ("folder.jsonl", r"folder\.jsonl is a folder, no trace file"),
    ):
        with pytest.raises(InvalidRequestError, match=reason):
            read_trace(tmp_path / name)


def test_unique_blocks_are_counted_once() -> None:
    requests = [TraceRequest(0.0, 1, 1, (1, 2)), TraceRequest(0.0, 1, 1, (1, 3)), TraceRequest(0.0, 1, 1, ())]
    assert unique_blocks(requests) == 3


def test_a_generated_workload_is_the_same_for_the_same_seed() -> None:
    assert generate(7, sessions=20) == generate(7, sessions=20)
    assert generate(7, sessions=20) != generate(8, sessions=20)


def test_a_generated_workload_is_a_valid_trace(write: Write) -> None:
    requests = generate(7, sessions=50, tokens_per_block=64)
    lines = [
        {
            "timestamp": request.timestamp_ms,
            "input_length": request.input_length,
            "output_length": request.output_length,
            "hash_ids": request.hash_ids,
        }
        for request in requests
    ]
    assert list(read_trace(write(*lines))) == requests
    assert all(len(request.hash_ids) == -(-request.input_length // 64) for request in requests)


def test_a_generated_session_extends_its_former_prompts() -> None:
    requests = generate(3, sessions=1, turns=50, system_blocks=2, think_time_s=1.0)
    assert len(requests) > 1
    for former, later in pairwise(requests):
        full = former.input_length // 512
        assert later.hash_ids[:full] == former.hash_ids[:full]
        assert later.input_length > former.input_length + former.output_length
        assert later.timestamp_ms > former.timestamp_ms


def test_generated_sessions_share_system_prompts() -> None:
    requests = generate(3, sessions=100, turns=1, system_prompts=4, system_blocks=3)
    starts = {request.hash_ids[:3] for request in requests}
    assert starts <= {(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)}
    assert len(starts) > 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"sessions": 0},
        {"turns": 0.5},
        {"turns": float("nan")},
        {"system_prompts": 0},
        {"system_blocks": -1},
        {"turn_blocks": 0},
        {"session_rate_per_s": 0},
        {"think_time_s": -1},
        {"tokens_per_block": 0},
    ],
)
def test_an_impossible_workload_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        generate(1, **wrong)
