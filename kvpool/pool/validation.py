"""What makes a request for a cache one that could be met at some time, whatever is in use now."""

from __future__ import annotations

import math

from kvpool.errors import InvalidRequestError, InvalidSizeError, LimitError
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model
from kvpool.pool.requests import CacheRequest
from kvpool.sizes import format_size


def check_timeout(timeout_s: float) -> None:
    """Raise :class:`~kvpool.errors.InvalidRequestError` unless somebody can wait so many seconds."""
    if not 0 <= timeout_s < math.inf:
        raise InvalidRequestError(f"a timeout is 0 or more seconds, and ends; asked for {timeout_s}")


def footprint_bytes(ledger: Ledger, request: CacheRequest) -> int:
    """Return the most that a new cache may take of a device."""
    devices = (ledger.devices[number] for number in request.devices)
    return max(device.footprint_bytes(request.size_bytes, request.max_size_bytes) for device in devices)


def check_request(ledger: Ledger, request: CacheRequest) -> None:
    """Raise what keeps a request from ever being met.

    Raises
    ------
    InvalidRequestError
        For a timeout that is none.
    InvalidSizeError
        For a size that is none, or more than any device of its host has, or addresses that none has.
    LimitError
        For more than its model or tenant may ever hold.
    DeviceLostError
        If all devices of its host are lost.
    """
    size_bytes, max_size_bytes = request.size_bytes, request.max_size_bytes
    check_timeout(request.timeout_s)
    if size_bytes <= 0 or max_size_bytes < size_bytes:
        raise InvalidSizeError(
            f"a cache needs 0 < size <= max_size, asked for size={size_bytes}, max_size={max_size_bytes}",
            asked_bytes=size_bytes,
        )
    check_limit(ledger, request)
    devices = ledger.usable(request.client)
    largest = max(device.capacity_bytes for device in devices)
    if size_bytes > largest:
        raise InvalidSizeError(
            f"asked for {format_size(size_bytes)}, but the largest device that this process can use has "
            f"{format_size(largest)}: ask for less, or start the pool with larger devices",
            asked_bytes=size_bytes,
            largest_bytes=largest,
        )
    if not any(device.can_grow_to(size_bytes, max_size_bytes) for device in devices):
        raise InvalidSizeError(
            f"asked for addresses to grow to {format_size(max_size_bytes)}, but the devices reserve at most "
            f"{format_size(max(device.arena_bytes for device in devices))}: ask for less, or raise arena_factor",
            asked_bytes=max_size_bytes,
        )


def check_limit(ledger: Ledger, request: CacheRequest) -> None:
    """Raise :class:`~kvpool.errors.LimitError` for a new cache that takes more than its model or tenant may ever hold.

    It may be asked for with a larger ``max_size``: growth is checked when it comes, by the limit that holds then.
    """
    if not ledger.quotas.active:
        return
    least_bytes = footprint_bytes(ledger, request)
    _check_limit(ledger, request.model, request.size_bytes, f"({format_size(least_bytes)} of a device)", least_bytes)


def check_growth(ledger: Ledger, model: Model, cache_id: int, backed_bytes: int) -> None:
    """Raise :class:`~kvpool.errors.LimitError` if a cache would hold more, by itself, than its model or tenant may."""
    if ledger.quotas.active:
        _check_limit(ledger, model, backed_bytes, f"of cache {cache_id} to be backed", backed_bytes)


def _check_limit(ledger: Ledger, model: Model, asked_bytes: int, of_what: str, least_bytes: int) -> None:
    limit_bytes, owner = ledger.quotas.limit_of(ledger.quotas.account(model.space))
    if least_bytes > limit_bytes:
        raise LimitError(
            f"asked for {format_size(asked_bytes)} {of_what}, but {owner} may hold at most "
            f"{format_size(int(limit_bytes))} in all: ask for less, or raise its limit (set_quota, 'kvpool quota')",
            asked_bytes=asked_bytes,
            limit_bytes=int(limit_bytes),
        )
