"""What ``kvpool status`` says of a device, and of a disk below it."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvpool.cli.pool import _show

PROBLEM = "the disk tier at file:///d/p/host-0: writing x failed: it is not the folder; mount its disk again"


LOST = "The actor died unexpectedly.\n\tclass_name: DeviceActor\n\tpid: 7"


def stats(disk: dict[str, Any], problem: str | None) -> Any:
    lower = {"host": None, "disk": disk, "disk_problem": problem, "leftover_folders": []}
    lower |= {"demoted": 0, "fills": 0, "not_kept": 0}
    return SimpleNamespace(
        name="p",
        policy="lru",
        policy_requested="lru",
        policy_failure=None,
        placement="least_loaded",
        devices=[
            SimpleNamespace(
                name="host-0",
                fragmentation=0.0,
                lost=None,
                disk_url="file:///d/p/host-0",
                lower=lower,
                **dict.fromkeys(("capacity_bytes", "live_bytes", "backed_bytes", "reserve_bytes", "zombie_bytes"), 0),
                **dict.fromkeys(("pinned_bytes", "caches", "evictions", "compacted_bytes"), 0),
            )
        ],
        quotas=(),
        hit_ratio=0.0,
        **dict.fromkeys(("clients", "keys", "lower_keys", "waiting", "blocks_hit", "blocks_looked_up"), 0),
        **dict.fromkeys(("evictions", "refusals"), 0),
    )


def shown(capsys: pytest.CaptureFixture[str], disk: dict[str, Any], problem: str | None, **lower: Any) -> str:
    told = stats({"used_bytes": 18 << 20, "budget_bytes": 10 << 30} | disk, problem)
    told.devices[0].lower.update(lower)
    _show(told, None)
    return " ".join(capsys.readouterr().out.split())


def test_a_folder_that_is_gone_is_told_with_its_cause(capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(capsys, {"errors": {"ESTALE": 112}, "lost": True}, PROBLEM)
    assert f"host-0: {PROBLEM}" in told
    assert "lost: 18 MiB" in told
    assert "112 (ESTALE)" in told
    assert "of 10 GiB" not in told


def test_removed_caches_that_are_still_on_disk_are_told_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(capsys, {"errors": {"ESTALE": 3}, "pending_removals": 80}, None)
    assert "host-0: 80 removed caches hidden, and still on disk: each is tried again, every minute at least" in told
    assert "still on disk" not in shown(capsys, {"errors": {"ESTALE": 3}, "pending_removals": 0}, None)
    told = shown(capsys, {"errors": {}}, None, leftover_folders=["/d/p/host-1"], leftover_removals=1)
    assert "host-0: removed content of 1 model may still be in folders that are not used: each is tried again" in told


def test_errors_that_are_over_are_told_by_their_causes(capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(capsys, {"errors": {"ESTALE": 2, "ENOSPC": 3}, "lost": False}, None)
    assert "5 (ENOSPC 3, ESTALE 2)" in told
    assert "18 MiB of 10 GiB" in told


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///d/p/host-0", "what is on its disk, file:///d/p/host-0, is kept, and found again when the pool is"),
        (None, "host-0 is lost with all it held (The actor died unexpectedly.); start the pool again"),
    ],
)
def test_of_a_lost_device_it_is_told_what_is_kept(
    url: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = stats({}, None)
    (device,) = figures.devices
    device.lost, device.lower, device.disk_url = LOST, None, url
    _show(figures, None)
    told = capsys.readouterr().out
    assert said in told
    assert "'kvpool stop --name p', then 'kvpool start'" in told
    assert "class_name" not in told


def test_a_disk_in_order_has_no_errors_and_an_older_pool_tells_less(capsys: pytest.CaptureFixture[str]) -> None:
    assert "18 MiB of 10 GiB" in shown(capsys, {"errors": {}}, None)


def device_table(capsys: pytest.CaptureFixture[str], **figures: Any) -> list[dict[str, str]]:
    told = stats({}, None)
    told.devices[0].__dict__.update(figures, lower=None)
    _show(told, None)
    _, _, head, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line]
    names = [cell.strip() for cell in head.strip("┃").split("┃")]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows if row.startswith("│")]
    return [dict(zip(names, row, strict=True)) for row in cells]


def test_fragmentation_and_what_compaction_did_are_told_of_each_device(capsys: pytest.CaptureFixture[str]) -> None:
    [row] = device_table(capsys, fragmentation=0.234, compacted_bytes=3 << 30)
    assert (row["frag."], row["moved"]) == ("23%", "3 GiB")


def test_the_state_of_devices_is_a_column_where_one_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert "state" not in device_table(capsys)[0]
    assert device_table(capsys, lost=LOST)[0]["state"] == "lost"
