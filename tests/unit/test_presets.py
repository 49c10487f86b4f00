"""What the presets ask for."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from kvpool.cache.eviction import policy_names
from kvpool.errors import ConfigError, InvalidSizeError
from kvpool.presets import deepseek_ocr_config, vista_config
from kvpool.sizes import MIB


@pytest.fixture(autouse=True)
def _no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_vista() -> None:
    config = vista_config(3)
    assert config.device_sizes_bytes() == [4 * 512 * MIB] * 3
    assert (config.gc_threshold, config.preset) == (0.8, "vista")
    assert config.policy == "size_aware_lru"
    assert config.policy in policy_names()


def test_deepseek_ocr() -> None:
    config = deepseek_ocr_config(1)
    assert config.device_sizes_bytes() == [4 * 256 * MIB]
    assert (config.gc_threshold, config.preset) == (0.7, "deepseek-ocr")
    assert config.policy == "lru"


def test_what_a_preset_starts_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kvpool.presets"):
        vista_config(2)
    assert "2 devices of 2 GiB in host memory" in caplog.text


@pytest.mark.parametrize("memory", ["300MiB", 300 * MIB])
def test_memory_and_other_settings_can_be_given(memory: int | str) -> None:
    config = vista_config(2, memory_per_device=memory, name="mine", gc_threshold=0.5)
    assert config.device_sizes_bytes() == [300 * MIB] * 2
    assert (config.name, config.gc_threshold, config.preset) == ("mine", 0.5, "vista")


@pytest.mark.parametrize("policy", ["lru", "unknown"])
def test_a_policy_that_somebody_chose_is_taken(policy: str) -> None:
    """An unknown one is refused when the pool is made, with the names of those there are."""
    assert vista_config(1, policy=policy).policy == policy


@pytest.mark.parametrize("make", [vista_config, deepseek_ocr_config])
def test_a_pool_of_no_device_is_refused(make) -> None:
    for number in (0, -1):
        with pytest.raises(ConfigError, match=f"num_gpus={number}"):
            make(number)
    with pytest.raises(InvalidSizeError):
        make(1, memory_per_device=0)
    with pytest.raises(ConfigError, match="colour"):
        make(1, colour="blue")


def test_a_config_needs_no_running_ray(tmp_path: Path) -> None:
    code = "import ray; from kvpool.presets import vista_config; vista_config(1); assert not ray.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=240)
