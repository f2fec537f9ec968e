"""run_dir/log.txt: the messages of process 0 with their time, appended over restarts, and the program that wrote them."""

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
"""Time limit of a git call, which can hang on a network file system."""


def stamped(text: str) -> str:
    """Return a line with the local time in front: "2026-11-28 16:52:56 done"."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"


class RunLog(logging.Handler):
    """Appends lines to run_dir/log.txt and, while entered as a context manager, warnings of the package's loggers.

    Lines written before it is entered are held back: the folder may turn out to be another run's.

    Args:
      run_dir: the run's folder.
      say: called with a line when the file cannot be written, and when it can again.
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
        """Append a warning, and show it as Python would without this handler."""
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
    """Return the identity of this start of the program: versions, git commit, host, command line, time with its zone."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "jaxtrain": importlib.metadata.version("jaxtrain"),
        "git": git_commit(Path(jaxtrain.__file__).parents[1]),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "command": without_passwords(shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])),
    }


def describe_program(about: dict[str, str]) -> str:
    """Return that identity in one line."""
    git = f" ({about['git']})" if about["git"] else ""
    software = f"jaxtrain {about['jaxtrain']}{git}, python {about['python']}"
    return f"{software}, on {about['host']} at {about['time']}: {about['command']}"


def git_commit(checkout: Path) -> str:
    """Return a checkout's commit, with "-dirty" if tracked files differ; "" without a repository or git."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def without_passwords(command: str) -> str:
    """Remove user and password from URLs, where a flag may hold a secret."""
    return re.sub(r"://[^/@\s]+@", "://***@", command)
