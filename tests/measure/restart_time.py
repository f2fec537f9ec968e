"""How long a run of four processes stands still when one of them is killed: from SIGKILL to the end of the next step.

    .venv/bin/python -m tests.measure.restart_time

Kills each rank in turn, process 0 (the coordinator) last, in one supervised run of the tests' tiny model with a warm
compilation cache. Nearly all of it is the start of four Pythons; the load of the machine is printed with it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from jaxtrain.errors import EXIT_DONE
from tests.faults.runs import Faulty


def main() -> int:
    """Runs, and prints the seconds of each kill."""
    folder = Path(tempfile.mkdtemp())
    try:
        run = Faulty(folder, steps=24)
        ranks = (1, 2, 3, 0)
        run.plan(*([(6 + 4 * i, rank, f"saved:{4 + 4 * i}+kill")] for i, rank in enumerate(ranks)))
        if run.run() != EXIT_DONE:
            print(run.log[-3000:])
            return 1
        done = sorted((row["time"], row["starter"]) for row in run.records() if "done" in row)
        for life, rank in enumerate(ranks):
            killed = next(row["time"] for row in run.records() if "killed" in row and row["starter"].endswith(f"{life + 1})"))
            ended = next(row["time"] for row in run.events("end") if row["generation"] == life + 1)
            first = min(when for when, starter in done if starter.endswith(f"(generation {life + 2})"))
            print(f"kill -9 of process {rank}: all had ended after {ended - killed:.1f} s, ", end="")
            print(
                f"the next step was done after {first - killed:.1f} s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
            )
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
