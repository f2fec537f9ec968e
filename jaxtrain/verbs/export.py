"""`jaxtrain export RUN[@STEP] DIR`: the weights of a run as a HuggingFace folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtrain.command import Usage, parse
from jaxtrain.errors import EXIT_DONE
from jaxtrain.text import show


@dataclass(frozen=True)
class ExportFlags:
    """Flags of `jaxtrain export`."""

    run: str
    """RUN or RUN@STEP; without a step, the newest."""
    folder: str
    """Folder to make."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Dtype of the matrices; empty: that of the folder the weights were imported from, or else model.dtype."""
    adapter: bool = False
    """Write the adapters alone, for the PEFT library, in float32."""


USAGE = Usage(
    "export",
    "Write the weights of a run as a HuggingFace folder, whole or not at all.",
    ExportFlags,
    ("run", "folder"),
    config="none",
)


def main(arguments: Sequence[str]) -> int:
    """Parse, export, print; return the exit code."""
    flags = parse(USAGE, arguments).own
    os.environ["JAX_PLATFORMS"] = "cpu"  # must not take a GPU away from a run
    if flags.adapter:
        from jaxtrain.huggingface.adapters import export_adapter

        modules = export_adapter(flags.run, flags.folder)
        show(f"exported an adapter of {', '.join(modules)} to {flags.folder}")
        return EXIT_DONE
    from jaxtrain.huggingface.exporting import export

    config = export(flags.run, flags.folder, flags.dtype)
    kind = (config.get("architectures") or [config["model_type"]])[0]
    show(f"exported a {kind} in {config['dtype']} to {flags.folder}")
    return EXIT_DONE
