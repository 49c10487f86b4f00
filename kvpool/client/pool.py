"""``CachePool``: a pool as a model's process uses it."""

from __future__ import annotations

import logging
from typing import Any

from kvpool.actors.cluster import (
    call,
    end,
    ensure_ray,
    is_alive,
    is_dead,
    is_out_of_reach,
    kill,
    start_local_ray,
)
from kvpool.actors.fleet import end_orphans
from kvpool.actors.handshake import find_living, shake_hands
from kvpool.actors.pool_actor import find_pool, make_pool
from kvpool.client.administration import Administration
from kvpool.client.cache import VirtualKVCache
from kvpool.client.connection import Connection
from kvpool.client.model import Model
from kvpool.client.spec import ModelSpec, content_hash, is_number
from kvpool.config import PoolConfig, load_config
from kvpool.errors import (
    CacheStateError,
    ConfigError,
    InvalidRequestError,
    InvalidSizeError,
    KvpoolError,
    PoolExistsError,
    PoolUnavailableError,
    from_wire,
)
from kvpool.pool.state import PoolState
from kvpool.pool.statistics import PoolStatistics
from kvpool.sizes import MIB

logger = logging.getLogger("kvpool.client")

_START_S = 120.0


async def start(config: PoolConfig) -> Any:
    """Start a pool, unless the very same one runs already; returns its actor.

    For where no memory is used, such as a head node that has no devices: :meth:`CachePool.create` also connects.

    Raises
    ------
    UnknownPolicyError, PoolExistsError, ProtocolError, SystemLimitError
        As :meth:`CachePool.create`.
    """
    PoolState(config.name, config.policy, config.placement, config.queue_limit)  # refuses unknown names here
    ensure_ray(start=start_local_ray)
    actor = await shake_hands(lambda: make_pool(config), config.name, timeout_s=_START_S)
    try:
        running = await call(actor.start, timeout_s=_START_S)
    except PoolUnavailableError:
        raise  # perhaps a running pool that is slow: not ours to kill
    except KvpoolError:
        kill(actor)  # it could not start, so there is nothing in it
        raise
    for problem in running.get("telemetry_problems", []):
        logger.warning("pool %s runs without telemetry it was to have: %s", config.name, problem)
    wanted = config.model_dump(mode="json")
    if running["config"] != wanted:
        differing = {k: (running["config"].get(k), v) for k, v in wanted.items() if running["config"].get(k) != v}
        text = ", ".join(f"{key}: runs with {has!r}, asked for {asks!r}" for key, (has, asks) in differing.items())
        raise PoolExistsError(
            f"pool {config.name!r} exists with another config ({text}): connect() to it, delete it, or choose "
            "another name",
            differing=sorted(differing),
        )
    if running.get("began", False):
        logger.info("pool %s is started, on %s", config.name, config.devices)
    else:
        logger.info("pool %s ran already, with the same config: joined, with all that it holds", config.name)
    return actor


