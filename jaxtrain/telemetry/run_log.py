"""run_dir/log.txt: what process 0 of a run says, with the time, appended over restarts; and which program said it."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import jaxtrain
from jaxtrain.errors import Stopped
from jaxtrain.files import AppendedFile, Say

PATIENCE_SECONDS = 5.0
"""Git may take so long on a network file system; then its answer is done without."""


def stamped(text: str) -> str:
    """Return a line with the local time before it: "2026-11-28 16:52:56 done"."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"


class RunLog(logging.Handler):
    """Appends lines to run_dir/log.txt, and while it is entered as a context manager, warnings of the package's loggers.

    Lines written before it is entered wait: the folder may turn out to be another run's.

    Args:
      run_dir: the run's folder.
      say: takes a line when the file cannot be written, and when it can again.
    """

    def __init__(self, run_dir: Path, say: Say):
        super().__init__(logging.WARNING)
        self._file = AppendedFile(run_dir / "log.txt", say)
        self._waiting: list[bytes] | None = []

    def write(self, text: str) -> None:
        """Append a line, or several."""
        line = f"{stamped(text)}\n".encode(errors="backslashreplace")
        if self._waiting is None:
            self._file.append(line)
        else:
            self._waiting.append(line)

    def emit(self, record: logging.LogRecord) -> None:
        """Append a warning, and show it where Python would have shown it without this handler."""
        self.write(f"{record.levelname.lower():<10} {record.getMessage()}")
        if not logging.root.handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)

    def __enter__(self) -> RunLog:
        waiting, self._waiting = self._waiting or [], None
        for line in waiting:
            self._file.append(line)
        logging.getLogger("jaxtrain").addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        logging.getLogger("jaxtrain").removeHandler(self)
        if error is not None:
            word = "stopped" if isinstance(error, Stopped) else "error"
            self.write(f"{word:<10} {type(error).__name__}: {error}")
        self._file.close()


def about_program() -> dict[str, str]:
    """Return what identifies this start of the program: versions, git commit, host, command line, time with its zone."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "jaxtrain": importlib.metadata.version("jaxtrain"),
        "git": git_commit(Path(jaxtrain.__file__).parents[1]),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "command": without_passwords(shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])),
    }


def describe_program(about: dict[str, str]) -> str:
    """Return it in one line."""
    git = f" ({about['git']})" if about["git"] else ""
    software = f"jaxtrain {about['jaxtrain']}{git}, python {about['python']}"
    return f"{software}, on {about['host']} at {about['time']}: {about['command']}"


def git_commit(checkout: Path) -> str:
    """Return the commit of a checkout, "-dirty" after it where tracked files differ; "" where there is none, or no git."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def without_passwords(command: str) -> str:
    """Return the command with user and password left out of URLs, which is where a flag can hold a secret."""
    return re.sub(r"://[^/@\s]+@", "://***@", command)
