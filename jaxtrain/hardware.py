"""Chips and their links: peak FLOP/s, bytes, bytes/s and watts, as their makers state them.

Every figure is for one chip, at its rated power, dense (no structured sparsity: datasheets that print only the sparse
figure are halved here). A figure that the maker does not publish is None or absent, and whatever would be computed from
it is then None as well, never a guess.

Units: FLOP/s (a multiply-add is two), bytes, bytes/s, watts; all decimal (1 GB = 1e9 bytes), as in datasheets.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jaxtrain.errors import ExplainedError, nearest

TERA, GIGA = 1e12, 1e9

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8", "fp32": "float32", "tf32": "tfloat32"}


@dataclass(frozen=True)
class Chip:
    """One accelerator: what its maker says it can do. Fields that are None are not published (or make no sense)."""

    name: str
    """Short name, as in --telemetry.hardware=h100-sxm."""
    device_kinds: tuple[str, ...]
    """Exactly what `jax.Device.device_kind` says on this chip."""
    peak_flops: Mapping[str, float]
    """Dense matmul FLOP/s by dtype: bfloat16, float16, float8, tfloat32; float32 is the plain (vector) rate."""
    memory_bytes: int | None = None
    """Device memory."""
    memory_bandwidth: float | None = None
    """Device memory bytes/s."""
    link_bandwidth: float | None = None
    """Bytes/s out of the chip over all its links to the other chips of the same host or slice, one direction."""
    nic_bandwidth: float | None = None
    """Bytes/s of the network per chip, one direction, in the maker's reference system."""
    watts: float | None = None
    """Rated power of the chip or module."""
    idle_watts: float | None = None
    """Power of a chip that waits, memory in use and clocks up; makers publish none, `jaxtrain.calibrate` measures it."""

    def peak(self, dtype: str) -> float | None:
        """Peak FLOP/s that the maker states for `dtype` (bfloat16 or bf16, ...), or None where it states none."""
        return self.peak_flops.get(_DTYPE_ALIASES.get(dtype, dtype))

    def matmul_peak(self, dtype: str) -> float | None:
        """Peak FLOP/s of a matmul with operands of `dtype` as XLA runs it at its default precision, or None if unknown.

        A float32 matmul runs in TF32 on NVIDIA tensor cores and in one bfloat16 pass on a TPU, so that is its peak there.
        """
        if _DTYPE_ALIASES.get(dtype, dtype) != "float32":
            return self.peak(dtype)
        return self.peak("tfloat32") or (self.peak("bfloat16") if self.name.startswith("tpu") else self.peak("float32"))


IDLE_SHARE = 0.15
"""Share of its rated power that a waiting GPU draws, where it was not measured: `nvidia-smi` shows 10% on an H100 SXM and 13%
on an A100 SXM without a process, and 18% on an H200 that holds a model and does nothing."""


def predicted_watts(chip: Chip, utilisation: float) -> float | None:
    """Mean power of one chip that works for a share `utilisation` of the time and waits for the rest; None without a rating.

    P(u) = idle + (rated - idle) u, the linear model of Fan, Weber and Barroso, "Power provisioning for a warehouse-sized
    computer" (ISCA 2007), taken in time: in training the compute phases draw close to the rated power and the waits close to
    idle (arXiv:2508.14318). "Works" means that kernels run, whatever fraction of the peak they reach: it is 1 - (exposed
    transfers + bubble) / step, not the MFU. Values beyond 0 and 1 are held to them.

    It is the chip alone: hosts, NICs, switches and cooling come on top (an 8 x H100 host is rated at 10.2 kW, 1.8 times its
    GPUs, and was measured at 76% of that in training, arXiv:2506.14551).
    """
    if chip.watts is None:
        return None
    idle = IDLE_SHARE * chip.watts if chip.idle_watts is None else chip.idle_watts
    return idle + (chip.watts - idle) * min(max(utilisation, 0.0), 1.0)


def _tera(**rates: float) -> Mapping[str, float]:
    return MappingProxyType({dtype: rate * TERA for dtype, rate in rates.items()})


