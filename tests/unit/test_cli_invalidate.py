"""What ``kvpool invalidate`` says of what was removed."""

import pytest
from click.testing import CliRunner

from kvpool.cli import administration, main


@pytest.mark.parametrize(
    ("lower_keys", "status", "said"),
    [(2, 0, "2 keys removed from the tiers below the devices"), (0, 1, "nothing is stored under these keys")],
    ids=["below the devices alone", "nowhere"],
)
def test_content_that_lies_below_the_devices_alone_is_not_nothing(
    lower_keys: int, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"caches": 0, "bytes": 0, "unsealed": 0, "lower_keys": lower_keys, "held": {}}
    monkeypatch.setattr(administration, "ask", lambda *_, **__: answer)
    result = CliRunner().invoke(main, ["invalidate", "--model", "m", "page 1"])
    assert result.exit_code == status
    assert said in result.output
    assert ("nothing is stored" in result.output) is not bool(lower_keys)
    assert "same content" not in result.output


def test_what_lay_on_a_device_and_below_it_is_not_told_as_if_it_were_two(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"caches": 4, "bytes": 4096, "unsealed": 0, "lower_keys": 4, "held": {}}
    monkeypatch.setattr(administration, "ask", lambda *_, **__: answer)
    result = CliRunner().invoke(main, ["invalidate", "--model", "m", "--all"])
    assert "4 keys removed from the tiers below the devices: the same content, where it lay in both" in result.output
