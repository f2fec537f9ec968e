"""`jaxtrain preflight --config=configs/7b.py`: check in half a minute whether a run would work here.

Runs as the training command does, once a process: alone, under `jaxtrain launch --preflight`, SLURM, Open MPI or any other
starter.

Exit codes: 0 no failure (there may be warnings), 1 something would fail the run, 2 wrong usage, 70 a check hung.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtrain.command import Usage, parse
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, UsageError
from jaxtrain.text import open_console

if TYPE_CHECKING:
    from jaxtrain.preflight.checks import Finding

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


@dataclass(frozen=True)
class PreflightFlags:
    """Flags of `jaxtrain preflight`."""

    json: bool = False
    """Print JSON instead of a table."""
    patience: float = 120.0
    """Time limit of one check in seconds; reading text for the first time tokenizes all of it, and may need more."""


USAGE = Usage(
    "preflight", "Check devices, links, folders, clocks, software, memory and data for a run, without training.", PreflightFlags
)


def main(arguments: Sequence[str]) -> int:
    """Parse, join the other processes, check, print; return the exit code."""
    line = parse(USAGE, arguments)
    flags, config = line.own, line.config
    if not 1 <= flags.patience <= 86400:
        raise UsageError(f"--patience={flags.patience}: give seconds, from 1 to 86400")

    from jaxtrain.launch import distributed
    from jaxtrain.launch.watchdog import Watchdog
    from jaxtrain.preflight.examine import examine, verdict, where
    from jaxtrain.telemetry.heartbeat import Heartbeat

    started = time.perf_counter()
    place = distributed.start(config.distributed)
    with Watchdog(config, Heartbeat.from_environment()) as watchdog:
        site, findings = examine(config, flags.patience, watchdog.heartbeat)
    good, seconds = all(finding.state != "failed" for finding in findings), time.perf_counter() - started
    if place is None or place.process == 0:
        if flags.json:
            rows = [dataclasses.asdict(finding) for finding in findings]
            print(json.dumps({"good": good, "seconds": seconds, "where": where(site), "findings": rows}))
        else:
            show(f"preflight of {site.config.name}: {where(site)}", findings, f"{verdict(findings)} ({seconds:.0f} s)")
    if not good:
        print(f"error: {verdict(findings)}", file=sys.stderr)
    return EXIT_DONE if good else EXIT_ERROR


def show(title: str, findings: Sequence[Finding], verdict: str) -> None:
    """Print the table and the verdict."""
    from rich.text import Text

    from jaxtrain.tables import plain_table, print_table

    table = plain_table(title, ["check", "state", "found"])
    for finding in findings:
        table.add_row(finding.check, Text(finding.state, STYLES[finding.state]), Text(finding.words))
    console = open_console(160)
    print_table(console, table)
    console.print(verdict)
