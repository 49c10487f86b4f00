"""A pool whose parts answer when they are told to: late, out of order between devices, or never.

As in the actors, one batch is on its way to a device at a time, and what a device has to tell (a client died, zombies
are gone) comes by another way than its answers, so that either may overtake the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from pool_harness import LocalPool

from kvpool.errors import DeviceLostError
from kvpool.pool.instructions import Batch, BatchDone, ClientGone, DeviceAnswered, DeviceFreed, DeviceLost, Event, Grant


class InterleavedPool(LocalPool):
    """Driven step by step; :meth:`settle` lets everything happen that can."""

    def __init__(self, devices: int, pages: int, granted: Callable[[str, int, Any], None], **options: Any) -> None:
        super().__init__(devices, pages, **options)
        self.granted = granted
        self.open: dict[Batch, Callable[[list[Any]], None]] = {}
        self.answered: list[DeviceAnswered | None] = [None] * devices
        self.news: list[deque[Event]] = [deque() for _ in range(devices)]
        self.deaths: list[deque[str]] = [deque() for _ in range(devices)]
        self.drops: list[dict[str, list[int]]] = [{} for _ in range(devices)]
        self.lost: set[int] = set()
        self.revoked: set[str] = set()
        """Clients that drop nothing any more when they are asked, but all when they end."""

    @property
    def live(self) -> list[int]:
        """Devices that are not lost."""
        return [number for number in range(len(self.stores)) if number not in self.lost]

    def take(self, instructions) -> None:
        for instruction in instructions:
            super().take([instruction])
            match instruction:
                case BatchDone() if instruction.batch in self.open:
                    self.open.pop(instruction.batch)(self.done.pop(instruction.batch))
                case BatchDone():
                    raise AssertionError("a batch was answered twice")
                case Grant():
                    self.granted(instruction.client, instruction.ticket, instruction.answer)

    def submit(self, event_type, client: str, items, answered: Callable[[list[Any]], None], *more) -> None:
        """Give the pool a batch; ``answered`` gets its answers, some time."""
        batch = Batch(len(items))
        self.open[batch] = answered
        self.handle(event_type(batch, client, items, *more))

    # -- one device, one step ---------------------------------------------------------------------------------------

    def carry_out(self, device: int) -> bool:
        """The device carries out what waits for it; the pool does not know yet."""
        if device in self.lost or self.answered[device] or not self.outboxes[device]:
            return False
        sent = list(self.outboxes[device])
        self.outboxes[device].clear()
        answers = self.stores[device].apply([send.operation for send in sent])
        self.answered[device] = DeviceAnswered(device, sent, answers, self._zombies(device))
        self._collect_drops(device)
        return True

    def deliver(self, device: int) -> bool:
        """The device's answers reach the pool."""
        event, self.answered[device] = self.answered[device], None
        if event is not None:
            self.handle(event)
        return event is not None

    def see_death(self, device: int) -> bool:
        """The device sees that a client's process is gone; the pool does not know yet."""
        if not self.deaths[device]:
            return False
        client, store = self.deaths[device].popleft(), self.stores[device]
        zombie_bytes = store.allocator.usage().zombie_bytes
        ended, freed = store.disconnect(client)
        self.drops[device].pop(client, None)
        store.allocator.holder_gone(client)
        self.news[device].append(ClientGone(client, device, ended, freed))
        self._tell_if_freed(device, zombie_bytes)
        self._collect_drops(device)
        return True

    def drop_pages(self, device: int) -> bool:
        """Clients give back the pages that the device asked for."""
        drops = {client: serials for client, serials in self.drops[device].items() if client not in self.revoked}
        for client in drops:
            del self.drops[device][client]
        allocator = self.stores[device].allocator
        zombie_bytes = allocator.usage().zombie_bytes
        for client, serials in drops.items():
            allocator.dropped(client, serials)
        self._tell_if_freed(device, zombie_bytes)
        return bool(drops)

    def tell(self, device: int) -> bool:
        """What happened at the device reaches the pool."""
        if not self.news[device]:
            return False
        self.handle(self.news[device].popleft())
        return True

    def step(self, device: int) -> bool:
        if device in self.lost:
            return self._fail(device)
        steps = (self.see_death, self.drop_pages, self.carry_out, self.deliver, self.tell)
        return any([step(device) for step in steps])  # noqa: C419 - all of them, not up to the first

    # -- ends -------------------------------------------------------------------------------------------------------

    def die(self, client: str) -> None:
        """A client's process ends. Each device will see it in its own time."""
        for device in self.live:
            self.deaths[device].append(client)

    def lose(self, device: int) -> None:
        """A device dies with all that is on it, answers and news included."""
        self.lost.add(device)
        self.deaths[device].clear()
        self.news[device].clear()
        self.drops[device].clear()
        self.handle(DeviceLost(device, "killed"))
        event, self.answered[device] = self.answered[device], None
        if event is not None:
            self.outboxes[device].extendleft(reversed(event.sent))
        self._fail(device)

    def _fail(self, device: int) -> bool:
        sent = list(self.outboxes[device])
        self.outboxes[device].clear()
        if sent:
            self.take(self.state.fail_operations(sent, DeviceLostError(f"device {device} is gone"), self.now))
        return bool(sent)

    def _zombies(self, device: int) -> tuple[int, int]:
        return self.stamp(), self.stores[device].allocator.usage().zombie_bytes

    def _tell_if_freed(self, device: int, zombie_bytes_before: int) -> None:
        if self.stores[device].allocator.usage().zombie_bytes < zombie_bytes_before:
            self.news[device].append(DeviceFreed(device, self._zombies(device)))

    def _collect_drops(self, device: int) -> None:
        for client, serials in self.stores[device].allocator.take_drops().items():
            self.drops[device].setdefault(client, []).extend(serials)
