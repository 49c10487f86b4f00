"""The client of a pool in a model's process."""

from kvpool.client.blocks import NewBlocks, PrefixHit
from kvpool.client.cache import VirtualKVCache
from kvpool.client.model import ModelSpec
from kvpool.client.pool import CachePool, Model, delete

__all__ = ["CachePool", "Model", "ModelSpec", "NewBlocks", "PrefixHit", "VirtualKVCache", "delete"]
