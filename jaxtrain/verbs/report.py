"""`jaxtrain report runs/one runs/other --html=report.html`: what runs did, side by side, as one page or as tables.

Exit codes: 0 done, 1 the page cannot be written, 2 wrong usage, or a folder that is no run's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtrain.command import Usage, parse
from jaxtrain.errors import EXIT_DONE
from jaxtrain.files import check_output, write_output
from jaxtrain.text import open_console, tell

WIDTH = 140
"""Columns of the tables without a terminal."""


@dataclass(frozen=True)
class ReportFlags:
    """Flags of `jaxtrain report`."""

    runs: tuple[str, ...]
    """Folders of runs, done or under way."""
    html: str = ""
    """File for one page with curves, nothing from the net and no script; else tables are printed."""
    overwrite: bool = False
    """Let --html replace an existing file."""


USAGE = Usage(
    "report",
    "Report runs side by side: curves over tokens, FLOPs and time, measures, what differs in their configs, stages, faults and "
    "restarts, goodput, energy and samples.",
    ReportFlags,
    words=("runs",),
    config="none",
)


def main(arguments: Sequence[str]) -> int:
    """Parse, read, print or write; return the exit code."""
    flags = parse(USAGE, arguments).own
    if flags.html:
        check_output("--html", flags.html, flags.overwrite)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # must not take a GPU away from a run

    from jaxtrain.report.page import render, tables
    from jaxtrain.report.runs import read_runs
    from jaxtrain.tables import print_table

    runs = read_runs(flags.runs)
    if not flags.html:
        console = open_console(WIDTH)
        for table in tables(runs):
            print_table(console, table)
        return EXIT_DONE
    write_output("--html", flags.html, render(runs))
    tell(f"wrote {flags.html}")
    return EXIT_DONE
