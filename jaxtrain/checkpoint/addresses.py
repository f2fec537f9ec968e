"""The names of checkpoints: RUN (the newest), RUN@STEP, RUN@best; RUN:STEP is RUN@STEP."""

from __future__ import annotations

import os
import re

from jaxtrain.checkpoint.retention import best_step
from jaxtrain.checkpoint.stored import absolute, committed_steps, step_path
from jaxtrain.errors import CheckpointError

_ADDRESS = re.compile(r"(.+?)[:@](\d{1,18}|best)")


def find(text: str) -> tuple[str, int]:
    """(folder, step) of RUN, RUN@STEP or RUN@best, where RUN is a run's folder or its `checkpoints`.

    Raises:
      CheckpointError: no such checkpoint.
    """
    match = _ADDRESS.fullmatch(text)
    folder, name = (match[1], match[2]) if match else (text, "")
    inside = absolute(folder) / "checkpoints"
    folder = os.fspath(inside if inside.is_dir() else absolute(folder))
    steps = committed_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder} holds no checkpoint")
    step = best_step(folder) if name == "best" else int(name) if name else steps[-1]
    step_path(folder, step)
    return folder, step
