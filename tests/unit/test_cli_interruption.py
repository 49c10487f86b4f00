"""What SIGINT and SIGTERM do to a command that has something to clean up."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType

import click
import pytest
from click.testing import CliRunner, Result

from kvpool.cli import LazyGroup
from kvpool.cli.interruption import Interruption
from kvpool.errors import PoolBusyError

Call = Callable[[Callable[[], object]], Result]
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call a function as a command."""

    def call(work: Callable[[], object]) -> Result:
        module = ModuleType("interrupted")
        module.work = click.command()(work)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "interrupted", module)
        return CliRunner().invoke(LazyGroup("kvpool", lazy_commands={"work": ("interrupted:work", "Works.")}), ["work"])

    return call


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@BOTH
def test_a_coroutine_cleans_up_to_its_end_whatever_comes_meanwhile(call: Call, number: int) -> None:
    done: list[str] = []

    async def work() -> None:
        try:
            send(number)
            await asyncio.sleep(600)
        finally:
            for again in (signal.SIGINT, signal.SIGTERM):
                send(again)
                await asyncio.sleep(0)
            done.append("cleaned up")

    def command() -> None:
        with Interruption() as interruption:
            interruption.run(work())

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    result = call(command)
    assert done == ["cleaned up"]
    assert (result.exit_code, result.stdout, result.stderr) == (128 + number, "", "kvpool: interrupted\n")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


@BOTH
def test_what_runs_in_no_event_loop_ends_at_once(call: Call, number: int) -> None:
    def command() -> None:
        with Interruption():
            send(number)
            pytest.fail("it went on")

    assert call(command).stderr == "kvpool: interrupted\n"


def test_what_goes_wrong_in_cleaning_up_is_told_too(call: Call) -> None:
    async def work() -> None:
        try:
            send(signal.SIGINT)
            await asyncio.sleep(600)
        finally:
            raise PoolBusyError("pool 'p' is in use")

    def command() -> None:
        with Interruption() as interruption:
            interruption.run(work())

    assert call(command).stderr == "kvpool: interrupted (then, in cleaning up: pool 'p' is in use)\n"


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption():
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_of_any_command_is_told_in_a_word(call: Call) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    result = call(command)
    assert (result.exit_code, result.stderr) == (128 + signal.SIGINT, "kvpool: interrupted\n")
