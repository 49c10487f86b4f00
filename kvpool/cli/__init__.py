"""The command line: ``kvpool``.

Subcommands are imported when they are called, so that those that need no cluster start without Ray.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click
from opentelemetry import trace

from kvpool.errors import ConfigError, KvpoolError, ensure
from kvpool.telemetry.calls import SCOPE, fail
from kvpool.telemetry.sdk import set_up_command_line
from kvpool.version import __version__

EXIT_ERROR = 2

_COMMANDS = {
    "contains": ("kvpool.cli.administration:contains", "Show how much of a chain is in a pool, and where."),
    "events": ("kvpool.cli.administration:events", "Write what happens to a pool's content, as it happens."),
    "evict": ("kvpool.cli.administration:evict", "Evict caches that nobody holds."),
    "invalidate": ("kvpool.cli.administration:invalidate", "Remove a model's content, or that of keys, for good."),
    "leases": ("kvpool.cli.administration:leases", "Show who holds what, and revoke it."),
    "ls": ("kvpool.cli.administration:ls", "List models and caches."),
    "quota": ("kvpool.cli.quota:quota", "Show what tenants and models are guaranteed and limited to, or set it."),
    "waiting": ("kvpool.cli.waiting:waiting", "Show who waits for memory."),
    "set-policy": ("kvpool.cli.administration:set_policy", "Let another eviction policy decide."),
    "defragment": ("kvpool.cli.administration:defragment", "Compact a pool's memory."),
    "flush": ("kvpool.cli.administration:flush", "Write all that is stored to disk."),
    "trim": ("kvpool.cli.administration:trim", "Give a pool's warm pages back to the system."),
    "bench": ("kvpool.cli.bench:bench", "Measure, beside something measured in the same run."),
    "doctor": ("kvpool.cli.doctor:doctor", "Say what is wrong with this system and how to mend it."),
    "replay": ("kvpool.cli.replay:replay", "Replay a trace against a pool and verify every hit."),
    "start": ("kvpool.cli.pool:start", "Start a pool in the running Ray cluster."),
    "status": ("kvpool.cli.pool:status", "Show what a pool holds and did."),
    "stop": ("kvpool.cli.pool:stop", "Delete a pool."),
    "simulate": ("kvpool.cli.simulate:simulate", "Say what an eviction policy would hit on a trace."),
}
"""Name to (where the command is, its line in the help)."""

_OF_MANY_CALLS = ("bench", "replay")
"""Commands without a span: it would put each of their calls into its trace, which costs more than the calls."""


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is called, and reports kvpool's errors as one line.

    Parameters
    ----------
    commands
        Name to ``("module:command", short help)``.
    """

    def __init__(self, *args: Any, lazy_commands: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = lazy_commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        module, _, name = self._lazy[cmd_name][0].partition(":")
        command = getattr(import_module(module), name)
        ensure(isinstance(command, click.Command), "an entry of the command table that is no command", entry=cmd_name)
        return command  # type: ignore[no-any-return]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._lazy[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KvpoolError as error:
            fail(trace.get_current_span(), type(error).__name__, error.message)
            click.echo(f"kvpool: {_told(error)}", err=True)
            ctx.exit(EXIT_ERROR)
        except KeyboardInterrupt as interrupt:
            failed = interrupt.__cause__
            told = f" (then, in cleaning up: {_line(failed)})" if failed is not None else ""
            click.echo(f"kvpool: interrupted{told}", err=True)
            ctx.exit(128 + getattr(interrupt, "number", signal.SIGINT))  # as a shell tells which signal it was


def _told(error: BaseException) -> str:
    """Return an error in one line; what went wrong first comes first, if this one came up in its clean-up."""
    first = None if error.__suppress_context__ else error.__context__
    told = _line(error)
    return told if first is None else f"{_told(first)} (then, in cleaning up: {told})"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@click.group(
    cls=LazyGroup,
    lazy_commands=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(__version__, prog_name="kvpool")
@click.pass_context
def main(ctx: click.Context) -> None:
    """One elastic pool of KV-cache memory for many models on a Ray cluster."""
    here = os.getcwd()
    if here not in sys.path:  # policies of one's own: last, so that nothing in it hides what is installed
        sys.path.append(here)
    try:
        end_telemetry = set_up_command_line()
    except ConfigError as error:
        click.echo(f"kvpool: not traced: {error}", err=True)
    else:
        if end_telemetry is not None:
            ctx.call_on_close(end_telemetry)  # after the span, which is entered later
    if ctx.invoked_subcommand not in _OF_MANY_CALLS:
        span = trace.get_tracer(SCOPE, __version__).start_as_current_span(
            f"kvpool.cli.{ctx.invoked_subcommand}", record_exception=False, set_status_on_exception=False
        )  # an exception may be click's way to end well
        ctx.with_resource(span)
