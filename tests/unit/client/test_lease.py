"""A lease and the tensors that hang on it, when threads and the event loop meet."""

from __future__ import annotations

import pytest
from lease_connection import LeaseConnection

from kvpool.client.lease import Lease
from kvpool.client.view import open_view
from kvpool.errors import CacheStateError, DoubleReleaseError
from kvpool.memory.backend import Access


def test_no_view_is_opened_over_a_lease_that_ended_since_it_was_checked() -> None:
    # As when a request is cancelled while its thread is about to open tensors.
    lease = Lease(LeaseConnection(), [7], 4096)  # type: ignore[arg-type]
    lease.check_held()
    assert lease.release_by_word(), "nothing hangs on it: it ends at once, and its memory may be given to others"
    with pytest.raises(CacheStateError, match="was released"):
        open_view(lease, 0x1000, (1024,), "float32", Access.READ)
    assert lease.views == 0


def test_a_view_that_was_opened_in_time_keeps_the_lease_and_a_later_one_is_refused() -> None:
    connection = LeaseConnection()
    lease = Lease(connection, [7], 4096)  # type: ignore[arg-type]
    view = open_view(lease, 0x1000, (1024,), "float32", Access.READ)
    assert not lease.release_by_word()
    with pytest.raises(CacheStateError, match="was released"):
        open_view(lease, 0x1000, (1024,), "float32", Access.READ)
    assert connection.released == []
    del view
    assert connection.released == [7]


async def test_what_ended_with_its_connection_is_released_as_often_as_one_likes() -> None:
    connection = LeaseConnection()
    lease = Lease(connection, [7], 4096)  # type: ignore[arg-type]
    connection.ended = True
    await lease.release()
    await lease.release()
    assert lease.released
    assert connection.released == []
    with pytest.raises(CacheStateError):
        lease.check_held()


async def test_a_lease_is_released_once() -> None:
    connection = LeaseConnection()
    lease = Lease(connection, [7], 4096)  # type: ignore[arg-type]
    await lease.release()
    with pytest.raises(DoubleReleaseError):
        await lease.release()
    assert connection.released == [7]
