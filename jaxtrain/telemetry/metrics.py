"""Log a run's metrics: metrics.jsonl and TensorBoard always, Weights & Biases and Prometheus if configured.

metrics.jsonl has one JSON object per line. Every row has `time` (seconds since 1970, UTC) and `step`. A training row has `loss`
(of that step alone), `loss_mean`, `grad_norm`, `learning_rate` and the timings of clock.py; a validation row has
`validation_loss, validation_bits_per_byte`. JSON has no NaN or infinity: such a value is null, and the row's `not_finite` names
it ({"loss": "nan"}).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxtrain.config import Config, to_plain
from jaxtrain.errors import ExplainedError
from jaxtrain.files import AppendedFile, ReplacedFiles, Say, Tolerance, json_lines, log_warning, user_path
from jaxtrain.telemetry.prometheus import PrometheusWriter
from jaxtrain.telemetry.tensorboard import TensorBoardWriter


class Writer(Protocol):
    """Takes rows of plain Python values."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row; `row["step"]` is its step."""

    def close(self) -> None:
        """Flush and close."""


class MetricsLog:
    """Writes a run's rows to all its logs. Process 0 writes; on the others every call does nothing.

    Args:
      run_dir: the run's folder.
      start_step: the step that the run resumes from; 0 for a new run. An earlier process's later rows are dropped, since
        those steps will be logged again.
      process_index: `jax.process_index()`.
      wandb_project: Weights & Biases project; empty for none.
      name: name of the run, for Weights & Biases.
      config: the resolved config, for TensorBoard's hyperparameters, Weights & Biases and Prometheus.
      say: called with a line when a file cannot be written, and when it can again: a run goes on without its logs.

    Raises:
      ExplainedError: wandb or its key is missing, or wandb does not start.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int = 0,
        process_index: int = 0,
        wandb_project: str = "",
        name: str = "run",
        config: Config | None = None,
        say: Say = log_warning,
    ):
        self._writers: list[Writer] = []
        if process_index != 0:
            return
        run_dir = Path(run_dir)
        # Weights & Biases first: if it cannot start, no row of an earlier run has been dropped yet.
        weights_and_biases = [WandbWriter(run_dir, wandb_project, name, config, say)] if wandb_project else []
        tensorboard = TensorBoardWriter(run_dir, start_step, config, say)
        self._writers = [JsonLinesWriter(run_dir, start_step, say), tensorboard, *weights_and_biases]
        if config is not None and config.telemetry.prometheus:
            self._writers.append(PrometheusWriter(user_path(config.telemetry.prometheus), name, say))

    def write(self, row: Mapping[str, Any]) -> None:
        """Log one row with a `step`; adds the `time`. Values: numbers (also numpy's and jax's), strings, None."""
        if not self._writers:
            return
        plain = {"time": round(time.time(), 3), **{key: _plain(value) for key, value in row.items()}}
        for writer in self._writers:
            writer.write(plain)

    def close(self) -> None:
        """Flush and close all writers. Safe to call twice."""
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """Return numpy and jax scalars as Python numbers."""
    return value.item() if hasattr(value, "item") else value


def to_json_line(row: Mapping[str, Any]) -> str:
    """Return the row as one line of valid JSON: non-finite numbers become null and are named in `not_finite`."""
    not_finite = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    if not_finite:
        row = {**row, **dict.fromkeys(not_finite), "not_finite": not_finite}
    return json.dumps(row, allow_nan=False)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a metrics.jsonl, without a line that a killed process left unfinished; [] without a file."""
    return [row for row in json_lines(path) if isinstance(row.get("step"), int)]


def size_up_to(path: Path, step: int) -> int:
    """Return the bytes of a metrics.jsonl before its first row beyond `step` or an unfinished line; 0 if `step` is 0."""
    size = 0
    with open(path, "rb") as file:
        for line in file if step > 0 else ():
            if not line.endswith(b"\n") or _step(line) > step:
                break
            size += len(line)
    return size


def _step(line: bytes) -> int:
    """Return the step of a line, 0 for one that is no row."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return 0


class JsonLinesWriter:
    """Writes run_dir/metrics.jsonl, each row in one append, so that a reader never sees half a line of a live run.

    An earlier process's rows beyond `start_step` are cut off: those steps will be logged again.
    """

    def __init__(self, run_dir: Path, start_step: int, say: Say):
        self._file = AppendedFile(run_dir / "metrics.jsonl", say, lambda path: size_up_to(path, start_step))
        self._file.begin()

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.append((to_json_line(row) + "\n").encode())

    def close(self) -> None:
        self._file.close()


class WandbWriter:
    """Writes to Weights & Biases. The run's id is kept in run_dir, so that a resumed run continues it."""

    def __init__(self, run_dir: Path, project: str, name: str, config: Config | None, say: Say):
        check_wandb(project)
        import wandb  # pyright: ignore[reportMissingImports]

        self._tolerance, self._files = Tolerance("the run at Weights & Biases", say), ReplacedFiles(say)
        self._run: Any = None
        id_file = run_dir / "wandb_id"
        identity = os.urandom(4).hex()
        with contextlib.suppress(OSError):
            identity = id_file.read_text(encoding="utf-8").strip() or identity
        self._files.write(id_file, identity)
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                dir=str(run_dir),
                id=identity,
                resume="allow",
                config=to_plain(config) if config else {},
            )
        except OSError as error:  # a full disk must not end a run that was restarted on it
            say(f"warning    Weights & Biases did not start: {error}; the run goes on without it")
            return
        except Exception as error:  # wandb's own errors come in many classes, none of them stable
            raise ExplainedError(f"Weights & Biases did not start: {error}; or leave telemetry.wandb_project empty") from error
        # wandb's step counter may not go back, but a resumed run does: so `step` is a value, and the x axis of all others.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        self._files.retry()
        self._attempt("log", {key: value for key, value in row.items() if value is not None})

    def close(self) -> None:
        self._files.retry()
        self._attempt("finish")

    def _attempt(self, call: str, *arguments: Any) -> None:
        """Call a method of the wandb run; an exception of any class is reported once."""

        def work() -> None:
            try:
                getattr(self._run, call)(*arguments)
            except OSError:
                raise
            except Exception as error:
                raise OSError(f"{type(error).__name__}: {error}") from error

        if self._run is not None:
            self._tolerance.attempt(work)


def check_wandb(project: str) -> None:
    """Check, before anything slow, that Weights & Biases can start; an empty project needs no check.

    Raises:
      ExplainedError: the package or its key is missing.
    """
    if not project:
        return
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ExplainedError(
            f"telemetry.wandb_project={project!r} needs the wandb package: pip install 'jaxtrain[wandb]', or leave it empty"
        ) from error
    if not _has_wandb_key():
        raise ExplainedError(
            f"telemetry.wandb_project={project!r} needs a key: set WANDB_API_KEY, run `wandb login`, "
            "or set WANDB_MODE=offline to keep the run on this machine"
        )


def _has_wandb_key() -> bool:
    """Return whether wandb.init finds a key or needs none; without one it would prompt on the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    import netrc
    from urllib.parse import urlsplit

    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
