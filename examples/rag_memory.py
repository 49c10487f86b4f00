"""Pages that are read once: the KV of page images, kept under the hash of their content and used for any question.

Run it from the folder that holds ``examples/``::

    python -m examples.rag_memory                 # a pool of its own (the DeepSeek-OCR preset), deleted at the end
    python -m examples.rag_memory --pool kvpool   # a running one: the second time, no page is read

Each page is read by itself, so its KV depends on nothing but its image; a question then attends to the KV of all its
pages. So a page serves every question, beside any other page, and also where it turns up in another document. Every
answer is compared with one for which all pages were read anew.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from hashlib import blake2b

import torch
from torch import Tensor, nn

import kvpool
from examples.tiny_model import TinyModel
from kvpool import CachePool, Model

PAGE_PIXELS = 256
PATCH_PIXELS = 16
PAGE_TOKENS = 64

CONTRACT = [0, 1, 2, 3]
INVOICE = [4, 2]  # the second page is one of the contract's, scanned again
QUESTIONS: list[tuple[str, list[int]]] = [  # with the pages that a retriever chose
    ("Who are the parties?", CONTRACT[:2]),
    ("When does it end?", CONTRACT[1:]),
    ("What was paid?", INVOICE),
    ("Was it paid as agreed?", [*CONTRACT[2:], *INVOICE]),
]


def draw_page(number: int) -> Tensor:
    """Return a page's image, ``(PAGE_PIXELS, PAGE_PIXELS)`` of bytes: rows of dark words on white paper."""
    chance = torch.Generator().manual_seed(number)
    page = torch.full((PAGE_PIXELS, PAGE_PIXELS), 255, dtype=torch.uint8)
    for top in range(16, PAGE_PIXELS - 16, 12):
        words = torch.rand(PAGE_PIXELS // 8, generator=chance) < 0.7
        ink = words.repeat_interleave(8) & (torch.arange(PAGE_PIXELS) % 8 < 7)
        page[top : top + 7, ink] = 40
    return page


class PageReader(nn.Module):
    """A vision encoder of random weights before the decoder: patches, attention, four patches to a vision token."""

    def __init__(self, decoder: TinyModel, seed: int = 0) -> None:
        super().__init__()
        self._decoder = decoder
        # Named apart from the decoder alone: the encoder's weights make the KV differ, too.
        self.spec = replace(decoder.spec, name="tiny-ocr", revision=f"{decoder.spec.revision}, encoder {seed}")
        width = decoder.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._patches = nn.Conv2d(1, width, PATCH_PIXELS, stride=PATCH_PIXELS)
            layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            self._encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
            self._compress = nn.Conv2d(width, width, 2, stride=2)
        self.eval()

    @torch.inference_mode()
    def read(self, page: Tensor) -> Tensor:
        """Return the decoder's KV of a page's vision tokens."""
        patches: Tensor = self._patches(page[None, None] / 255.0)
        encoded: Tensor = self._encoder(patches.flatten(2).transpose(1, 2))
        tokens: Tensor = self._compress(encoded.transpose(1, 2).view_as(patches))
        kv: Tensor = self._decoder(tokens.flatten(2)[0].T)[1]
        return kv


class PageMemory:
    """The KV of pages in a pool."""

    def __init__(self, model: Model, reader: PageReader) -> None:
        self._model = model
        self._reader = reader
        self.found = self.read = 0

    @asynccontextmanager
    async def recall(self, pages: Sequence[Tensor]) -> AsyncIterator[list[Tensor]]:
        """Provide the KV of pages, leased while the context lasts; those that are not in the pool are read."""
        async with AsyncExitStack() as leases:
            recalled = []
            for page in pages:
                key = blake2b(page.numpy().tobytes(), digest_size=16).digest()
                hit = await leases.enter_async_context(await self._model.match_prefix([key]))
                if hit:
                    self.found += 1
                    recalled.append(hit.tensors()[0])
                else:
                    self.read += 1
                    kv = self._reader.read(page)
                    # A chain of one block. A full pool stores nothing, and two who read the same page keep one copy.
                    await self._model.put_blocks([key], [kv])
                    recalled.append(kv)
            yield recalled


async def answer_questions(pool: CachePool) -> bool:
    """Answer all questions; returns whether each answer is what it is without the pool."""
    decoder = TinyModel(tokens_per_block=PAGE_TOKENS)
    reader = PageReader(decoder)
    reader.read(draw_page(99))  # torch prepares itself at its first use
    memory = PageMemory(await pool.model(reader.spec), reader)
    print(f"{'question':<24}{'pages found':>12}{'read':>6}{'seconds':>10}{'reading all':>13}  same answer")
    all_same = True
    for text, numbers in QUESTIONS:
        question = decoder.embed(text.encode())
        pages = [draw_page(number) for number in numbers]
        found, read, began = memory.found, memory.read, time.perf_counter()
        async with memory.recall(pages) as kv:
            logits, _ = decoder(question, kv)
            del kv  # a tensor keeps its lease
        recalled = time.perf_counter()
        anew, _ = decoder(question, [reader.read(page) for page in pages])
        ended = time.perf_counter()
        same = torch.allclose(logits, anew, atol=1e-5)
        all_same &= same
        print(
            f"{text:<24}{memory.found - found:>12}{memory.read - read:>6}{recalled - began:>10.3f}"
            f"{ended - recalled:>13.3f}  {'yes' if same else 'NO'}"
        )
    stats = await pool.stats()
    print(f"{memory.found} pages found, {memory.read} read; {stats.keys} pages in the pool, {stats.policy} evicts")
    return all_same


async def main(pool_name: str | None) -> bool:
    """Connect to the pool, or start one for this run; see the top of the file."""
    torch.set_num_threads(1)  # the model is too small for more
    if pool_name is not None:
        async with await CachePool.connect(pool_name) as pool:
            return await answer_questions(pool)
    name = f"rag-memory-{os.getpid()}"
    async with await kvpool.create_deepseek_ocr_cache_pool(2, memory_per_device="64MiB", name=name) as pool:
        same = await answer_questions(pool)
        await pool.delete()
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", help="name of a running pool")
    if not asyncio.run(main(parser.parse_args().pool)):
        raise SystemExit("an answer differs from the one without the pool")
