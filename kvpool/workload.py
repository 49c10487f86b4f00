"""Workloads: request traces read from files, and seeded synthetic ones.

A request names the blocks of its prompt in prefix order. Block ids are chained: an id stands for its block and all
before it, so it always has the same predecessor and never repeats in one request.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from kvpool.cache.key import HASH_BYTES
from kvpool.errors import InvalidRequestError, TraceFormatError

_MOST_ID = 1 << 8 * HASH_BYTES
_ROOT = -1  # predecessor of a first block
_KINDS = (
    "a trace is named .jsonl (requests with block ids, in Mooncake's format) or .csv (arrivals and lengths alone, in "
    "that of Azure's traces), or the same with .gz"
)


class TraceRequest(NamedTuple):
    """One request of a workload."""

    timestamp_ms: float
    """Arrival, milliseconds from the start."""
    input_length: int
    """Tokens of the prompt."""
    output_length: int
    """Tokens of the answer."""
    hash_ids: tuple[int, ...]
    """Ids of the prompt's blocks in prefix order; empty where the trace has none."""


def unique_blocks(requests: Iterable[TraceRequest]) -> int:
    """Return how many different blocks the requests name."""
    blocks: set[int] = set()
    for request in requests:
        blocks.update(request.hash_ids)
    return len(blocks)


