"""The table of signals x phases: `python -m tests.faults.signal_table [PHASE ...]` signals a run in each phase in each way,
and prints the exit code, the newest saved step and what was said; exit code 1 if a cell is not as promised.

tests/faults/test_signal_table.py holds a few of the cells.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.checkpoint.stored import committed_steps
from tests import quick
from tests.faults.signalled import EVERY, HALT, STEPS

ROOT = Path(__file__).parents[2]
PHASES = ("import", "data", "compile", "step", "save", "validation", "sampling", "end")
SAVED_BEFORE = {"step": EVERY, "validation": EVERY, "sampling": STEPS, "end": STEPS}
STOPS_AFTER = {"step": HALT, "save": EVERY, "validation": 4}
"""The step that a run which is asked to end in this phase saves."""


TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


@dataclass(frozen=True)
class Way:
    """One way of being asked to end."""

    name: str
    first: signal.Signals
    send: Callable[[Run], None]
    or_first: signal.Signals | None = None
    """Another one that may be heard first: of two that wait the kernel gives either to a thread."""
    insists: signal.Signals | None = None
    """The signal that ends it at once, in words and exit code."""
    terminal: bool = False
    """The run has a terminal of its own, which is closed."""
    processes: int = 1
    """With more than one the launcher is signalled."""


@dataclass
class Run:
    """A run under way: its first process, and what it has said."""

    process: subprocess.Popen
    folder: Path
    master: int
    said: bytearray
    reader: threading.Thread

    def kill(self, *signals: signal.Signals, apart: float = 0.0) -> None:
        """Sends the first process signals, `apart` seconds apart."""
        for i, number in enumerate(signals):
            time.sleep(apart if i else 0)
            self.process.send_signal(number)


def insist(run: Run) -> None:
    run.kill(signal.SIGINT, signal.SIGINT, apart=1.3)


def passed_on(run: Run) -> None:
    """The process group has it, and whoever started the run passes it on."""
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(0.05)
    run.kill(signal.SIGTERM)


def close_terminal(run: Run) -> None:
    """The kernel tells the process group in front, and then the shell does."""
    os.close(run.master)
    time.sleep(0.02)
    run.kill(signal.SIGHUP)


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
WAYS = (
    Way("INT", INT, lambda run: run.kill(INT)),
    Way("TERM", TERM, lambda run: run.kill(TERM)),
    Way("HUP", HUP, lambda run: run.kill(HUP)),
    Way("HUP HUP", HUP, lambda run: run.kill(HUP, HUP, apart=0.05)),
    Way("INT TERM", INT, lambda run: run.kill(INT, TERM, apart=0.01), or_first=TERM),
    Way("group INT", INT, passed_on, or_first=TERM),
    Way("terminal closed", HUP, close_terminal, terminal=True),
    Way("INT, 1.3 s, INT", INT, insist, insists=INT),
    Way("launch INT", INT, lambda run: run.kill(INT), processes=2),
)


def start(folder: Path, phase: str, way: Way) -> Run:
    """A run that halts in the phase, with its output in a pipe or on a terminal."""
    config = ["--config=tests/faults/signalled.py", f"--run_dir={folder / 'run'}"]
    launch = ["jaxtrain", "launch", f"--processes={way.processes}", "--devices_per_process=1", "--", "--mesh.data=2"]
    command = [sys.executable, "-m", *(launch if way.processes > 1 else ["jaxtrain.main"]), *config]
    if way.terminal:
        command = [sys.executable, "-c", TAKE_TERMINAL, *command]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_FLAGS", "JAX", "PYTEST"))}
    ours = {"JAX_PLATFORMS": "cpu", "JAXTRAIN_TEST_PHASE": phase, "JAXTRAIN_TEST_FOLDER": str(folder)}
    master, slave = pty.openpty() if way.terminal else os.pipe()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=kept | ours | {"XLA_FLAGS": quick.FLAGS, "TERM": "xterm"},
        stdin=slave if way.terminal else subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    said = bytearray()
    reader = threading.Thread(
        target=drain, args=(os.dup(master) if not way.terminal else master, said, way.terminal), daemon=True
    )
    reader.start()
    return Run(process, folder, master, said, reader)


def drain(descriptor: int, said: bytearray, terminal: bool) -> None:
    """Reads until the other end is closed; a terminal is polled, since a read that is under way keeps it open."""
    if terminal:
        os.set_blocking(descriptor, False)
    while True:
        try:
            data = os.read(descriptor, 65536)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                return
            time.sleep(0.005)
            continue
        if not data:
            return
        said += data


def try_out(folder: Path, phase: str, way: Way) -> tuple[int, int, list[str]]:
    """(exit code, newest saved step or 0, lines) of a run that is signalled in a phase."""
    run = start(folder, phase, way)
    try:
        until = time.monotonic() + 120
        while not (folder / "reached").exists():
            assert run.process.poll() is None, run.said.decode()
            assert time.monotonic() < until, run.said.decode()
            time.sleep(0.01)
        way.send(run)
        (folder / "go").touch()
        code = run.process.wait(120)
    finally:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
    run.reader.join(10)
    saved = committed_steps(folder / "run" / "checkpoints")
    return code, saved[-1] if saved else 0, run.said.decode().splitlines()


def promised(phase: str, way: Way) -> tuple[int, int, str]:
    """(exit code, newest saved step, what one of the lines says; "" for no such line)"""
    several, name = way.processes > 1, way.first.name
    at_once = way.insists is not None and phase not in ("import", "data", "end")
    if phase == "import":
        words = f"stopped by {name} before training began" if several else f"interrupted by {name}"
        return 128 + way.first, 0, "" if way.terminal else words
    if phase in ("sampling", "end") and not at_once:
        return 0, STEPS, "" if way.terminal else f"done       all {STEPS} steps"
    if at_once:
        lost = {"compile": "no step was taken", "save": "steps 1 to 3 are not saved", "validation": "step 4 is not saved"}
        lost |= {
            "step": f"step {HALT - 1} is not saved",
            "sampling": f"step {STEPS} is saved, and nothing is lost",
        }
        return 128 + way.first, SAVED_BEFORE.get(phase, 0), lost[phase]
    if phase in ("data", "compile") and not several:
        return 76, 0, "" if way.terminal else f"stopped: {name} received outside the training loop"
    if several:  # they agree on a step in the loop
        return 76, -1, "stopped    after saving step"
    return 76, STOPS_AFTER[phase], "" if way.terminal else f"stopped    after saving step {STOPS_AFTER[phase]}"


def judge(outcome: tuple[int, int, list[str]], phase: str, way: Way) -> bool:
    """Whether a run came out as promised; of several processes any step may be the one that they save."""
    code, saved, lines = outcome
    ways = [way, *([dataclasses.replace(way, first=way.or_first)] if way.or_first else [])]
    return any(
        code == promise[0]
        and (saved == promise[1] or (promise[1] == -1 and saved > 0))
        and any(promise[2] in line for line in [*lines, ""])
        for promise in (promised(phase, each) for each in ways)
    )


def main(phases: Sequence[str]) -> int:
    """Tries every cell out."""
    wrong = 0
    print(f"| phase | {' | '.join(way.name for way in WAYS)} |\n|{'---|' * (len(WAYS) + 1)}")
    for phase in phases or PHASES:
        cells = []
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                outcome, promise = try_out(Path(folder), phase, way), promised(phase, way)
            good = judge(outcome, phase, way)
            wrong += not good
            cells.append(f"{outcome[0]}, step {outcome[1]}" + ("" if good else " WRONG"))
            words = next((line for line in outcome[2] if promise[2] in line), "") if promise[2] else ""
            print(f"{phase}, {way.name}: {cells[-1]}; {words}", file=sys.stderr, flush=True)
            if not good:
                print(f"  promised {promise}; said:", *outcome[2][-12:], sep="\n    ", file=sys.stderr, flush=True)
        print(f"| {phase} | {' | '.join(cells)} |", flush=True)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
