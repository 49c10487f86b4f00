"""The seam to Ray: every call of its API is made here. Everything else handles actors as plain objects."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvpool.actors.protocol import NAMESPACE
from kvpool.errors import ForkedHandleError, PoolNotFoundError, PoolUnavailableError

ActorLost = RayActorError
"""Raised by a call to an actor that is dead or dying."""

_MOST_CONCURRENT = 20_000
"""Calls of one actor in flight at most. No call waits for memory, so this bounds long polls: one a client or device."""


_KNOCK_S = 5.0
"""How long a named address may take to accept a connection, seconds."""

_ANY_CLUSTER = "auto"
"""The address that means whatever cluster runs on this machine."""

_END_S = 30.0
"""How long the end of a killed actor may take, seconds."""

_forked_from_ray = False


def _note_fork() -> None:
    global _forked_from_ray
    _forked_from_ray = _forked_from_ray or ray.is_initialized()


os.register_at_fork(after_in_child=_note_fork)


def ensure_ray(*, start: Callable[[], Any] | None = None) -> None:
    """Connect this process to Ray unless it is connected.

    Parameters
    ----------
    start
        Called when no cluster is running, to start one (``ray.init`` of a notebook); by default that is an error. It
        is one always where ``RAY_ADDRESS`` names a cluster: a pool elsewhere would be found by nobody.

    Raises
    ------
    PoolNotFoundError
        If no cluster is running and none may be started, or the one that is named cannot be connected to.
    ForkedHandleError
        In a child that was forked while Ray was connected: Ray does not survive that, and every call of it would hang.
    """
    if _forked_from_ray:
        raise ForkedHandleError(
            "this process was forked from one that is connected to Ray, and Ray's connection is not inherited: start "
            "it as a Ray task or actor, or by multiprocessing's 'spawn'"
        )
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", _ANY_CLUSTER)
    try:
        knock(address)
    except OSError as error:
        raise PoolNotFoundError(
            f"nobody answers at RAY_ADDRESS={address} ({error}): name the head's address and port, or unset it; "
            "'kvpool doctor' says more"
        ) from error
    try:
        _init(address=address)
    except ConnectionError as error:
        if address != _ANY_CLUSTER:
            raise PoolNotFoundError(
                f"cannot connect to the Ray cluster at RAY_ADDRESS={address} ({error}). Does it want a token ('export "
                "RAY_AUTH_MODE=token')? 'kvpool doctor' knows"
            ) from error
        if start is None:
            raise PoolNotFoundError(
                f"there is no Ray cluster to find a pool in ({error}); start one with 'ray start --head', or call "
                "ray.init() first. Does it want a token ('export RAY_AUTH_MODE=token')? 'kvpool doctor' knows"
            ) from error
        start()


def knock(address: str) -> None:
    """Raise OSError if ``address`` is a ``HOST:PORT`` at which nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()


def start_local_ray() -> None:
    """Start a Ray of this process alone, whatever else runs on this machine."""
    _init(address="local", include_dashboard=False)


def _init(**options: Any) -> None:
    """Connect to Ray, or start it. From another thread than the main one it warns that it handles no SIGTERM: why not
    is plain (the blocking client has a thread of its own), and nothing is to be done about it.
    """
    logger = logging.getLogger("ray._private.worker")
    logger.addFilter(_tells_more_than_sigterm)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING, **options)
    finally:
        logger.removeFilter(_tells_more_than_sigterm)
        # Ray takes it for its own, which exits, whoever had it before; but not in another thread, where nobody can.
        ours = handler not in (signal.SIG_DFL, None) and threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)


