"""Pools for known applications: sizes, policy and threshold in one call."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kvpool.client import CachePool
from kvpool.config import PoolConfig, load_config
from kvpool.errors import ConfigError
from kvpool.sizes import MIB, format_size, parse_size

logger = logging.getLogger("kvpool.presets")


def preset_config(
    preset: str,
    num_gpus: int,
    settings: Mapping[str, Any],
    *,
    instance_bytes: int,
    policy: str,
    gc_threshold: float,
    memory_per_device: int | str | None,
) -> PoolConfig:
    """Return the configuration of a preset.

    Parameters
    ----------
    preset
        Its name.
    num_gpus
        Number of devices.
    settings
        Other fields of :class:`~kvpool.PoolConfig`; they win over the preset's.
    instance_bytes
        What one instance of the model takes.
    policy
        The eviction policy it wants.
    gc_threshold
        Share of memory in use above which eviction runs ahead.
    memory_per_device
        Bytes of a device; by default four instances.

    Raises
    ------
    ConfigError
        If ``num_gpus`` is not positive.
    """
    if num_gpus < 1:
        raise ConfigError(f"a pool needs at least one device, asked for num_gpus={num_gpus}", asked=num_gpus)
    size_bytes = parse_size(memory_per_device) if memory_per_device is not None else 4 * instance_bytes
    logger.info("preset %s: %d devices of %s in host memory", preset, num_gpus, format_size(size_bytes))
    return load_config(
        **{
            "devices": f"host:{num_gpus}x{size_bytes}",
            "policy": policy,
            "gc_threshold": gc_threshold,
            "preset": preset,
            **settings,
        }
    )


async def create_vista_cache_pool(
    num_gpus: int, *, memory_per_device: int | str | None = None, tenant: str = "default", **settings: Any
) -> CachePool:
    """Start or join a pool for VISTA: 512 MiB a model instance, size-aware LRU, threshold 0.8.

    Parameters
    ----------
    num_gpus
        Number of devices. This version has host-memory devices only; the statistics say which.
    memory_per_device
        Bytes or text; by default four instances, 2 GiB.
    """
    return await CachePool.create(
        vista_config(num_gpus, memory_per_device=memory_per_device, **settings), tenant=tenant
    )


async def create_deepseek_ocr_cache_pool(
    num_gpus: int, *, memory_per_device: int | str | None = None, tenant: str = "default", **settings: Any
) -> CachePool:
    """Start or join a pool for DeepSeek-OCR: 256 MiB a model instance, LRU, threshold 0.7.

    Parameters
    ----------
    num_gpus
        Number of devices. This version has host-memory devices only; the statistics say which.
    memory_per_device
        Bytes or text; by default four instances, 1 GiB.
    """
    return await CachePool.create(
        deepseek_ocr_config(num_gpus, memory_per_device=memory_per_device, **settings), tenant=tenant
    )


def vista_config(num_gpus: int, *, memory_per_device: int | str | None = None, **settings: Any) -> PoolConfig:
    """Return the configuration of :func:`create_vista_cache_pool`."""
    return preset_config(
        "vista",
        num_gpus,
        settings,
        instance_bytes=512 * MIB,
        policy="size_aware_lru",
        gc_threshold=0.8,
        memory_per_device=memory_per_device,
    )


def deepseek_ocr_config(num_gpus: int, *, memory_per_device: int | str | None = None, **settings: Any) -> PoolConfig:
    """Return the configuration of :func:`create_deepseek_ocr_cache_pool`."""
    return preset_config(
        "deepseek-ocr",
        num_gpus,
        settings,
        instance_bytes=256 * MIB,
        policy="lru",
        gc_threshold=0.7,
        memory_per_device=memory_per_device,
    )
