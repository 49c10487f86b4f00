"""Many caches that leave the books at once, for their devices to free.

It goes step by step: the next step begins when the devices concerned have answered the one before, and whoever asks for
memory meanwhile is served in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvpool.pool.instructions import Answer
from kvpool.pool.leases import PINNER
from kvpool.pool.ledger import Ledger

STEP_CACHES = 1000
"""Caches that leave the books in one step: about 5 ms of the pool's event loop."""


class Gone(NamedTuple):
    """A cache that has left the books."""

    device: int
    id: int
    void: bool


def send_removals(
    ledger: Ledger, gone: Sequence[Gone], then: Callable[[list[Answer], float], None], now: float
) -> None:
    """Let the devices concerned free these caches, and go on when all have answered."""
    by_device: dict[int, list[int]] = {}
    void: dict[int, list[int]] = {}
    for each in gone:
        (void if each.void else by_device).setdefault(each.device, []).append(each.id)
    answers: list[Answer] = []
    expected = len(by_device) + len(void)

    def answered(answer: Answer, now: float) -> None:
        answers.append(answer)
        if len(answers) == expected:
            then(answers, now)

    for device, ids in by_device.items():
        ledger.send(device, ("evict", ids), answered)
    for device, ids in void.items():
        ledger.send(device, ("void", ids, PINNER), answered)
    if not expected:
        then([], now)
