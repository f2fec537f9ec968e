"""HuggingFace folders of what is trained: of a model in hand, and of a run at its end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.checkpoint.trees import leaves_by_path
from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface.exporting import write_folder
from jaxtrain.inference.model import Model
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.sharding import is_dims
from jaxtrain.train.state import to_canonical


def hf_writer(beside: Path) -> Callable[[Model, str], dict[str, Any]]:
    """Return a function (model, folder) that writes the model's weights as a HuggingFace folder.

    Args:
      beside: the folder of the files that travel with the weights, if it is there.
    """

    def write(model: Model, target: str) -> dict[str, Any]:
        if jax.process_count() > 1:
            raise ExplainedError("one process alone writes a folder: save the run, then `jaxtrain export RUN DIR`")
        (held, _), dims = leaves_by_path(model.params), jax.tree.leaves(parameter_dims(model.config.model), is_leaf=is_dims)
        leaves = {"/".join(path): (leaf, own) for (path, leaf), own in zip(held.items(), dims, strict=True)}

        def read(names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
            for name in names:
                yield name, np.asarray(to_canonical(model.config, *leaves[name.removeprefix("params/")]))

        return write_folder(model.config, read, target, beside)

    return write


def export_apart(run_dir: Path, folder: str) -> None:
    """Write a run's last checkpoint as a HuggingFace folder, in a process of its own, on the CPU.

    Raises:
      ExplainedError: it cannot be written; says why.
    """
    command = [sys.executable, "-m", "jaxtrain", "export", str(run_dir), folder]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ExplainedError(f"the run is done and saved, but not exported: {why}")
