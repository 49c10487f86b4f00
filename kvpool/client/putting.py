"""Storing blocks with one copy: ask for memory, copy, seal."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from kvpool.client.blocks import NewBlocks
from kvpool.memory.copying import copy_blocks

_INLINE_BYTES = 1 << 18
"""Copies up to this size are done on the event loop: handing them to a thread would take longer."""

_THREAD_BYTES = 64 << 20
"""What a copying thread has to copy at least: less is over before a second one is under way."""

_MOST_THREADS = 4
"""Threads that copy for one call. One core does not use up a server's memory bandwidth; a few do."""


async def fill(blocks: NewBlocks, sources: Sequence[int], block_bytes: int, *, durable: bool = False) -> None:
    """Copy the bytes at ``sources`` into leased new blocks, and seal and release them.

    (Copying in parts, while the pool is asked for the next ones and seals the ones before, was slower on two cores:
    see docs/performance.md.)
    """
    async with blocks:
        if not blocks:
            await blocks.finish(durable=durable)  # what is in the pool already is made durable, too
            return
        destinations = blocks.addresses()
        size_bytes = len(destinations) * block_bytes
        if size_bytes <= _INLINE_BYTES:
            copy_blocks(destinations, sources, block_bytes)
        else:
            await _in_threads(destinations, sources, block_bytes, threads_for(size_bytes))
        await blocks.finish(durable=durable)


def threads_for(size_bytes: int) -> int:
    """Return how many threads copy so many bytes."""
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)), size_bytes // _THREAD_BYTES))


async def _in_threads(destinations: Sequence[int], sources: Sequence[int], block_bytes: int, threads: int) -> None:
    """Copy in threads, and wait for their end even when cancelled, however often: they write into leased memory.

    Each takes an equal share of the blocks, in one piece: neighbours are copied in one go, and past the caches.
    """
    # No tasks, which the end of asyncio.run() would cancel while their threads go on.
    start = asyncio.get_running_loop().run_in_executor
    share = -(-len(destinations) // threads)
    copies = {
        start(None, copy_blocks, destinations[first : first + share], sources[first : first + share], block_bytes)
        for first in range(0, len(destinations), share)
    }
    cancelled: asyncio.CancelledError | None = None
    copying = copies
    while copying:
        try:
            _, copying = await asyncio.wait(copying)
        except asyncio.CancelledError as error:
            cancelled = error  # also a second time: the lease must not end under a thread
    if cancelled is not None:
        raise cancelled
    for copy in copies:
        copy.result()
