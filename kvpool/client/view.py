"""Tensors over leased memory: each storage keeps the lease until it is gone."""

from __future__ import annotations

from collections.abc import Sequence

from kvpool.client.lease import Lease
from kvpool.memory.backend import Access
from kvpool.memory.dlpack import MappedTensorSource


def open_view(lease: Lease, address: int, shape: Sequence[int], dtype: str, access: Access) -> MappedTensorSource:
    """Return what :func:`~kvpool.memory.dlpack.as_torch` and ``as_numpy`` make a tensor of; it counts as a view."""
    lease.view_opened()
    try:
        # Once more: a revocation that came since the address was asked for unmaps the memory, unless it sees this view.
        lease.check_held()
        return MappedTensorSource(address, shape, dtype, access, lease.view_closed)
    except BaseException:
        lease.view_closed()
        raise
