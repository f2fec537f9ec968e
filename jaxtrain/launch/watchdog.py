"""A thread in every process that ends it if it, or a peer that it waits for, hangs or has ended the run.

Heartbeats of JAX's runtime come from C++, so a stuck process looks alive to its peers for ever, and a process that refuses
leaves them waiting. The thread checks once a second. It publishes this process's position in the key-value store. If nothing
has moved for longer than its limit, it compares positions with the peers, names the one that is behind, writes the stacks of
all threads, and posts a failure; if it finds a peer's failure, it ends this process with one line.

| what does not move | limit | |---|---| | a step | distributed.hang_seconds, or 20 times the usual step | | the first step, and
whatever steps wait for: saving, restoring, validating, a barrier | distributed.phase_seconds | | reading data, compiling,
copies from and to a mirror | a day |

A process waits for a peer as long as that peer's own limit. Only time that the thread itself sees pass is counted: a machine or
process that was suspended has not hung.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxtrain import processes
from jaxtrain.config import Config, DistributedConfig
from jaxtrain.errors import EXIT_ERROR, EXIT_FAULT, EXIT_PEER, EXIT_USAGE
from jaxtrain.launch import distributed
from jaxtrain.processes import LONG_SECONDS, Failure
from jaxtrain.signals import begin_timer
from jaxtrain.telemetry.heartbeat import Heartbeat, innermost

POLL_SECONDS = 1.0
USUAL_STEPS = 20
"""A step may take this many times the median of the last hundred."""
LONG_PHASES = ("reading data", "compiling", "opening checkpoints", "ending", "preflight", "replaying")
"""First words of the long phases. Opening checkpoints may download one; preflight checks have their own limit."""
FOLDER = "stacks"
"""Folder for stacks in run_dir."""


class Position(NamedTuple):
    """A process's progress; of two that wait for each other, the lower one is behind."""

    dispatched: int = 0
    """Newest dispatched step."""
    done: int = 0
    """Newest step whose metrics have been read."""
    collectives: int = 0
    """Number of host barriers and exchanges entered."""
    phase: str = "starting"
    """The work that steps wait for; empty while training."""

    def is_behind(self, other: Position) -> bool:
        return self[:3] < other[:3]

    def __str__(self) -> str:
        return f"at step {self.dispatched}" + (f", {self.phase}" if self.phase else "")


class Stall:
    """Decides whether a process has hung, from its own positions and those of its peers, as time passes.

    Args:
      config: the limits.
      process: this process's index.
    """

    def __init__(self, config: DistributedConfig, process: int):
        self._config, self._process = config, process
        self._position, self._age, self._since_comparison = Position(), 0.0, 0.0
        self._steps: deque[float] = deque(maxlen=100)
        self._behind: dict[int, Position] | None = None

    def limit(self, position: Position) -> float:
        """Return the seconds that a process may stay at a position; infinite if the config says 0."""
        if position.phase.startswith(LONG_PHASES):
            return LONG_SECONDS
        if position.phase or position.done == 0 or position.done == position.dispatched:
            return self._config.phase_seconds or float("inf")
        usual = USUAL_STEPS * statistics.median(self._steps) if self._steps else 0.0
        return max(self._config.hang_seconds, usual) if self._config.hang_seconds else float("inf")

    def see(self, position: Position, seconds: float, peers: Callable[[], dict[int, Position]]) -> Failure | None:
        """Return a failure if this process, or one that it waits for, has not moved for longer than its limit.

        Args:
          position: this process's position.
          seconds: time since the last call.
          peers: () -> newest positions of all processes; called rarely, and not while this process moves.
        """
        self._age += seconds
        self._since_comparison += seconds
        if position != self._position:
            steps = position.done - self._position.done
            if steps > 0 and self._position.done > 0:
                self._steps.append(self._age / steps)
            self._position, self._age, self._behind = position, 0.0, None
            return None
        limit = self.limit(position)
        if self._age < limit / 4 or self._since_comparison < limit / 8:
            return None
        self._since_comparison = 0.0
        others = {process: other for process, other in peers().items() if process != self._process}
        behind = {process: other for process, other in others.items() if other.is_behind(position)}
        if self._behind is not None and behind != self._behind:  # a peer has moved
            self._age = limit / 4
        self._behind = behind
        allowed = max([limit, *map(self.limit, behind.values())])
        return self._failure(behind, others) if self._age > allowed else None

    def _failure(self, behind: dict[int, Position], others: dict[int, Position]) -> Failure:
        culprit, position = min(behind.items(), key=lambda item: item[1], default=(self._process, self._position))
        count = len(others) + 1
        if count == 1:
            name = "the run is"
        elif not behind and not any(position.is_behind(other) for other in others.values()):
            name = f"each of {count} processes is"
        else:
            name = f"process {culprit} of {count} is"
        return Failure(culprit, EXIT_FAULT, f"{name} {position} and has not moved for {self._age:.0f} s", hang=True)