# NVIDIA A100 Tensor Core GPU datasheet (SXM: 400 W; NVLink 600 GB/s both ways). Network: DGX A100 datasheet, 200 Gb/s a GPU.
_A100_40 = Chip(
    name="a100-40",
    device_kinds=("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
    peak_flops=_tera(bfloat16=312, float16=312, tfloat32=156, float32=19.5),
    memory_bytes=int(40 * GIGA),
    memory_bandwidth=1555 * GIGA,
    link_bandwidth=300 * GIGA,
    nic_bandwidth=25 * GIGA,
    watts=400,
)
_A100_80 = dataclasses.replace(
    _A100_40,
    name="a100-80",
    device_kinds=("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
    memory_bytes=int(80 * GIGA),
    memory_bandwidth=2039 * GIGA,
)
# Same datasheet, PCIe cards: PCIe Gen4 x16, 64 GB/s both ways. No reference network: 8-GPU servers differ.
_A100_PCIE_40 = dataclasses.replace(
    _A100_40,
    name="a100-pcie-40",
    device_kinds=("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
    link_bandwidth=32 * GIGA,
    nic_bandwidth=None,
    watts=250,
)
_A100_PCIE_80 = dataclasses.replace(
    _A100_PCIE_40,
    name="a100-pcie-80",
    device_kinds=("NVIDIA A100 80GB PCIe",),
    memory_bytes=int(80 * GIGA),
    memory_bandwidth=1935 * GIGA,
    watts=300,
)
# NVIDIA H100 Tensor Core GPU Architecture whitepaper, table 2 (dense rates), and H100 datasheet (3.35 TB/s, 700 W, NVLink
# 900 GB/s both ways). Network: DGX H100 datasheet, 400 Gb/s a GPU.
_H100_SXM = Chip(
    name="h100-sxm",
    device_kinds=("NVIDIA H100 80GB HBM3",),
    peak_flops=_tera(bfloat16=989.4, float16=989.4, float8=1978.9, tfloat32=494.7, float32=66.9),
    memory_bytes=int(80 * GIGA),
    memory_bandwidth=3350 * GIGA,
    link_bandwidth=450 * GIGA,
    nic_bandwidth=50 * GIGA,
    watts=700,
)
# H100 datasheet, PCIe column (sparse rates halved), PCIe Gen5 x16 128 GB/s both ways.
_H100_PCIE = Chip(
    name="h100-pcie",
    device_kinds=("NVIDIA H100 PCIe",),
    peak_flops=_tera(bfloat16=756, float16=756, float8=1513, tfloat32=378, float32=51),
    memory_bytes=int(80 * GIGA),
    memory_bandwidth=2000 * GIGA,
    link_bandwidth=64 * GIGA,
    watts=350,
)
# NVIDIA H200 Tensor Core GPU datasheet, SXM column: H100's compute, 141 GB at 4.8 TB/s. Network: DGX H200 datasheet.
_H200 = dataclasses.replace(
    _H100_SXM,
    name="h200",
    device_kinds=("NVIDIA H200",),
    memory_bytes=int(141 * GIGA),
    memory_bandwidth=4800 * GIGA,
)
# NVIDIA Blackwell datasheet, HGX B200, figures of one GPU (sparse rates halved). Network: DGX B200 datasheet, 400 Gb/s a GPU.
_B200 = Chip(
    name="b200",
    device_kinds=("NVIDIA B200",),
    peak_flops=_tera(bfloat16=2250, float16=2250, float8=4500, tfloat32=1100, float32=75),
    memory_bytes=int(180 * GIGA),
    memory_bandwidth=7700 * GIGA,
    link_bandwidth=900 * GIGA,
    nic_bandwidth=50 * GIGA,
    watts=1000,
)
# Same datasheet, GB200 NVL72, figures of one GPU; the Grace CPU's power is not in the watts. Network: 400 Gb/s a GPU.
_GB200 = Chip(
    name="gb200",
    device_kinds=("NVIDIA GB200",),
    peak_flops=_tera(bfloat16=2500, float16=2500, float8=5000, tfloat32=1250, float32=80),
    memory_bytes=int(186 * GIGA),
    memory_bandwidth=8000 * GIGA,
    link_bandwidth=900 * GIGA,
    nic_bandwidth=50 * GIGA,
    watts=1200,
)
# NVIDIA L40S datasheet (dense column; PCIe Gen4 x16, 64 GB/s both ways).
_L40S = Chip(
    name="l40s",
    device_kinds=("NVIDIA L40S",),
    peak_flops=_tera(bfloat16=362.05, float16=362.05, float8=733, tfloat32=183, float32=91.6),
    memory_bytes=int(48 * GIGA),
    memory_bandwidth=864 * GIGA,
    link_bandwidth=32 * GIGA,
    watts=350,
)
# NVIDIA Ada GPU Architecture whitepaper, appendix A: tensor rates with float32 accumulation, which is what training uses
# (float16 accumulation is twice as fast on GeForce). PCIe Gen4 x16.
_RTX_4090 = Chip(
    name="rtx-4090",
    device_kinds=("NVIDIA GeForce RTX 4090",),
    peak_flops=_tera(bfloat16=165.2, float16=165.2, float8=330.3, tfloat32=82.6, float32=82.6),
    memory_bytes=int(24 * GIGA),
    memory_bandwidth=1008 * GIGA,
    link_bandwidth=32 * GIGA,
    watts=450,
)
# Google Cloud TPU documentation, "TPU v5e" and "TPU v6e": ICI 1,600 and 3,200 Gb/s a chip, host NICs of 2 x 100 and
# 4 x 200 Gb/s over 8 chips. No float8 matmul unit, and no power figure is published.
_TPU_V5E = Chip(
    name="tpu-v5e",
    device_kinds=("TPU v5 lite", "TPU v5e"),
    peak_flops=_tera(bfloat16=197),
    memory_bytes=int(16 * GIGA),
    memory_bandwidth=800 * GIGA,
    link_bandwidth=200 * GIGA,
    nic_bandwidth=3.125 * GIGA,
)
_TPU_V6E = Chip(
    name="tpu-v6e",
    device_kinds=("TPU v6 lite", "TPU v6e"),
    peak_flops=_tera(bfloat16=918),
    memory_bytes=int(32 * GIGA),
    memory_bandwidth=1600 * GIGA,
    link_bandwidth=400 * GIGA,
    nic_bandwidth=12.5 * GIGA,
)
# Google Cloud TPU documentation, "TPU v5p": ICI 4,800 Gb/s a chip. Its network per chip is not in that table.
_TPU_V5P = Chip(
    name="tpu-v5p",
    device_kinds=("TPU v5", "TPU v5p"),
    peak_flops=_tera(bfloat16=459),
    memory_bytes=int(95 * GIGA),
    memory_bandwidth=2765 * GIGA,
    link_bandwidth=600 * GIGA,
)
# A CPU's peak depends on its cores, vector width and clock under load; nobody states it for "cpu", so neither do we.
_CPU = Chip(name="cpu", device_kinds=("cpu",), peak_flops=_tera())

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            _A100_40,
            _A100_80,
            _A100_PCIE_40,
            _A100_PCIE_80,
            _H100_SXM,
            _H100_PCIE,
            _H200,
            _B200,
            _GB200,
            _L40S,
            _RTX_4090,
            _TPU_V5E,
            _TPU_V5P,
            _TPU_V6E,
            _CPU,
        )
    }
)
"""Every chip known, by name."""


