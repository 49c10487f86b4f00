"""Tables as people read them."""

import sys
from contextlib import AbstractContextManager, redirect_stderr
from io import StringIO
from threading import Event
from types import ModuleType

import click
import pytest

from kvpool.cli import EXIT_ERROR, LazyGroup
from kvpool.cli.output import print_rows, progress
from kvpool.cli.spinner import working
from kvpool.errors import CacheStateError, CapacityError


def test_a_list_of_figures_is_told_by_its_ends(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows("rounds", [{"name": "x", "ratios": [0.3253525979, 1.9688582936]}, {"name": "y", "ratios": None}])
    shown = capsys.readouterr().out
    assert "0.3254 to 1.969" in shown
    assert "0.32535" not in shown


class _Log(StringIO):
    """Standard error that is no terminal, and tells when something is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = Event()

    def write(self, text: str) -> int:
        length = super().write(text)
        self.written.set()
        return length


def test_what_takes_a_while_says_so_in_the_log_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.cli.spinner._AFTER_S", 0.0)
    with redirect_stderr(_Log()) as log, working("measuring growth in place"):
        assert log.written.wait(10)
    assert log.getvalue().startswith("measuring growth in place … (0 s)")


def test_progress_is_shown_before_the_first_step_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.cli.output._PROGRESS_AFTER_S", 0.0)
    with redirect_stderr(_Log()) as log, progress("measuring eviction", total=20):
        assert log.written.wait(10)
    assert log.getvalue() == "measuring eviction: 0 of 20 (0 %)\n"


def test_progress_is_told_again_while_the_first_tenth_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.cli.output._PROGRESS_AFTER_S", 0.0)
    monkeypatch.setattr("kvpool.cli.output._PROGRESS_AGAIN_S", 0.001)
    with redirect_stderr(_Log()) as log, progress("measuring eviction", total=20) as report:
        for text in ("0 of 20 (0 %)", "1 of 20 (5 %)"):
            while f"measuring eviction: {text}\n" * 2 not in log.getvalue():
                log.written.clear()
                assert log.written.wait(10)
            report(1)


@pytest.mark.parametrize("shown", [working("asking pool kvpool"), progress("replaying", total=3)])
def test_what_is_done_in_a_moment_says_nothing(shown: AbstractContextManager[object]) -> None:
    with redirect_stderr(_Log()) as log, shown:
        pass
    assert log.getvalue() == ""


def test_an_error_of_cleaning_up_does_not_hide_what_went_wrong_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        try:
            raise CapacityError("no room for 4 MiB")
        finally:
            raise CacheStateError("a tensor is still in use")

    module = ModuleType("failing")
    module.fails = click.command()(fails)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "failing", module)
    group = LazyGroup("kvpool", lazy_commands={"fails": ("failing:fails", "Fails.")})
    with pytest.raises(SystemExit) as ended:
        group.main(["fails"], prog_name="kvpool")
    assert ended.value.code == EXIT_ERROR
    told = "kvpool: no room for 4 MiB (then, in cleaning up: a tensor is still in use)\n"
    assert capsys.readouterr().err == told
