"""The configuration of a pool: ``kvpool.yaml`` < ``KVPOOL_*`` < arguments."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml  # type: ignore[import-untyped]
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from kvpool.amount import parse_amount, parse_limit
from kvpool.errors import ConfigError, InvalidSizeError
from kvpool.sizes import MIB, format_size, parse_size

_PREFIX = "KVPOOL_"
_ELSEWHERE = {"KVPOOL_TRACES", "KVPOOL_CONFIG", "KVPOOL_HOST"}  # read by other parts, not settings of a pool
MOST_DEVICES = 1024
_DEVICES = re.compile(r"host:([1-9][0-9]*)(?:x(.+))?")

_WANTED = {
    "string_type": "text",
    "string_pattern_mismatch": "1 to 63 letters, digits and _ . -, of which a letter or digit is the first",
    "string_too_short": "text that is not empty",
    "path_type": "a path",
    "tuple_type": "a list",
    "model_type": "keys and values",
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    "finite_number": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
}
"""What is possible, by the type of pydantic's error: its own wording speaks of types and URLs."""

SizeBytes = Annotated[int, BeforeValidator(parse_size)]


def _power_of_two(size_bytes: int) -> int:
    if size_bytes & (size_bytes - 1):
        raise ValueError(f"must be a power of two of bytes, not {size_bytes}")
    return size_bytes


def _plain_policy(name: str) -> str:
    return name if ":" in name else name.lower()  # as kvpool.cache.eviction.plain_name, which is above this


def _none_if_empty(url: object) -> object:
    return None if isinstance(url, str) and not url.strip() else url


def _absolute(url: str | None) -> str | None:
    """Return a local folder by its full path: the devices, which open it, run in other folders."""
    if url is None:
        return None
    scheme, is_url, path = url.partition("://")
    if not is_url:
        return os.path.abspath(os.path.expanduser(url))
    local = scheme in ("file", "local") and not path.startswith("/")
    return os.path.abspath(os.path.expanduser(path)) if local else url


def _readable_amount(amount: Any) -> Any:
    parse_amount(amount)
    return amount


def _readable_limit(limit: Any) -> Any:
    parse_limit(limit)
    return limit


class DevicePlan(NamedTuple):
    """What a device will be: memory to hand out at most, a whole number of pages."""

    capacity_bytes: int
    page_bytes: int

    @property
    def pages(self) -> int:
        """Number of its pages."""
        return self.capacity_bytes // self.page_bytes


PolicyName = Annotated[str, AfterValidator(_plain_policy)]
DiskUrl = Annotated[str | None, BeforeValidator(_none_if_empty), AfterValidator(_absolute)]
PowerOfTwoBytes = Annotated[int, BeforeValidator(parse_size), AfterValidator(_power_of_two)]


class TierPlan(NamedTuple):
    """What lies below one device. Built-in types only."""

    host_bytes: int
    disk_url: str | None
    disk_bytes: int
    write_policy: str
    pool_url: str | None = None
    """The folder in which each device has its own, :attr:`disk_url`."""
    devices: int = 1
    """How many the pool has."""


