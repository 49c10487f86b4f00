"""A pool of two models, whose quotas are set, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pool_harness import PAGE, LocalPool

from kvpool.errors import from_wire
from kvpool.pool.instructions import Batch, QuotaSet

PAGES = 10
A, B = 0, 1
"""The models' numbers."""


@contextmanager
def two_models() -> Iterator[LocalPool]:
    """A pool of :data:`PAGES` pages with models a and b, in whose blocks a page is one; sound at the end."""
    pool = LocalPool(pages=PAGES)
    pool.connect()
    for name in "ab":
        pool.model(name=name, block_bytes=PAGE)
    yield pool
    pool.check()
    pool.close()


def set_quota(pool, model=None, guaranteed=0, limit=None, revision=None, tenant="default"):
    return pool.administer(QuotaSet(Batch(1), tenant, model, guaranteed, limit, revision))


def guarantee_both(pool, *, limit=None):
    set_quota(pool, "a", "40%", limit)
    set_quota(pool, "b", "40%", limit)


def held(pool, model):
    return next(q["held_bytes"] for q in pool.state.quotas() if q["model"] == model) // PAGE


def put(pool, model, first, count):
    """Cache that many pages of blocks that nobody holds; returns how many of them are in the pool then."""
    return sum(pool.store([first + n], model=model, block_bytes=PAGE) for n in range(count))


def lease(pool, model, count):
    """Ask for pages, without waiting; returns the ids of those that were granted."""
    answers = [pool.request(PAGE, model=model) for _ in range(count)]
    return [answer[1] for answer in answers if answer[0] == "granted"]


def error_of(answer):
    assert answer[0] == "error", answer
    return from_wire(answer[1:])
