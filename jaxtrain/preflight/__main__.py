"""`python -m jaxtrain.preflight --config=configs/7b.py`: would this run work here? Answered in half a minute, before it starts.

Runs as the training command does, once a process: alone, under `python -m jaxtrain.launch --preflight`, SLURM, Open MPI or any
other starter. Trains nothing, and leaves nothing behind.

Exit codes: 0 nothing stands in the way (there may be warnings), 1 something would fail the run, 2 wrong usage, 70 a check hung.
"""

from __future__ import annotations

if __name__ == "__main__":
    import jaxtrain.early  # noqa: F401, before all else: Ctrl-C ends the program from here on
    from jaxtrain import cli

    cli.run("jaxtrain.preflight.__main__", joins=True)

import dataclasses
import json
import sys
from collections.abc import Sequence

from jaxtrain.command_line import parse_with_flags
from jaxtrain.config import Config
from jaxtrain.config_rules import validate
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, UsageError
from jaxtrain.launch import distributed
from jaxtrain.launch.watchdog import Watchdog
from jaxtrain.main import count_devices
from jaxtrain.preflight.checks import Check, Finding, PreflightFlags, Site, Stopwatch, carry_out
from jaxtrain.processes import barrier
from jaxtrain.telemetry.heartbeat import Heartbeat
from jaxtrain.text import open_console

PROG = "python -m jaxtrain.preflight"
DESCRIPTION = "Check devices, links, folders, clocks, software, memory and data for a run, without training."
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


def examine(config: Config, flags: PreflightFlags, heartbeat: Heartbeat | None = None) -> tuple[Site, list[Finding]]:
    """Carries out all checks. What would hang or mislead after a failure is skipped.

    Raises:
      ConfigError: the config does not fit the devices.
    """
    from jaxtrain.mesh import make_mesh
    from jaxtrain.preflight import copies, data, devices, folders, hosts, links

    site, findings = Site(config), []

    def carry(checks: list[Check]) -> bool:
        """Whether none of them failed."""
        new = []
        for check in checks:
            if any(finding.state == "failed" for finding in new):
                new.append(Finding(check.name, "skipped", "after the failure above"))
            else:
                new += carry_out(check, site, flags.patience, heartbeat)
        findings.extend(new)
        return all(finding.state != "failed" for finding in new)

    with site.closing:
        software, same_config, clocks = hosts.checks()
        same = [carry([software]), carry([same_config])]  # both touch no device
        if not all(same):
            findings.append(Finding("all else", "skipped", "processes that differ may wait for one another for ever"))
            return site, findings
        carry([clocks])
        site.config = validate(config, count_devices())
        site.mesh = make_mesh(site.config.mesh)
        carry(folders.checks())
        for check in (*copies.checks(site.config), *devices.checks(), *links.checks(site), *data.checks()):
            carry([check])
        barrier("preflight end", flags.patience)  # no process cleans up before all have checked
    return site, findings


def show(site: Site, findings: Sequence[Finding], seconds: float) -> None:
    """Prints the table and what it comes to."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"preflight of {site.config.name}: {where(site)}", title_justify="left")
    for head in ("check", "state", "found"):
        table.add_column(head)
    for finding in findings:
        table.add_row(finding.check, Text(finding.state, STYLES[finding.state]), Text(finding.words))
    console = open_console(160)
    console.print(table)
    console.print(f"{verdict(findings)} ({seconds:.0f} s)")


def where(site: Site) -> str:
    """The mesh and the processes, in words."""
    from jaxtrain.mesh import describe_mesh

    mesh = describe_mesh(site.mesh) if site.mesh is not None else "no mesh"
    processes = f"{len(site.hosts)} processes on {len(set(site.hosts))} host(s)" if len(site.hosts) > 1 else "one process"
    return f"{mesh}, {processes}"


def verdict(findings: Sequence[Finding]) -> str:
    """One line."""
    failed = sorted({finding.check for finding in findings if finding.state == "failed"})
    warned = sorted({finding.check for finding in findings if finding.state == "warning"})
    if failed:
        return f"this run would fail: {', '.join(failed)}"
    return "nothing stands in the way" + (f"; look at: {', '.join(warned)}" if warned else "")


def main(arguments: Sequence[str]) -> int:
    """Parses, joins the other processes, checks, prints; returns the exit code."""
    flags, config = parse_with_flags(arguments, PreflightFlags, DESCRIPTION, PROG)
    if not 1 <= flags.patience <= 86400:
        raise UsageError(f"--patience={flags.patience}: give seconds, from 1 to 86400")
    clock = Stopwatch()
    place = distributed.start(config.distributed)
    with Watchdog(config, Heartbeat.from_environment()) as watchdog:
        site, findings = examine(config, flags, watchdog.heartbeat)
    good, seconds = all(finding.state != "failed" for finding in findings), clock()
    if place is None or place.process == 0:
        rows = [dataclasses.asdict(finding) for finding in findings]
        if flags.json:
            print(json.dumps({"good": good, "seconds": seconds, "where": where(site), "findings": rows}))
        else:
            show(site, findings, seconds)
    if not good:
        print(f"error: {verdict(findings)}", file=sys.stderr)
    return EXIT_DONE if good else EXIT_ERROR
