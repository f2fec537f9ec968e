"""Give XLA's scheduler the durations of instructions where it would not estimate them itself.

XLA orders matmuls and transfers by their estimated durations. Its speed-of-light estimator is disabled by a ragged all-to-all
(the exchange of dropless experts); the fallback counts every kernel and every transfer alike, so that a gather of weights over
slow links gets no more matmuls to overlap with than one over fast links. Such a program is compiled twice: first for the names
of its instructions, then with a profile of them in the form of a measured one (a `ProfiledInstructionsProto`, as text). Here it
is computed (`program.collectives.instruction_seconds`).

For a name that the second compilation does not know, and an instruction that the profile does not name, XLA uses its own
estimate: a wrong profile makes a slower program, never a wrong one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtrain.config import Config
from jaxtrain.files import make_file, user_path
from jaxtrain.hardware import chip_of_device_kind
from jaxtrain.program.collectives import instruction_seconds
from jaxtrain.program.groups import layout_of

FOLDER = "~/.cache/jaxtrain/costs"
OPTION = "xla_gpu_pgle_profile_file_or_directory_path"
"""The XLA option that names the profile. A run that sets it (`train.xla_options`) uses its own profile."""


def needs_costs(config: Config, mesh: Mesh) -> bool:
    """Return whether XLA lacks duration estimates for this train step: dropless experts on several GPUs of a known chip."""
    moe, device = config.model.moe, mesh.devices.flat[0]
    if moe is None or moe.dispatch != "dropless" or config.mesh.expert == 1 or device.platform not in ("gpu", "cuda"):
        return False
    chip = chip_of_device_kind(device.device_kind)
    return chip is not None and chip.peak("bfloat16") is not None and chip.link_bandwidth is not None


def costs_option(compiled: Any, mesh: Mesh) -> dict[str, str]:
    """Write a profile of the program's instruction durations; return the XLA option that names it."""
    chip = chip_of_device_kind(mesh.devices.flat[0].device_kind)
    return {OPTION: str(write_profile(instruction_seconds(compiled.as_text(), layout_of(mesh), chip)))}


def write_profile(seconds: Mapping[str, float], folder: str = FOLDER) -> Path:
    """Write a ProfiledInstructionsProto as text; return its path.

    The name is a hash of the content: the persistent compilation cache identifies a program by its options, and all processes
    of a host may write at once. The folder must not be writable by others, who could put a link there.
    """
    text = "".join(f'costs {{ name: "{name}" cost_us: {1e6 * time:.3f} }}\n' for name, time in seconds.items())
    path = user_path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.pbtxt"
    # An error if that fails: without the profile this process would compile another program than its peers.
    make_file(path, text, "XLA reads instruction durations there")
    return path
