"""What a command is to write to is looked at before it does anything."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from kvpool.cli import EXIT_ERROR, main
from kvpool.cli.output import write_json


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def commands(group: click.Group, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command of the command line, by its names."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


WRITE = [
    (names, option.opts[0])
    for names, command in commands(main)
    for option in command.params
    if option.opts[0] in ("--json", "--out")
]


@pytest.mark.parametrize(("names", "option"), WRITE, ids=[" ".join((*names, option)) for names, option in WRITE])
def test_each_command_refuses_what_cannot_be_written_before_it_does_anything(
    names: tuple[str, ...], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command: Any = main
    for name in names:
        command = command.get_command(click.Context(command), name)
    monkeypatch.setattr(command, "callback", lambda **_: pytest.fail("it was done all the same"))
    needed = {"contains": ("--model", "m", "k"), "invalidate": ("--model", "m", "--all"), "set-policy": ("lru",)}
    result = call(*names, *needed.get(names[0], ()), option, "/proc/nowhere/x")
    assert (result.exit_code, result.stdout) == (EXIT_ERROR, "")
    assert result.stderr.startswith("kvpool: ")
    assert "/proc/nowhere/x" in result.stderr
    assert result.stderr.count("\n") == 1


def test_there_are_such_commands() -> None:
    assert {(("evict",), "--json"), (("bench", "fragmentation"), "--json"), (("replay",), "--out")} < set(WRITE)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a pool was asked; it answers to 'trim' with 7 bytes."""
    calls: list[str] = []

    def ask(_name: str, method: str, *_arguments: object, **_more: object) -> int:
        calls.append(method)
        return 7

    monkeypatch.setattr("kvpool.cli.administration.ask", ask)
    return calls


@pytest.mark.parametrize("file", ["", ".", "absent/x", "file/x", "link-in-a-circle", "n" * 300])
def test_a_file_that_cannot_be_written_is_refused(
    file: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link-in-a-circle").symlink_to("link-in-a-circle")
    before = set(tmp_path.iterdir())
    result = call("trim", "--json", file)
    assert result.exit_code == EXIT_ERROR
    assert result.stderr.startswith(f"kvpool: cannot write JSON to {file}: ")
    assert (asked, set(tmp_path.iterdir())) == ([], before)


@pytest.mark.parametrize("file", ["new", "old", "link", "link-to-nothing"])
def test_a_file_that_can_be_written_is_as_it_was_until_it_is(
    file: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("as it was")
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "link-to-nothing").symlink_to("nothing")
    before = set(tmp_path.iterdir())
    refused = call("evict", "--json", file)
    assert "say how much is to go" in refused.stderr
    assert set(tmp_path.iterdir()) == before
    assert not (tmp_path / "nothing").exists()
    assert (tmp_path / "old").read_text() == "as it was"
    assert call("trim", "--json", file).exit_code == 0
    assert (tmp_path / file).read_text() == '{\n  "bytes": 7\n}\n'


def test_a_pipe_is_written_once_and_not_opened_before(asked: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    refused = call("evict", "--json", tmp_path / "pipe")
    assert "say how much is to go" in refused.stderr
    assert call("trim", "--json", tmp_path / "pipe").exit_code == 0
    assert os.read(reader, 100) == b'{\n  "bytes": 7\n}\n'
    os.close(reader)


def test_what_cannot_be_written_when_all_is_done_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"all is done, but .* cannot be written: No such file") as error:
        write_json(tmp_path / "gone" / "x", {})
    assert error.value.exit_code != EXIT_ERROR


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/kvpool", "holds-a-folder"])
def test_a_folder_that_cannot_be_written_to_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "holds-a-folder" / "replay.png").mkdir(parents=True)
    result = call("replay", "--out", folder)
    assert result.exit_code == EXIT_ERROR
    assert result.stderr.startswith(f"kvpool: --out {folder}: cannot write there")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_is_not_made_for_a_command_that_is_refused(tmp_path: Path) -> None:
    result = call("simulate", "--out", tmp_path / "a" / "b", "--capacity", "0")
    assert "--capacity" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_files_and_folders_of_somebody_else_are_refused(asked: list[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for command in (
        ("trim", "--json", tmp_path / "x"),
        ("replay", "--out", tmp_path),
        ("replay", "--out", tmp_path / "x"),
    ):
        result = call(*command)
        assert result.exit_code == EXIT_ERROR
        assert "Permission denied" in result.stderr
    assert asked == []
