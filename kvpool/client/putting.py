"""Storing blocks with one copy: a large put asks for memory, copies and seals part by part, all at once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvpool.client.blocks import NewBlocks
from kvpool.client.copying import copy_blocks
from kvpool.errors import ParentNotResidentError

_INLINE_BYTES = 1 << 18
"""Copies up to this size are done on the event loop: handing them to a thread would take longer."""

_FIRST_BYTES = 64 << 20
_LAST_BYTES = 16 << 20
"""The first part is small, so that copying begins soon, and the last one is, so that little is sealed after it. In
between one call to the pool takes less time than the copy of the part before it. (`kvpool bench put-get`)"""

NewBlocksOf = Callable[[Sequence[bytes], bytes | int | None], Awaitable[NewBlocks]]


def split(count: int, block_bytes: int) -> list[tuple[int, int]]:
    """Return ``(start, end)`` of the parts in which ``count`` blocks are stored."""
    first = max(1, _FIRST_BYTES // block_bytes)
    last = max(1, _LAST_BYTES // block_bytes)
    if count < 2 * (first + last):
        return [(0, count)]
    middle = min(first + 3 * first, count - last)
    cuts = sorted({0, first, middle, count - last, count})
    return list(itertools.pairwise(cuts))


class Put:
    """One put under way.

    Parameters
    ----------
    new_blocks
        Leases new blocks for hashes behind a parent: a hash, or the id of a block that is being written.
    hashes, sources
        The blocks' hashes, and the addresses where their bytes lie now.
    block_bytes
        Size of a block.
    """

    def __init__(
        self, new_blocks: NewBlocksOf, hashes: Sequence[bytes], sources: Sequence[int], block_bytes: int
    ) -> None:
        self._new_blocks = new_blocks
        self._hashes = hashes
        self._sources = sources
        self._block_bytes = block_bytes
        self._copying = asyncio.Lock()

    async def run(self, parent: bytes | None) -> int:
        """Store the blocks behind ``parent``; returns how many leading hashes are in the pool then."""
        stored = 0
        behind: bytes | int | None = parent
        fills: list[asyncio.Task[None]] = []
        try:
            for start, end in split(len(self._hashes), self._block_bytes):
                try:
                    blocks = await self._new_blocks(self._hashes[start:end], behind)
                except ParentNotResidentError:
                    if not start:
                        raise
                    break  # what came before was there already, was not leased, and has gone meanwhile
                stored = start + blocks.stored
                fills.append(asyncio.create_task(self._fill(blocks, start + blocks.resident)))
                if blocks.stored < end - start:
                    break
                behind = blocks.last_id if blocks else self._hashes[end - 1]
            await asyncio.gather(*fills)
        except BaseException:
            for fill in fills:
                fill.cancel()
            await asyncio.gather(*fills, return_exceptions=True)
            raise
        return stored

    async def _fill(self, blocks: NewBlocks, start: int) -> None:
        async with blocks:
            if not blocks:
                return
            work = (blocks.addresses(), self._sources[start : start + blocks.num_blocks], self._block_bytes)
            if blocks.num_blocks * self._block_bytes <= _INLINE_BYTES:
                copy_blocks(*work)
            else:
                async with self._copying:
                    await _in_thread(copy_blocks, *work)
            await blocks.finish()


async def _in_thread(work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work`` in a thread, and wait for its end even when cancelled: it writes into leased memory."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
