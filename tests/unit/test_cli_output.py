"""Tables as people read them."""

import pytest

from kvpool.cli.output import print_rows


def test_a_list_of_figures_is_told_by_its_ends(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows("rounds", [{"name": "x", "ratios": [0.3253525979, 1.9688582936]}, {"name": "y", "ratios": None}])
    shown = capsys.readouterr().out
    assert "0.3254 to 1.969" in shown
    assert "0.32535" not in shown
