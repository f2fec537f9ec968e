"""The errors a person can mend, and the exit codes a script can rely on.

An `ExplainedError` carries the whole explanation in its message: what is wrong, where, with its numbers, and what would
work. `main` prints that message alone, without a traceback. Any other exception is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_FAULT = 70  # an unforeseen error in one process of several, or a process that hangs: traceback or stacks are in the log
EXIT_PEER = 75  # another process of the run was lost or hangs; nothing is wrong with this one
EXIT_STOPPED = 76  # stopped by a signal after saving: run the same command again to go on
EXIT_UNREAD = 141  # what a verb prints is read by nobody any more (`| head`); as coreutils, 128 + SIGPIPE


class ExplainedError(Exception):
    """An error whose message alone tells a person what is wrong and what would work."""

    exit_code = EXIT_ERROR


class UsageError(ExplainedError):
    """A flag of a verb's own is wrong, or does not go with another."""

    exit_code = EXIT_USAGE


class ConfigError(ExplainedError):
    """The configuration cannot work. `problems` lists everything that is wrong with it, one line each."""

    exit_code = EXIT_USAGE

    def __init__(self, problems: Iterable[str], where: str = "in the configuration"):
        self.problems = list(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count > 1 else ''} {where}:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class DataError(ExplainedError):
    """Input data is missing, unreadable, empty, or not what the configuration says it is."""


class CheckpointError(ExplainedError):
    """A checkpoint cannot be written, or does not belong to this run."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint does not hold what was saved; an older one may."""


class LostSave(ExplainedError):
    """One of several processes could not do its part of a save; all must start again, from the checkpoint before."""

    exit_code = EXIT_FAULT


class PeerMissing(ExplainedError):
    """Another process did not come to a barrier in time."""

    exit_code = EXIT_PEER


class PeersDiffer(ExplainedError):
    """Processes of one run do not have in common what they must. `problems` lists the differences, one line each."""

    exit_code = EXIT_USAGE

    def __init__(self, problems: Iterable[str], way_out: str):
        self.problems = list(problems)
        super().__init__("; ".join(self.problems) + f": {way_out}")


class NumbersError(ExplainedError):
    """Numbers have gone wrong: a loss, gradients, parameters or a device's copy of them cannot be gone on with."""


class ProgramError(ExplainedError, ValueError):
    """The text of a compiled program does not hang together, or has something in it that our readers do not know."""


class Interrupted(KeyboardInterrupt):
    """A signal broke a verb off; the message is the signal's name."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end where nothing is lost by ending at once: before or after the training loop."""

    exit_code = EXIT_STOPPED


def nearest(name: str, options: Iterable[object]) -> str:
    """Return the words that list `options`, the one most like `name` first: "did you mean 'adamw'? one of: adamw, sgd"."""
    options = [str(option) for option in options]
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    listing = "one of: " + ", ".join(options)
    return f"did you mean {close[0]!r}? {listing}" if close else listing