def _tells_more_than_sigterm(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("SIGTERM handler is not set")


def ensure_own_ray() -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names (as in a job), or start a Ray of this process alone.

    For work that brings its own pool: it must not land in any cluster that happens to run on this machine.
    """
    if "RAY_ADDRESS" in os.environ or ray.is_initialized():
        ensure_ray()
    else:
        start_local_ray()


def find_actor(name: str) -> Any:
    """Return the handle of a pool or device actor.

    Raises
    ------
    PoolNotFoundError
        If none of that name is alive; names the pools there are.
    """
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        pools = ", ".join(pool_names()) or "none"
        raise PoolNotFoundError(
            f"no pool named {name!r} is running in this cluster (running: {pools}): start it with 'kvpool start' or "
            "CachePool.create()",
            asked=name,
        ) from None


def pool_names() -> list[str]:
    """Return the names of the pools in this cluster."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE and "/" not in actor["name"])


def actors_below(prefix: str) -> list[Any]:
    """Return the handles of the actors whose names start with ``prefix``."""
    named = ray.util.list_named_actors(all_namespaces=True)
    found = []
    for name in [actor["name"] for actor in named if actor["namespace"] == NAMESPACE]:
        if name.startswith(prefix):
            with contextlib.suppress(ValueError):  # it died since it was listed
                found.append(ray.get_actor(name, namespace=NAMESPACE))
    return found


def join_actor(cls: type, name: str, *arguments: Any) -> Any:
    """Start a detached, named actor that takes no CPU or GPU from the models, or find the one that runs."""
    return _start_actor(cls, name, arguments, get_if_exists=True)


def make_actor(cls: type, name: str, *arguments: Any, node: str) -> Any:
    """Start a detached, named actor that takes no CPU or GPU from the models; none of that name may run.

    ``node``: id of the node it must live and die with.
    """
    return _start_actor(cls, name, arguments, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def _start_actor(cls: type, name: str, arguments: tuple[Any, ...], **options: Any) -> Any:
    return (
        ray.remote(cls)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            num_gpus=0,
            max_concurrency=_MOST_CONCURRENT,
            **options,
        )
        .remote(*arguments)
    )


def make_worker(cls: type, *arguments: Any, num_cpus: float = 0) -> Any:
    """Start an actor of this job (a model, say); it ends with the job."""
    return ray.remote(cls).options(num_cpus=num_cpus).remote(*arguments)


def address() -> str:
    """Return where other processes connect to this cluster (``RAY_ADDRESS``)."""
    return str(ray.get_runtime_context().gcs_address)


def node_ids() -> list[str]:
    """Return the ids of the nodes on which models can run, this process's own first.

    A node without CPUs and GPUs (a head that is to do no work) is left out: who could use a device there? If all are
    such, all count.
    """
    own = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    working = [node for node, has in alive.items() if has.get("CPU") or has.get("GPU")]
    return sorted(working or alive, key=lambda node: (node != own, node))


def node_addresses() -> dict[str, str]:
    """Return the addresses of the nodes that are alive, by their ids."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def log_folder() -> str:
    """Return where Ray's processes on this node keep their logs."""
    runtime = ray.get_runtime_context()
    return os.path.join(runtime.get_temp_dir(), runtime.get_session_name(), "logs")


async def run_on(node: str, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
    """Run a function once in a process of a node, and return its result; raises what it, or Ray, raised."""
    options = {
        "num_cpus": 0,
        "max_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    async with asyncio.timeout(timeout_s):
        return await ray.remote(function).options(**options).remote(*arguments)


def object_put(value: Any) -> Any:
    """Copy a value into Ray's object store; returns its reference."""
    return ray.put(value)


def object_get(reference: Any) -> Any:
    """Return what a reference of :func:`object_put` stands for."""
    return ray.get(reference)


def kill(actor: Any) -> None:
    """Kill an actor for good."""
    ray.kill(actor, no_restart=True)


def end_self(after_s: float) -> None:
    """Kill the actor that calls this, ``after_s`` from now: what it answers until then still arrives."""
    asyncio.get_running_loop().call_later(after_s, kill, ray.get_runtime_context().current_actor)


async def end(actor: Any) -> None:
    """Kill an actor for good, and return when it is dead: until then it may answer calls.

    Raises
    ------
    PoolUnavailableError
        If the cluster does not end it within 30 s.
    """
    kill(actor)
    try:
        async with asyncio.timeout(_END_S):
            while await _answers(actor):
                pass
    except TimeoutError:
        raise PoolUnavailableError(f"the pool's actor was killed and still lives {_END_S:g} s later") from None


async def is_alive(actor: Any) -> bool:
    """Whether an actor that could not be reached is alive, or may be: what is not known is waited for, for 30 s."""
    try:
        async with asyncio.timeout(_END_S):
            return await _answers(actor)
    except TimeoutError:
        return True


async def _answers(actor: Any) -> bool:
    """Whether an actor answers, or is dead; waits until it is known."""
    while True:
        try:
            await actor.__ray_ready__.remote()
        except ActorUnavailableError:
            continue  # its connection is gone, but the cluster has not declared it dead yet
        except RayActorError:
            return False
        return True


def submit(method: Any, *arguments: Any) -> Any:
    """Call an actor's method; returns the reference of its result.

    The call is no child of the Ray task that makes it. Ray cancels a task (of a Serve request whose client went away,
    say) together with its children, and ours carry what other tasks asked for, too: the answers would be lost, and
    with them the leases that they name.
    """
    return Context().run(method.remote, *arguments)  # Ray knows the task that runs by a context variable


async def call(method: Any, *arguments: Any, timeout_s: float | None = None) -> Any:
    """Call an actor's method and await its result.

    Raises
    ------
    PoolUnavailableError
        If the actor is gone, or did not answer within ``timeout_s``. What Ray says of that is told by its first line;
        ``details["ray"]`` has the others, too.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await submit(method, *arguments)
    except TimeoutError:
        raise PoolUnavailableError(f"the pool did not answer within {timeout_s:g} s: is its node overloaded?") from None
    except ActorUnavailableError as error:
        raise PoolUnavailableError(
            f"the pool's actor is out of reach: try again. Ray says: {_first_line(error)}", ray=str(error)
        ) from error
    except RayActorError as error:
        raise PoolUnavailableError(
            f"the pool's actor is gone, and the pool with it: create it again ('kvpool start' or CachePool.create()). "
            f"Ray says: {_first_line(error)}",
            ray=str(error),
        ) from error
    except RayError as error:
        cause = getattr(error, "cause", None)
        if cause is not None:
            raise cause from None
        raise


def _first_line(error: RayActorError) -> str:
    return str(error).strip().partition("\n")[0]


def is_dead(error: PoolUnavailableError) -> bool:
    """Whether an error of :func:`call` says that the actor is dead, and not only out of reach."""
    return isinstance(error.__cause__, ActorDiedError)


def is_out_of_reach(error: PoolUnavailableError) -> bool:
    """Whether an error of :func:`call` says that the actor is out of reach: dead or not, Ray does not know yet."""
    return isinstance(error.__cause__, ActorUnavailableError)


def context() -> dict[str, Any]:
    """Return who this process is in the cluster: its id, name of its host, ids of its job, node and worker."""
    runtime = ray.get_runtime_context()
    return {
        "pid": os.getpid(),
        "hostname": socket.gethostname(),
        "job": runtime.get_job_id(),
        "node": runtime.get_node_id(),
        "worker": runtime.get_worker_id(),
    }
