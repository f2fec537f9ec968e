"""`jaxtrain import DIR --run_dir=runs/base`: the weights of a HuggingFace folder as a run of ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtrain.command import Usage, parse
from jaxtrain.config.fields import DType
from jaxtrain.errors import EXIT_DONE
from jaxtrain.text import show


@dataclass(frozen=True)
class ImportFlags:
    """Flags of `jaxtrain import`."""

    folder: str
    """Folder with config.json and safetensors files."""
    run_dir: str
    """Run folder to make: config.json, checkpoints/0 with the weights alone, and the tokenizer in huggingface/."""
    param_dtype: DType = "float32"
    """Dtype in which matrices are stored; float32 holds every bit of bfloat16 and float16."""


USAGE = Usage(
    "import",
    "Turn a HuggingFace folder into a run that holds its weights: export, generate and --init_from read it.",
    ImportFlags,
    ("folder",),
    config="none",
)


def main(arguments: Sequence[str]) -> int:
    """Parse, import, print; return the exit code."""
    flags = parse(USAGE, arguments).own
    os.environ["JAX_PLATFORMS"] = "cpu"  # must not take a GPU away from a run
    from jaxtrain.huggingface.importing import import_folder
    from jaxtrain.telemetry.flops import num_parameters

    config = import_folder(flags.folder, flags.run_dir, flags.param_dtype)
    show(f"imported {num_parameters(config.model).total:,} parameters into {flags.run_dir}; train them further with")
    show(f"  jaxtrain train --config={flags.run_dir}/config.json --init_from={flags.run_dir} --run_dir=runs/NAME")
    return EXIT_DONE
