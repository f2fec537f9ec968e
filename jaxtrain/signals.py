"""Receive signals that ask a program to end in a separate thread, such that none is swallowed.

Python runs a signal's handler in the main thread, and only when that thread next runs bytecode: not while it compiles, connects
to its peers or waits in a collective for one that is dead. And the KeyboardInterrupt of Python's own handler is lost if a
library catches everything during its import (seen: 5 of 38 starts trained on after Ctrl-C). So the handlers here do little or
nothing; the signal's number goes through a pipe to a thread, which decides.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, NoReturn

Request = Literal["stop", "same", "at once"]
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""SLURM is told to send SIGUSR1 before a time limit; SIGHUP comes when the terminal, or our supervisor, is gone."""
SAME_REQUEST_SECONDS = 1.0
_LOOK_SECONDS = 0.02


@dataclass
class Requests:
    """Distinguishes a second request from an echo of the first.

    One request arrives as several signals: a closing terminal sends SIGHUP from the kernel and from the shell, Ctrl-C reaches a
    whole process group and is also passed on by the starter. So signals less than a second after the previous one belong to the
    same request, and SIGHUP is never a second request.
    """

    newest: float | None = None
    """Time of the previous signal, by a monotonic clock."""

    def hear(self, number: int, earliest: float, latest: float) -> Request:
        """Return the meaning of a signal that came between two times: the first is a "stop", a second request an "at once"."""
        before, self.newest = self.newest, latest
        if before is None:
            return "stop"
        return "same" if number == signal.SIGHUP or earliest - before <= SAME_REQUEST_SECONDS else "at once"


_watches: list[Watch] = []
"""The entered watches; the last one receives the signals."""


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Replace a signal's default action."""


class Watch:
    """Receives signals while it is entered (by the main thread); afterwards the previous watch does so again.

    SIGHUP is not handled if it is ignored, as under nohup.

    Args:
      hear: called in the watching thread with each signal; it must not block, or the next is missed.
      in_main_thread: Python's own handler, called in the main thread when that runs bytecode.
    """

    def __init__(
        self,
        hear: Callable[[int, Request], None],
        in_main_thread: Callable[[int, FrameType | None], None] = _do_nothing,
        numbers: Sequence[int] = STOPPING,
    ):
        self._hear, self._in_main_thread, self._numbers = hear, in_main_thread, numbers
        self._handlers_before: dict[int, Any] = {}
        self._requests = Requests()

    def __enter__(self) -> Watch:
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in self._numbers:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers_before[number] = signal.signal(number, self._in_main_thread)
        self._thread = threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True)
        self._thread.start()
        _watches.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writing)  # which ends the thread
        self._thread.join(1.0)
        _watches.remove(self)
        if _watches and self._requests.newest is not None:
            _watches[-1]._requests.newest = self._requests.newest  # a later echo is recognised there

    def _listen(self, reading: int) -> None:
        """Read the pipe. After the first signal also record when the pipe was last empty.

        This thread may be delayed, and two signals that it finds together may have come at any time since then.
        """
        requests, quiet, poll = self._requests, 0.0, select.poll()
        poll.register(reading, select.POLLIN)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while True:
                if not poll.poll(None if requests.newest is None else _LOOK_SECONDS * 1000):
                    quiet = time.monotonic()
                    continue
                byte = pipe.read(1)
                if not byte:
                    return
                if byte[0] in self._handlers_before:  # other signals come through the same pipe
                    self._hear(byte[0], requests.hear(byte[0], quiet, time.monotonic()))


def begin_timer(seconds: float, work: Callable[..., object], *arguments: Any) -> threading.Timer:
    """Have `work` done after some time, by a thread that does not keep the process from ending."""
    timer = threading.Timer(seconds, work, arguments)
    timer.daemon = True
    timer.start()
    return timer


def end_at_once(exit_code: int, last_words: Callable[[], object]) -> NoReturn:
    """End the process without unwinding, after `last_words`, which has a second, as the terminal may hang."""
    with contextlib.suppress(RuntimeError):  # no thread can start while Python itself ends
        begin_timer(1.0, os._exit, exit_code)
    with contextlib.suppress(BaseException):
        last_words()
    os._exit(exit_code)


def say(line: str) -> None:
    """Write a line to standard error, bypassing Python's own streams, whose lock the main thread may hold."""
    os.write(2, f"{line}\n".encode())
