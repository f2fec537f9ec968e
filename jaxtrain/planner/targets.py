"""What XLA must know of a GPU to compile for one that is not there: a few numbers a chip, and the text that XLA reads.

The numbers are NVIDIA's (`cudaGetDeviceProperties`), as openxla/xla keeps them in
xla/backends/gpu/target_config/specs/{h100_sxm,h200,b200}.txtpb. XLA ends the process without a word (a division by zero)
where one that it divides by is missing, so all of them are fields without defaults, or true of every chip here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxtrain.errors import ExplainedError, nearest

UNLIMITED = 99_999_999_999_999
"""Device memory, in bytes, at which XLA never recomputes anything to save memory: the program as it was written."""


@dataclass(frozen=True)
class Target:
    """One GPU, as XLA's compiler sees it."""

    description: str
    compute_capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    memory_bytes: int
    memory_bandwidth: int
    l2_bytes: int
    clock_ghz: float

    def text(self, memory_bytes: int | None = None) -> str:
        """The GpuTargetConfigProto, with this much device memory (the chip's own by default)."""
        major, minor = self.compute_capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {memory_bytes or self.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.description}"
"""


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "h100-sxm": Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 84_942_979_072, 3_352_320_000_000, 52_428_800, 1.98),
        "h200": Target("NVIDIA H200", (9, 0), 132, 151_397_597_184, 4_800_000_000_000, 52_428_800, 1.98),
        "b200": Target("NVIDIA B200", (10, 0), 148, 191_514_411_008, 7_672_320_000_000, 132_644_864, 1.965),
    }
)
"""The chips that programs can be compiled for, under their names in `hardware.CHIPS`."""


def find_target(chip: str) -> Target:
    """The target of a chip of `hardware.CHIPS`.

    Raises:
      ExplainedError: programs cannot be compiled for it here.
    """
    if chip not in TARGETS:
        raise ExplainedError(f"--chip={chip}: no program can be compiled for it without having one: {nearest(chip, TARGETS)}")
    return TARGETS[chip]
