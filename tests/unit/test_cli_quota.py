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


def test_each_warning_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    quota = {"tenant": "t", "model": "m", "guaranteed": "0", "guaranteed_bytes": 0, "waiting": 0, "revision": 1}
    figures = {"limit": "5%", "limit_bytes": 2 * MIB, "held_bytes": 4 * MIB, "leased_bytes": 0}
    show_quotas("p", [quota | figures | {"warning": each} for each in ("too much", "too much\nm drains", None)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["warning: too much", "warning: m drains"]


@pytest.mark.parametrize(
    ("model", "known", "shown"),
    [
        ("m", {"registered": True}, "m"),
        ("m", {"registered": False}, "m (not registered)"),
        (None, {"registered": False}, "(all) (not registered)"),
        ("m", {}, "m"),
    ],
    ids=["registered", "not", "a tenant", "a pool of an earlier version"],
)
def test_who_has_a_quota_and_is_not_there_is_marked(
    model: str | None, known: dict[str, bool], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quota = {"tenant": "t", "model": model, "guaranteed": "0", "guaranteed_bytes": 0, "limit": None, "held_bytes": 0}
    show_quotas("p", [quota | {"leased_bytes": 0, "waiting": 0, "revision": 1, "warning": None} | known])
    *_, row, _ = capsys.readouterr().out.splitlines()
    assert row.strip("│").split("│")[1].strip() == shown
