"""Keep a run of several processes on one machine going: start them, detect their end and its cause, restart.

Imports no jax, so that a failure of jax cannot break it. A *generation* is one life of all the processes: they start together,
on a fresh port, and when one is lost all end, because a collective needs every one of them.

The culprit is found from what the processes did, in this order: one that the kernel shows as stopped (SIGSTOP); the first to
end by itself with anything but "I lost a peer" (75, JAX's abort, -6, or a line that blames a peer). The watchdog in every
process (`launch.watchdog`) detects a step that hangs; the supervisor checks that the watchdogs answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, EXIT_FAULT, EXIT_PEER, EXIT_STOPPED, EXIT_USAGE, ExplainedError
from jaxtrain.files import AppendedFile
from jaxtrain.launch.distributed import PARENT
from jaxtrain.signals import Request, Watch
from jaxtrain.telemetry.heartbeat import STACKS_VARIABLE, VARIABLE, Doing, innermost, read_heartbeat
from jaxtrain.telemetry.run_log import stamped

POLL_SECONDS = 0.05
_NOISE = re.compile(r"is connected to \d+ peer ranks|^WARNING: All log messages before absl")
_STACK = re.compile(r"^ *@ +0x[0-9a-f]+|^\*\*\* Check failure stack trace")
"""Stack lines of jax's client when it aborts: kept in the process's log, not shown on the screen."""
_UNSTARTED = (128 + signal.SIGTERM, -signal.SIGTERM)  # a process that was asked to end before it trained
_ABORT = -signal.SIGABRT  # jax's client aborts when the coordination service reports a lost task
Kind = Literal["done", "stopped", "refused", "failed", "hung", "resized"]


@dataclass(frozen=True)
class Policy:
    """The supervisor's limits."""

    restarts: int = 10
    """Generations in a row that may fail without a new step before the supervisor gives up."""
    backoff_seconds: float = 1.0
    """Seconds before the first restart; doubles with every failure in a row, to at most a minute."""
    silent_seconds: float = 120.0
    """Seconds without a check of its watchdog after which a process counts as stopped, or stuck in code that holds the GIL."""
    start_seconds: float = 1800.0
    """Seconds that a process may take until its watchdog's first check."""
    grace_seconds: float = 3.0
    """Seconds that the others have to report after the first process is lost."""
    stop_seconds: float = 120.0
    """Seconds that the run has to save and end after a signal."""


@dataclass(frozen=True)
class Ending:
    """The end of a generation."""

    kind: Kind
    words: str
    """The process and its reason, in one line."""
    exit_code: int = EXIT_ERROR
    culprit: int | None = None
    """Index of the process that caused it."""


@dataclass
class Worker:
    """One process of a generation."""

    index: int
    process: subprocess.Popen
    heartbeat: Path
    """File in memory, written by the process: on a full disk a live process must not look like one that hangs."""
    log: Path
    stacks: Path
    said: deque[str] = field(default_factory=lambda: deque(maxlen=1000))
    """Newest lines of its output."""
    doing: Doing = field(default_factory=Doing)
    since: float = 0.0
    """Time of its last new heartbeat."""
    stepped: float = 0.0
    """Time of its last completed step."""
    ended: float | None = None

    @property
    def name(self) -> str:
        return f"process {self.index}"

    def is_frozen(self) -> bool:
        """Return whether the kernel has stopped it (SIGSTOP, a debugger)."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.process.pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
        return False

    def last_words(self) -> str:
        """Return the last line of its log that begins with "error:", else its last line."""
        lines = [line for line in tuple(self.said) if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        return (errors or lines or ["no output"])[-1][:300]

    def blames_a_peer(self) -> bool:
        """Return whether it ended because of another process: by its exit code, or by its last line."""
        named = re.match(r"error: process (\d+) of \d+ (ended the run|is at step)", self.last_words())
        return self.process.returncode in (EXIT_PEER, _ABORT) or (named is not None and int(named[1]) != self.index)


@dataclass
class Goodput:
    """Productive step time as a share of wall time."""

    started: float
    furthest: int = 0
    productive: float = 0.0
    """Seconds of steps beyond all earlier ones."""
    repeated: float = 0.0
    """Seconds of steps computed again because they came after the last checkpoint."""
    before: float = 0.0
    """Seconds of earlier supervisors of this run."""

    @classmethod
    def go_on(cls, events: Path, now: float) -> Goodput:
        """Return the figures as the run's last supervisor wrote them to `events`; new ones if there was none."""
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            last = json.loads(events.read_text(encoding="utf-8").splitlines()[-1])
            return cls(now, last["furthest"], last["productive"], last["repeated"], last["seconds"])
        return cls(now)

    def seconds(self, now: float) -> float:
        """Return the wall time under a supervisor."""
        return self.before + now - self.started

    def step(self, done: int, seconds: float) -> None:
        """Count a step that is done, `seconds` after the one before it in the same generation."""
        if done > self.furthest:
            self.productive += seconds
        else:
            self.repeated += seconds
        self.furthest = max(self.furthest, done)

    def share(self, now: float) -> float:
        """productive step time / wall time."""
        return self.productive / max(self.seconds(now), 1e-9)


