"""What a policy ranks apart: a device, or what an account has there."""

from __future__ import annotations

from kvpool.errors import ensure


class Partitions:
    """Partitions by number, from 0; the first of each device is that of all that has no account of its own there."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, int], int] = {}
        """By device and account, of those made so far."""
        self._places: list[tuple[int, int]] = []
        self._by_device: list[list[int]] = []

    def __len__(self) -> int:
        """Partitions of all devices."""
        return len(self._places)

    def __getitem__(self, partition: int) -> tuple[int, int]:
        """Return the device and the account of a partition."""
        return self._places[partition]

    def add_device(self, number: int) -> None:
        """Make a device known. Devices are numbered in order, from 0."""
        ensure(number == len(self._by_device), "devices are numbered in order", asked=number)
        self._by_device.append([])
        self.number(number, 0)

    def number(self, device: int, account: int) -> int:
        """Return the number of what an account has on a device; it is made if there is none."""
        number = self.numbers.get((device, account))
        if number is None:
            number = self.numbers[device, account] = len(self._places)
            self._places.append((device, account))
            self._by_device[device].append(number)
        return number

    def of(self, device: int) -> list[int]:
        """Return the numbers of a device's partitions."""
        return self._by_device[device]
