"""Forks, on each line it reads, a child that stores and removes caches, tells what holds, and dies by SIGKILL.

Lines in: the number of the first cache, how many lines the child tells before its end, and how long it lives on then,
in seconds. It kills itself, from a thread: however long others do not run, it dies in the middle of its work.
Lines out: ``stored N`` and ``removed N`` once acknowledged, ``dead`` when it has died. The parent imports everything
once, so that fifty children take seconds.
"""

import asyncio
import os
import random
import signal
import sys
import threading
import time

from disk_stores import key_of

from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.tier import DiskTier

CACHES = 400  # more than a child lives to store
LANES = 12  # more than there are threads, so that some go into a pack together, and some large ones to one thread


def stored_content(number: int) -> bytes:
    """The bytes of a cache: of a size and a content that only its number has."""
    rng = random.Random(number)
    times = rng.randrange(8200, 12000) if number % 3 == 0 else rng.randrange(1, 3000)  # too large for a pack, or not
    return rng.randbytes(64) * times


def tell(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # one write: whole or not at all


class Death:
    """Comes ``lives_on_s`` seconds after so many lines."""

    def __init__(self, lines: int, lives_on_s: float) -> None:
        self._lines_left, self._lives_on_s, self._due = lines, lives_on_s, threading.Event()
        threading.Thread(target=self._come, daemon=True).start()

    def tell(self, line: str) -> None:
        tell(line)
        self._lines_left -= 1
        if not self._lines_left:
            self._due.set()

    def _come(self) -> None:
        self._due.wait()
        time.sleep(self._lives_on_s)
        os.kill(os.getpid(), signal.SIGKILL)


async def lane(tier: DiskTier, numbers: range, death: Death) -> None:
    for number in numbers:
        content = memoryview(stored_content(number))
        if number % 5 == 4:
            await tier.write_back(key_of(number), None, content)
        else:
            await tier.write_through(key_of(number), None, content)
            death.tell(f"stored {number}")
        if number % 7 == 6:
            await tier.remove([key_of(number)])
            death.tell(f"removed {number}")


async def store(folder: str, first: int, death: Death) -> None:
    tier = DiskTier(folder_at(folder), 1 << 40)
    await tier.start()
    await asyncio.gather(*(lane(tier, range(first + start, first + CACHES, LANES), death) for start in range(LANES)))


def main(folder: str) -> None:
    for line in sys.stdin:
        first, lines, lives_on_s = line.split()
        child = os.fork()
        if not child:
            asyncio.run(store(folder, int(first), Death(int(lines), float(lives_on_s))))
            os._exit(1)
        _, status = os.waitpid(child, 0)
        tell("dead" if os.waitstatus_to_exitcode(status) == -signal.SIGKILL else "ended")


if __name__ == "__main__":
    main(sys.argv[1])
