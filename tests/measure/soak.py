"""Thousands of steps of the quickstart with a random fault about every fifty: the same parameters as without, bit for bit.

    .venv/bin/python -m tests.measure.soak --steps=2000 --folder=runs/soak

runs it without faults, then with them (two processes of one fake device under the supervisor), and compares the losses, every
token id and every array of the last checkpoint. Prints the faults and the goodput; exit code 0 if all is equal. The same
seed gives the same faults, and a soak that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time
from pathlib import Path

from jaxtrain.errors import EXIT_DONE, EXIT_STOPPED
from tests.faults.runs import Faulty
from tests.measure.soaked import EVERY

CONFIG = "--config=tests/measure/soaked.py"
LAUNCHER = ("--processes=2", "--devices_per_process=1")
LEFT_ALONE = (EXIT_STOPPED, -9)  # how the supervisor ends where one process was told to stop, or itself was killed

# What happens at a step, by the newest checkpoint before it and the next one after it.
DEEDS = (
    "kill",
    "kill",
    "throw",
    "stop",
    "hang",
    "terminate",
    "kill_supervisor",
    "kill_in_save:{next}",
    "saved:{newest}+flip:{newest}+kill",
    "saved:{newest}+truncate:{newest}+kill",
    "saved:{newest}+fake:{newest}+kill",
)


def make_plan(steps: int, every: int, chance: random.Random) -> list[list[tuple[int, int, str]]]:
    """One fault a life, `every` steps apart in the mean, in a random process."""
    lives, step = [], 0
    while True:
        step += chance.randint(every // 2, every + every // 2)
        newest = (step - 1) // EVERY * EVERY
        if newest < EVERY or newest + EVERY >= steps:
            if step >= steps:
                return lives
            continue
        deed = chance.choice(DEEDS).format(newest=newest, next=newest + EVERY)
        lives.append([(step, chance.randrange(2), deed)])


def keep_going(run: Faulty) -> float:
    """Runs the launcher until the run is done, as whatever starts it would; returns seconds."""
    started = time.monotonic()
    while (code := run.run(config=CONFIG, seconds=24 * 3600)) in LEFT_ALONE:
        run.wait_for_processes()
    if code != EXIT_DONE:
        sys.exit(f"the launcher ended with {code}: {run.log[-3000:]}")
    return time.monotonic() - started


def main() -> int:
    """Both runs, and what they differ in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between two faults, in the mean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    flags = parser.parse_args()
    folder = flags.folder.absolute()
    # Compiled as a run compiles, not as tests do: here the steps take the time.
    whole, run = (Faulty(folder / name, flags.steps, "", LAUNCHER) for name in ("whole", "faults"))
    plan = make_plan(flags.steps, flags.every, random.Random(flags.seed))
    whole.plan()
    run.plan(*plan)
    seconds = [keep_going(one) for one in (whole, run)]
    print(f"{flags.steps} steps: {seconds[0]:.0f} s without faults, {seconds[1]:.0f} s with {len(plan)}:")
    names = collections.Counter(deed.partition(":")[0] if "+" not in deed else deed for ((_, _, deed),) in plan)
    kinds = collections.Counter("".join(c for c in name if not c.isdigit()).replace(":", "") for name in names.elements())
    print("  " + ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())))
    print(run.log.splitlines()[-1])
    differences = [
        name
        for name, of in (("losses", Faulty.losses), ("arrays", Faulty.final_checksums), ("token ids", Faulty.token_ids))
        if of(whole) != of(run)
    ]
    fired = len(list(run.folder.glob("fault-*")))
    print(f"{fired} faults happened; " + (f"DIFFERENT: {', '.join(differences)}" if differences else "all equal, bit for bit"))
    return int(bool(differences) or fired != len(plan))


if __name__ == "__main__":
    sys.exit(main())
