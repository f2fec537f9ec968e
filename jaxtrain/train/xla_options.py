"""The XLA options of a run on GPUs: one table with each option's effect and gain, and how a run overrides them.

Gains are read from the schedule of the program compiled for H100s (`planner/`): the share of the bytes that move
while the device waits. BENCHMARKS.md has the figures. There are two kinds of layout, and what helps one hurts the other:

* **Weights move, activations do not** (`tensor` and `expert` are 1): XLA may take a layer's gathers and scatters into the
  iteration of the scan before or after it.
* **Activations move** (`tensor` or `expert` above 1): two parts of a microbatch interleave (`parallel/turns.py`), four layers
  to an iteration, and XLA's pipelining is off: it takes whole chains of recomputed attention along with a gather, and runs 40
  of 241 GiB of reduce-scatters twice.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jaxlib.version

from jaxtrain.config import Config
from jaxtrain.config.run_rules import parse_xla_option
from jaxtrain.errors import ExplainedError
from jaxtrain.layout import is_gpu, moves_activations

MIB = 2**20
Value = bool | int | float | str


TABLE: dict[str, tuple[Value, Value]] = {
    # Orders the program so that matmuls stand between the start and the end of transfers; nothing is hidden without it.
    "xla_gpu_enable_latency_hiding_scheduler": (True, True),
    # Transfers under way at a time (XLA: 1); else a gather over slow links keeps all others waiting. 7b fsdp=64: 31.8% exposed
    # with 1, 16.4% with 2, 29.4% with 3; 70b fsdp=32 tensor=8: 33.2% with 2, 27.0% with 4.
    "xla_gpu_experimental_parallel_collective_overlap_limit": (2, 4),
    # Gathers the next layer's weights in this iteration of the scan, in backward too. 7b fsdp=64: 3% of the gathers' bytes
    # exposed with it, 56% without.
    "xla_gpu_enable_pipelined_all_gather": (True, False),
    # Sends a layer's gradients in the next iteration.
    "xla_gpu_enable_pipelined_reduce_scatter": (True, False),
    # The same for gradients that data parallelism sums.
    "xla_gpu_enable_pipelined_all_reduce": (True, False),
    # Two layers an iteration, so that a gathered layer is not copied into the place of the one before it.
    "xla_gpu_enable_while_loop_double_buffering": (True, False),
    # Gathers up to so much in one call: a layer's weights, and not the activations of two parts that take turns.
    "xla_gpu_all_gather_combine_threshold_bytes": (256 * MIB, 128 * MIB),
    # The same for reduce-scatters, of which XLA counts what each device is left with: a large matrix's gradient travels alone,
    # as soon as it is there. 7b fsdp=64: 16.4% exposed with a layer's gradients in one call, 7.1% so.
    "xla_gpu_reduce_scatter_combine_threshold_bytes": (3 * MIB, 4 * MIB),
    # One all-reduce for all the gradients of norms, and few for those that data parallelism sums.
    "xla_gpu_all_reduce_combine_threshold_bytes": (256 * MIB, 256 * MIB),
    # A permute meets its own ring only; all devices of the mesh would wait for one another in the ring attention of a pipeline
    # stage that others do not run in that tick. From the option's own words; not tried on GPUs.
    "xla_gpu_collective_permute_connected_components": (True, True),
    # Rows go to experts by NCCL's sends. XLA's own kernel, for up to 8 devices of a host, reached 2% of NVLink's bandwidth on 8
    # B200s (openxla/xla#33386), and gradients were NaN through it (marin-community/marin#8077). Not tried on GPUs.
    "xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel": (False, False),
}
"""{option: (its value if only weights move between devices, its value if activations move too)}, each with what it does."""

FLOAT8 = {"xla_gpu_enable_triton_gemm": False}
"""Options of `model.matmul_dtype=float8`: matmuls go to cuBLAS, whose float8 kernels take the scales. Of Triton's, XLA knows no
tiles for two float8 formats until it has measured some on a GPU."""

DETERMINISTIC = (
    "xla_gpu_deterministic_ops",
    "xla_gpu_exclude_nondeterministic_ops",
    "xla_gpu_enable_scatter_determinism_expander",
)
"""The first implies the others by its definition (openxla/xla#12520); they are set by name all the same."""


def default_options(config: Config, platform: str) -> dict[str, Value]:
    """Return the table's values for a layout; empty on other platforms than NVIDIA's."""
    if not is_gpu(platform):
        return {}
    values = {name: both[moves_activations(config.mesh)] for name, both in TABLE.items()}
    return values | (FLOAT8 if config.model.matmul_dtype == "float8" else {})


def deterministic_options(config: Config, platform: str) -> dict[str, Value]:
    """Return the XLA options of `train.deterministic`; empty on other platforms than NVIDIA's, where nothing depends on timing.

    GPU kernels that add with atomics differ from run to run: scatters (the embedding's gradient), some matmuls, cuDNN's
    attention backward (XLA sets its `force_deterministic` by the first two options). Also, the fastest kernel is found by
    measurement at compile time, so that two compilations may choose differently: the first option turns the measurement off.
    """
    return {name: True for name in DETERMINISTIC} if config.train.deterministic and is_gpu(platform) else {}


def options_of_rare_programs(platform: str) -> dict[str, Value]:
    """Return compiler options for rarely run programs: on CPU they compile 4x faster, to the same bits at the same speed.

    A level that XLA_FLAGS names takes precedence.
    """
    level = "xla_backend_optimization_level"
    return {level: 1} if platform == "cpu" and level not in os.environ.get("XLA_FLAGS", "") else {}


def parse_options(options: tuple[str, ...]) -> dict[str, Value]:
    """Parse `train.xla_options`, "name=value" each, with true, false and numbers as such.

    Raises:
      ExplainedError: an entry without a name or a value; a validated config has none.
    """
    return dict(map(parse_xla_option, options))


def compile_with_options(lowered: Any, defaults: Mapping[str, Value], asked: Mapping[str, Value]) -> Any:
    """Compile. A default that this XLA does not know is dropped with a line on stderr; a requested option must be known.

    Raises:
      ExplainedError: XLA does not know a requested option, or not with that value.
    """
    options = {**defaults, **asked}
    while True:
        try:
            return lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            ill = re.search(r"While setting option (\w+), (.*)", str(error))
            name = unknown.group(1) if unknown else ill.group(1) if ill else ""
            if name in asked:
                why = "this XLA has no such option" if unknown or not ill else ill.group(2)
                by = "train.deterministic" if name in DETERMINISTIC else "train.xla_options"
                raise ExplainedError(f"{by}: {name}={asked[name]}: {why} (jaxlib {jaxlib.version.__version__})") from error
            if name not in options:
                raise
            del options[name]
            print(f"xla        without {name}, which jaxlib {jaxlib.version.__version__} does not take", file=sys.stderr)
