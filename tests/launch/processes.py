"""Runs of several real processes on the loopback, each with fake devices of its own; always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests import quick

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """Return a TCP port that no socket is bound to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(devices: int, **more: str) -> dict[str, str]:
    """The environment of a child: this many fake devices, no flags of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_FLAGS", "JAX", "PYTEST"))}
    return kept | {
        "XLA_FLAGS": quick.FLAGS,
        "JAXTRAIN_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


@contextlib.contextmanager
def started(
    count: int,
    devices: int,
    arguments: Sequence[str],
    folder: Path,
    own: Sequence[Sequence[str]] = (),
    module: str = "jaxtrain",
    verb: str = "train",
    **variables: str,
) -> Iterator[list[subprocess.Popen]]:
    """`jaxtrain train` as `count` processes, process i with the arguments own[i] too; it writes to folder/i.log."""
    port, running = free_port(), []
    try:
        for i in range(count):
            more = {
                "JAXTRAIN_COORDINATOR": f"127.0.0.1:{port}",
                "JAXTRAIN_PROCESSES": str(count),
                "JAXTRAIN_PROCESS_ID": str(i),
                "JAXTRAIN_STARTER": "a test",
                **variables,
            }
            with open(folder / f"{i}.log", "w") as log:
                program = [module, verb] if module == "jaxtrain" else [module]
                command = [sys.executable, "-m", *program, *arguments, *(own[i] if own else ())]
                running.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment(devices, **more), stdout=log, stderr=subprocess.STDOUT)
                )
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def wait_for_line(log: Path, words: str, seconds: float = 240) -> None:
    """Until a log says so."""
    until = time.monotonic() + seconds
    while words not in (said := log.read_text() if log.exists() else ""):
        assert time.monotonic() < until, f"{log} never said {words!r}:\n{said[-3000:]}"
        time.sleep(0.05)
