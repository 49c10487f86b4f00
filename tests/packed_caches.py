"""Caches small enough to share a file, and the files that they share."""

import asyncio

from disk_stores import content_of, key_of, read

from kvpool.cache.disk.index import DiskEntry

SIZE = 9000  # three units of a file system, with what stands before it
FILE = DiskEntry(key_of(0), None, SIZE).file_bytes
TABLE_BYTES = 4096  # of a pack of few
CONTENTS = [content_of(number, SIZE) for number in range(40)]


async def write_together(tier, numbers, write="write_back"):
    return await asyncio.gather(*(getattr(tier, write)(key_of(n), None, CONTENTS[n]) for n in numbers))


async def contents(tier, numbers):
    """For each whether it can be read; what can be must be right."""
    there = [await read(tier, key_of(number)) for number in numbers]
    assert all(content in (None, CONTENTS[number]) for number, content in zip(numbers, there, strict=True))
    return [content is not None for content in there]


def packs(tmp_path):
    return sorted(tmp_path.rglob("*.kvpack"))


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
