"""The examples and the notebook, run as their users run them, and what the examples claim."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import ray
import torch
from conftest import Pools
from nbclient import NotebookClient
from pool_actors import until_leased

from examples import rag_memory, video_agent
from examples.tiny_model import TinyModel, block_hashes
from kvpool import CachePool
from kvpool.actors.cluster import pool_names
from kvpool.workload import generate

TOP = Path(__file__).parents[2]
NOTEBOOK = TOP / "notebooks" / "explore.ipynb"


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As the examples set it: for models as small as theirs, a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def environment() -> dict[str, str]:
    """That of a user whose cluster is the one of these tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVPOOL_")}
    return clean | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


async def run(module: str, environment: dict[str, str]) -> str:
    """Run an example in a process of its own; returns what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, cwd=TOP, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(240):
        printed, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    assert "Traceback" not in complaints.decode()
    return printed.decode()


def rows(printed: str) -> list[tuple[str, int, int, str]]:
    """First cell, found, computed and verdict of each line of an example's table."""
    lines = re.findall(r"^(.+?) +(\d+) +(\d+) +[\d.]+ +[\d.]+ +(\w+)$", printed, re.MULTILINE)
    return [(name, int(found), int(computed), same) for name, found, computed, same in lines]


async def test_each_example_brings_its_own_pool_and_takes_it_along(environment: dict[str, str]) -> None:
    before = pool_names()
    pages, agents = await asyncio.gather(
        run("examples.rag_memory", environment), run("examples.video_agent", environment)
    )
    assert rows(pages) == [
        ("Who are the parties?", 0, 2, "yes"),
        ("When does it end?", 1, 2, "yes"),
        ("What was paid?", 1, 1, "yes"),
        ("Was it paid as agreed?", 4, 0, "yes"),
    ]
    blocks = len(video_agent.PROMPT) // TinyModel().tokens_per_block
    assert rows(agents) == [
        ("visual", 0, blocks, "yes"),
        ("audio", blocks, 0, "yes"),
        ("context", blocks, 0, "yes"),
    ]
    assert pool_names() == before


@pytest.mark.usefixtures("_one_thread")
async def test_pages_outlive_the_program_that_read_them(make_pool: Pools, capsys: pytest.CaptureFixture[str]) -> None:
    pool = await make_pool("host:1x16MiB")
    assert await rag_memory.answer_questions(pool)
    async with await CachePool.connect(pool.name) as another:
        capsys.readouterr()
        assert await rag_memory.answer_questions(another)
    assert [(found, read) for _, found, read, _ in rows(capsys.readouterr().out)] == [(2, 0), (3, 0), (2, 0), (4, 0)]
    await until_leased(pool, 0)


@pytest.mark.usefixtures("_one_thread")
async def test_pages_that_found_no_room_are_read_and_used_all_the_same(
    make_pool: Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = await make_pool("host:1x1MiB")
    async with await pool.request_cache("another model", size="960KiB"):
        assert await rag_memory.answer_questions(pool)
    assert sum(found for _, found, _, _ in rows(capsys.readouterr().out)) == 0
    await until_leased(pool, 0)


@pytest.mark.usefixtures("_one_thread")
async def test_agents_that_compute_the_prompt_in_the_same_moment_keep_one_copy(make_pool: Pools) -> None:
    pool = await make_pool("host:1x16MiB")
    network = TinyModel()
    text = video_agent.PROMPT[:500]
    blocks = len(block_hashes(text, network.tokens_per_block))
    async with await CachePool.connect(pool.name) as another:
        models = [await pool.model(network.spec), await another.model(network.spec)]
        hits = await asyncio.gather(*(video_agent.read_prompt(model, network, text) for model in models))
        for hit, kv in hits:
            assert hit.num_blocks == 0
            assert kv.shape[2] == len(text)
        stats = await pool.stats()
        assert stats.keys == blocks
        async with await models[1].match_prefix(block_hashes(text, network.tokens_per_block)) as hit:
            assert hit.num_blocks == blocks
            kept = torch.cat(hit.tensors(), dim=2)
            assert torch.allclose(kept, hits[0][1][:, :, : kept.shape[2]], atol=1e-6)
    await until_leased(pool, 0)


def write_trace(path: Path, sessions: int) -> int:
    """Write a small trace; returns its number of requests."""
    requests = generate(5, sessions=sessions)
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, request, strict=True))) + "\n" for request in requests))
    return len(requests)


async def execute(environment: dict[str, str], **variables: Any) -> tuple[str, list[bytes]]:
    """Execute the notebook; returns what its cells printed, and its plots."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    await NotebookClient(notebook, timeout=240).async_execute(env=environment | variables)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    return printed, [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


async def test_the_notebook_starts_a_pool_or_joins_one(
    environment: dict[str, str], make_pool: Pools, tmp_path: Path
) -> None:
    running = await make_pool("host:1x16MiB")
    requests = write_trace(tmp_path / "small.jsonl", sessions=10)
    own = f"explore-{os.getpid()}"
    (started, plots), (joined, _) = await asyncio.gather(
        execute(environment, EXPLORE_POOL=own),
        execute(environment, EXPLORE_POOL=running.name, EXPLORE_TRACE=str(tmp_path / "small.jsonl")),
    )
    assert f"started pool {own}" in started
    assert "300 requests" in started
    assert " 0 wrong bytes" in started
    assert len(plots) == 1
    assert own not in pool_names()
    assert f"joined pool {running.name}" in joined
    assert f"{requests} requests" in joined
    assert " 0 wrong bytes" in joined
    assert running.name in pool_names()


def test_the_notebooks_outputs_are_not_in_git() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)
