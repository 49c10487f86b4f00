"""Every error that kvpool raises.

Each message says what was asked, what is possible, and what to do; ``details`` holds the same figures for programs.

::

    KvpoolError
    ├── InvalidRequestError (ValueError)   the request itself is wrong; nothing was changed
    │   ├── InvalidSizeError               zero, negative, unreadable, larger than any device
    │   ├── LimitError                     more than its model or tenant may ever hold
    │   ├── TensorMismatchError            shape or dtype does not fit the cache or the model
    │   ├── ConfigError                    unknown key, unreadable value
    │   │   ├── UnknownPolicyError         no eviction or placement policy of that name
    │   │   └── PolicyError                an eviction policy of one's own failed, or is none
    │   └── TraceFormatError               a trace line that cannot be used (file and line number)
    ├── CapacityError (MemoryError)        valid, but there is no room, or not before the deadline
    │   ├── AddressSpaceError              addresses ran out, not memory
    │   └── QueueFullError                 the waiting queue is at its bound
    ├── CacheStateError                    the cache is not in a state that allows this
    │   ├── UnknownCacheError (KeyError)   foreign id, never handed out or long gone
    │   ├── StaleCacheError                an id of an earlier generation or epoch
    │   ├── DoubleReleaseError             released (or freed) twice
    │   ├── SealedError                    write access to a sealed cache, or sealed twice with another key
    │   ├── NotSealedError                 shared or looked up before it was sealed
    │   ├── ParentNotResidentError         the chain's parent is not in the pool
    │   ├── InvalidatedError               the content was declared void while it was written or held
    │   ├── LeaseRevokedError              an administrator ended this process's leases
    │   └── ForkedHandleError              used in a forked child
    ├── PoolError                          the pool as a whole
    │   ├── PoolNotFoundError              no pool of that name
    │   ├── PoolExistsError                ``create`` on a name that exists with another config
    │   ├── PoolBusyError                  ``delete`` while clients hold leases
    │   ├── PoolUnavailableError           the pool actor is gone or does not answer
    │   ├── DeviceLostError                the device that held the memory is gone
    │   └── ProtocolError                  peer speaks another version, or out of turn
    ├── SystemLimitError (OSError)         a limit of this system is too low (nofile, max_map_count, memory)
    ├── BackendError (OSError)             the operating system or driver refused a memory operation
    ├── TierError (OSError)                the disk tier could not store, or not surely remove, what it was told to
    └── InvariantError                     a bug in kvpool: state that must never be
"""

from __future__ import annotations

from typing import Any


class KvpoolError(Exception):
    """Base of all errors of kvpool.

    Parameters
    ----------
    message
        What was asked, what is possible, what to do.
    **details
        The figures of the message, built-in types only (they travel between processes).
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__name__, self.message, self.details)

    def to_wire(self) -> tuple[str, str, dict[str, Any]]:
        """Return ``(class name, message, details)``: the form in which errors cross process borders."""
        return type(self).__name__, self.message, self.details


class InvalidRequestError(KvpoolError, ValueError):
    """The request itself is wrong. Nothing was changed."""


class InvalidSizeError(InvalidRequestError):
    """A size that is zero, negative, unreadable, or larger than any device."""


class LimitError(InvalidRequestError):
    """A request for more than its model, or tenant, may ever hold.

    No :class:`CapacityError`: whatever others release, it could not be met.
    """


class TensorMismatchError(InvalidRequestError):
    """Shape or dtype does not fit the cache or the model."""


class ConfigError(InvalidRequestError):
    """An unknown key or an unreadable value in the configuration."""


class UnknownPolicyError(ConfigError):
    """No policy of that name is registered."""


class PolicyError(ConfigError):
    """An eviction policy of one's own raised an error, answered what cannot be, or is no policy at all."""


class TraceFormatError(InvalidRequestError):
    """A trace line that cannot be used; names file and line."""


class CapacityError(KvpoolError, MemoryError):
    """A valid request for which there is no room, or was none before its deadline.

    ``details``: ``asked_bytes``, ``free_bytes``, ``pinned_bytes``, ``zombie_bytes``, ``largest_bytes`` (the largest
    size that would have fitted), ``pinned_by`` (model to bytes) and ``held_by`` (client to bytes), as far as known.
    """


class AddressSpaceError(CapacityError):
    """Addresses ran out, not memory."""


class QueueFullError(CapacityError):
    """The queue of waiting requests is at its bound."""


class CacheStateError(KvpoolError):
    """The cache is not in a state that allows this."""


class UnknownCacheError(CacheStateError, KeyError):
    """A foreign id: never handed out here, or long gone."""


class StaleCacheError(CacheStateError):
    """An id of an earlier generation or epoch."""


class DoubleReleaseError(CacheStateError):
    """Released, or freed, a second time."""


class SealedError(CacheStateError):
    """Write access to a sealed cache, or sealing it again with another key."""


class NotSealedError(CacheStateError):
    """Only sealed caches can be shared."""


class ParentNotResidentError(CacheStateError):
    """The parent of a chain is not in the pool, so its children could never be hit."""


class InvalidatedError(CacheStateError):
    """The content was declared void while it was being written or held: it can neither be sealed nor found."""


class LeaseRevokedError(CacheStateError):
    """An administrator ended all leases of this process: connect again. Tensors that are alive stay mapped."""


class ForkedHandleError(CacheStateError):
    """A handle of the parent process, used in a forked child (mappings are not inherited)."""


class PoolError(KvpoolError):
    """Something about the pool as a whole."""


class PoolNotFoundError(PoolError):
    """No pool of that name is running."""


class PoolExistsError(PoolError):
    """``create`` on a name that exists with another config."""


class PoolBusyError(PoolError):
    """``delete`` while clients hold leases."""


class PoolUnavailableError(PoolError):
    """The pool actor is gone or does not answer."""


class DeviceLostError(PoolError):
    """The device that held the memory is gone."""


class ProtocolError(PoolError):
    """The peer speaks another protocol version, or out of turn."""


class SystemLimitError(KvpoolError, OSError):
    """A limit of this system is too low for what was configured."""


class BackendError(KvpoolError, OSError):
    """The operating system or the driver refused a memory operation. ``details["errno"]`` holds its code."""


class TierError(KvpoolError, OSError):
    """The disk tier could not be opened, could not store durably, or could not surely remove what it was told to.

    ``details["cause"]`` is the name under which the tier counts it (``"ENOSPC"``, ``"closed"``).
    """


class InvariantError(KvpoolError):
    """State that must never be: a bug in kvpool."""


def _collect(base: type[KvpoolError]) -> dict[str, type[KvpoolError]]:
    found = {base.__name__: base}
    for child in base.__subclasses__():
        found.update(_collect(child))
    return found


_CLASSES = _collect(KvpoolError)


def _rebuild(name: str, message: str, details: dict[str, Any]) -> KvpoolError:
    return _CLASSES.get(name, KvpoolError)(message, **details)


def from_wire(wire: tuple[str, str, dict[str, Any]]) -> KvpoolError:
    """Return the error that :meth:`KvpoolError.to_wire` described."""
    name, message, details = wire
    return _rebuild(name, message, details)


def ensure(condition: object, message: str, **details: Any) -> None:
    """Raise :class:`InvariantError` unless ``condition`` holds (kept under ``python -O``, unlike ``assert``)."""
    if not condition:
        raise InvariantError(f"kvpool invariant broken: {message} (please report this)", **details)