class QuotaConfig(BaseModel):
    """A quota that a pool begins with: that of a model, or of a tenant as a whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str = Field("default", min_length=1)
    model: str | None = Field(None, min_length=1)
    guaranteed: Annotated[int | str, BeforeValidator(_readable_amount)] = 0
    limit: Annotated[int | str | None, BeforeValidator(_readable_limit)] = None

    @model_validator(mode="after")
    def _makes_sense(self) -> QuotaConfig:
        if self.model is None and "tenant" not in self.model_fields_set:
            raise ValueError(
                "a quota is a model's or a tenant's, and neither is named: add model, or tenant for all its models"
            )
        guaranteed, limit = parse_amount(self.guaranteed), parse_limit(self.limit)
        if limit is not None and guaranteed.exceeds(limit):
            raise ValueError(
                f"guaranteed {guaranteed.text} is more than the limit {limit.text}: give a limit of at least that"
            )
        return self

    def __str__(self) -> str:
        return f"tenant {self.tenant!r}" if self.model is None else f"model {self.model!r} of tenant {self.tenant!r}"


def _each_once(quotas: tuple[QuotaConfig, ...]) -> tuple[QuotaConfig, ...]:
    seen: dict[tuple[str, str | None], int] = {}
    for number, quota in enumerate(quotas):
        first = seen.setdefault((quota.tenant, quota.model), number)
        if first != number:
            raise ValueError(f"quotas.{first} and quotas.{number} are both of {quota}: state its quota once")
    return quotas


class PoolConfig(BaseSettings):
    """What a pool is made of. Frozen; unknown keys are refused.

    Read from ``kvpool.yaml`` in the working directory (or the file that ``KVPOOL_CONFIG`` names), then from
    environment variables such as ``KVPOOL_DEVICES``, then from arguments; later ones win. Sizes are bytes or text
    (``"512MiB"``). Build it with :func:`load_config`, which raises :class:`~kvpool.errors.ConfigError`.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="forbid", frozen=True)

    name: str = Field(
        "kvpool", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", description="name of the pool in the cluster"
    )
    devices: str = Field("host:1", description="'host:4' or 'host:4x512MiB': number and size of host-memory devices")
    memory_per_device: SizeBytes = Field(1024 * MIB, description="bytes of a device whose spec names no size")
    page_size: PowerOfTwoBytes | None = Field(
        None, description="bytes of a page; by default from the device's capacity"
    )
    min_block: PowerOfTwoBytes = Field(4096, description="smallest range of addresses handed out, bytes")
    arena_factor: int = Field(8, ge=1, le=1024, description="reserved addresses of a device, times its memory")
    reserve: float = Field(0.5, ge=0.0, le=1.0, description="share of a device that may be kept as warm pages")
    idle_trim_s: float = Field(
        60.0,
        gt=0.0,
        allow_inf_nan=False,
        description="seconds after which warm pages that nobody used go back to the system",
    )
    policy: PolicyName = Field("lru", description="eviction policy: a name, or module:name of one's own")
    placement: str = Field("least_loaded", description="which device a new cache goes to")
    gc_threshold: float = Field(
        0.8, gt=0.0, le=1.0, description="share of a device in use from which on what goes next is copied down ahead"
    )
    compaction_threshold: float = Field(
        0.25, ge=0.0, le=1.0, description="fragmentation above which a device compacts in the background; 1: never"
    )
    compaction_share: float = Field(
        0.1,
        gt=0.0,
        le=0.5,
        description="most of a device's time that goes there; a fiftieth of it while it serves others",
    )
    host_memory: SizeBytes | None = Field(
        None, description="bytes of host memory below each device, for what is evicted there; by default none"
    )
    disk_url: DiskUrl = Field(
        None, description="folder or fsspec URL for what is evicted from memory, or is to survive; empty: none"
    )
    disk_budget: SizeBytes = Field(10 * 1024 * MIB, description="most bytes of the disk tier of each device")
    write_policy: Literal["write_back", "write_through", "none"] = Field(
        "write_back", description="what goes to disk: what is evicted, also each put before it is answered, or nothing"
    )
    queue_limit: int = Field(10_000, ge=1, description="most requests that may wait for memory")
    timeout_s: float = Field(
        30.0, gt=0.0, allow_inf_nan=False, description="how long a request waits for memory unless it says otherwise"
    )
    quotas: Annotated[tuple[QuotaConfig, ...], AfterValidator(_each_once)] = Field(
        (), description="quotas to begin with, a list of {model or tenant, guaranteed, limit}: bytes, text or a share"
    )
    socket_dir: Path | None = Field(None, description="folder of the device sockets; by default a private one in /tmp")
    preset: str | None = Field(None, description="name of the preset this config came from, for the statistics")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(item) for item in error.errors()), asked=sorted(values)) from None
        # Where disk_url is given as none, the disk is switched off by word, and what else is said of it stays unused.
        default_bytes = type(self).model_fields["disk_budget"].default
        if self.disk_budget != default_bytes and "disk_url" not in self.model_fields_set:
            raise ConfigError(
                f"disk_budget={format_size(self.disk_budget)} is that of a disk tier, of which there is none: name its "
                "folder by disk_url, or leave disk_budget out",
                asked=self.disk_budget,
            )
        if self.write_policy == "write_through" and self.disk_url is None:  # by word, too: no put could be answered
            raise ConfigError(
                "write_policy=write_through writes each put to disk before it is answered, and there is no disk: name "
                "its folder by disk_url, or leave write_policy out (or set it to write_back)",
                asked=self.write_policy,
            )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: arguments before environment before file."""
        file = Path(os.environ.get("KVPOOL_CONFIG", "kvpool.yaml"))
        settings: dict[str, Any] = {}
        if file.is_file():
            settings = _read(file)
        elif "KVPOOL_CONFIG" in os.environ:
            raise ConfigError(f"KVPOOL_CONFIG names {file}, which is not a file", asked=str(file))
        return init_settings, env_settings, InitSettingsSource(settings_cls, settings)

    def device_sizes_bytes(self) -> list[int]:
        """Return the bytes of each device, in order.

        Raises
        ------
        ConfigError
            If ``devices`` is not of the form ``host:N`` or ``host:NxSIZE``.
        """
        match = _DEVICES.fullmatch(self.devices)
        if match is None:
            raise ConfigError(
                f"devices={self.devices!r} is not understood: write 'host:2' or 'host:2x512MiB'", asked=self.devices
            )
        if int(match.group(1)) > MOST_DEVICES:
            raise ConfigError(
                f"devices={self.devices!r}: a pool has at most {MOST_DEVICES} devices", asked=self.devices
            )
        size_bytes = parse_size(match.group(2)) if match.group(2) else self.memory_per_device
        return [size_bytes] * int(match.group(1))

    def page_size_bytes(self, capacity_bytes: int, granularity_bytes: int) -> int:
        """Return the page size of a device: the configured one, or max(2 MiB, granularity, capacity / 8192).

        Parameters
        ----------
        capacity_bytes
            Memory of the device.
        granularity_bytes
            Smallest page its backend can make.
        """
        if self.page_size is not None:
            return self.page_size
        share = 1 << (max(capacity_bytes // 8192, 1) - 1).bit_length()
        return max(2 * MIB, granularity_bytes, share)

    def device_plans(self, granularity_bytes: int) -> list[DevicePlan]:
        """Return what each device will be, in order.

        Raises
        ------
        ConfigError
            If a device, or the host memory below it, is smaller than a page, or a guarantee is above its limit.
        """
        plans = []
        for size_bytes in self.device_sizes_bytes():
            page_bytes = self.page_size_bytes(size_bytes, granularity_bytes)
            plans.append(DevicePlan(size_bytes - size_bytes % page_bytes, page_bytes))
            if not plans[-1].capacity_bytes:
                raise ConfigError(
                    f"devices={self.devices!r}: a device of {format_size(size_bytes)} is smaller than one page: give "
                    f"each at least {format_size(page_bytes)}, or set page_size to a smaller one",
                    asked_bytes=size_bytes,
                    least_bytes=page_bytes,
                )
            if self.host_memory is not None and self.host_memory < page_bytes:
                raise ConfigError(
                    f"host_memory={format_size(self.host_memory)} below each device is smaller than one page: give at "
                    f"least {format_size(page_bytes)}, set page_size to a smaller one, or leave it out",
                    asked_bytes=self.host_memory,
                    least_bytes=page_bytes,
                )
        self._check_quotas(sum(plan.capacity_bytes for plan in plans))
        return plans

    def _check_quotas(self, capacity_bytes: int) -> None:
        """Refuse guarantees above their limits where one is bytes and the other a share: it takes the memory to see."""
        for number, quota in enumerate(self.quotas):
            guaranteed, limit = parse_amount(quota.guaranteed), parse_limit(quota.limit)
            if limit is not None and guaranteed.of(capacity_bytes) > limit.of(capacity_bytes):
                raise ConfigError(
                    f"config key 'quotas.{number}': guaranteed {guaranteed.text} is more than the limit {limit.text} "
                    f"in a pool of {format_size(capacity_bytes)}: give a limit of at least that",
                    asked=quota.guaranteed,
                )

    def tier_plan(self, device: str) -> TierPlan:
        """Return what lies below a device; each has a folder of its own."""
        pool_url = None if self.disk_url is None else f"{self.disk_url.rstrip('/')}/{self.name}"
        url = None if pool_url is None else f"{pool_url}/{device}"
        devices = len(self.device_sizes_bytes())
        return TierPlan(self.host_memory or 0, url, self.disk_budget, self.write_policy, pool_url, devices)

    def socket_path(self, number: int, epoch: int) -> Path:
        """Return where a device listens. ``epoch`` tells the private folders of one name's pools apart."""
        folder = self.socket_dir or Path(tempfile.gettempdir()) / private_folder(self.name, epoch)
        return folder / f"{number}.sock"


