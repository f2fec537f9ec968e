"""Record what a process does right now, for `launch.watchdog`, a thread of the process that reads it once a second.

JAX's own heartbeats come from a thread of their own, so a process that is stuck in Python seems alive to its peers for ever
(measured: over 119 s, then killed). A supervisor that names a file in JAXTRAIN_HEARTBEAT finds the record there, one line, with
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
"""Names the file for stacks; without it that beside the heartbeat (`stacks_beside`)."""
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
    ticks: int = 0
    """How often the watchdog has looked."""


class Heartbeat:
    """Records what this process does.

    Args:
      path: of a file for a supervisor, or None.
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
        """Record that a step was begun, or is done; either way no phase keeps the steps waiting any more."""
        now = self.doing
        dispatched, done = now.dispatched if dispatched is None else dispatched, now.done if done is None else done
        self._write(replace(now, dispatched=dispatched, done=done, phase=""))

    def phase(self, words: str) -> None:
        """Record that something keeps the steps waiting; empty when it is over."""
        self._write(replace(self.doing, phase=words))

    def tick(self) -> None:
        """Record that the watchdog looked; from its thread."""
        self._ticks += 1
        self._write(None)

    def _write(self, doing: Doing | None) -> None:
        with self._lock:
            self.doing = doing = doing or self.doing
            if self._file is not None:
                line = f"{doing.dispatched} {doing.done} {self._ticks} {doing.phase}"[: _WIDTH - 1].ljust(_WIDTH - 1)
                os.pwrite(self._file, line.encode() + b"\n", 0)


def read_heartbeat(path: Path) -> Doing:
    """Return what the process of that file last said; a fresh `Doing` where it has not begun to."""
    try:
        dispatched, done, ticks, phase = path.read_text(encoding="utf-8", errors="replace").split(" ", 3)
        return Doing(int(dispatched), int(done), phase.strip(), int(ticks))
    except (OSError, ValueError):
        return Doing()


def open_stacks(heartbeat: Path) -> IO[str]:
    """Return the file for this process's stacks; standard error where it cannot be made, as on a full disk."""
    try:
        path = os.environ.get(STACKS_VARIABLE) or stacks_beside(heartbeat)
        return open(path, "w", encoding="utf-8")  # noqa: SIM115, for the life of the process
    except OSError:
        return sys.stderr


def stacks_beside(path: Path) -> Path:
    """Return where a process with that heartbeat writes its stacks."""
    return path.with_suffix(".stacks")


def innermost(stacks: Path) -> str:
    """Return where the main thread of a process is, by the stacks that it wrote: "train/loop.py:75 in _read", the innermost
    call of this package, or of whatever runs where there is none. Empty where nothing was written (a frozen process cannot).
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
