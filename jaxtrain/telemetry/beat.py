"""What a process does right now, in a file of one line that costs a microsecond to write: how a watcher outside sees a hang.

JAX's heartbeats come from a thread of their own, so a process that is stuck in Python is alive to all its peers, for ever
(measured: over 119 s, then killed). Whoever starts the processes names a file in JAXTRAIN_BEAT; without it nothing is written.
On SIGUSR2 a process writes the stacks of all its threads beside it.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

VARIABLE = "JAXTRAIN_BEAT"
STACKS_VARIABLE = "JAXTRAIN_STACKS"
"""Names the file for stacks; without it that beside the beat (`stacks_beside`)."""
_WIDTH = 96


@dataclass(frozen=True)
class Doing:
    """What a process was doing when it last said so."""

    dispatched: int = 0
    """The newest step that was begun."""
    done: int = 0
    """The newest step whose metrics are there."""
    phase: str = "starting"
    """What keeps the steps waiting ("compiling", "saving"); empty while it trains."""


class Beat:
    """Writes what this process does."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._doing = Doing()
        self._stacks = open_stacks(path)
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._write(self._doing)

    @classmethod
    def from_environment(cls) -> Beat | None:
        """The beat that JAXTRAIN_BEAT asks for, or None."""
        path = os.environ.get(VARIABLE)
        return cls(Path(path)) if path else None

    def step(self, dispatched: int | None = None, done: int | None = None) -> None:
        """A step was begun, or is done; either way no phase keeps the steps waiting any more."""
        now = self._doing
        self._write(Doing(now.dispatched if dispatched is None else dispatched, now.done if done is None else done, ""))

    def phase(self, words: str) -> None:
        """Something keeps the steps waiting; empty when it is over."""
        self._write(Doing(self._doing.dispatched, self._doing.done, words))

    def _write(self, doing: Doing) -> None:
        self._doing = doing
        os.pwrite(
            self._file, f"{doing.dispatched} {doing.done} {doing.phase}"[: _WIDTH - 1].ljust(_WIDTH - 1).encode() + b"\n", 0
        )


def read_beat(path: Path) -> Doing:
    """What the process of that file last said; a fresh `Doing` where it has not begun to."""
    try:
        dispatched, done, phase = path.read_text(encoding="utf-8", errors="replace").split(" ", 2)
        return Doing(int(dispatched), int(done), phase.strip())
    except (OSError, ValueError):
        return Doing()


def open_stacks(beat: Path) -> IO[str]:
    """Return the file for this process's stacks; standard error where it cannot be made, as on a full disk."""
    try:
        path = os.environ.get(STACKS_VARIABLE) or stacks_beside(beat)
        return open(path, "w", encoding="utf-8")  # noqa: SIM115, for the life of the process
    except OSError:
        return sys.stderr


def stacks_beside(path: Path) -> Path:
    """Where a process with that beat writes its stacks."""
    return path.with_suffix(".stacks")


def innermost(stacks: Path) -> str:
    """Where the main thread of a process is, by the stacks that it wrote: "train/loop.py:75 in _read", the innermost call of
    this package, or of whatever runs where there is none. Empty where nothing was written (a frozen process cannot)."""
    try:
        threads = stacks.read_text(encoding="utf-8", errors="replace").split("\n\n")
    except OSError:
        return ""
    for thread in threads:
        calls = re.findall(r'^  File "(.*)", line (\d+) in (\S+)$', thread, re.MULTILINE)
        if calls and calls[-1][2] in ("<module>", "_run_module_as_main"):  # the main thread's outermost
            ours = [call for call in calls if "/jaxtrain/" in call[0]]
            file, line, function = (ours or calls)[0]
            return f"{file.rpartition('/jaxtrain/')[2]}:{line} in {function}"
    return ""