def private_folder(pool: str, epoch: int) -> str:
    """Return the name of the folder of a pool's sockets where none is configured."""
    return f"kvpool-{pool}-{epoch:x}"


def load_config(**arguments: Any) -> PoolConfig:
    """Build a :class:`PoolConfig` from file, environment and arguments.

    Raises
    ------
    ConfigError
        For an unknown key or an unusable value, naming the key and what is possible.
    """
    known = PoolConfig.model_fields
    unknown = sorted(
        name
        for name in os.environ
        if name.startswith(_PREFIX) and name not in _ELSEWHERE and name.removeprefix(_PREFIX).lower() not in known
    )
    if unknown:
        raise ConfigError(
            f"unknown setting in the environment: {', '.join(unknown)}; possible: {_possible()}", asked=unknown
        )
    try:
        config = PoolConfig(**arguments)
        config.device_sizes_bytes()
    except InvalidSizeError as error:
        raise ConfigError(f"devices: {error}", **error.details) from None
    return config


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {file}: {' '.join(str(error).split())}", asked=str(file)) from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{file} must hold lines of 'key: value'; possible keys: {_possible()}", asked=str(file))
    return settings


def _possible() -> str:
    return ", ".join(sorted(PoolConfig.model_fields))


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "config"
    if item["type"] == "extra_forbidden":
        possible = _possible() if len(item["loc"]) == 1 else ", ".join(sorted(QuotaConfig.model_fields))
        return f"unknown config key {key!r}; possible: {possible}"
    limits = item.get("ctx", {})
    if "error" in limits:  # a check of our own
        return f"config key {key!r}: {limits['error']}"
    wanted = _WANTED.get(item["type"], "another value").format(**limits)
    means = PoolConfig.model_fields[str(item["loc"][0])].description if item["loc"] else "settings of a pool"
    return f"config key {key!r} must be {wanted}, not {item['input']!r} ({means})"
