"""Leaf-first LRU for caches of different sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpool.cache.eviction import register_policy
from kvpool.cache.leaf_first import LeafFirst

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex


@register_policy("size_aware_lru")
def size_aware_lru(index: CacheIndex) -> LeafFirst:
    """The cache that costs most memory for how recently it was used goes first.

    This is GreedyDual-Size with equal costs: a cache is worth what room has cost so far when it is given back (the
    worth of the dearest victim), plus one hit for its bytes. So of two caches of half the size each must stay unused
    twice as long; among caches of one size it is LRU exactly.
    """
    sizes = index.size_bytes

    def worth(row: int, now: float) -> float:
        return policy.floor + 1 / sizes[row]

    policy = LeafFirst(index, worth)
    return policy
