"""Copies ahead of need: what it costs to find what is new among many that are copied already. Books only, no memory."""

import pytest

from kvpool.cache.key import encode_block_id
from kvpool.pool import ahead
from kvpool.pool.state import PoolState

SIZE = 4096
COUNT = 5000


class Books:
    """A device full of caches that hang on nothing, and what passes when its copies are followed up."""

    def __init__(self):
        self.state = PoolState("test", "lru", "least_loaded", 100, 0.05)
        self.state.add_device("host-0", "here", COUNT * SIZE, 1 << 21, 4096, 8 * COUNT * SIZE, has_lower=True)
        self.state.connect("c", "default", "here", "token")
        spec = {"name": "m", "identity": {"model": "m"}, "block_bytes": SIZE, "limit_bytes": None}
        self.space = self.state.register_model("c", spec)[0].space
        self.state.ledger.out = []
        self.now, self.stored, self.seen, self.copied = 0.0, 0, 0, []
        victims = self.state.ledger.policy.victims

        def counted(device):
            for row in victims(device):
                self.seen += 1
                yield row

        self.state.ledger.policy.victims = counted

    def store(self, count):
        index = self.state.ledger.index
        rows = [index.add(self.space, SIZE, 0, now=self.now) for _ in range(count)]
        for row in rows:
            index.seal(row)
            index.publish(row, encode_block_id(self.stored))
            self.stored += 1
        index.unpin(rows, now=self.now)

    def evict(self, count):
        ledger = self.state.ledger
        rows = [row for row, _ in zip(ledger.policy.victims(0), range(count), strict=False)]
        ledger.index.remove_all(rows)
        ledger.devices[0].evictions += count

    def follow_up(self):
        """Let the device do all that it is told now."""
        self.step()
        while self.step():
            pass

    def step(self):
        """Let the device do what it was told, and follow up on that; returns whether there was anything."""
        sent, self.state.ledger.out = self.state.ledger.out, []
        for send in sent:
            self.copied += [key for _, key, _ in send.operation[3]]
            send.then([True] * len(send.operation[3]), self.now)
        self.state.copies.follow_up(self.now)
        return bool(sent)


@pytest.fixture
def books():
    made = Books()
    made.store(COUNT)
    made.follow_up()
    return made


def test_all_that_is_next_to_go_is_copied_once_in_its_order(books):
    assert books.copied == [encode_block_id(number) for number in range(COUNT)]
    assert books.seen < 4 * COUNT


def test_a_pool_at_rest_is_looked_at_now_and_then(books):
    books.seen = 0
    for _ in range(240):
        books.now += 0.25
        books.follow_up()
    assert len(books.copied) == COUNT
    assert books.seen <= 60 * 10_000 + COUNT


def test_what_is_new_costs_a_bounded_number_of_looks_however_fast_it_comes(monkeypatch):
    monkeypatch.setattr(ahead, "_ROWS_A_SECOND", 1)  # none of these looks is due by time
    books = Books()
    books.store(COUNT)
    books.follow_up()
    books.seen = 0
    for _ in range(COUNT // 10):
        books.now += 0.25
        books.evict(10)
        books.store(10)
        books.follow_up()
    assert len(books.copied) >= COUNT + COUNT * 7 // 8
    assert len(set(books.copied)) == len(books.copied)
    assert books.seen <= 2 * COUNT + 10 * COUNT


def test_what_is_listed_and_goes_or_is_held_before_its_turn_is_left_out():
    books = Books()
    books.store(1000)
    index = books.state.ledger.index
    listed = books.state.copies._progress
    while not (listed and listed[0].listed):
        books.step()
    held, gone = (index.live_row(cache_id) for cache_id in list(listed[0].listed)[:2])
    left_out = {index.key_of(held), index.key_of(gone)}
    index.pin([held], now=0.0)
    index.remove(gone)
    books.follow_up()
    assert len(books.copied) == 998
    assert left_out.isdisjoint(books.copied)
