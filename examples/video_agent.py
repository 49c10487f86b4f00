"""Agents that share one prompt's KV: the first computes it, the others find it, and each goes on with its own frames.

Run it from the folder that holds ``examples/``::

    python -m examples.video_agent                 # a pool of its own (the VISTA preset), deleted at the end
    python -m examples.video_agent --pool kvpool   # a running one: the second time, no agent computes the prompt

Each agent is a Ray actor, a process of its own, in which the prompt's blocks are mapped, not copied. What it computes
of its frames lies in pool memory, too, which is its own and gone at the end. Its verdict is compared with one for which
everything was computed anew.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from contextlib import AsyncExitStack
from typing import Any

import ray
import torch
from torch import Tensor

import kvpool
from examples.tiny_model import TinyModel, block_hashes
from kvpool import CachePool, Model, PrefixHit

AGENTS = ("visual", "audio", "context")
FRAMES = 12
FRAME_PIXELS = 32
PATCH_PIXELS = 8
PROMPT = (
    b"You judge videos that were generated from a description. Look at each frame in turn. Note what the description "
    b"asks for and the frame lacks, what it shows and nobody asked for, and what changes from one frame to the next "
    b"without a reason. Then say how the description should be changed so that the next video is better. "
) * 4


def film_frames(agent: str) -> Tensor:
    """Return an agent's frames, ``(FRAMES, FRAME_PIXELS, FRAME_PIXELS)``: a bright square that wanders."""
    chance = torch.Generator().manual_seed(sum(agent.encode()))
    frames = torch.zeros(FRAMES, FRAME_PIXELS, FRAME_PIXELS)
    corners = torch.randint(0, FRAME_PIXELS - 8, (FRAMES, 2), generator=chance)
    for frame, (top, left) in zip(frames, corners.tolist(), strict=True):
        frame[top : top + 8, left : left + 8] = 1.0
    return frames


class VideoModel(TinyModel):
    """The tiny transformer with an eye: a frame is as many tokens as it has patches."""

    FRAME_TOKENS = (FRAME_PIXELS // PATCH_PIXELS) ** 2

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, layers=4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._eye = torch.nn.Conv2d(1, self.width, PATCH_PIXELS, stride=PATCH_PIXELS)

    @torch.inference_mode()
    def see(self, frame: Tensor) -> Tensor:
        """Return the embeddings of a frame's tokens."""
        patches: Tensor = self._eye(frame[None, None])
        return patches.flatten(2)[0].T


async def read_prompt(model: Model, network: TinyModel, prompt: bytes) -> tuple[PrefixHit, Tensor]:
    """Provide the KV of a prompt: what is in the pool, leased, and the rest, computed and put there.

    Agents that begin in the same moment may all find nothing and all compute it; the pool keeps what was sealed first,
    and drops the duplicates.
    """
    size = network.tokens_per_block
    hashes = block_hashes(prompt, size)
    hit = await model.match_prefix(hashes)
    try:
        found = hit.num_blocks
        _, kv = network(network.embed(prompt[found * size :]), hit.tensors())
        blocks = torch.split(kv, size, dim=2)[: len(hashes) - found]
        if blocks:
            await model.put_blocks(hashes[found:], blocks, parent=hashes[found - 1] if found else None)
    except BaseException:
        await hit.release()
        raise
    return hit, kv


class Agent:
    """One judge of a video; a Ray actor."""

    async def connect(self, name: str, pool: str) -> None:
        """Load the model and connect to the pool."""
        torch.set_num_threads(1)  # the model is too small for more
        self._name = name
        self._network = VideoModel()
        self._network(self._network.embed(PROMPT[:16]))  # torch prepares itself at its first use
        self._pool = await CachePool.connect(pool)
        self._model = await self._pool.model(self._network.spec)

    async def judge(self) -> dict[str, Any]:
        """Watch the frames; returns what was found and computed of the prompt, and whether the verdict is the same."""
        network, frames = self._network, film_frames(self._name)
        tokens = FRAMES * network.FRAME_TOKENS
        async with AsyncExitStack() as leases:
            began = time.perf_counter()
            hit, rest = await read_prompt(self._model, network, PROMPT)
            await leases.enter_async_context(hit)
            prompt_s = time.perf_counter() - began
            request = self._model.request_cache(network.kv_bytes(tokens))
            work = await leases.enter_async_context(await request)
            verdict = self._watch(frames, [*hit.tensors(), rest], work.tensor(torch.float32, network.kv_shape(tokens)))
            found = hit.num_blocks
        began = time.perf_counter()
        _, prompt_kv = network(network.embed(PROMPT))
        anew_s = time.perf_counter() - began
        anew = self._watch(frames, [prompt_kv], torch.empty(network.kv_shape(tokens)))
        return {
            "agent": self._name,
            "found": found,
            "computed": len(PROMPT) // network.tokens_per_block - found,
            "prompt_s": prompt_s,
            "anew_s": anew_s,
            "same": torch.allclose(verdict, anew, atol=1e-5),
        }

    def _watch(self, frames: Tensor, prompt: list[Tensor], work: Tensor) -> Tensor:
        """Compute the frames one by one, after the prompt, into working memory; returns the last logits."""
        written = 0
        for frame in frames:
            seen = self._network.see(frame)
            logits, kv = self._network(seen, [*prompt, work[:, :, :written]])
            work[:, :, written : written + len(seen)] = kv
            written += len(seen)
        last: Tensor = logits[-1]
        return last

    async def close(self) -> None:
        """Leave the pool."""
        await self._pool.close()


async def judge_video(pool: CachePool) -> bool:
    """Let all agents judge; returns whether each verdict is what it is without the pool."""
    actors = {name: ray.remote(Agent).options(num_cpus=0).remote() for name in AGENTS}
    await asyncio.gather(*(actor.connect.remote(name, pool.name) for name, actor in actors.items()))
    first, *others = actors.values()
    results = [await first.judge.remote()]  # alone, so that the prompt is computed once and not by each
    results += await asyncio.gather(*(actor.judge.remote() for actor in others))
    await asyncio.gather(*(actor.close.remote() for actor in actors.values()))
    print(f"{'agent':<10}{'prompt blocks found':>20}{'computed':>10}{'seconds':>10}{'computing all':>15}  same verdict")
    for result in results:
        print(
            f"{result['agent']:<10}{result['found']:>20}{result['computed']:>10}{result['prompt_s']:>10.3f}"
            f"{result['anew_s']:>15.3f}  {'yes' if result['same'] else 'NO'}"
        )
    stats = await pool.stats()
    print(f"{stats.keys} blocks in the pool; policy asked for: {stats.policy_requested}, in use: {stats.policy}")
    return all(result["same"] for result in results)


async def main(pool_name: str | None) -> bool:
    """Connect to the pool, or start one for this run; see the top of the file."""
    if pool_name is not None:
        async with await CachePool.connect(pool_name) as pool:
            return await judge_video(pool)
    name = f"video-agent-{os.getpid()}"
    async with await kvpool.create_vista_cache_pool(2, memory_per_device="64MiB", name=name) as pool:
        same = await judge_video(pool)
        await pool.delete()
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", help="name of a running pool")
    if not asyncio.run(main(parser.parse_args().pool)):
        raise SystemExit("a verdict differs from the one without the pool")
