"""Chips and their links: their makers' peak FLOP/s, bytes, bytes/s and watts, and how to name one.

Every figure is for one chip, at its rated power, dense (no structured sparsity: datasheets that print only the sparse figure
are halved here). An unpublished figure is None or absent, and whatever would be computed from it is then None as well, never a
guess. `chip.Chip` documents each field and its unit.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from jaxtrain.errors import ExplainedError, nearest
from jaxtrain.files import user_path
from jaxtrain.hardware.chip import Chip
from jaxtrain.hardware.chip_file import ENDINGS, read_chip

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6


def _tera(**rates: float) -> Mapping[str, float]:
    return MappingProxyType({dtype: rate * TERA for dtype, rate in rates.items()})


# NCCL's own model for choosing an algorithm: src/graph/tuning.cc (2.28), rings with the Simple protocol, which
# carries large messages: 8.4 us to begin, 3.4 us per step over NVLink, 5.7 us over PCIe, 14 us from host to host.
_NCCL = "; latencies: NCCL 2.28, src/graph/tuning.cc (ring, Simple)"
_BEGIN, _NVLINK_STEP, _PCIE_STEP, _NIC_STEP = 8.4 * MICRO, 3.4 * MICRO, 5.7 * MICRO, 14.0 * MICRO

_A100_40 = Chip(
    name="a100-40",
    device_kinds=("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
    peak_flops=_tera(bfloat16=312, float16=312, tfloat32=156, float32=19.5),
    memory_bytes=int(40 * GIGA),
    memory_bandwidth=1555 * GIGA,
    link_bandwidth=300 * GIGA,
    nic_bandwidth=25 * GIGA,
    watts=400,
    collective_latency=_BEGIN,
    link_latency=_NVLINK_STEP,
    nic_latency=_NIC_STEP,
    source="NVIDIA A100 datasheet (SXM; NVLink 600 GB/s both ways); DGX A100 datasheet (8 GPUs, 200 Gb/s a GPU)" + _NCCL,
)
_A100_80 = dataclasses.replace(
    _A100_40,
    name="a100-80",
    device_kinds=("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
    memory_bytes=int(80 * GIGA),
    memory_bandwidth=2039 * GIGA,
)
_A100_PCIE_40 = dataclasses.replace(
    _A100_40,
    name="a100-pcie-40",
    device_kinds=("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
    link_bandwidth=32 * GIGA,
    nic_bandwidth=None,
    watts=250,
    link_latency=_PCIE_STEP,
    source="NVIDIA A100 datasheet (PCIe Gen4 x16, 64 GB/s both ways); servers differ in their network" + _NCCL,
)
_A100_PCIE_80 = dataclasses.replace(
    _A100_PCIE_40,
    name="a100-pcie-80",
    device_kinds=("NVIDIA A100 80GB PCIe",),
    memory_bytes=int(80 * GIGA),
    memory_bandwidth=1935 * GIGA,
    watts=300,
)
_H100_SXM = Chip(
    name="h100-sxm",
    device_kinds=("NVIDIA H100 80GB HBM3",),
    peak_flops=_tera(bfloat16=989.4, float16=989.4, float8=1978.9, tfloat32=494.7, float32=66.9),
    memory_bytes=int(80 * GIGA),
    memory_bandwidth=3350 * GIGA,
    link_bandwidth=450 * GIGA,
    nic_bandwidth=50 * GIGA,
    watts=700,
    collective_latency=_BEGIN,
    link_latency=_NVLINK_STEP,
    nic_latency=_NIC_STEP,
    source="NVIDIA H100 Tensor Core GPU Architecture whitepaper, table 2 (dense rates); H100 datasheet (3.35 TB/s, 700 W, "
    "NVLink 900 GB/s both ways); DGX H100 datasheet (8 GPUs, 400 Gb/s a GPU)" + _NCCL,
)
_H100_PCIE = Chip(
    name="h100-pcie",
    device_kinds=("NVIDIA H100 PCIe",),
    peak_flops=_tera(bfloat16=756, float16=756, float8=1513, tfloat32=378, float32=51),
    memory_bytes=int(80 * GIGA),
    memory_bandwidth=2000 * GIGA,
    link_bandwidth=64 * GIGA,
    watts=350,
    collective_latency=_BEGIN,
    link_latency=_PCIE_STEP,
    nic_latency=_NIC_STEP,
    source="NVIDIA H100 datasheet, PCIe column (sparse rates halved; PCIe Gen5 x16, 128 GB/s both ways); servers differ in "
    "their network" + _NCCL,
)
_H200 = dataclasses.replace(
    _H100_SXM,
    name="h200",
    device_kinds=("NVIDIA H200",),
    memory_bytes=int(141 * GIGA),
    memory_bandwidth=4800 * GIGA,
    source="NVIDIA H200 datasheet, SXM column (the H100's compute, 141 GB at 4.8 TB/s); DGX H200 datasheet (8 GPUs, 400 Gb/s "
    "a GPU)" + _NCCL,
)
_B200 = Chip(
    name="b200",
    device_kinds=("NVIDIA B200",),
    peak_flops=_tera(bfloat16=2250, float16=2250, float8=4500, tfloat32=1100, float32=75),
    memory_bytes=int(180 * GIGA),
    memory_bandwidth=7700 * GIGA,
    link_bandwidth=900 * GIGA,
    nic_bandwidth=50 * GIGA,
    watts=1000,
    collective_latency=_BEGIN,
    link_latency=_NVLINK_STEP,
    nic_latency=_NIC_STEP,
    source="NVIDIA Blackwell datasheet, HGX B200, one GPU (sparse rates halved); DGX B200 datasheet (8 GPUs, 400 Gb/s a GPU)"
    + _NCCL,
)
_GB200 = Chip(
    name="gb200",
    device_kinds=("NVIDIA GB200",),
    peak_flops=_tera(bfloat16=2500, float16=2500, float8=5000, tfloat32=1250, float32=80),
    memory_bytes=int(186 * GIGA),
    memory_bandwidth=8000 * GIGA,
    link_bandwidth=900 * GIGA,
    nic_bandwidth=50 * GIGA,
    watts=1200,
    devices_per_host=72,
    collective_latency=_BEGIN,
    link_latency=_NVLINK_STEP,
    nic_latency=_NIC_STEP,
    source="NVIDIA Blackwell datasheet, GB200 NVL72, one GPU (the Grace CPU's power is not in the watts; 72 GPUs on one "
    "NVLink, 400 Gb/s a GPU)" + _NCCL,
)
_L40S = Chip(
    name="l40s",
    device_kinds=("NVIDIA L40S",),
    peak_flops=_tera(bfloat16=362.05, float16=362.05, float8=733, tfloat32=183, float32=91.6),
    memory_bytes=int(48 * GIGA),
    memory_bandwidth=864 * GIGA,
    link_bandwidth=32 * GIGA,
    watts=350,
    collective_latency=_BEGIN,
    link_latency=_PCIE_STEP,
    nic_latency=_NIC_STEP,
    source="NVIDIA L40S datasheet (dense column; PCIe Gen4 x16, 64 GB/s both ways); servers differ in their network" + _NCCL,
)
_RTX_4090 = Chip(
    name="rtx-4090",
    device_kinds=("NVIDIA GeForce RTX 4090",),
    peak_flops=_tera(bfloat16=165.2, float16=165.2, float8=330.3, tfloat32=82.6, float32=82.6),
    memory_bytes=int(24 * GIGA),
    memory_bandwidth=1008 * GIGA,
    link_bandwidth=32 * GIGA,
    watts=450,
    collective_latency=_BEGIN,
    link_latency=_PCIE_STEP,
    nic_latency=_NIC_STEP,
    source="NVIDIA Ada GPU Architecture whitepaper, appendix A: tensor rates with float32 accumulation, which is what training "
    "uses (float16 accumulation is twice as fast on GeForce); PCIe Gen4 x16, without peer-to-peer, so that transfers pass "
    "through the host's memory and half the link is more than they reach" + _NCCL,
)
_TPU_V5E = Chip(
    name="tpu-v5e",
    device_kinds=("TPU v5 lite", "TPU v5e"),
    peak_flops=_tera(bfloat16=197),
    memory_bytes=int(16 * GIGA),
    memory_bandwidth=819 * GIGA,
    link_bandwidth=200 * GIGA,
    nic_bandwidth=3.125 * GIGA,
    devices_per_host=256,
    source='Google Cloud TPU documentation, "TPU v5e" (ICI 400 GB/s both ways; a pod of 256 in a torus; hosts of 8 chips with '
    "2 x 100 Gb/s between pods); no float8 unit, power and latencies are not published",
)
_TPU_V5P = Chip(
    name="tpu-v5p",
    device_kinds=("TPU v5", "TPU v5p"),
    peak_flops=_tera(bfloat16=459),
    memory_bytes=int(95 * GIGA),
    memory_bandwidth=2765 * GIGA,
    link_bandwidth=600 * GIGA,
    nic_bandwidth=6.25 * GIGA,
    devices_per_host=8960,
    source='Google Cloud TPU documentation, "TPU v5p" (ICI 1,200 GB/s both ways; a pod of 8,960 in a torus, jobs of at most '
    "6,144; 50 Gb/s a chip between pods); power and latencies are not published",
)
_TPU_V6E = Chip(
    name="tpu-v6e",
    device_kinds=("TPU v6 lite", "TPU v6e"),
    peak_flops=_tera(bfloat16=918),
    memory_bytes=int(32 * GIGA),
    memory_bandwidth=1638 * GIGA,
    link_bandwidth=400 * GIGA,
    nic_bandwidth=12.5 * GIGA,
    devices_per_host=256,
    source='Google Cloud TPU documentation, "TPU v6e" (ICI 800 GB/s both ways; a pod of 256 in a torus; hosts of 8 chips with '
    "4 x 200 Gb/s between pods); no float8 unit, power and latencies are not published",
)
_CPU = Chip(
    name="cpu",
    device_kinds=("cpu",),
    peak_flops=_tera(),
    devices_per_host=1,
    source="none: a CPU's peak depends on its cores, vector width and clock; `jaxtrain calibrate` measures it",
)

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


def find_chip(name: str, flag: str = "--hardware") -> Chip:
    """Return the chip of that name; case, spaces, underscores and hyphens do not matter ("RTX 4090").

    Raises:
      ExplainedError: no such chip; the message names the nearest, and the flag that gave the name.
    """
    key = re.sub(r"[\s_]+", "-", name.strip().lower())
    if key not in CHIPS:
        raise ExplainedError(f"{flag}={name!r} is no chip we know: {nearest(key, CHIPS)}; or a file of your own, chip.json")
    return CHIPS[key]


def load_chip(name_or_path: str, flag: str = "--hardware") -> Chip:
    """Return the chip of that name, or the one that a file describes ("my_chip.json", "measured.toml": see `chip_file.py`).

    Raises:
      ExplainedError: no such chip, no such file, or a mistake in the file; the message says what would work.
    """
    if Path(name_or_path).suffix in ENDINGS:
        return read_chip(user_path(name_or_path), CHIPS, flag)
    return find_chip(name_or_path, flag)


def chip_of_device_kind(device_kind: str) -> Chip | None:
    """Return the chip with this `jax.Device.device_kind`, or None.

    The match is exact: a MIG slice ("NVIDIA H200 MIG 1g.18gb") or a cut-down variant ("RTX 4090 D") is another chip, and an MFU
    against the whole chip's peak would be wrong.
    """
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def resolve_chip(hardware: str, device_kind: str, flag: str = "telemetry.hardware") -> Chip:
    """Return the chip that MFU is measured against: `hardware`, or with "auto" the chip of this device kind.

    An unknown device kind gives a chip of that name without figures, so that MFU is reported as unknown.

    Raises:
      ExplainedError: `hardware` is neither "auto" nor a known name nor a chip file that can be read.
    """
    if hardware != "auto":
        return load_chip(hardware, flag)
    return chip_of_device_kind(device_kind) or Chip(name=device_kind, device_kinds=(device_kind,), peak_flops=_tera())
