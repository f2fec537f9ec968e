"""Describe absent GPUs to XLA's compiler: a few numbers per chip, and the text that XLA reads.

The numbers are NVIDIA's (`cudaGetDeviceProperties`), as openxla/xla keeps them in xla/backends/gpu/target_config/specs/
({a100_sxm_40,a100_sxm_80,h100_sxm,h100_pcie,h200,b200,gb200}.txtpb). Chips that it does not keep are made of NVIDIA's
whitepapers (cores, caches, clock), datasheets (bandwidth) and the CUDA C++ Programming Guide's table of compute capabilities
(shared memory, threads); their memory is the driver's total. XLA ends the process without a message (a division by zero) if a
divisor is missing, so all of them are fields without defaults, or true of every chip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxtrain.errors import ExplainedError, nearest

UNLIMITED = 99_999_999_999_999
"""Device memory, in bytes, at which XLA never recomputes to save memory: the program as written."""


@dataclass(frozen=True)
class Architecture:
    """Common properties of one generation of GPUs."""

    compute_capability: tuple[int, int]
    feature_extension: str
    """XLA's value: ACCELERATED_FEATURES for features of this generation only (wgmma, tcgen05), else NONE."""
    fpus_per_core: int
    threads_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int


AMPERE = Architecture((8, 0), "NONE", 64, 2048, 167_936, 166_912)
ADA = Architecture((8, 9), "NONE", 128, 1536, 102_400, 101_376)
HOPPER = Architecture((9, 0), "ACCELERATED_FEATURES", 128, 2048, 233_472, 232_448)
BLACKWELL = Architecture((10, 0), "ACCELERATED_FEATURES", 128, 2048, 233_472, 232_448)


@dataclass(frozen=True)
class Target:
    """One GPU, as XLA's compiler sees it."""

    description: str
    architecture: Architecture
    cores: int
    """Streaming multiprocessors."""
    memory_bytes: int
    memory_bandwidth: int
    l2_bytes: int
    clock_ghz: float

    def text(self, memory_bytes: int | None = None) -> str:
        """Return the GpuTargetConfigProto, with this much device memory (by default the chip's own)."""
        common = self.architecture
        major, minor = common.compute_capability
        return f"""
gpu_device_info {{
  runtime_version: "12.9.0"
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {common.shared_memory_per_core}
  shared_memory_per_block_optin: {common.shared_memory_per_block_optin}
  threads_per_core_limit: {common.threads_per_core}
  core_count: {self.cores}
  fpus_per_core: {common.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {memory_bytes or self.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {common.feature_extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.description}"
"""


MEBI = 2**20

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "a100-40": Target("NVIDIA A100-SXM4-40GB", AMPERE, 108, 42_331_013_120, 1_555_200_000_000, 40 * MEBI, 1.41),
        "a100-80": Target("NVIDIA A100-SXM4-80GB", AMPERE, 108, 85_100_068_864, 2_039_040_000_000, 40 * MEBI, 1.41),
        # As the SXM chips, with the card's bandwidth; memory: 40,326 MiB reported, and the SXM chip's.
        "a100-pcie-40": Target("NVIDIA A100-PCIE-40GB", AMPERE, 108, 40_326 * MEBI, 1_555_200_000_000, 40 * MEBI, 1.41),
        "a100-pcie-80": Target("NVIDIA A100 80GB PCIe", AMPERE, 108, 85_100_068_864, 1_935_000_000_000, 40 * MEBI, 1.41),
        "h100-sxm": Target("NVIDIA H100 80GB HBM3", HOPPER, 132, 84_942_979_072, 3_352_320_000_000, 50 * MEBI, 1.98),
        "h100-pcie": Target("NVIDIA H100 PCIe", HOPPER, 114, 84_942_979_072, 2_039_040_000_000, 50 * MEBI, 1.755),
        "h200": Target("NVIDIA H200", HOPPER, 132, 151_397_597_184, 4_800_000_000_000, 50 * MEBI, 1.98),
        "b200": Target("NVIDIA B200", BLACKWELL, 148, 191_514_411_008, 7_672_320_000_000, 132_644_864, 1.965),
        "gb200": Target("NVIDIA GB200", BLACKWELL, 152, 197_897_748_480, 7_928_064_000_000, 135_528_448, 2.062),
        # Whitepaper "NVIDIA Ada GPU Architecture" (AD102: 96 MB of L2, 72 MB on the RTX 4090; boost 2.52 GHz), datasheets'
        # bandwidth, and 45,589 MiB and 24,217 MiB reported.
        "l40s": Target("NVIDIA L40S", ADA, 142, 45_589 * MEBI, 864_000_000_000, 96 * MEBI, 2.52),
        "rtx-4090": Target("NVIDIA GeForce RTX 4090", ADA, 128, 24_217 * MEBI, 1_008_000_000_000, 72 * MEBI, 2.52),
    }
)
"""The chips that programs can be compiled for, under their names in `hardware.CHIPS` (`Chip.target`)."""


def find_target(chip: str) -> Target:
    """Return the target of a chip of `hardware.CHIPS`.

    Raises:
      ExplainedError: programs cannot be compiled for it here.
    """
    if chip not in TARGETS:
        raise ExplainedError(
            f"--hardware={chip}: no program can be compiled for it without having one; {nearest(chip, TARGETS)}"
        )
    return TARGETS[chip]