def read_trace(path: str | Path) -> Iterator[TraceRequest]:
    """Read a trace request by request, checking each.

    Parameters
    ----------
    path
        ``.jsonl`` or ``.jsonl.gz``: one JSON object a line with ``timestamp`` (ms), ``input_length``,
        ``output_length`` (tokens) and ``hash_ids``, the format that Mooncake published (FAST '25). ``.csv`` or
        ``.csv.gz``: columns ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``, the format of the Azure LLM
        inference traces of 2023, which has arrivals and lengths but no blocks.

    Raises
    ------
    InvalidRequestError
        At once, if there is no such file, it cannot be read, or its suffix is none of these; at the end, if there was
        no request in it.
    TraceFormatError
        While reading, at the first line that cannot be used; ``details`` has ``file``, ``line`` and ``reason``.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidRequestError(f"there is no trace file {path}: {_KINDS}", asked=str(path)) from None
    except OSError as error:
        raise InvalidRequestError(f"cannot read {path}: {error.strerror}", asked=str(path)) from None
    if stat.S_ISDIR(mode):
        raise InvalidRequestError(f"{path} is a folder, no trace file: {_KINDS}", asked=str(path))
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    parse = _FORMATS.get(suffix)
    if parse is None:
        raise InvalidRequestError(f"cannot read {path}, by its name: {_KINDS}", asked=str(path))
    return _read(path, parse)


_Parser = Callable[[Iterator[str]], Iterator[TraceRequest]]


def _read(path: Path, parse: _Parser) -> Iterator[TraceRequest]:
    line = 0

    def lines(file: Iterable[bytes]) -> Iterator[str]:
        nonlocal line
        for text in file:
            line += 1
            yield text.decode()

    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            previous_ms = -math.inf
            for request in parse(lines(file)):
                if request.timestamp_ms < previous_ms:
                    raise _Unusable(
                        f"its time, {request.timestamp_ms} ms, is before that of the line above: sort the trace by time"
                    )
                previous_ms = request.timestamp_ms
                yield request
            if previous_ms == -math.inf:
                raise InvalidRequestError(f"{path} is empty: no request is in it", asked=str(path))
    except _Unusable as error:
        raise _format_error(path, line, str(error)) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise _format_error(path, line, f"it is not text in UTF-8, or not CSV ({error})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _format_error(path, line + 1, f"the file cannot be unpacked from here on ({error})") from None
    except OSError as error:
        raise InvalidRequestError(f"cannot read {path}: {error.strerror}", asked=str(path)) from error


class _Unusable(Exception):
    """Why the current line cannot be used."""


def _format_error(path: Path, line: int, reason: str) -> TraceFormatError:
    return TraceFormatError(f"{path}, line {line}: {reason}", file=str(path), line=line, reason=reason)


def _parse_jsonl(lines: Iterator[str]) -> Iterator[TraceRequest]:
    predecessors: dict[int, int] = {}
    for text in lines:
        try:
            fields = json.loads(text.rstrip("\r\n"))
        except json.JSONDecodeError as error:  # its text names a line, of this one
            raise _Unusable(f"it is not JSON ({error.msg}, at column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise _Unusable(f"it is not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise _Unusable(f"a request is a JSON object, this is {_shorten(fields)}")
        request = TraceRequest(
            _number(fields, "timestamp"),
            _count(fields, "input_length"),
            _count(fields, "output_length"),
            _block_ids(fields),
        )
        _check_chain(request.hash_ids, predecessors)
        yield request


def _field(fields: dict[str, Any], name: str) -> Any:
    try:
        return fields[name]
    except KeyError:
        raise _Unusable(f"the field {name!r} is missing") from None


def _number(fields: dict[str, Any], name: str) -> float:
    value = _field(fields, name)
    if type(value) not in (int, float) or not 0 <= value < 2**63:
        raise _Unusable(f"{name!r} must be a number from 0 to 2**63, it is {_shorten(value)}")
    return float(value)


def _count(fields: dict[str, Any], name: str) -> int:
    value = _field(fields, name)
    if type(value) is not int or value < 0:  # bool is an int, too
        raise _Unusable(f"{name!r} must be a whole number that is not negative, it is {_shorten(value)}")
    return value


def _block_ids(fields: dict[str, Any]) -> tuple[int, ...]:
    value = _field(fields, "hash_ids")
    if not isinstance(value, list):
        raise _Unusable(f"'hash_ids' must be a list, it is {_shorten(value)}")
    for block in value:
        if type(block) is not int or not 0 <= block < _MOST_ID:
            raise _Unusable(f"'hash_ids' must be whole numbers from 0 to 2**128 - 1, one is {_shorten(block)}")
    return tuple(value)


def _check_chain(blocks: tuple[int, ...], predecessors: dict[int, int]) -> None:
    if len(set(blocks)) != len(blocks):
        repeated = next(block for block in blocks if blocks.count(block) > 1)
        raise _Unusable(f"block {repeated} repeats in the request: an id names a block and all before it")
    before = _ROOT
    for block in blocks:
        known = predecessors.setdefault(block, before)
        if known != before:
            names = ["the start" if other == _ROOT else f"block {other}" for other in (before, known)]
            raise _Unusable(f"block {block} follows {names[0]} here, but {names[1]} earlier: the chain is broken")
        before = block


def _parse_azure(lines: Iterator[str]) -> Iterator[TraceRequest]:
    rows = csv.DictReader(lines, strict=True)
    if not {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(rows.fieldnames or ()):
        raise _Unusable("the first line must name the columns TIMESTAMP, ContextTokens and GeneratedTokens")
    start: datetime | None = None
    for row in rows:
        try:
            arrival = datetime.fromisoformat(row["TIMESTAMP"])
            lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            start = start or arrival
            timestamp_ms = (arrival - start).total_seconds() * 1000
        except (TypeError, ValueError) as error:
            raise _Unusable(f"its fields are not a time and two whole numbers ({error})") from None
        if min(lengths) < 0:
            raise _Unusable(f"lengths must not be negative, they are {lengths[0]} and {lengths[1]}")
        yield TraceRequest(timestamp_ms, *lengths, ())


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_FORMATS: dict[str, _Parser] = {".jsonl": _parse_jsonl, ".csv": _parse_azure}


def generate(
    seed: int,
    *,
    sessions: int = 200,
    turns: float = 4.0,
    system_prompts: int = 8,
    system_blocks: int = 8,
    turn_blocks: float = 6.0,
    session_rate_per_s: float = 1.0,
    think_time_s: float = 30.0,
    tokens_per_block: int = 512,
) -> list[TraceRequest]:
    """Return a multi-turn workload in order of arrival; the same arguments always give the same one.

    Sessions arrive as a Poisson process and begin with one of the shared system prompts, popular ones more often
    (the weight of the k-th is 1/k). Each turn's prompt is the former one, the former answer and new input, so that it
    shares all its full blocks with the former turn. Turns are counted geometrically, lengths and think times drawn
    exponentially. Every prompt has ceil(tokens / tokens_per_block) blocks; a last block that is partial is never
    shared.

    Parameters
    ----------
    seed
        Chooses the workload.
    sessions, turns
        Number of sessions; mean number of turns in one, at least 1.
    system_prompts, system_blocks
        Number of shared prompts; their length in blocks.
    turn_blocks
        Mean length of what a turn adds, input and answer together, in blocks.
    session_rate_per_s, think_time_s
        Arrivals of sessions a second; mean pause between a session's turns.
    tokens_per_block
        Tokens in a block.

    Raises
    ------
    InvalidRequestError
        If a number is not positive, or there is less than one turn a session.
    """
    for name, value, least in (
        ("sessions", sessions, 1),
        ("turns", turns, 1),
        ("system_prompts", system_prompts, 1),
        ("system_blocks", system_blocks, 0),
        ("tokens_per_block", tokens_per_block, 1),
    ):
        if not least <= value < math.inf:
            raise InvalidRequestError(f"{name} must be at least {least}, asked for {value}", asked=value)
    for name, value in (("turn_blocks", turn_blocks), ("session_rate_per_s", session_rate_per_s)):
        if not 0 < value < math.inf:
            raise InvalidRequestError(f"{name} must be above 0, asked for {value}", asked=value)
    if not 0 <= think_time_s < math.inf:
        raise InvalidRequestError(f"think_time_s must be at least 0, asked for {think_time_s}", asked=think_time_s)
    chance = random.Random(seed)
    next_id = system_prompts * system_blocks
    weights = [1 / (rank + 1) for rank in range(system_prompts)]
    requests: list[TraceRequest] = []
    start_s = 0.0
    for _ in range(sessions):
        start_s += chance.expovariate(session_rate_per_s)
        prompt = chance.choices(range(system_prompts), weights)[0]
        full = list(range(prompt * system_blocks, (prompt + 1) * system_blocks))
        tokens = system_blocks * tokens_per_block
        arrival_s = start_s
        while True:
            tokens += 1 + int(chance.expovariate(2 / (turn_blocks * tokens_per_block)))
            answer = 1 + int(chance.expovariate(2 / (turn_blocks * tokens_per_block)))
            grown = tokens // tokens_per_block - len(full)
            full.extend(range(next_id, next_id + grown))
            next_id += grown
            blocks = tuple(full)
            if tokens % tokens_per_block:
                blocks += (next_id,)
                next_id += 1
            requests.append(TraceRequest(round(arrival_s * 1000, 3), tokens, answer, blocks))
            tokens += answer
            if chance.random() * turns < 1:
                break
            arrival_s += chance.expovariate(1 / think_time_s) if think_time_s else 0.0
    requests.sort(key=lambda request: request.timestamp_ms)  # stable: a session's turns keep their order
    return requests
