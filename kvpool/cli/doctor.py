"""``kvpool doctor``: what is wrong with this system, and how to mend it."""

from __future__ import annotations

from typing import Any

import click

from kvpool.cli.options import JSON
from kvpool.cli.output import print_rows, write_json
from kvpool.cli.spinner import working
from kvpool.sizes import format_count


@click.command()
@click.option("--name", help="Name of the pool that is to run.  [default: kvpool]")
@click.option("--devices", help="'host:2' or 'host:2x512MiB': the devices that are to run.")
@click.option("--memory-per-device", help="Size of a device, where --devices names none: '1GiB'.")
@JSON
@click.option("--here", is_flag=True, help="Check this host alone, without asking a cluster.")
def doctor(json_path: str | None, here: bool, **settings: Any) -> None:
    """Check limits, memory, token, versions, sockets, driver, nodes and pools; say what is wrong and how to mend it.

    Checks what the pool that is configured needs: as for 'start', what is not given here comes from KVPOOL_*
    variables and kvpool.yaml. Exit status: 0 if nothing failed (there may be warnings), 1 if something did.
    """
    from kvpool.config import load_config
    from kvpool.doctor.examination import examine, no_survey
    from kvpool.doctor.finding import FAILED, OK, WARNING
    from kvpool.doctor.survey import survey

    config = load_config(**{key: value for key, value in settings.items() if value is not None})
    with working("examining this host and the cluster"):
        findings = examine(config, no_survey if here else survey)
    if json_path is not None:
        write_json(json_path, {"rows": [finding.to_row() for finding in findings]})
    else:
        names = ("check", "where", "result", "found", "needed")
        rows = [{name: finding.to_row()[name] for name in names} for finding in findings]
        print_rows(f"what pool {config.name} needs, configured here as {config.devices}", rows)
        for finding in findings:
            if finding.result != OK:
                click.echo(f"{finding.check}, {finding.where}: {finding.mend}")
        failed, warned = (sum(finding.result == result for finding in findings) for result in (FAILED, WARNING))
        click.echo(f"{format_count(len(findings), 'check')}, {failed} failed, {warned} with a warning")
    click.get_current_context().exit(1 if any(finding.result == FAILED for finding in findings) else 0)
