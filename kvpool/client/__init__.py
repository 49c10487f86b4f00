"""The client of a pool in a model's process."""

from kvpool.client.block_allocator import BlockAllocator
from kvpool.client.blocks import NewBlocks, PrefixHit
from kvpool.client.cache import VirtualKVCache
from kvpool.client.events import EventStream, PoolEvent
from kvpool.client.model import Model
from kvpool.client.pool import CachePool, delete, start
from kvpool.client.spec import ModelSpec

__all__ = [
    "BlockAllocator",
    "CachePool",
    "EventStream",
    "Model",
    "ModelSpec",
    "NewBlocks",
    "PoolEvent",
    "PrefixHit",
    "VirtualKVCache",
    "delete",
    "start",
]
