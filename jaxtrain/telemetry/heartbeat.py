"""Record what a process is doing, for `launch.watchdog`, a thread of the process that reads it once a second.

JAX's own heartbeats come from a separate thread, so a process that is stuck in Python seems alive to its peers for ever
(measured: over 119 s, then killed). A supervisor names a file in JAXTRAIN_HEARTBEAT and finds the record there, one line, with
the number of times that the watchdog has read it, and so sees whether the process still answers. On SIGUSR2 a process writes
the stacks of all its threads beside that file.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

VARIABLE = "JAXTRAIN_HEARTBEAT"
STACKS_VARIABLE = "JAXTRAIN_STACKS"
"""Names the file for stacks; the default lies beside the heartbeat (`stacks_beside`)."""
_WIDTH = 96


@dataclass(frozen=True)
class Doing:
    """A process's last record of its progress."""

    dispatched: int = 0
    """Newest dispatched step."""
    done: int = 0
    """Newest step whose metrics have been read."""
    phase: str = "starting"
    """The work that steps wait for ("compiling", "saving"); empty while training."""
    ticks: int = 0
    """Number of the watchdog's checks."""


class Heartbeat:
    """Records what this process is doing.

    Args:
      path: file for a supervisor, or None.
    """

    def __init__(self, path: Path | None = None):
        self.doing = Doing()
        self._ticks, self._lock = 0, threading.Lock()
        self._file: int | None = None
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            self._stacks = open_stacks(path)
            faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._write(self.doing)

    @classmethod
    def from_environment(cls) -> Heartbeat:
        """Return a heartbeat that writes the file named in JAXTRAIN_HEARTBEAT, if any."""
        path = os.environ.get(VARIABLE)
        return cls(Path(path) if path else None)

    def step(self, dispatched: int | None = None, done: int | None = None) -> None:
        """Record that a step was dispatched, or is done; either ends the phase."""
        now = self.doing
        dispatched, done = now.dispatched if dispatched is None else dispatched, now.done if done is None else done
        self._write(replace(now, dispatched=dispatched, done=done, phase=""))

    def phase(self, words: str) -> None:
        """Record the work that steps wait for; empty when it is over."""
        self._write(replace(self.doing, phase=words))

    def tick(self) -> None:
        """Record one check of the watchdog; called from its thread."""
        self._ticks += 1
        self._write(None)

    def _write(self, doing: Doing | None) -> None:
        with self._lock:
            self.doing = doing = doing or self.doing
            if self._file is not None:
                line = f"{doing.dispatched} {doing.done} {self._ticks} {doing.phase}"[: _WIDTH - 1].ljust(_WIDTH - 1)
                os.pwrite(self._file, line.encode() + b"\n", 0)


def read_heartbeat(path: Path) -> Doing:
    """Return the last record in that file; a fresh `Doing` before the first."""
    try:
        dispatched, done, ticks, phase = path.read_text(encoding="utf-8", errors="replace").split(" ", 3)
        return Doing(int(dispatched), int(done), phase.strip(), int(ticks))
    except (OSError, ValueError):
        return Doing()


def open_stacks(heartbeat: Path) -> IO[str]:
    """Open the file for this process's stacks; standard error if it cannot be made, as on a full disk."""
    try:
        path = os.environ.get(STACKS_VARIABLE) or stacks_beside(heartbeat)
        return open(path, "w", encoding="utf-8")  # noqa: SIM115, for the life of the process
    except OSError:
        return sys.stderr


def stacks_beside(path: Path) -> Path:
    """Return the file into which a process with that heartbeat writes its stacks."""
    return path.with_suffix(".stacks")


def innermost(stacks: Path) -> str:
    """Return the main thread's innermost call of this package in a stacks file: "train/loop.py:75 in _read".

    Without one, return the innermost call of any code; empty if nothing was written (a frozen process cannot).
    """
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