def find_chip(name: str) -> Chip:
    """The chip of that name; upper case, spaces and underscores are as good as lower case and hyphens ("RTX 4090").

    Raises:
      ExplainedError: no such chip; the message names the nearest.
    """
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    if key not in CHIPS:
        raise ExplainedError(f"telemetry.hardware={name!r} is no chip we know: {nearest(key, CHIPS)}")
    return CHIPS[key]


def chip_of_device_kind(device_kind: str) -> Chip | None:
    """The chip that `jax.Device.device_kind` names, or None.

    The match is exact: a MIG slice ("NVIDIA H200 MIG 1g.18gb") or a cut-down variant ("RTX 4090 D") is another chip, and
    an MFU against the whole chip's peak would be wrong.
    """
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def resolve_chip(hardware: str, device_kind: str) -> Chip:
    """The chip that a run's MFU is measured against: telemetry.hardware, or with "auto" the one that the device says it is.

    A device that nobody here knows gives a chip under its own name without figures, so that MFU is reported as unknown.

    Raises:
      ExplainedError: `hardware` is neither "auto" nor a known name.
    """
    if hardware != "auto":
        return find_chip(hardware)
    return chip_of_device_kind(device_kind) or Chip(name=device_kind, device_kinds=(device_kind,), peak_flops=_tera())
