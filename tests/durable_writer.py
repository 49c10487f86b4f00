"""A process to be killed: forks, on each line it reads, a child that stores and removes caches and tells what holds.

Lines out: ``pid N`` when the child begins, ``stored N`` and ``removed N`` once acknowledged, ``dead`` when it has died.
The parent imports everything once, so that fifty children take seconds.
"""

import asyncio
import os
import random
import sys

from disk_stores import key_of

from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.tier import DiskTier

CACHES = 400  # more than a child lives to store
LANES = 12  # more than there are threads, so that some go into a pack together


def stored_content(number: int) -> bytes:
    """The bytes of a cache: of a size and a content that only its number has."""
    rng = random.Random(number)
    return rng.randbytes(64) * rng.randrange(1, 3000)


def tell(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # one write: whole or not at all


async def lane(tier: DiskTier, numbers: range) -> None:
    for number in numbers:
        content = memoryview(stored_content(number))
        if number % 5 == 4:
            await tier.write_back(key_of(number), None, content)
        else:
            await tier.write_through(key_of(number), None, content)
            tell(f"stored {number}")
        if number % 7 == 6:
            await tier.remove([key_of(number)])
            tell(f"removed {number}")


async def store(folder: str, first: int) -> None:
    tier = DiskTier(folder_at(folder), 1 << 40)
    await tier.start()
    await asyncio.gather(*(lane(tier, range(first + start, first + CACHES, LANES)) for start in range(LANES)))


def main(folder: str) -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            tell(f"pid {os.getpid()}")
            asyncio.run(store(folder, int(line)))
            os._exit(0)
        os.waitpid(child, 0)
        tell("dead")


if __name__ == "__main__":
    main(sys.argv[1])
