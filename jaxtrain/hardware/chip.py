"""The figures of one kind of chip: its maker's, and the measured share of each.

Units: FLOP/s (a multiply-add is two), bytes, bytes/s, seconds, watts; all decimal (1 GB = 1e9 bytes), as in datasheets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8", "fp32": "float32", "tf32": "tfloat32"}
PEAK_DTYPES = ("bfloat16", "float16", "float8", "tfloat32", "float32")

IDLE_SHARE = 0.15
"""Assumed share of its rated power that an idle GPU draws: `nvidia-smi` shows 10% on an H100 SXM and 13% on an A100 SXM
without a process, and 18% on an idle H200 that holds a model."""


@dataclass(frozen=True)
class Rate:
    """The share of the chip's peak that one operation of one size reaches."""

    dtype: str
    size: int
    """For a matmul (m k n)^(1/3), the edge of its cube; for attention the length of the sequence."""
    fraction: float
    """FLOP/s over the chip's `matmul_peak(dtype)`; over 1 is possible, since peaks are stated for one clock."""
    spread: float = 0.0
    """(slowest - fastest) / median of the repetitions."""


@dataclass(frozen=True)
class CollectiveRate:
    """One collective over one group of devices: its time is latency + sent bytes / bandwidth."""

    over: Literal["link", "nic"]
    """link: all devices of the group are in one host; nic: each is in a different host."""
    kind: str
    """all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute."""
    devices: int
    bandwidth: float
    """Bytes/s that one device sends, at the largest size (the payload times the ring's factor, as `planner` counts)."""
    latency: float
    """Seconds of the smallest one."""
    spread: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """Results of `jaxtrain calibrate`, as fractions of the chip's stated figures; may be written by hand."""

    matmul: tuple[Rate, ...] = ()
    attention: tuple[Rate, ...] = ()
    """Forward and backward of causal attention, head_dim 128: 7 L^2 N H FLOPs per sequence, two matmuls forward and five
    backward over half of the square."""
    memory: float | None = None
    """Bytes/s of a copy (read and written) / `memory_bandwidth`."""
    link: float | None = None
    """Bytes/s that a device sends in all-gathers and reduce-scatters over a whole host / `link_bandwidth`."""
    nic: float | None = None
    """The same between hosts / `nic_bandwidth`."""
    collectives: tuple[CollectiveRate, ...] = ()
    device_kind: str = ""
    devices: int = 1
    processes: int = 1
    simulated: bool = False
    """Whether measured on fake CPU devices, which share one machine's cores and memory: only good to try the verb."""
    noise: float = 0.0
    """Median spread of all measurements."""
    software: str = ""
    date: str = ""


@dataclass(frozen=True)
class Chip:
    """One accelerator with its maker's figures. Fields that are None are not published (or not applicable)."""

    name: str
    """Short name, as in --telemetry.hardware=h100-sxm."""
    device_kinds: tuple[str, ...]
    """The exact values of `jax.Device.device_kind` on this chip."""
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
    host_bandwidth: float | None = None
    """Bytes/s between the chip and its host's memory, one direction."""
    watts: float | None = None
    """Rated power of the chip or module."""
    idle_watts: float | None = None
    """Power of an idle chip with memory in use and clocks up; makers publish none, `jaxtrain calibrate` measures it."""
    devices_per_host: int = 8
    """Chips that reach each other over their own links in the maker's reference system: 8 in an HGX host, 72 in a GB200 NVL72
    rack, a pod of TPUs."""
    collective_latency: float | None = None
    """Seconds before any collective begins."""
    link_latency: float | None = None
    """Seconds that each step of a ring adds inside a host, whatever its size; a ring of n has n - 1 steps."""
    nic_latency: float | None = None
    """The same for a step from one host to the next."""
    source: str = ""
    """Source of the figures."""
    based_on: str = ""
    """For a chip from a file: the known chip that it is a variant of, and that programs are compiled for."""
    calibration: Calibration | None = None
    """Measurements, or None."""

    @property
    def target(self) -> str:
        """The name under which programs are compiled for it (`planner.targets`)."""
        return self.based_on or self.name

    def peak(self, dtype: str) -> float | None:
        """Return the stated peak FLOP/s for `dtype` (bfloat16 or bf16, ...), or None."""
        return self.peak_flops.get(DTYPE_ALIASES.get(dtype, dtype))

    def matmul_peak(self, dtype: str) -> float | None:
        """Return the peak FLOP/s of a matmul with operands of `dtype` at XLA's default precision, or None if unknown.

        A float32 matmul runs in TF32 on NVIDIA tensor cores and in one bfloat16 pass on a TPU, so that is its peak there.
        """
        if DTYPE_ALIASES.get(dtype, dtype) != "float32":
            return self.peak(dtype)
        return self.peak("tfloat32") or (self.peak("bfloat16") if self.target.startswith("tpu") else self.peak("float32"))

    def matmul_fraction(self, dtype: str, m: int, k: int, n: int) -> float | None:
        """Return the measured share of `matmul_peak(dtype)` that an [m, k] x [k, n] matmul reaches, or None.

        Linear between two measured sizes in the logarithm of (m k n)^(1/3); outside, that of the nearest size.
        """
        return interpolated(self.calibration.matmul if self.calibration else (), dtype, (m * k * n) ** (1 / 3))

    def attention_fraction(self, dtype: str, length: int) -> float | None:
        """Return the measured share of `matmul_peak(dtype)` that attention over `length` tokens reaches, or None."""
        return interpolated(self.calibration.attention if self.calibration else (), dtype, length)


def interpolated(rates: tuple[Rate, ...], dtype: str, size: float) -> float | None:
    """Return the fraction at `size`, linear in log(size), constant beyond the measured ones; None without rates of `dtype`."""
    dtype = DTYPE_ALIASES.get(dtype, dtype)
    points = sorted((rate.size, rate.fraction) for rate in rates if rate.dtype == dtype)
    if not points:
        return None
    for (small, below), (large, above) in zip(points, points[1:], strict=False):
        if small <= size < large:
            share = math.log(size / small) / math.log(large / small)
            return below + (above - below) * share
    return points[0][1] if size < points[0][0] else points[-1][1]


def predicted_watts(chip: Chip, utilisation: float) -> float | None:
    """P(u) = idle + (rated - idle) u: mean power of a chip that is busy for a share u of the time; None without a rating.

    The linear model of Fan, Weber and Barroso, "Power provisioning for a warehouse-sized computer" (ISCA 2007), over time: in
    training the compute phases draw close to the rated power and the waits close to idle (arXiv:2508.14318). "Busy" means that
    kernels run, whatever fraction of the peak they reach: u is 1 - (exposed transfers + bubble) / step, not the MFU. Values
    outside [0, 1] are clipped.

    It is the chip alone: hosts, NICs, switches and cooling come on top (an 8 x H100 host is rated at 10.2 kW, 1.8 times its
    GPUs, and was measured at 76% of that in training, arXiv:2506.14551).
    """
    if chip.watts is None:
        return None
    idle = IDLE_SHARE * chip.watts if chip.idle_watts is None else chip.idle_watts
    return idle + (chip.watts - idle) * min(max(utilisation, 0.0), 1.0)
