"""Read what a run's folder holds: its config, logged rows, events and sample, of a run that is done, stopped or under way."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxtrain.config import Config, Recipe
from jaxtrain.config.loading import written_config
from jaxtrain.config.names import field_values
from jaxtrain.errors import ExplainedError, UsageError
from jaxtrain.files import json_lines, user_path
from jaxtrain.telemetry.flops import model_flops_per_token, num_parameters
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.telemetry.plots import column, stages_of
from jaxtrain.text import printable

Axis = Literal["tokens", "flops", "time"]
TOLD = ("resume", "branch", "rollback", "skipped", "warning", "error", "stopped", "ended", "done")
"""First words of the lines of log.txt that are events."""
IDLE = ("name", "run_dir")
"""Fields that differ between any two runs."""
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (\S+)\s+(.*)")
_SAMPLE = "--- held-out text:"


@dataclass(frozen=True)
class Event:
    """Something that happened to a run beside its steps."""

    time: float
    """Seconds since 1970, UTC."""
    kind: str
    """start, a word of TOLD, or supervisor."""
    words: str

    @property
    def step(self) -> int | None:
        """The step that it names, if it is one to mark in a curve."""
        found = (
            re.search(r"step (\d+)", self.words)
            if self.kind in ("resume", "branch", "rollback", "skipped", "supervisor")
            else None
        )
        return int(found[1]) if found else None


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder shows it."""

    name: str
    config: Config | None
    """None where config.json is missing or of another version."""
    rows: list[dict[str, Any]]
    events: list[Event]
    sample: str = ""
    goodput: float | None = None
    """Seconds of steps that were not repeated, over all seconds: of the supervisor where there was one; else seconds of steps
    over those since the first step of each start."""

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def starts(self) -> int:
        """Number of times that the program started here."""
        return sum(event.kind == "start" for event in self.events)

    def last(self, key: str) -> float | None:
        """Return the newest number under `key`."""
        values = column(self.rows, key)[1]
        return float(values[-1]) if values.size else None

    def curve(self, key: str, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, FLOPs or seconds, values) of the rows with a number under `key`; empty where that axis is not known."""
        steps, values = column(self.rows, key)
        places = self.place(steps, axis)
        return places, values[: len(places)]

    def place(self, steps: np.ndarray, axis: Axis) -> np.ndarray:
        """Return steps as tokens, model FLOPs or seconds of training, between the logged rows linearly; empty where unknown."""
        known, values = column(self.rows, "elapsed_seconds" if axis == "time" else "tokens")
        if not known.size or (axis == "flops" and self.config is None):
            return steps[:0]
        order = np.unique(known, return_index=True)[1]
        found = np.interp(steps, known[order], values[order])
        return _flops(self.config, found) if axis == "flops" and self.config is not None else found

    def stages(self) -> list[tuple[int, str]]:
        """Return (first step, name) of each stage that the rows name, in order."""
        return stages_of(self.rows)

    def parameters(self) -> int | None:
        """Return the number of all parameters."""
        return num_parameters(self.config.model).total if self.config else None

    def state(self) -> str:
        """Return "done", or how far it came and when it last logged."""
        if not self.rows:
            return "no step logged"
        total = self.config.train.steps if self.config else None
        if (total is not None and self.steps >= total) or (self.events and self.events[-1].kind == "done"):
            return f"done, {self.steps:,} steps"
        of = f" of {total:,}" if total else ""
        logged = max((row["time"] for row in self.rows if isinstance(row.get("time"), (int, float))), default=None)
        when = f", {time.strftime('%Y-%m-%d %H:%M', time.localtime(logged))}" if logged is not None else ""
        return f"step {self.steps:,}{of}{when}"


def _flops(config: Config, tokens: np.ndarray) -> np.ndarray:
    """Return the model FLOPs of a run's first tokens: each stage has its own length of sequences."""
    stages, total = Recipe(config).stages, np.zeros(len(tokens))
    for stage, end in zip(stages, [*(stage.tokens for stage in stages[1:]), np.inf], strict=True):
        own = np.clip(tokens, stage.tokens, end) - stage.tokens
        total += own * model_flops_per_token(stage.config.model, stage.config.data.sequence_length, "causal")
    return total


