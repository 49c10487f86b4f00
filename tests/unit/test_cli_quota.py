"""How ``kvpool quota`` shows what is promised."""

import pytest

from kvpool.cli.quota import show_quotas
from kvpool.sizes import MIB


@pytest.mark.parametrize(
    ("given", "now_bytes", "shown"),
    [
        ("40%", 4 * MIB, "40%: 4 MiB"),
        ("0", 0, "0 B"),
        ("8 MiB", 8 * MIB, "8 MiB"),
        ("16MiB", 8 * MIB, "16 MiB: 8 MiB"),
    ],
    ids=["a share", "nothing", "all of it", "less, where guarantees exceed the memory"],
)
def test_what_was_stated_is_told_beside_what_it_comes_to(
    given: str, now_bytes: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"held_bytes": 0, "leased_bytes": 0, "waiting": 0, "revision": 1, "warning": None}
    show_quotas(
        "p",
        [{"tenant": "t", "model": "m", "guaranteed": given, "guaranteed_bytes": now_bytes, "limit": None} | figures],
    )
    *_, row, _ = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in row.strip("│").split("│")][2:4] == [shown, "none"]


def test_that_guarantees_exceed_the_memory_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"held_bytes": 0, "leased_bytes": 0, "waiting": 0, "revision": 1, "warning": "too much is guaranteed"}
    quota = {"tenant": "t", "model": "m", "guaranteed": "80%", "guaranteed_bytes": 8 * MIB, "limit": None} | figures
    show_quotas("p", [quota, quota | {"model": "n"}])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "too much" in line] == ["warning: too much is guaranteed"]


@pytest.mark.parametrize(("held_bytes", "drains"), [(4 * MIB, True), (2 * MIB, False)])
@pytest.mark.parametrize(("model", "whose"), [("m", "model m"), (None, "tenant t")])
def test_a_limit_below_what_is_held_revokes_no_lease(
    held_bytes: int, drains: bool, model: str | None, whose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quota = {"tenant": "t", "model": model, "guaranteed": "0", "guaranteed_bytes": 0, "waiting": 0, "revision": 1}
    figures = {"limit": "5%", "limit_bytes": 2 * MIB, "held_bytes": held_bytes, "leased_bytes": 0, "warning": None}
    show_quotas("p", [quota | figures])
    said = f"{whose} holds more than its limit, and drains: what nobody has leased is evicted at once, the rest as"
    assert (said in capsys.readouterr().out) == drains
