"""The most prefix hits that any policy could have had, knowing the future."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from heapq import heappop, heappush


def most_prefix_hits(chains: Sequence[Sequence[Hashable]], capacity_blocks: int) -> int:
    """Return the hits of an optimal policy over all blocks, exactly; blocks are of one size.

    Between two uses of a block it is held or not: a hit costs one of ``capacity_blocks`` places for that time. The most
    such intervals that fit are had by giving up, whenever too many are held, the one that ends last (Belady's MIN with
    bypass: a block may be given up at once). A block is used whenever one behind it in a chain is, so none is used
    later than what it leads to. With the deepest of equals given up first, what is held is a prefix of every chain:
    these hits are prefix hits, and it is the bound for policies that evict leaf-first too.

    Parameters
    ----------
    chains
        The blocks of each request, in prefix order; a block always has the same predecessor.
    capacity_blocks
        Blocks that can be kept from one request to the next.
    """
    never = len(chains)
    next_use: dict[Hashable, int] = {}
    uses_after: list[list[int]] = []  # of each request's blocks, the last request first
    for number in range(len(chains) - 1, -1, -1):
        uses_after.append([next_use.get(block, never) for block in chains[number]])
        next_use.update(dict.fromkeys(chains[number], number))
    held: dict[Hashable, int] = {}  # next use
    latest: list[tuple[int, int, int, Hashable]] = []  # heap: next use and depth, both negative; lazily deleted
    hits = entries = 0
    for chain in chains:
        uses = uses_after.pop()
        for depth, (block, use) in enumerate(zip(chain, uses, strict=True)):
            if held.pop(block, None) is not None:
                hits += 1
            if use < never:
                held[block] = use
                entries += 1
                heappush(latest, (-use, -depth, entries, block))
        while len(held) > capacity_blocks:
            use, _, _, block = heappop(latest)
            if held.get(block) == -use:
                del held[block]
    return hits
