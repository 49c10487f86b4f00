"""Everything at once, at random: a fill that says True has the right bytes, and what is removed never comes back.

Each key's bytes carry a version, which goes up when the key is removed: bytes of before a removal that comes to light
after it are told by that.
"""

import asyncio
import random

import pytest
from disk_stores import Faults, FaultyFolder, FullDisk, key_of

from kvpool.errors import TierError

PAGE = 64 << 10
KEYS = 24
CHAIN = 6
WORKERS = 6
STEPS = 60
FULL = OSError(28, "No space left on device")


def size_of(number):
    return [PAGE, PAGE // 3, 2 * PAGE - 7, 100][number % 4]


def bytes_of(number, version):
    unit = number.to_bytes(4, "little") + version.to_bytes(4, "little")
    return (unit * (size_of(number) // 8 + 1))[: size_of(number)]


class Model:
    def __init__(self, device, seed):
        self.device, self.tiers = device, device.tiers
        self.rng = random.Random(seed)
        self.versions = [1] * KEYS
        self.removed = [0] * KEYS  # versions up to this one are gone for good
        self.directory = set()  # as a device keeps it: told kept, and not told gone
        self.filled = 0
        device.tiers._contents._on_gone = self.gone

    def gone(self, keys):
        for key in keys:
            assert self.tiers.find(key) is None, "gone means gone"
        self.directory.difference_update(keys)

    def sources(self, worker, numbers):
        """Each worker has ten places of the device, two for each cache of a batch."""
        sources = []
        for place, number in enumerate(numbers):
            source = self.device.source(number, size_of(number), place=worker * 10 + 2 * place)
            parent = key_of(number - 1).block_hash if number % CHAIN else None
            sources.append(source._replace(parent=parent))
        return sources

    async def step(self, worker):
        count = self.rng.randint(1, 5)
        first = self.rng.randrange(KEYS)
        numbers = self.rng.choice([self.rng.sample(range(KEYS), count), range(first, min(first + count, KEYS))])
        sources = self.sources(worker, numbers)
        weights = {
            self.down: 40, self.up: 30, self.held: 10, self.through: 12, self.save: 2,
            self.remove: 6, self.remove_chained: 2, self.remove_all: 1,
        }  # fmt: skip
        (action,) = self.rng.choices(list(weights), list(weights.values()))
        await action(numbers, sources)

    def write(self, numbers, sources):
        for number, source in zip(numbers, sources, strict=True):
            source.view()[:] = bytes_of(number, self.versions[number])

    async def down(self, numbers, sources):
        move = self.rng.choice([self.tiers.demote, self.tiers.demote, self.tiers.copy_ahead])

        async def call(sources):
            # No removal may begin and end between the two: what is given up after it may be found.
            self.write(numbers, sources)
            return await move(sources)

        if self.rng.random() < 0.1:
            task = asyncio.ensure_future(call(sources))
            for _ in range(self.rng.randint(0, 4)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))
            kept = [] if task.cancelled() else task.result()
        else:
            kept = await call(sources)
        self.device.overwrite(sources)
        for source, there in zip(sources, kept, strict=False):
            if there and self.tiers.find(source.key) is not None:
                self.directory.add(source.key)

    async def through(self, numbers, sources):
        self.write(numbers, sources)
        errors = await self.tiers.write_through(sources)
        self.device.overwrite(sources)
        for source, error in zip(sources, errors, strict=True):
            if error is None and self.tiers.find(source.key) is not None:
                self.directory.add(source.key)

    async def up(self, numbers, sources):
        floors = [self.removed[number] for number in numbers]
        self.device.overwrite(sources)
        filled = await self.tiers.fill(sources)
        for number, source, floor, there in zip(numbers, sources, floors, filled, strict=True):
            if there:
                version = int.from_bytes(bytes(source.view()[4:8]), "little")
                assert source.view() == bytes_of(number, version), number
                assert floor < version <= self.versions[number], number
                self.filled += 1

    async def held(self, numbers, sources):
        keys = [key_of(number) for number in numbers]
        self.tiers.hold(keys)
        await self.up(numbers, sources)
        self.tiers.unhold(keys)

    async def save(self, numbers, sources):
        await self.tiers.save(None)

    async def remove(self, numbers, sources):
        await self.removal(numbers, self.tiers.remove([key_of(number) for number in numbers]))

    async def remove_chained(self, numbers, sources):
        keys = self.tiers.with_descendants([key_of(numbers[0])])
        numbers = [number for number in range(KEYS) if key_of(number) in keys]
        await self.removal(numbers, self.tiers.remove(keys))

    async def remove_all(self, numbers, sources):
        await self.removal(range(KEYS), self.tiers.remove_space("default", "f"))

    async def removal(self, numbers, work):
        until = {number: self.versions[number] for number in numbers}
        for number in numbers:
            self.versions[number] += 1
        self.directory.difference_update(key_of(number) for number in numbers)
        try:
            await work
        except TierError:
            return
        for number, version in until.items():
            self.removed[number] = max(self.removed[number], version)

    async def work(self, worker):
        for _ in range(STEPS):
            await self.step(worker)

    async def run(self):
        await asyncio.gather(*(self.work(worker) for worker in range(WORKERS)))
        await self.device.saved()
        await asyncio.sleep(0)
        self.device.check()
        assert all(self.tiers.find(key) is not None for key in self.directory), "what is gone is told"
        for number in range(KEYS):
            await self.up([number], self.sources(0, [number]))
        assert self.filled > 10, "the test has tested something"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("pages", "disk", "budget_pages"),
    [(12, None, 0), (12, "memory", 1000), (12, "file", 10), (0, "file", 20), (4, "file", 1000)],
    ids=["host", "host and disk", "host and small disk", "small disk", "small host and disk"],
)
async def test_fills_are_right_or_misses(open_device, tmp_path, seed, pages, disk, budget_pages):
    where = None if disk is None else f"{disk}://{tmp_path}/tier"
    device = await open_device(pages, where, max(budget_pages, 1) * PAGE, watermark=0.5)
    await Model(device, seed).run()
    if disk is not None:
        assert device.disk.statistics().bad_files == {}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pages", [0, 12])
async def test_with_a_disk_that_is_full(open_device, tmp_path, seed, pages):
    device = await open_device(pages, FullDisk(str(tmp_path), 10 * PAGE), watermark=0.3)
    await Model(device, seed).run()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pages", [0, 12])
async def test_with_a_store_that_fails_now_and_then(open_device, tmp_path, seed, pages):
    faults = Faults()
    device = await open_device(pages, FaultyFolder(str(tmp_path / "tier"), faults), watermark=0.3)
    model = Model(device, seed)
    rng = random.Random(seed)

    async def break_things():
        for _ in range(30):
            faults.errors = dict.fromkeys(
                rng.sample(["write", "read", "remove", "sync", "list"], rng.randint(0, 3)), FULL
            )
            for _ in range(20):
                await asyncio.sleep(0)
        faults.errors = {}

    await asyncio.gather(model.run(), break_things())
    # What was surely removed does not come back in the next life.
    await device.tiers.close()
    again = await open_device(pages, str(tmp_path / "tier"))
    model.device, model.tiers = again, again.tiers
    for number in range(KEYS):
        await model.up([number], model.sources(0, [number]))
