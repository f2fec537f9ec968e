"""The errors that a user can fix, and the exit codes that a script can rely on.

The message of an `ExplainedError` is the whole explanation: what is wrong, where, with its numbers, and what would
work. `main` prints that message alone, without a traceback. Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Mapping

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_FAULT = 70  # an unforeseen error in one process of several, or a process that hangs: traceback or stacks are in the log
EXIT_PEER = 75  # another process of the run was lost or hangs; no fault of this one
EXIT_STOPPED = 76  # stopped by a signal after saving: run the same command again to resume
EXIT_UNREAD = 141  # the reader of standard output is gone (`| head`): 128 + SIGPIPE, as in coreutils


class ExplainedError(Exception):
    """An error whose message alone tells what is wrong and what would work."""

    exit_code = EXIT_ERROR


class UsageError(ExplainedError):
    """A verb's own flag is wrong, or conflicts with another."""

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
    """A checkpoint differs from what was saved; an older one may be intact."""


class LostSave(ExplainedError):
    """One of several processes could not do its part of a save; all must restart from the previous checkpoint."""

    exit_code = EXIT_FAULT


class PeerMissing(ExplainedError):
    """Another process did not come to a barrier in time."""

    exit_code = EXIT_PEER


class PeersDiffer(ExplainedError):
    """Processes of one run differ in something that must be equal. `problems` lists the differences, one line each."""

    exit_code = EXIT_USAGE

    def __init__(self, problems: Iterable[str], way_out: str):
        self.problems = list(problems)
        super().__init__("; ".join(self.problems) + f": {way_out}")


class NumbersError(ExplainedError):
    """A loss, gradients, parameters or a device's copy of them are wrong, so that the run cannot go on."""


class ProgramError(ExplainedError, ValueError):
    """The text of a compiled program is inconsistent, or has something that our readers do not know."""


class Interrupted(KeyboardInterrupt):
    """A signal interrupted a verb; the message is the signal's name."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end before or after the training loop, where ending at once loses nothing."""

    exit_code = EXIT_STOPPED


def nearest(name: str, options: Iterable[object]) -> str:
    """Return a hint that lists `options`, the one most like `name` first: "did you mean 'adamw'? one of: adamw, sgd"."""
    options = [str(option) for option in options]
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    listing = "one of: " + ", ".join(options)
    return f"did you mean {close[0]!r}? {listing}" if close else listing


def violated(rules: Mapping[str, object]) -> list[str]:
    """Return the messages of a table {message: whether it applies} that apply, in their order."""
    return [message for message, applies in rules.items() if applies]


def cause(error: BaseException) -> str:
    """Return the first line of the deepest cause: Orbax wraps exceptions in messages about its handlers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
