"""How rounds of a disk become one figure."""

import pytest

from kvpool.bench.disk import _compared
from kvpool.sizes import MIB


def test_each_round_is_compared_with_its_own_neighbours_and_the_first_warms_up():
    slow_disk = [(4.0, 3.0), (8.0, 6.0), (40.0, 30.0)]  # each three quarters of what stands beside it
    found = _compared("x", [(100.0, 1.0), *slow_disk, (1.0, 3.0)], 8 * MIB)
    assert found["ratio"] == 0.75
    assert found["ratios"] == [0.75, 0.75, 0.75, 3.0]
    assert found["value"] == pytest.approx(1.0)
    assert found["unit"] == "MiB/s"
