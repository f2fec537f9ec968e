"""Flags and start of the verbs that give text to a model: `generate` and `evaluate`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxtrain.command.parsing import CommandLine
from jaxtrain.config import Config, MeshConfig
from jaxtrain.errors import ExplainedError, UsageError

if TYPE_CHECKING:
    from jaxtrain.inference.model import Model

ONE_DEVICE = Config(mesh=MeshConfig(fsdp=1))
"""The mesh of these verbs where none is given."""


@dataclass(frozen=True)
class TextModelFlags:
    """The model, and how it is held."""

    model: str
    """HuggingFace folder, run (its newest checkpoint) or RUN@STEP."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Dtype of matmuls and activations; empty: float32 for a folder, the run's own for a run."""
    quantisation: Literal["", "int8", "float8", "nf4"] = ""
    """Hold the matrices in 8 bits, or of nf4 in 4."""
    group: int = 0
    """With quantisation: neighbouring inputs with a scale of their own; 0: all of an output channel, or 64 for nf4."""


def check_given(line: CommandLine[Any], verb: str) -> None:
    """Raise UsageError where fields of the config are given that are not of the mesh."""
    others = [name for name in line.given if not name.startswith("mesh.")]
    if others:
        raise UsageError(f"--{others[0]}: {verb} takes its own flags and --mesh.*; the model's settings come with its weights")


@contextlib.contextmanager
def text_model(line: CommandLine[Any]) -> Iterator[Model]:
    """Give the model of the flags; what is compiled for it in the block is kept for the next call.

    In the user's own cache, whatever a run's config names: programs in a folder that came with a run would be foreign code.

    Raises:
      ExplainedError: it cannot be read, does not fit the mesh, or has no tokenizer.
    """
    from jaxtrain.train.loading import load
    from jaxtrain.train.run_dir import compilation_cache

    flags: TextModelFlags = line.own
    mesh = line.config.mesh if line.given else None
    model = load(flags.model, mesh, flags.dtype or None, flags.quantisation or None, flags.group)
    if model.tokenizer is None or model.config.data.tokenizer == "none":
        raise ExplainedError(f"{flags.model}: has no tokenizer.json, so no text can be given to its model")
    with compilation_cache(model.mesh):
        yield model
