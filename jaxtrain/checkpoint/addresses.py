"""The names of checkpoints: RUN (the newest), RUN@STEP, RUN@best; RUN:STEP is RUN@STEP. With @ema behind it, RUN@STEP@ema,
it is the moving average of the weights (train.ema_decay).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from jaxtrain.checkpoint.retention import best_step
from jaxtrain.checkpoint.stored import absolute, committed_steps, step_path
from jaxtrain.errors import CheckpointError

_ADDRESS = re.compile(r"(.+?)[:@](\d{1,18}|best)")
AVERAGE = "@ema"


def find(text: str) -> tuple[str, int]:
    """(folder, step) of RUN, RUN@STEP or RUN@best, where RUN is a run's folder or its `checkpoints`.

    Raises:
      CheckpointError: no such checkpoint.
    """
    text = text.removesuffix(AVERAGE)
    match = _ADDRESS.fullmatch(text)
    folder, name = (match[1], match[2]) if match else (text, "")
    inside = absolute(folder) / "checkpoints"
    folder = os.fspath(inside if inside.is_dir() else absolute(folder))
    steps = committed_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder} {'holds no checkpoint' if os.path.isdir(folder) else 'is no folder'}")
    step = best_step(folder) if name == "best" else int(name) if name else steps[-1]
    step_path(folder, step)
    return folder, step


def is_average(text: str) -> bool:
    """Return whether a name is of the moving average of the weights."""
    return text.endswith(AVERAGE)


def check_average(text: str, leaves: Collection[str]) -> None:
    """Check that a checkpoint whose average is named has one.

    Raises:
      CheckpointError: it has none.
    """
    if is_average(text) and not any(name.startswith("ema/") for name in leaves):
        raise CheckpointError(f"{text}: that checkpoint holds no average of the weights; it was saved with train.ema_decay=0")
