"""The scheduling priority of our actors."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger("kvpool")

_NORMAL = 0
_ROUNDS = 5


def run_at_normal_priority() -> None:
    """Give this process the niceness of ordinary programs, 0, if it may.

    Ray starts its workers at niceness 15, where a process at 0 (a driver, a notebook, a data loader) gets thirty times
    the share of a busy core. Our actors use little time, but everyone waits for them: with two busy processes on two
    cores a request took 119 ms at niceness 15 and 9 ms at 0. Only a privileged process may do this (root,
    CAP_SYS_NICE); for others ``RAY_worker_niceness=0``, set where Ray is started, does it for all workers.
    """
    try:
        for _ in range(_ROUNDS):  # a thread may have been started meanwhile by one that was not yet changed
            if not (slow := _slow_threads()):
                return
            for thread in slow:
                try:
                    os.setpriority(os.PRIO_PROCESS, thread, _NORMAL)  # on Linux each thread has its own
                except ProcessLookupError:
                    continue  # it has ended
    except PermissionError:
        logger.info(
            "niceness stays at %d, so requests wait where cores are busy: start Ray with RAY_worker_niceness=0",
            os.getpriority(os.PRIO_PROCESS, 0),
        )


def niceness() -> int:
    """Return the niceness that a kvpool actor started where this runs would have, found by trying."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    if own <= _NORMAL:
        return own
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _NORMAL)
    except PermissionError:
        return own
    os.setpriority(os.PRIO_PROCESS, 0, own)
    return _NORMAL


def _slow_threads() -> list[int]:
    slow = []
    for entry in Path("/proc/self/task").iterdir():
        try:
            if os.getpriority(os.PRIO_PROCESS, int(entry.name)) > _NORMAL:
                slow.append(int(entry.name))
        except ProcessLookupError:
            continue
    return slow
