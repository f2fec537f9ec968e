"""What a run writes down: metrics.jsonl and TensorBoard always, Weights & Biases where asked for.

metrics.jsonl has one JSON object a line. A training row has `step, loss, grad_norm, learning_rate` and the timings of
clock.py; a validation row has `step, validation_loss, validation_bits_per_byte`. JSON has no NaN or infinity: such a value
is null, and the row's `not_finite` says which it was ({"loss": "nan"}).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxtrain.errors import ExplainedError


class Writer(Protocol):
    """Takes rows of plain Python values."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Records a row; `row["step"]` is its step."""

    def close(self) -> None:
        """Writes what is still held back."""


class MetricsLog:
    """Everything a run logs, through one `write`. Process 0 writes; on the others every call does nothing.

    Args:
      run_dir: the run's folder.
      start_step: the step that the run goes on from; 0 for a new run. What an earlier process logged beyond it is dropped,
        since those steps will be logged again.
      process_index: `jax.process_index()`.
      wandb_project: Weights & Biases project; empty for none.
      name: name of the run, for Weights & Biases.
      config: the resolved config as plain data, for Weights & Biases.

    Raises:
      ExplainedError: run_dir cannot be written, or wandb or its key is missing.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int = 0,
        process_index: int = 0,
        wandb_project: str = "",
        name: str = "run",
        config: Mapping[str, Any] | None = None,
    ):
        self._writers: list[Writer] = []
        if process_index != 0:
            return
        run_dir = Path(run_dir)
        # Weights & Biases first: if it cannot start, nothing of an earlier run has been dropped yet.
        weights_and_biases = [WandbWriter(run_dir, wandb_project, name, config)] if wandb_project else []
        self._writers = [JsonLinesWriter(run_dir, start_step), TensorBoardWriter(run_dir, start_step), *weights_and_biases]

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs one row; it must have a `step`. Values: numbers (also numpy and jax scalars), strings, None."""
        if not self._writers:
            return
        plain = {key: _plain(value) for key, value in row.items()}
        for writer in self._writers:
            writer.write(plain)

    def close(self) -> None:
        """Flushes and closes all writers. Safe to call twice."""
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """numpy and jax scalars as Python numbers."""
    return value.item() if hasattr(value, "item") else value


def to_json_line(row: Mapping[str, Any]) -> str:
    """The row as one line of valid JSON: numbers that are not finite become null and are named in `not_finite`."""
    not_finite = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    if not_finite:
        row = {**row, **dict.fromkeys(not_finite), "not_finite": not_finite}
    return json.dumps(row, allow_nan=False)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl. A line that a killed process left unfinished is passed over; no file gives no rows."""
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return [row for row in map(_parse, file) if row is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrites metrics.jsonl without rows beyond `step` and without unfinished lines; without any row if `step` is 0.

    The new file takes the old one's place in one move, so a crash leaves either the one or the other.
    """
    kept = [row for row in read_rows(path) if row["step"] <= step] if step > 0 else []
    beside = path.with_name(path.name + ".new")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(to_json_line(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


class JsonLinesWriter:
    """run_dir/metrics.jsonl: each row goes out in one append, so a reader never sees half a line of a live run."""

    def __init__(self, run_dir: Path, start_step: int):
        self.path = run_dir / "metrics.jsonl"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            drop_rows_after(self.path, start_step)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise ExplainedError(f"cannot write {self.path}: {error.strerror}; give another --run_dir") from error

    def write(self, row: Mapping[str, Any]) -> None:
        line = memoryview((to_json_line(row) + "\n").encode())
        try:
            while line:  # a full disk or a signal can cut a write short
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise ExplainedError(f"cannot write {self.path}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._descriptor)


class TensorBoardWriter:
    """run_dir/tensorboard: every number of a row as a scalar under the same name as in metrics.jsonl."""

    FLUSH_SECONDS = 10

    def __init__(self, run_dir: Path, start_step: int):
        from tensorboardX import SummaryWriter

        # purge_step makes TensorBoard forget what an earlier process logged from that step on. The suffix, because file
        # names go by the second and a file of the same name would be overwritten.
        self._writer = SummaryWriter(
            str(run_dir / "tensorboard"),
            purge_step=start_step + 1 if start_step else 0,
            flush_secs=self.FLUSH_SECONDS,
            filename_suffix=f".{time.time_ns()}",
        )

    def write(self, row: Mapping[str, Any]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        # One event for the whole row: an `add_scalar` for each number took 2.6 ms a row, most of the loop's overhead.
        numbers = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
        }
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        assert self._writer.file_writer is not None
        self._writer.file_writer.add_summary(Summary(value=values), row["step"])

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases. The run's id is kept in run_dir, so that a resumed run goes on under it."""

    def __init__(self, run_dir: Path, project: str, name: str, config: Mapping[str, Any] | None):
        check_wandb(project)
        import wandb  # pyright: ignore[reportMissingImports]

        run_dir.mkdir(parents=True, exist_ok=True)
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                dir=str(run_dir),
                id=id_file.read_text().strip(),
                resume="allow",
                config=dict(config or {}),
            )
        except Exception as error:  # wandb's own errors come in many classes, none of them stable
            raise ExplainedError(f"Weights & Biases did not start: {error}; or leave telemetry.wandb_project empty") from error
        # Its own step counter may not go back, but a resumed run does: so `step` is a value, and the x axis of all others.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({key: value for key, value in row.items() if value is not None})

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str) -> None:
    """Sees that Weights & Biases can be started, before anything that takes long; nothing is asked for an empty project.

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
    """Whether wandb.init will find a key, or need none; without one it would stop and ask on the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    import netrc
    from urllib.parse import urlsplit

    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
