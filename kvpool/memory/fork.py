"""What a fork of this process must not see: descriptors in flight and half-made mappings.

A page's descriptor that a forked child inherits pins the page's memory for as long as the child lives, and so does a
mapping that was made but not yet excluded from forks. So every short run of steps that leaves such a thing open holds
:data:`fork_guard`, and ``os.fork`` in any other thread waits for it.

(``subprocess`` without ``preexec_fn`` forks without these hooks, but its child executes another program at once, which
closes our close-on-exec descriptors and drops all mappings.)
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class ForkAware(Protocol):
    """An object that gives up what it inherited when it finds itself in a forked child."""

    def after_fork_in_child(self) -> None:
        """Close inherited descriptors and refuse further use. Runs in the child, the only thread there."""
        ...


# Reentrant: a finalizer may run while the same thread holds it.
fork_guard = threading.RLock()
_watched: weakref.WeakSet[ForkAware] = weakref.WeakSet()


def watch_forks(watched: ForkAware) -> None:
    """Call ``watched.after_fork_in_child()`` in every forked child, for as long as ``watched`` lives."""
    with fork_guard:
        _watched.add(watched)


def _after_in_child() -> None:
    try:
        for watched in list(_watched):
            watched.after_fork_in_child()
    finally:
        fork_guard.release()


os.register_at_fork(before=fork_guard.acquire, after_in_parent=fork_guard.release, after_in_child=_after_in_child)