class CachePool(Administration):
    """A connection to a pool of this cluster. Use it as an async context manager, or :meth:`close` it.

    Made by :meth:`create` (starts the pool, or joins the same one) or :meth:`connect`. The pool itself is detached:
    it stays when the process ends, until :meth:`delete`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._models: dict[ModelSpec, Model] = {}
        self._found: dict[ModelSpec, Model] = {}

    @classmethod
    async def create(cls, config: PoolConfig | None = None, *, tenant: str = "default", **settings: Any) -> CachePool:
        """Start a pool, and connect to it; one of that name that runs with the same config is joined as it is.

        Which of both it was is logged (``kvpool.client``, INFO). What a pool that is joined holds stays, and whoever
        else uses it goes on; :meth:`delete` it first for an empty one.

        Parameters
        ----------
        config
            By default read from ``kvpool.yaml``, ``KVPOOL_*`` and ``settings``.
        tenant
            Protection domain of this connection.
        **settings
            Fields of :class:`~kvpool.PoolConfig`, instead of ``config``.

        Raises
        ------
        ConfigError, UnknownPolicyError
            If the configuration cannot be used, or both ``config`` and ``settings`` are given.
        PoolExistsError
            If a pool of that name runs with another configuration.
        ProtocolError
            If it was started by another version of kvpool: says how to drain and restart it.
        SystemLimitError
            If a limit of the system is too low for it.
        """
        if config is not None and settings:
            raise ConfigError(
                f"asked for a config and for {', '.join(sorted(settings))} beside it: give a whole config, or "
                "fields of one"
            )
        config = config if config is not None else load_config(**settings)
        await start(config)
        return cls(await Connection.open(config.name, tenant))

    @classmethod
    async def connect(cls, name: str | None = None, *, tenant: str = "default") -> CachePool:
        """Connect to a running pool.

        Parameters
        ----------
        name
            By default that of ``KVPOOL_NAME`` or ``kvpool.yaml``, as for the commands; else ``kvpool``.
        tenant
            Protection domain of this connection.

        Raises
        ------
        ConfigError
            If there is no name given, and the configuration cannot be used.
        PoolNotFoundError
            If none of that name runs.
        ProtocolError
            If it was started by another version of kvpool: says how to drain and restart it.
        """
        return cls(await Connection.open(load_config().name if name is None else name, tenant))

    @property
    def name(self) -> str:
        """The pool's name."""
        return str(self._connection.config["name"])

    @property
    def config(self) -> dict[str, Any]:
        """The pool's configuration."""
        return dict(self._connection.config)

    @property
    def actor(self) -> Any:
        """The bare handle of the pool actor, for metadata and administration."""
        return self._connection.actor

    @property
    def client_id(self) -> str:
        """By which the pool knows this connection."""
        return self._connection.client

    async def model(self, spec: ModelSpec | str) -> Model:
        """Register a model, or find it: equal specs of one tenant share their caches."""
        spec = _spec_of(spec)
        if spec not in self._models:
            number = await self._number(self._connection.actor.register_model, spec)
            self._models[spec] = Model(self._connection, spec, number)
        return self._models[spec]

    async def _number(self, ask: Any, spec: ModelSpec) -> Any:
        answer = await self._connection.call(ask, self._connection.client, spec.to_wire())
        if answer[0] == "error":
            raise from_wire(answer[1:])
        return answer[1]

    async def request_cache(
        self,
        model_name: str,
        size_mb: float | None = None,
        *,
        size: int | str | None = None,
        max_size_mb: float | None = None,
        max_size: int | str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> VirtualKVCache:
        """Lease a new cache: the short form of ``model()`` and :meth:`Model.request_cache`.

        Give ``size_mb`` (MiB) or ``size`` (bytes or text); for a cache that may grow also ``max_size_mb`` or
        ``max_size``.

        Raises
        ------
        InvalidSizeError
            If both forms of a size are given, or none that can be used.
        """
        size_bytes = _size_of("size", size_mb, size)
        growing = max_size_mb is not None or max_size is not None
        most_bytes = _size_of("max_size", max_size_mb, max_size) if growing else None
        model = await self.model(model_name)
        return await model.request_cache(size_bytes, max_size=most_bytes, timeout_s=timeout_s, priority=priority)

    async def find_cache(self, model_name: str, key: bytes | str) -> VirtualKVCache | None:
        """Lease the sealed cache of a key, or return None: the short form of :meth:`Model.find_cache`.

        None also when nobody has used a model of that name (without revision and blocks) yet, and no disk has content
        of it: a look-up registers none.
        """
        spec = _spec_of(model_name)
        content_hash(key)  # what is no key is refused also where there is no model
        model = self._models.get(spec) or self._found.get(spec)
        if model is None:
            number = await self._number(self._connection.actor.find_model, spec)
            if number is None:
                return None
            # Not by registering it: with its name alone it would lose the limit that an earlier life has noted.
            model = self._found[spec] = Model(self._connection, spec, number)
        return await model.find_cache(key)

    async def stats(self) -> PoolStatistics:
        """Return what the pool holds and did."""
        return PoolStatistics.from_dict(await self._connection.call(self._connection.actor.statistics))

    def leases(self) -> list[dict[str, Any]]:
        """Return this process's leases: ids, bytes, views that are alive, and whether they wait only for those."""
        return [
            {"ids": lease.ids, "size_bytes": lease.size_bytes, "views": lease.views, "released": lease.released}
            for lease in self._connection.leases
            if lease.ids and (lease.views or not lease.released)
        ]

    async def delete(self, *, drain_s: float | None = None) -> None:
        """End the pool and give its memory back; this connection is closed, too.

        Parameters
        ----------
        drain_s
            How long to wait for other clients' leases to end, seconds; by default it refuses at once while there are
            any.

        Raises
        ------
        PoolBusyError
            If other clients hold leases at the deadline. The pool, and this connection, go on as before.
        CacheStateError
            If tensors over pool memory are still alive here.
        """
        self._connection.check_usable()
        self._connection.check_no_views()
        await delete_pool(self._connection.actor, self.name, drain_s, self.client_id)
        await self._connection.close()

    async def close(self) -> None:
        """End this process's leases and unmap its memory. The pool goes on.

        Raises
        ------
        CacheStateError
            If tensors over pool memory are still alive.
        """
        await self._connection.close()

    async def __aenter__(self) -> CachePool:
        return self

    async def __aexit__(self, _kind: object, raised: BaseException | None, _traceback: object) -> None:
        try:
            await self.close()
        except CacheStateError as error:
            if raised is None:
                raise
            # What is raised keeps the tensors alive through its traceback, and must not be hidden by that.
            logger.warning("pool %s stays connected: %s", self.name, error.message)


def _size_of(name: str, size_mb: float | None, size: int | str | None) -> int | str:
    """Return the one of two forms in which a size was given."""
    if size is not None and size_mb is not None:
        raise InvalidSizeError(
            f"give {name}_mb or {name}, not both; asked for {name}_mb={size_mb!r} and {name}={size!r}"
        )
    if size is not None:
        return size
    if not is_number(size_mb, at_least=1 / MIB):
        raise InvalidSizeError(f"give {name}_mb, a positive number of MiB, or {name}; asked for {size_mb!r}")
    return round((size_mb or 0) * MIB)


def _spec_of(model: ModelSpec | str) -> ModelSpec:
    if isinstance(model, ModelSpec):
        return model
    if not isinstance(model, str):
        raise InvalidRequestError(f"a model is its name (text) or a ModelSpec, not {model!r}", asked=repr(model))
    return ModelSpec(model)


async def delete_pool(actor: Any, name: str, drain_s: float | None, leaving: str | None = None) -> None:
    """End a pool by its actor's handle; see :meth:`CachePool.delete`."""
    # Only what every version's delete() takes, unless there is more to say.
    arguments = (drain_s,) if leaving is None else (drain_s, leaving)
    try:
        await call(actor.delete, *arguments, timeout_s=(drain_s or 0.0) + _START_S)
    except PoolUnavailableError as error:
        # It ends itself a moment after it has answered, and on a busy machine the answer may come to nothing.
        if not (is_dead(error) or is_out_of_reach(error)) or await is_alive(actor):
            raise
        await end_orphans(name)  # of which there are some if it died of something else
    else:
        await end(actor)


async def delete(name: str | None = None, *, drain_s: float | None = None) -> None:
    """End a running pool without connecting to it; see :meth:`CachePool.delete`. ``name``: as for ``connect``."""
    name = load_config().name if name is None else name
    ensure_ray()
    actor, _ = await find_living(lambda: find_pool(name), timeout_s=_START_S)
    await delete_pool(actor, name, drain_s)
