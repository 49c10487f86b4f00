"""kvpool: one elastic pool of KV-cache memory for many models on a Ray cluster.

Start with :class:`CachePool`; the blocking form of everything is in :mod:`kvpool.sync`. All errors are in
:mod:`kvpool.errors`, below ``kvpool.errors.KvpoolError``.
"""

from typing import TYPE_CHECKING, Any

from kvpool import errors as errors
from kvpool.version import __version__ as __version__

if TYPE_CHECKING:
    from kvpool.cache.key import encode_block_id
    from kvpool.cache.record import CacheBlock
    from kvpool.client import (
        BlockAllocator,
        CachePool,
        Model,
        ModelSpec,
        NewBlocks,
        PoolEvent,
        PrefixHit,
        VirtualKVCache,
        delete,
    )
    from kvpool.client.ranges import byte_ranges
    from kvpool.config import PoolConfig, load_config
    from kvpool.memory.backend import Access
    from kvpool.pool.statistics import PoolStatistics
    from kvpool.presets import create_deepseek_ocr_cache_pool, create_vista_cache_pool
    from kvpool.telemetry.metric import record_metric

_HOMES = {
    "Access": "kvpool.memory.backend",
    "BlockAllocator": "kvpool.client",
    "CacheBlock": "kvpool.cache.record",
    "CachePool": "kvpool.client",
    "Model": "kvpool.client",
    "ModelSpec": "kvpool.client",
    "NewBlocks": "kvpool.client",
    "PoolConfig": "kvpool.config",
    "PoolEvent": "kvpool.client",
    "PoolStatistics": "kvpool.pool.statistics",
    "PrefixHit": "kvpool.client",
    "VirtualKVCache": "kvpool.client",
    "byte_ranges": "kvpool.client.ranges",
    "create_deepseek_ocr_cache_pool": "kvpool.presets",
    "create_vista_cache_pool": "kvpool.presets",
    "delete": "kvpool.client",
    "encode_block_id": "kvpool.cache.key",
    "load_config": "kvpool.config",
    "record_metric": "kvpool.telemetry.metric",
}

__all__ = [
    "Access",
    "BlockAllocator",
    "CacheBlock",
    "CachePool",
    "Model",
    "ModelSpec",
    "NewBlocks",
    "PoolConfig",
    "PoolEvent",
    "PoolStatistics",
    "PrefixHit",
    "VirtualKVCache",
    "byte_ranges",
    "create_deepseek_ocr_cache_pool",
    "create_vista_cache_pool",
    "delete",
    "encode_block_id",
    "load_config",
    "record_metric",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def __getattr__(name: str) -> Any:
    # Loaded when first used: `kvpool simulate` and the decisions need neither Ray nor torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'kvpool' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
