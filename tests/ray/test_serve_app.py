"""``examples/serve_app.py`` under ``serve run``: its answers, what deployments share, what cancelled requests leave."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import ray
import torch
from conftest import Pools
from pool_actors import leased_bytes, until, until_leased, until_waiting

from examples.tiny_model import TinyModel, block_hashes
from kvpool import CachePool

TOP = Path(__file__).parents[2]
DOCUMENT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse. " * 4
DEVICES = "host:2x64MiB"
WAIT_S = 12
LONG = 16_384
"""Tokens of an answer that takes longer than any deadline here: a request for it ends because it is cancelled."""


async def run(*command: str, until_line: str | None = None) -> asyncio.subprocess.Process:
    """Start a command of the Python environment under test; returns at its end, or when it has printed a line."""
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name(command[0])), *command[1:], cwd=TOP,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    printed: list[str] = []
    assert process.stdout is not None
    async with asyncio.timeout(240):
        async for line in process.stdout:
            printed.append(line.decode())
            if until_line and until_line in printed[-1]:
                return process
        await process.wait()
    assert until_line is None, "".join(printed)
    assert process.returncode == 0, "".join(printed)
    return process


class App:
    """The application as its clients see it."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session

    async def post(self, path: str, document: str, question: str = "", max_tokens: int = 6) -> dict[str, Any]:
        body = {"document": document, "question": question, "max_tokens": max_tokens}
        async with self._session.post(f"{self._url}/{path}", json=body) as response:
            return {"status": response.status, **await response.json()}

    def start(self, path: str, document: str, max_tokens: int) -> asyncio.Task[dict[str, Any]]:
        return asyncio.create_task(self.post(path, document, max_tokens=max_tokens))


@pytest.fixture
async def pool(make_pool: Pools) -> CachePool:
    return await make_pool(DEVICES, page_size=None)


@pytest.fixture
async def app(pool: CachePool) -> AsyncIterator[App]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ray.get_runtime_context().gcs_address
    await run("serve", "start", "--address", address, "--http-host", "127.0.0.1", "--http-port", str(port))
    settings = (f"pool={pool.name}", f"devices={DEVICES}", f"wait_s={WAIT_S}")
    serving = await run(
        "serve", "run", "--address", address, "examples.serve_app:app", *settings, until_line="is ready at"
    )
    assert serving.stdout is not None
    drained = asyncio.create_task(serving.stdout.read())  # or it would stop at a full pipe
    async with aiohttp.ClientSession() as session:
        yield App(f"http://127.0.0.1:{port}", session)
    serving.send_signal(signal.SIGINT)
    async with asyncio.timeout(240):
        log = (await drained).decode()
        assert await serving.wait() == 0, log
    assert not [trace for trace in log.split("Traceback")[1:] if "kvpool" in trace or "examples" in trace], log


def expected(network: TinyModel, text: str, count: int) -> list[int]:
    """What the model answers, computed without any pool."""
    logits, kv = network(network.embed(text.encode()))
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count:
        logits, new = network(network.embed(bytes(tokens[-1:])), [kv])
        kv = torch.cat([kv, new], dim=2)
        tokens.append(int(logits[-1].argmax()))
    return tokens


async def leave(requests: Sequence[asyncio.Task[Any]]) -> None:
    """Be a client that goes away."""
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)


async def test_deployments_share_a_pool_and_cancelled_requests_leave_nothing(app: App, pool: CachePool) -> None:
    network = TinyModel()
    await check_answers_and_sharing(app, pool, network)
    await check_cancelled_in_the_middle(app, pool)
    await check_cancelled_anywhere(app, pool)

    answer = await app.post("chat", DOCUMENT, "And now?")
    assert answer["tokens"] == expected(network, f"{DOCUMENT}\n\nAnswer the question:\nAnd now?\n", 6)
    await until_leased(pool, 0)


async def check_answers_and_sharing(app: App, pool: CachePool, network: TinyModel) -> None:
    shared = len(block_hashes(DOCUMENT.encode(), network.tokens_per_block))
    first = await app.post("summarize", DOCUMENT)
    assert (first["status"], first["blocks_found"]) == (200, 0)
    assert first["tokens"] == expected(network, f"{DOCUMENT}\n\nSummarize the document.\n\n", 6)

    questions = [f"{number}. Who speaks?" for number in range(8)]
    others = [f"{number} {DOCUMENT}" for number in range(4)]
    answers = await asyncio.gather(
        *(app.post("chat", DOCUMENT, question) for question in questions),
        *(app.post("summarize", document) for document in others),
    )
    texts = [f"{DOCUMENT}\n\nAnswer the question:\n{question}\n" for question in questions]
    texts += [f"{document}\n\nSummarize the document.\n\n" for document in others]
    for text, answer in zip(texts, answers, strict=True):
        assert answer["status"] == 200
        assert answer["tokens"] == expected(network, text, 6)
    for answer in answers[: len(questions)]:
        assert answer["blocks_found"] >= shared, "what one deployment computed, the other found"
    for answer in answers[len(questions) :]:
        assert answer["blocks_found"] == 0, "another document begins otherwise, however much of it is the same"
    assert (await pool.stats()).clients == 4, "three replicas and this test use one pool"
    await until_leased(pool, 0)


async def check_cancelled_in_the_middle(app: App, pool: CachePool) -> None:
    """Two requests fill the pool, others wait; all are cancelled where they stand but one, which is refused."""
    running = [app.start(path, DOCUMENT, LONG) for path in ("chat", "summarize")]
    work_bytes = TinyModel().kv_bytes(LONG)

    async def both_work() -> bool:
        return sum((await leased_bytes(pool)).values()) > 2 * work_bytes

    await until(both_work, "both hold their working memory")
    waiting = [app.start("chat", DOCUMENT, LONG) for _ in range(3)]
    await until_waiting(pool, 3)
    await leave(waiting[:1])
    await until_waiting(pool, 2)
    await leave(running[:1])
    await until_waiting(pool, 1)  # what was released went to the next
    (refused,), granted = await asyncio.wait(waiting[1:], timeout=240, return_when=asyncio.FIRST_COMPLETED)
    assert refused.result() == {"status": 503, "detail": "the pool is full, try again later"}
    await leave([*running, *granted])
    await until_leased(pool, 0)


async def check_cancelled_anywhere(app: App, pool: CachePool) -> None:
    """Requests that are given up after any time up to that of an answer: in a look-up, a copy, a computation …"""
    chance = random.Random(7)
    requests = [
        app.start(chance.choice(["chat", "summarize"]), f"{number} {DOCUMENT}", chance.randrange(1, 300))
        for number in range(30)
    ]
    for request in requests:
        await asyncio.sleep(chance.uniform(0, 0.03))
        await leave([request])
    await until_leased(pool, 0)
    await until_waiting(pool, 0)
