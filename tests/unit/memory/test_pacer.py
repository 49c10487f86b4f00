"""When compaction in the background takes its steps."""

from random import Random

import pytest

from kvpool.memory.allocation import Compaction
from kvpool.memory.pacer import IDLE_S, STEP_S, CompactionPacer

MOVED, NOTHING = Compaction(1 << 19, 0, True), Compaction(0, 0, False)


def test_steps_take_their_share_of_the_time_and_a_fiftieth_of_it_while_others_are_served() -> None:
    pacer = CompactionPacer(threshold=0.2, share=0.1)
    assert pacer.stepped(10.0, 10.001, 0.3, MOVED) == pytest.approx(0.009)
    pacer.operated(10.0)
    assert pacer.stepped(10.0, 10.001, 0.3, MOVED) == pytest.approx(0.499)
    assert pacer.stepped(11.0, 11.001, 0.3, MOVED) == pytest.approx(0.009)


def test_nothing_is_tried_below_the_threshold() -> None:
    pacer = CompactionPacer(threshold=0.2, share=0.1)
    assert [pacer.due(fragmentation) for fragmentation in (0.1, 0.2, 0.21)] == [False, False, True]
    assert not CompactionPacer(threshold=1.0, share=0.1).due(1.0)


def test_what_could_not_be_helped_is_not_tried_again_until_there_is_more() -> None:
    pacer = CompactionPacer(threshold=0.2, share=0.1)
    assert pacer.stepped(0.0, 0.001, 0.4, NOTHING) == IDLE_S
    assert [pacer.due(fragmentation) for fragmentation in (0.4, 0.41)] == [False, True]
    assert not pacer.due(0.3), "less, and still not more than it was"
    assert pacer.due(0.35)


def test_a_step_copies_what_the_last_one_would_have_in_its_time_within_bounds() -> None:
    pacer = CompactionPacer(threshold=0.2, share=0.1)
    for took_s, step_bytes in ((2 * STEP_S, 1 << 18), (1.0, 1 << 16), (STEP_S / 100, 1 << 20)):
        pacer.stepped(0.0, took_s, 0.3, MOVED)
        assert pacer.step_bytes == step_bytes
    pacer.stepped(0.0, 1.0, 0.3, NOTHING)
    assert pacer.step_bytes == 1 << 20


@pytest.mark.parametrize("every_s", [0.0002, 0.001, 0.005, 0.025])
@pytest.mark.parametrize("step_s", [0.0001, 0.0005, 0.002])
def test_fewer_than_one_in_a_hundred_operations_waits_for_a_step_while_they_come(every_s: float, step_s: float) -> None:
    """Counted in a time of its own: the percentile of times on a machine that others share says little."""
    pacer, rng = CompactionPacer(threshold=0.2, share=0.1), Random(0)
    operations, waited = 30_000, 0
    due = next_step = free = 0.0
    pacer.operated(0.0)
    for _ in range(operations):
        due += rng.uniform(0.0, 2.0) * every_s
        while (began := max(next_step, free)) < due:
            free = began + step_s
            next_step = free + pacer.stepped(began, free, 0.3, MOVED)
        waited += free > due
        free = max(free, due) + every_s / 100
        pacer.operated(free)
    assert 0 < waited < operations / 100
