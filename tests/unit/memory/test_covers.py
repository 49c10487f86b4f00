"""Zeros where nothing is mapped, when leases end in the middle of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvpool.memory.backend import Access
from kvpool.memory.covers import Covers
from kvpool.memory.host import HostBackend

PAGE = 4096
READ, WRITE = Access.READ, Access.READ_WRITE

pytestmark = pytest.mark.timeout(30)  # where it fails, a thread waits for itself


class Zeros:
    """Notes what reads as zeros; something may happen while it is told to."""

    def __init__(self) -> None:
        self.shown: set[tuple[int, int]] = set()
        self.meanwhile: Callable[[], None] = lambda: None

    def show_zeros(self, address: int, size_bytes: int) -> None:
        assert not any(at < address + size_bytes and address < at + size for at, size in self.shown)
        self.shown.add((address, size_bytes))
        self.meanwhile()

    def hide_zeros(self, address: int, size_bytes: int) -> None:
        self.shown.remove((address, size_bytes))
        self.meanwhile()


@pytest.fixture
def zeros() -> Zeros:
    return Zeros()


@pytest.fixture
def covers(zeros: Any) -> Covers:
    return Covers(zeros, PAGE)


def test_a_lease_that_dies_in_the_middle_of_a_cover_ends_its_own(zeros, covers) -> None:
    """As by a garbage collection, which may run in any allocation of the very thread that holds the lock."""
    covers.show(0, 0, 4, READ)
    zeros.meanwhile = lambda: covers.end(0, 4)
    covers.show(0, 8, 4, READ)
    assert covers.ranges(READ) == [(8, 4)]
    assert zeros.shown == {(8 * PAGE, 4 * PAGE)}


def test_what_ends_while_another_is_ended_ends_too(zeros, covers) -> None:
    for first in (0, 4, 8):
        covers.show(0, first, 4, READ)
    ends = iter([4, 8])

    def end_another() -> None:
        for first in ends:
            covers.end(first, 4)
            return

    zeros.meanwhile = end_another
    covers.end(0, 4)
    assert not covers.ranges(READ)
    assert not zeros.shown


def test_an_end_in_another_thread_does_not_wait_for_a_cover(zeros, covers) -> None:
    covers.show(0, 0, 4, WRITE)
    within, ended = threading.Event(), threading.Event()

    def wait() -> None:
        zeros.meanwhile = lambda: None
        within.set()
        assert ended.wait(60)

    zeros.meanwhile = wait
    covering = threading.Thread(target=covers.show, args=(0, 8, 4, WRITE))
    covering.start()
    assert within.wait(60)
    covers.end(0, 4)
    ended.set()
    covering.join()
    assert covers.ranges(WRITE) == [(8, 4)], "who had the lock has done it"


def test_what_nobody_ended_gives_way_to_the_next_cache_there() -> None:
    backend = HostBackend()
    try:
        base = backend.reserve(64 * PAGE, PAGE)
        covers = Covers(backend, PAGE)
        covers.show(base, 0, 8, WRITE)
        covers.show(base, 16, 8, WRITE)
        covers.show(base, 4, 4, WRITE)
        assert covers.ranges(WRITE) == [(4, 4), (16, 8)]
        covers.end(0, 8)  # too late, and of no effect
        assert covers.ranges(WRITE) == [(4, 4), (16, 8)]
        covers.close()
        backend.unreserve(base)
        covers.end(4, 4)
    finally:
        backend.close()
