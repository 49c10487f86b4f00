"""Leaf-first least frequently used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpool.cache.eviction import register_policy
from kvpool.cache.leaf_first import LeafFirst

if TYPE_CHECKING:
    from kvpool.cache.index import CacheIndex


@register_policy("lfu")
def least_frequently_used(index: CacheIndex) -> LeafFirst:
    """The cache found least often goes first; counts last as long as the cache is resident."""
    accesses = index.access_count
    return LeafFirst(index, worth=lambda row, now: accesses[row])
