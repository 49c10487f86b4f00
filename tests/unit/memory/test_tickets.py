"""TicketQueue: order, deadlines and bound."""

import pytest

from kvpool.errors import ConfigError, InvariantError, QueueFullError, UnknownCacheError
from kvpool.memory.tickets import TicketQueue


def test_first_come_first_served() -> None:
    queue: TicketQueue[str] = TicketQueue(limit=10)
    tickets = [queue.put(item, deadline=9.0 - i) for i, item in enumerate("abc")]
    served = []
    while queue:
        served.append(queue.head())
        assert queue.pop(served[-1][0]) == served[-1][1]
    assert served == list(zip(tickets, "abc", strict=True))
    with pytest.raises(InvariantError):
        queue.head()


def test_deadlines_end_the_wait_in_their_own_order() -> None:
    queue: TicketQueue[str] = TicketQueue(limit=10)
    late, soon, never = queue.put("late", 5.0), queue.put("soon", 1.0), queue.put("never", float("inf"))
    assert queue.next_deadline() == 1.0
    assert queue.expired(0.999) == []
    assert queue.expired(1.0) == [(soon, "soon")]  # a deadline is reached when its time has come
    assert queue.next_deadline() == 5.0
    assert queue.expired(1e9) == [(late, "late")]
    assert queue.head() == (never, "never")
    queue.check()


def test_the_bound_holds_and_a_place_is_free_again_at_once() -> None:
    queue: TicketQueue[int] = TicketQueue(limit=2)
    first = queue.put(1, 1.0)
    queue.put(2, 1.0)
    with pytest.raises(QueueFullError, match="limit is 2") as caught:
        queue.put(3, 1.0)
    assert caught.value.details == {"waiting": 2, "limit": 2}
    assert queue.cancel(first) == 1
    queue.put(4, 1.0)
    queue.check()


def test_cancelling_what_left_is_a_race_and_popping_it_is_an_error() -> None:
    queue: TicketQueue[str] = TicketQueue(limit=2)
    ticket = queue.put("a", 1.0)
    assert ticket in queue
    assert queue.cancel(ticket) == "a"
    assert ticket not in queue
    assert queue.cancel(ticket) is None
    with pytest.raises(UnknownCacheError, match="does not wait"):
        queue.pop(ticket)
    assert queue.expired(2.0) == []
    assert queue.next_deadline() is None


def test_tickets_are_never_used_again() -> None:
    queue: TicketQueue[int] = TicketQueue(limit=2)
    seen = [queue.put(i, 1.0) for i in range(2)]
    for i in range(100):
        queue.pop(seen[-1])
        seen.append(queue.put(i, 1.0))
    assert seen == sorted(set(seen))


def test_deadlines_of_what_left_do_not_pile_up() -> None:
    queue: TicketQueue[int] = TicketQueue(limit=10)
    kept = queue.put(-1, 7.0)
    for i in range(10_000):
        queue.cancel(queue.put(i, 1e9 + i))
    assert len(queue._deadlines) < 100
    queue.check()
    assert queue.expired(7.0) == [(kept, -1)]


def test_a_queue_needs_room_for_one() -> None:
    with pytest.raises(ConfigError):
        TicketQueue(limit=0)


def test_what_is_put_back_keeps_its_place_and_gets_its_new_deadline() -> None:
    queue: TicketQueue[str] = TicketQueue(limit=3)
    first, second, third = (queue.put(item, 5.0) for item in "abc")
    assert (queue.pop(first), queue.pop(second)) == ("a", "b")
    queue.put(("d"), 9.0)
    queue.put_back(second, "b", 7.0)  # beyond the limit by now: it was in the line before
    queue.put_back(first, "a", 6.0)
    assert queue.head() == (first, "a")
    assert sorted(item for _, item in queue.items()) == ["a", "b", "c", "d"]
    assert queue.get(second) == "b"
    assert queue.get(99) is None
    queue.check()
    assert queue.expired(5.5) == [(third, "c")]
    assert queue.expired(7.0) == [(first, "a"), (second, "b")]
    with pytest.raises(UnknownCacheError):
        queue.put_back(99, "x", 1.0)
