"""Who is let in when there is no room, or another has the key."""

import asyncio
import gc
import weakref

from disk_stores import key_of

from kvpool.cache.disk.admission import Admission
from kvpool.cache.disk.batches import Request
from kvpool.cache.disk.key_locks import KeyLocks


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_waits_for_room_is_let_in_in_order_and_who_was_given_up_is_passed_over():
    admission, begun = Admission(KeyLocks(), 2), []
    requests = [Request() for _ in range(6)]
    for number, request in enumerate(requests):
        admission.admit(request, key_of(number), lambda request: begun.append(requests.index(request)))
    assert (begun, admission.full, admission.admitted) == ([0, 1], True, 2)
    requests[3].cancel()
    requests[0].succeed(None)
    await turns()
    assert (begun, admission.admitted) == ([0, 1, 2], 2)
    requests[4].cancel()  # in the same turn as its room comes free
    requests[1].succeed(None)
    await turns()
    assert begun == [0, 1, 2, 5]
    for request in requests:
        request.succeed(None)
    await turns()
    assert (admission.full, admission.admitted) == (False, 0)


async def test_each_has_room_and_key_until_it_is_done():
    locks = KeyLocks()
    admission, begun = Admission(locks, 3), []
    first, second, third, other = (Request() for _ in range(4))
    for request, key in ((first, 1), (second, 1), (third, 1), (other, 2)):
        admission.admit(request, key_of(key), begun.append)
    await turns()
    assert begun == [first], "the others of its key wait for it, and the last for room"
    second.cancel()
    await turns()
    assert begun == [first, other]
    first.succeed(None)
    await turns()
    assert begun == [first, other, third]
    for request in (third, other):
        request.succeed(None)
    await turns()
    assert not locks.is_held(key_of(1))
    assert not admission.admitted


async def test_nothing_is_kept_of_what_was_given_up_while_it_waited():
    """A store that hangs must not hold the memory of all who had enough of it."""
    admission = Admission(KeyLocks(), 1)
    admission.admit(Request(), key_of(0), lambda _: None)
    waits = Request()
    admission.admit(waits, key_of(1), lambda _: None)
    gone = weakref.ref(waits)
    waits.cancel()
    del waits
    await turns()
    gc.collect()
    assert gone() is None
