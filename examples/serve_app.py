"""Two Ray Serve deployments that share one pool: what ``chat`` has read of a document, ``summarize`` finds there.

Run it from the folder that holds ``examples/``, on the cluster that is running or on one of its own::

    serve run examples.serve_app:app
    curl -X POST localhost:8000/summarize -H 'content-type: application/json' -d '{"document": "Call me Ishmael. ..."}'
    curl -X POST localhost:8000/chat -H 'content-type: application/json' \\
        -d '{"document": "Call me Ishmael. ...", "question": "Who speaks?"}'

An answer says how many of the prompt's blocks were found in the pool. The pool is detached: it outlives the app, so a
new version of the app finds what the old one computed. ``serve run examples.serve_app:app pool=mine`` names another,
``kvpool stop --name serve-app`` ends it.
"""

import asyncio
import time

import torch
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from examples.tiny_model import TinyModel, block_hashes
from kvpool import CachePool, PrefixHit, VirtualKVCache
from kvpool.errors import CapacityError


class Prompt(BaseModel):
    """What a client posts."""

    document: str = Field(min_length=1, max_length=4_000)
    question: str = Field("", max_length=500)
    max_tokens: int = Field(32, ge=1, le=16_384)


class Answer(BaseModel):
    """What it gets: the answer's tokens (bytes), and what the pool spared it."""

    tokens: list[int]
    blocks_found: int
    blocks_computed: int
    first_token_s: float


class LanguageModel:
    """A replica of the model. Connects to the pool in its constructor, which runs on the event loop of its requests."""

    _pool: CachePool | None = None

    async def __init__(self, instruction: str, pool: str, devices: str, wait_s: float) -> None:  # type: ignore[misc]
        torch.set_num_threads(1)  # the model is too small for more
        self._instruction, self._wait_s = instruction, wait_s
        self._network = TinyModel()
        self._pool = await CachePool.create(name=pool, devices=devices)  # the first replica starts it, the others join
        self._model = await self._pool.model(self._network.spec)

    async def answer(self, prompt: Prompt) -> Answer | None:
        """Answer a prompt; None if there is no memory for it. However a request ends, its leases end with it."""
        try:
            return await self._answer(prompt)
        except CapacityError:  # not raised to the caller: Serve would log it as a failure of this replica
            return None

    async def _answer(self, prompt: Prompt) -> Answer:
        began = time.perf_counter()
        text = f"{prompt.document}\n\n{self._instruction}\n{prompt.question}\n".encode()
        size = self._network.tokens_per_block
        hashes = block_hashes(text[:-1], size)  # the last token is always computed: the answer begins with its logits
        async with await self._model.match_prefix(hashes) as hit:
            found = hit.num_blocks
            rest, parent = text[found * size :], hashes[found - 1] if found else None
            room = len(rest) + prompt.max_tokens
            size_bytes = self._network.kv_bytes(room)
            async with await self._model.request_cache(size_bytes, timeout_s=self._wait_s) as work:
                token, kv = await asyncio.to_thread(self._compute, hit, work, room, 0, rest)
                first_token_s = time.perf_counter() - began
                computed = len(hashes) - found
                if computed:
                    await self._model.put_blocks(hashes[found:], torch.split(kv, size, dim=2)[:computed], parent=parent)
                tokens = [token]
                while len(tokens) < prompt.max_tokens:
                    written = len(rest) + len(tokens) - 1
                    token, _ = await asyncio.to_thread(self._compute, hit, work, room, written, bytes([token]))
                    tokens.append(token)
        return Answer(tokens=tokens, blocks_found=found, blocks_computed=computed, first_token_s=first_token_s)

    def _compute(
        self, hit: PrefixHit, work: VirtualKVCache, room: int, written: int, text: bytes
    ) -> tuple[int, torch.Tensor]:
        """Compute tokens after the ``written`` ones of the working cache; returns the next token and their KV.

        Runs in a thread, and its tensors over pool memory end with it. So a request that is cancelled meanwhile gives
        its leases back as soon as the step under way is done, and never before.
        """
        past = work.tensor(torch.float32, self._network.kv_shape(room))
        logits, kv = self._network(self._network.embed(text), [*hit.tensors(), past[:, :, :written]])
        past[:, :, written : written + len(text)] = kv
        return int(logits[-1].argmax()), kv

    async def __del__(self) -> None:
        """Leave the pool; Serve awaits this when it stops the replica. (After a crash the pool notices by itself.)"""
        if self._pool is not None:
            await self._pool.close()


api = FastAPI()


async def _ask(model: DeploymentHandle, prompt: Prompt) -> Answer:
    answer: Answer | None = await model.answer.remote(prompt)
    if answer is None:
        raise HTTPException(503, "the pool is full, try again later")
    return answer


@serve.ingress(api)
class Api:
    """Takes the requests. One that its client gives up is cancelled here, and with it what it called."""

    def __init__(self, chat: DeploymentHandle, summarize: DeploymentHandle) -> None:
        self._chat, self._summarize = chat, summarize

    @api.post("/chat")
    async def chat(self, prompt: Prompt) -> Answer:
        """Answer a question about a document."""
        return await _ask(self._chat, prompt)

    @api.post("/summarize")
    async def summarize(self, prompt: Prompt) -> Answer:
        """Summarize a document."""
        return await _ask(self._summarize, prompt)


class Settings(BaseModel):
    """Arguments of ``serve run``."""

    pool: str = "serve-app"
    devices: str = "host:2x128MiB"  # a device holds the longest prompt and answer that are allowed
    wait_s: float = 10.0  # for memory, before a client is told to come back later


def app(settings: Settings) -> Application:
    """Build the application: the same model deployed twice, for two tasks."""
    where = settings.model_dump()
    model = serve.deployment(LanguageModel, max_ongoing_requests=16, ray_actor_options={"num_cpus": 0.5})
    chat = model.options(name="chat", num_replicas=2).bind("Answer the question:", **where)
    summarize = model.options(name="summarize").bind("Summarize the document.", **where)
    return serve.deployment(Api, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0}).bind(chat, summarize)
