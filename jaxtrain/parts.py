"""The plugged-in parts of a run: values and callables, which no flag and no JSON can hold.

They are fields of the config (`Config.parts`, `ModelConfig.parts`), so that everything that takes a config sees them: trainer,
planner, layouts, preflight and replay. `Trainer(config, objective=...)` puts them there; so does `get_trainer(config)` of a
config file. A checkpoint keeps each part's name and a hash of its source (`digests`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelParts:
    """Classes in place of the decoder's own, each built as `kind(model_config, rngs)`; None for the decoder's own.

    A part declares its parameters with `jaxtrain.parameter` and is called inside the manual region: it sees this device's shard
    of every array, and says its collectives itself. README "Your own layer" is an example.
    """

    attention: type | None = None
    """Called as `attention(x_BLD, packing, plan)`, gives x_BLD with the block added."""
    mlp: type | None = None
    """Called as `mlp(x_BLD)`, gives x_BLD with the block added."""
    layer: type | None = None
    """Both: called as `layer(x_BLD, packing, plan, experts)`, gives x_BLD, or (x_BLD, auxiliary loss, sums to report)."""


@dataclass(frozen=True)
class Parts:
    """Parts of a run beside the model; None for those that the config says."""

    objective: Any = None
    """`jaxtrain.Objective`, or a function as its `loss`: what training minimises."""
    optimizer: Any = None
    """An optax transform: the whole update rule, in place of config section `optimizer`."""
    hooks: tuple[Any, ...] = ()
    """`jaxtrain.Hook`s."""
    schedule: Callable[[int, int, int], Any] | None = None
    """(stages, chunks a stage, microbatches) -> `parallel.pipeline_schedule.Schedule`, in place of pipeline.schedule; it is
    checked before it runs."""
    documents: Callable[[], Iterable[str]] | None = None
    """Gives the documents to train on, in place of data.sources; the same ones every time and on every host."""
    file: str = ""
    """The config file whose `get_trainer` plugged them in, for processes that must do it again; empty in a notebook."""


def plugged(parts: Parts | ModelParts) -> dict[str, Any]:
    """Return the parts that are plugged in, by name."""
    held = {field.name: getattr(parts, field.name) for field in dataclasses.fields(parts) if field.name != "file"}
    return {name: part for name, part in held.items() if part not in (None, ())}


def digests(*parts: Parts | ModelParts) -> dict[str, str]:
    """Return {"objective": "focal 1a2b3c4d"}: name and source hash of each part, and of the file that plugged them in."""
    found = {}
    for each in parts:
        for name, part in plugged(each).items():
            found[name] = ", ".join(map(_digest, part)) if isinstance(part, tuple) and name == "hooks" else _digest(part)
        if isinstance(each, Parts) and each.file:
            found["file"] = f"{Path(each.file).name} {_short(Path(each.file).read_bytes())}"
    return found


def _digest(part: Any) -> str:
    """Return the name of a part and a hash of its source; the name alone where there is no source (a transform of optax)."""
    named = part if hasattr(part, "__qualname__") else getattr(part, "loss", type(part))
    if isinstance(part, tuple):  # optax's: the class says nothing of the transform
        return type(part).__name__
    try:
        source = f" {_short(inspect.getsource(named).encode())}"
    except (OSError, TypeError):
        source = ""
    return f"{getattr(named, '__qualname__', type(part).__name__)}{source}"


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
