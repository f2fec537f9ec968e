"""Write TensorBoard event files record by record: run_dir/tensorboard.

A record is that of TFRecord files: 8 bytes of length, its masked CRC-32C, a serialized `Event`, its masked CRC-32C.
tensorboardX makes the records but does not write them: its writer has a thread that dies on the first full disk, after which
every further event blocks for ever.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain.config import Config
from jaxtrain.config.names import field_values
from jaxtrain.files import AppendedFile, Say

TRAIN = ("loss", "loss_mean", "total_loss", "grad_norm", "learning_rate", "tokens", "targets", "skipped_steps")
MOE = ("balance_", "router_", "expert_", "dropped_")
METRICS = ("validation/loss", "validation/bits_per_byte", "train/loss_mean")
"""Metrics in the table of hyperparameters."""


def tag_of(name: str) -> str:
    """Return the TensorBoard tag of a row's number: group/name."""
    if name.startswith("task_"):
        return f"tasks/{name.removeprefix('task_')}"
    if name.startswith("validation_"):
        return f"validation/{name.removeprefix('validation_')}"
    if name in TRAIN or name.endswith("_deviations"):
        return f"train/{name}"
    return f"moe/{name}" if name.startswith(MOE) else f"perf/{name}"


class TensorBoardWriter:
    """Writes every finite number of a row as a scalar, under the tag of `tag_of`.

    Args:
      run_dir: the run's folder.
      start_step: the step that the run resumes from; TensorBoard drops an earlier process's later events.
      config: the resolved config, shown as hyperparameters.
      say: called with a line when the file cannot be written, and when it can again.
    """

    def __init__(self, run_dir: Path, start_step: int, config: Config | None, say: Say):
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        # In nanoseconds, because two processes may begin a file within the same second.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = AppendedFile(run_dir / "tensorboard" / name, say)
        purge = start_step + 1 if start_step else 0
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=purge, session_log=SessionLog(status=SessionLog.START)))
        for summary in _hyperparameters(config) if config else ():
            self._write(Event(wall_time=time.time(), summary=summary))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row as one event: its numbers, at its `step` and `time`."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        numbers = {
            tag_of(name): float(value)
            for name, value in row.items()
            if name not in ("step", "time") and isinstance(value, (int, float)) and math.isfinite(value)
        }
        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._write(Event(wall_time=row.get("time") or time.time(), step=row["step"], summary=Summary(value=values)))

    def close(self) -> None:
        """Write what is still held back."""
        self._file.close()

    def _write(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.append(length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data)))


def _hyperparameters(config: Config) -> tuple[Any, ...]:
    """Return the summaries of TensorBoard's table of hyperparameters: every config field by its dotted name."""
    from tensorboardX.summary import hparams

    fields = {name: value for name, value in field_values(config).items() if value is not None}
    for name, value in fields.items():
        fields[name] = ",".join(map(str, value)) if isinstance(value, tuple) else value
    return hparams(fields, dict.fromkeys(METRICS))
