"""A check: each process looks, all exchange what they saw, and each comes to the same findings.

`look` runs in every process and returns plain values; its exceptions become findings of that process. `judge` sees only what
all processes have seen, so that every process comes to the same exit code, and tests can pass it any fault.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtrain.agreement import shortened
from jaxtrain.config import Config
from jaxtrain.errors import EXIT_FAULT
from jaxtrain.processes import exchange
from jaxtrain.signals import begin_timer
from jaxtrain.telemetry.heartbeat import Heartbeat

BLOCK = 2**20
"""Bytes that each process writes to each place."""
State = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    state: State
    """failed: the run would fail or train wrongly. warning: it would run, but slower or less safely."""
    words: str
    values: dict[str, Any] = field(default_factory=dict)
    """Figures for --json."""


@dataclass
class Site:
    """The subject of the checks."""

    config: Config
    """Resolved after the devices are counted."""
    hosts: list[str] = field(default_factory=list)
    """Host name of each process."""
    mesh: Any = None
    token: str = ""
    """Part of the names of the files that this preflight writes."""
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Clean-up at the end."""

    def name(self, process: int) -> str:
        """Return a process's name for messages; a single one is "this process"."""
        return f"process {process} on {self.hosts[process]}" if len(self.hosts) > 1 else "this process"


@dataclass(frozen=True)
class Check:
    """A question to every process, and the judgement of the answers."""

    name: str
    look: Callable[[Site], Any]
    """Returns what this process sees, as JSON values. May raise."""
    judge: Callable[[Site, list[Any]], list[Finding]]
    """Returns the findings from what each process has seen."""


def carry_out(check: Check, site: Site, patience: float, heartbeat: Heartbeat | None = None) -> list[Finding]:
    """Look, exchange, judge. A process that cannot look is a failed check."""
    if heartbeat is not None:
        heartbeat.phase(f"preflight: {check.name}")
    with limited(check.name, patience):
        try:
            answer = {"seen": check.look(site), "error": None}
        except Exception as error:
            answer = {"seen": None, "error": _first_line(error)}
        answers = exchange(f"preflight {check.name}", answer, patience)
    errors = [f"{site.name(i)}: {a['error']}" for i, a in enumerate(answers) if a["error"] is not None]
    if errors:
        return [Finding(check.name, "failed", "\n".join(shortened(errors)))]
    return check.judge(site, [answer["seen"] for answer in answers])


@contextlib.contextmanager
def limited(what: str, seconds: float) -> Iterator[None]:
    """End this process with a message if the block takes longer: a hang in a collective cannot be interrupted."""

    def end() -> None:
        print(f"error: preflight: {what!r} did not end within {seconds:.0f} s; allow more with --patience", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_FAULT)

    timer = begin_timer(seconds + 15, end)  # later than `exchange`, which can name the missing process
    try:
        yield
    finally:
        timer.cancel()


def write_probe(site: Site, path: Path, block: bytes) -> float:
    """Write a file that goes at the end, flush it to disk and read it back; return the seconds of the writing.

    Raises:
      OSError: it cannot be written, or other bytes come back.
    """
    started = time.perf_counter()
    with open(path, "xb") as file:
        site.closing.callback(path.unlink, missing_ok=True)
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    if path.read_bytes() != block:
        raise OSError(0, "the data read back differs from the data written", str(path))
    return seconds


def odd_ones(values: Sequence[Any]) -> tuple[Any, dict[int, Any]]:
    """(the most frequent value, {index: value} of the others); among equally frequent ones the first counts."""
    keys = [repr(value) for value in values]
    common = max(dict.fromkeys(keys), key=lambda key: Counter(keys)[key])
    return values[keys.index(common)], {i: value for i, value in enumerate(values) if keys[i] != common}


def relative_error(found: jax.Array, right: jax.Array) -> jax.Array:
    """|found - right| / |right|, norms in float32; NaN where numbers are not finite."""
    found, right = (x.astype(jnp.float32) for x in (found, right))
    return jnp.linalg.norm((found - right).ravel()) / jnp.maximum(jnp.linalg.norm(right.ravel()), 1e-30)


def judge_errors(
    site: Site, check: str, seen: Sequence[tuple[str, Mapping[str, float]]], limit: float, way_out: str
) -> tuple[list[Finding], float]:
    """Return a failed finding for each process that computes wrongly, naming its worst result, and the worst error of all.

    Args:
      seen: of each process, what computes ("attention by cudnn"), and {result: error as a share of its norm}.
    """
    findings, largest = [], 0.0
    for process, (subject, errors) in enumerate(seen):
        name, worst = max(((n, math.inf if math.isnan(e) else e) for n, e in errors.items()), key=lambda pair: pair[1])
        largest = max(largest, worst)
        if worst > limit:
            how = f"is off by {worst:.0%}" if math.isfinite(worst) else "is not finite"
            words = f"{subject} computes wrongly on {site.name(process)}: {name} {how}; use {way_out}"
            findings.append(Finding(check, "failed", words))
    return findings, largest


def _first_line(error: Exception) -> str:
    kind = "" if hasattr(error, "exit_code") else f"{type(error).__name__}: "
    return kind + (str(error).strip() or "no message")[:2000]