class Supervisor:
    """Runs `command` as several processes until it is done, refused, or fails too often.

    Args:
      command: the command of one process.
      size: () -> number of processes in the next generation; when it changes, the run saves and resumes with that many.
      environment: (index, processes) -> a process's environment variables beside the supervisor's own.
      extra: (processes) -> further arguments for a generation of that size: a mesh that fits it.
      folder: folder for logs, heartbeats and events.jsonl.
      say: prints a line.
    """

    def __init__(
        self,
        command: Sequence[str],
        size: Callable[[], int],
        environment: Callable[[int, int], dict[str, str]],
        folder: Path,
        policy: Policy | None = None,
        extra: Callable[[int], Sequence[str]] = lambda processes: (),
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ):
        self._command, self._size, self._environment, self._extra = command, size, environment, extra
        self._folder, self._policy, self._say = folder, policy or Policy(), say
        self._signal: signal.Signals | None = None
        self._insists = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExplainedError(f"{folder} cannot be made: {error.strerror}; give another --run_dir") from error
        self._events = AppendedFile(folder / "events.jsonl", self._tell)
        self.generation = last_generation(folder)
        self.goodput = Goodput.go_on(folder / "events.jsonl", time.monotonic())

    def run(self) -> int:
        """Run to the end; return the exit code (see `launch.distributed`)."""
        failures, furthest = 0, self.goodput.furthest
        with Watch(self._hear):
            while True:
                self.generation += 1
                ending = self._live()
                self._record("end", kind=ending.kind, words=ending.words, exit_code=ending.exit_code, culprit=ending.culprit)
                if ending.kind == "done":
                    self._summarise()
                    return EXIT_DONE
                if ending.kind in ("stopped", "refused") or self._signal is not None:
                    self._tell(ending.words)
                    return ending.exit_code
                if ending.kind == "resized":
                    self._tell(ending.words)
                    continue
                failures = 1 if self.goodput.furthest > furthest else failures + 1
                furthest = self.goodput.furthest
                if failures > self._policy.restarts:
                    self._tell(f"{ending.words}; {failures} failures in a row without a further step: giving up")
                    return ending.exit_code
                wait = min(self._policy.backoff_seconds * 2 ** (failures - 1), 60.0)
                self._tell(f"{ending.words}; restart {failures} in {wait:g} s")
                if self._sleep(wait):
                    return EXIT_STOPPED

    # -----------------------------------------------------------------------------------------------------------------
    # One generation

    def _live(self) -> Ending:
        count = self._size()
        workers = self._start(count)
        try:
            return self._watch(workers)
        finally:
            for worker in workers:
                if worker.process.poll() is None:
                    worker.process.kill()
                worker.process.wait()
                os.close(int(worker.heartbeat.name))

    def _start(self, count: int) -> list[Worker]:
        folder = self._folder / f"generation-{self.generation}"
        with contextlib.suppress(OSError):  # on a full disk logs stay in memory, and stacks go to the logs
            folder.mkdir(parents=True, exist_ok=True)
        coordinator = f"127.0.0.1:{free_port()}"
        self._record("start", processes=count, coordinator=coordinator)
        workers = []
        for index in range(count):
            log, stacks = folder / f"process-{index}.log", folder / f"process-{index}.stacks"
            memory = os.memfd_create(f"heartbeat-{index}")
            heartbeat = Path(f"/proc/self/fd/{memory}")
            environment = os.environ | {
                "JAXTRAIN_COORDINATOR": coordinator,
                "JAXTRAIN_PROCESSES": str(count),
                "JAXTRAIN_PROCESS_ID": str(index),
                "JAXTRAIN_LOCAL_PROCESSES": str(count),
                "JAXTRAIN_LOCAL_PROCESS_ID": str(index),
                "JAXTRAIN_STARTER": f"the supervisor (generation {self.generation})",
                PARENT: str(os.getpid()),
                "PYTHONUNBUFFERED": "1",
                VARIABLE: str(heartbeat),
                STACKS_VARIABLE: str(stacks),
                **self._environment(index, count),
            }
            process = subprocess.Popen(
                [*self._command, *self._extra(count)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(memory,),
                start_new_session=True,  # Ctrl-C reaches only the supervisor, which passes it on once
            )
            workers.append(Worker(index, process, heartbeat, log, stacks, since=time.monotonic()))
            assert process.stdout is not None
            arguments = (process.stdout, workers[-1], index == 0)
            threading.Thread(target=self._collect, args=arguments, name=f"log-{index}", daemon=True).start()
        return workers

    def _collect(self, pipe: IO[bytes], worker: Worker, aloud: bool) -> None:
        """Copy a process's output into its log, process 0's to the screen too. Must keep reading, or the process blocks."""
        with pipe, contextlib.closing(AppendedFile(worker.log, self._tell, keep=lambda path: 0)) as log:
            log.begin()
            for line in pipe:
                text = line.decode(errors="replace")
                if _NOISE.search(text):
                    continue
                worker.said.append(text.rstrip("\n"))
                log.append(line)
                if aloud and not _STACK.search(text):
                    self._say(text.rstrip("\n"))

    def _watch(self, workers: list[Worker]) -> Ending:
        signalled_at: float | None = None
        while True:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            for worker in workers:
                self._look(worker, now)
            if self._insists:
                return self._end_at_once(workers)
            if all(worker.ended is not None for worker in workers) or any(
                worker.ended is not None and worker.process.returncode not in (EXIT_DONE, EXIT_STOPPED) for worker in workers
            ):
                return self._ending(workers)
            wanted = self._size()
            if signalled_at is None and (self._signal is not None or wanted != len(workers)):
                signalled_at = now
                for worker in workers:
                    worker.process.send_signal(signal.SIGTERM)
            if signalled_at is not None and now - signalled_at > self._policy.stop_seconds:
                return Ending("stopped", f"not saved within {self._policy.stop_seconds:g} s of the signal", EXIT_ERROR)
            silent = self._find_silent(workers, now)
            if silent is not None:
                return silent

    def _look(self, worker: Worker, now: float) -> None:
        doing = read_heartbeat(worker.heartbeat)
        if doing != worker.doing:
            if worker.index == 0 and doing.done > worker.doing.done > 0:
                seconds = (now - worker.stepped) / (doing.done - worker.doing.done)
                for step in range(worker.doing.done + 1, doing.done + 1):
                    self.goodput.step(step, seconds)
            elif worker.index == 0 and doing.done:
                self.goodput.furthest = max(self.goodput.furthest, doing.done)
            if doing.done != worker.doing.done or doing.phase:  # a phase does not count as step time
                worker.stepped = now
            worker.doing, worker.since = doing, now
        if worker.ended is None and worker.process.poll() is not None:
            worker.ended = now

    def _end_at_once(self, workers: list[Worker]) -> Ending:
        """Let the processes report which steps are lost, then kill them."""
        for worker in workers:
            worker.process.send_signal(signal.SIGTERM)
        self._give_grace(workers)
        return Ending("stopped", "ended at once by a second signal", 128 + (self._signal or signal.SIGTERM))

    def _give_grace(self, workers: list[Worker]) -> None:
        until = time.monotonic() + self._policy.grace_seconds
        while time.monotonic() < until and any(worker.ended is None for worker in workers):
            time.sleep(POLL_SECONDS)
            for worker in workers:
                self._look(worker, time.monotonic())

    def _ending(self, workers: list[Worker]) -> Ending:
        """Wait a moment for the other processes' reports, then find the first cause."""
        codes = {worker.process.returncode for worker in workers}
        if codes == {EXIT_DONE}:
            return Ending("done", "done", EXIT_DONE)
        if codes <= {EXIT_DONE, EXIT_STOPPED}:
            if self._signal is None and self._size() != len(workers):
                return Ending("resized", f"going on with {self._size()} processes instead of {len(workers)}", EXIT_STOPPED)
            return Ending("stopped", "stopped after saving; the same command goes on from there", EXIT_STOPPED)
        frozen = next((worker for worker in workers if worker.ended is None and worker.is_frozen()), None)
        self._give_grace(workers)
        if self._signal is not None and {worker.process.returncode for worker in workers} <= {*_UNSTARTED, EXIT_STOPPED, None}:
            return Ending("stopped", f"stopped by {self._signal.name} before training began", 128 + self._signal)
        if frozen is not None:
            return Ending("failed", f"{frozen.name} is stopped (state T), and its peers gave it up", EXIT_PEER, frozen.index)
        first = min((w for w in workers if w.ended is not None), key=lambda w: (w.blames_a_peer(), w.ended))
        code = first.process.returncode
        if code in (EXIT_ERROR, EXIT_USAGE):
            return Ending("refused", f"{first.name}: {first.last_words()}", code, first.index)
        return Ending(
            "failed", f"{first.name} {how(code)}: {first.last_words()}", code if code > 0 else 128 - code, first.index
        )

    def _find_silent(self, workers: list[Worker], now: float) -> Ending | None:
        """Return the ending if a watchdog has not checked for too long; that process is asked for its stacks."""
        for worker in workers:
            limit = self._policy.silent_seconds if worker.doing.ticks or worker.doing.dispatched else self._policy.start_seconds
            if worker.ended is None and now - worker.since > limit:
                break
        else:
            return None
        silent = min(workers, key=lambda w: (w.ended is not None, not w.is_frozen(), w.since))
        state = "is stopped (state T)" if silent.is_frozen() else f"is at step {silent.doing.dispatched}"
        state += f", {silent.doing.phase}" if silent.doing.phase else ""
        self._dump_stacks([worker for worker in workers if worker.ended is None])
        where = innermost(silent.stacks)
        where = f" ({where})" if where else ""
        words = f"{silent.name} {state} and has not answered for {limit:.0f} s{where}; stacks in {silent.stacks.parent}"
        return Ending("hung", words, EXIT_FAULT, silent.index)

    def _dump_stacks(self, workers: list[Worker]) -> None:
        """Ask the workers for their stacks and wait for them; a busy machine needs longer, and a frozen process writes none."""
        for worker in workers:
            worker.process.send_signal(signal.SIGUSR2)
        until = time.monotonic() + 5.0
        while time.monotonic() < until and any(
            worker.process.poll() is None and not worker.is_frozen() and not innermost(worker.stacks) for worker in workers
        ):
            time.sleep(POLL_SECONDS)

    # -----------------------------------------------------------------------------------------------------------------
    # Words and signals

    def _summarise(self) -> None:
        now = time.monotonic()
        goodput = (
            f"; goodput {self.goodput.share(now):.1%} (steps that lasted {self.goodput.productive:.0f} s, repeated "
            f"{self.goodput.repeated:.0f} s)"
        )
        words = f"done in {self.goodput.seconds(now):.0f} s, {self.generation} generation{'s' * (self.generation > 1)}"
        self._tell(words + (goodput if self.goodput.furthest else ""))

    def _tell(self, words: str) -> None:
        self._say(stamped(f"supervisor {words}"))

    def _record(self, event: str, **values: Any) -> None:
        now, sums = time.monotonic(), self.goodput
        row = {"time": time.time(), "generation": self.generation, "event": event, "furthest": sums.furthest}
        row |= {"productive": sums.productive, "repeated": sums.repeated, "seconds": sums.seconds(now), **values}
        self._events.append((json.dumps(row) + "\n").encode())

    def _sleep(self, seconds: float) -> bool:
        """Sleep; return True if a signal came."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._signal is None:
            time.sleep(min(POLL_SECONDS, seconds))
        return self._signal is not None

    def _hear(self, number: int, request: Request) -> None:
        if request != "same":
            self._signal, self._insists = signal.Signals(number), request == "at once"


def how(code: int) -> str:
    """Describe an exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = " (out of host memory? see dmesg)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def last_generation(folder: Path) -> int:
    """Return the newest generation with logs in `folder`, 0 for none, so that a restarted supervisor overwrites nothing."""
    names = (path.name.rpartition("-")[2] for path in folder.glob("generation-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def free_port() -> int:
    """Return a free TCP port of the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command_of(verb: str, arguments: Sequence[str]) -> list[str]:
    """Return the command of one process that runs a verb."""
    return [sys.executable, "-m", "jaxtrain", verb, *arguments]