def read_runs(folders: Sequence[str]) -> list[RunRecord]:
    """Return the runs of folders, under names that tell them apart.

    Raises:
      UsageError: one is no folder of a run.
    """
    paths = list(dict.fromkeys(user_path(folder) for folder in folders))
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [read_run(path, printable(name)) for path, name in zip(paths, names, strict=True)]


def read_run(folder: Path, name: str) -> RunRecord:
    """Return what a folder holds. Files that are missing, or cut short by a write under way, count for what they hold.

    Raises:
      UsageError: it holds nothing of a run, or cannot be read.
    """
    try:
        if not any((folder / file).exists() for file in ("metrics.jsonl", "config.json", "log.txt")):
            raise UsageError(f"{folder} is no folder of a run: it has no metrics.jsonl, config.json or log.txt")
        rows = sorted(read_rows(folder / "metrics.jsonl"), key=lambda row: row["step"])
        log = _text(folder / "log.txt")
        supervised = json_lines(folder / "launch" / "events.jsonl")
        events = [*_starts(folder), *_told(log), *_supervisor(supervised)]
        goodput = _goodput(supervised, rows)
        return RunRecord(name, _config(folder), rows, sorted(events, key=lambda e: e.time), _sample(log), goodput)
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from error


def differing_fields(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return {field: its value in each run} of the fields that differ; None where a run has no such field or no config."""
    values = [field_values(run.config) if run.config else {} for run in runs]
    known = [held for held in values if held]
    names = dict.fromkeys(name for held in known for name in held if name not in IDLE)
    return {name: [held.get(name) for held in values] for name in names if len({repr(held.get(name)) for held in known}) > 1}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _config(folder: Path) -> Config | None:
    try:
        return written_config(_text(folder / "config.json")).config
    except (ExplainedError, ValueError):
        return None


def _starts(folder: Path) -> list[Event]:
    events = []
    for record in json_lines(folder / "starts.jsonl"):
        try:
            words = f"on {record['host']}, jaxtrain {record['jaxtrain']} {record.get('git', '')}".rstrip()
            events.append(Event(datetime.datetime.fromisoformat(record["time"]).timestamp(), "start", words))
        except (KeyError, ValueError, TypeError):
            continue
    return events


def _told(log: str) -> list[Event]:
    found = (match for match in map(_LINE.match, log.splitlines()) if match and match[2] in TOLD)
    return [Event(time.mktime(time.strptime(m[1], "%Y-%m-%d %H:%M:%S")), m[2], m[3]) for m in found]


def _supervisor(records: Sequence[dict[str, Any]]) -> list[Event]:
    ends = [r for r in records if r.get("event") == "end" and r.get("kind") not in ("done", "stopped") and "time" in r]
    return [Event(r["time"], "supervisor", f"{r.get('words', '')}, at step {r.get('furthest', '?')}") for r in ends]


def _goodput(supervised: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> float | None:
    for record in reversed(supervised):
        if record.get("seconds") and "productive" in record:
            return record["productive"] / record["seconds"]
    spent, before = 0.0, 0
    for row in rows:
        if row.get("step_seconds_mean") is not None:
            spent, before = spent + row["step_seconds_mean"] * (row["step"] - before), row["step"]
    whole = max((row.get("elapsed_seconds") or 0.0 for row in rows), default=0.0)
    return min(spent / whole, 1.0) if whole else None


def _sample(log: str) -> str:
    """Return the last sample that the log holds."""
    _, found, rest = log.rpartition(_SAMPLE)
    return rest.partition("\n---\n")[0].strip("\n") if found else ""