class Watchdog:
    """The watchdog thread. Start it after the process has joined its peers.

    Args:
      config: limits, and run_dir, which gets the stacks.
      heartbeat: the process's record of its progress.
      before_exit: restores the terminal before the process ends.
    """

    def __init__(self, config: Config, heartbeat: Heartbeat, before_exit: Callable[[], None] = lambda: None):
        self.heartbeat, self.before_exit = heartbeat, before_exit
        self._stacks = config.directory / FOLDER
        self._stall = Stall(config.distributed, processes.own_index())
        self._published = ""
        self._stopping = threading.Event()

    def __enter__(self) -> Watchdog:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        atexit.register(self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self.before_exit = lambda: None
        if not processes.are_several():  # with several, it runs until all processes have ended
            self._stopping.set()

    def _stop(self) -> None:
        """End the thread before the interpreter exits: Python would unwind it through jax's C++, which aborts."""
        self._stopping.set()
        self._thread.join(10 * POLL_SECONDS)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopping.wait(POLL_SECONDS):
            now = time.monotonic()
            failure = self.look(min(now - last, 2 * POLL_SECONDS))
            last = now
            if failure is not None:
                self._end(failure)

    def look(self, seconds: float) -> Failure | None:
        """Check once, `seconds` after the last time; return the failure, own or a peer's, that ends this process."""
        self.heartbeat.tick()
        doing = self.heartbeat.doing
        position = Position(doing.dispatched, doing.done, processes.collectives_entered(), doing.phase)
        try:
            self._publish(position)
            found = self._stall.see(position, seconds, _positions)
            if found is not None:
                processes.report(found)
                found = processes.reported() or found
            elif processes.are_several():
                found = processes.reported()
        except RuntimeError:  # the key-value store and process 0 are gone: jax's runtime ends this process
            return None
        # A process that has announced its own failure ends by itself.
        return None if processes.announced() is not None and not (found and found.hang) else found

    def _publish(self, position: Position) -> None:
        text = json.dumps(position)
        if processes.are_several() and text != self._published:
            processes.tell(f"position/{processes.own_index()}", text)
            self._published = text

    def _end(self, failure: Failure) -> None:
        begin_timer(10.0, os._exit, code_for(failure))  # in case the terminal hangs
        self.before_exit()
        where = self._write_stacks() if failure.hang else ""
        print(f"error: {words_for(failure, where, self._stacks)}", file=sys.stderr, flush=True)
        distributed.end_at_once(code_for(failure))

    def _write_stacks(self) -> str:
        """Write the stacks of all threads to run_dir and stderr; return where the main thread is."""
        path = self._stacks / f"process-{processes.own_index()}.txt"
        where = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = innermost(path)
        except OSError as error:
            print(f"warning    no stacks in {path}: {error}", file=sys.stderr)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        return where


def code_for(failure: Failure) -> int:
    """Return the exit code of a process that ends because of a failure.

    It is the peer's own code if that is 1 or 2, since a restart would end the same way, or if a signal ended the peer.
    """
    if failure.process == processes.own_index() or failure.code in (EXIT_ERROR, EXIT_USAGE) or failure.code > 128:
        return failure.code
    return EXIT_PEER


def words_for(failure: Failure, where: str, stacks: Path) -> str:
    """Return the line that a process prints when it ends because of a failure."""
    if failure.hang:
        own = failure.process == processes.own_index() and where
        return f"{failure.reason}{f' ({where})' if own else ''}; stacks in {stacks}"
    return distributed.blame(failure)


def _positions() -> dict[int, Position]:
    return {int(process): Position(*json.loads(text)) for process, text in processes.read_folder("position").items()}
