"""What a plan says of one layout on one cluster: numbers without the code that finds them, so that every room can speak them.

`memory` and `cost` fill them from closed forms, `verify` from a compiled program; `plan` ranks, tabulates and draws them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtrain.config import MESH_AXES, Config
from jaxtrain.hardware import Chip

Origin = Literal["estimate", "compiled", "approximate"]
"""estimate: closed forms. compiled: memory, FLOPs and bytes of the program that the chip would run. approximate: of a program
compiled for fake CPU devices, whose working memory and collectives are not a GPU's."""


@dataclass(frozen=True)
class Cluster:
    """Hosts of equal chips: links inside a host, a NIC a chip between hosts."""

    chip: Chip
    hosts: int
    devices_per_host: int = 8
    """Chips connected by the chip's own links (8 in an HGX host, 72 in a GB200 NVL72 rack)."""
    reserved_bytes: int = 3 * 2**30
    """Bytes of a chip's memory for the CUDA context, NCCL and cuBLAS."""

    @property
    def devices(self) -> int:
        """Number of chips."""
        return self.hosts * self.devices_per_host

    @property
    def budget_bytes(self) -> float:
        """Memory that a program may take on one chip; infinite if the chip's memory is unknown."""
        return (self.chip.memory_bytes or math.inf) - self.reserved_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device, at the worst moment of a step."""

    parameters: float
    """Master weights."""
    optimizer: float
    """Moments, and what the exchange between replicas keeps."""
    gradients: float
    """Gradients, as they are accumulated."""
    weights: float
    """Copies of weights in the compute dtype, and those gathered."""
    activations: float
    """What the forward pass keeps for the backward pass, of all microbatches under way."""
    working: float
    """What one layer, or the head, needs while it is computed; buffers of transfers under way."""
    other_models: float = 0.0
    """A teacher's weights, or those that rewards stay near."""
    kernels: float = 0.0
    """What cuDNN's attention within documents needs while it computes gradients."""
    rollouts: float = 0.0
    """What the cache of a rollout takes beyond what a step has at its worst moment, and a rollout has not."""

    @property
    def of_program(self) -> float:
        """Bytes of the step's program, as XLA shows them where there is no GPU to ask what its kernels need."""
        return self.parameters + self.optimizer + self.gradients + self.weights + self.activations + self.working

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.of_program + self.other_models + self.kernels + self.rollouts


@dataclass(frozen=True)
class Wire:
    """One device's traffic along some mesh axes in a step, of one kind and dtype."""

    axes: str
    """Mesh axes, "data+expert"."""
    kind: str
    dtype: str
    bytes: float
    """Bytes that a device sends (payload times the ring's factor)."""
    seconds: float
    """Time on the link if nothing else used it."""
    exposed_seconds: float
    """Part of it for which the device waits."""
    crosses_hosts: bool


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the busiest device; they add up."""

    matmul: float
    """Matmuls of weights, recomputation included."""
    attention: float
    memory_bound: float
    """Norms, activations, routing, the loss: limited by the memory's bandwidth."""
    optimizer: float
    exposed: float
    """Waiting for transfers."""
    bubble: float
    """Waiting for other pipeline stages."""
    overhead: float = 0.0
    """Launching kernels, and the host."""
    other_models: float = 0.0
    """Forward passes before the step: of the model itself, to score sequences, or of a teacher."""
    rollouts: float = 0.0
    """Answers of the model, before the first of the steps on them."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        device = self.matmul + self.attention + self.memory_bound + self.optimizer
        return device + self.exposed + self.bubble + self.overhead + self.other_models + self.rollouts


@dataclass(frozen=True)
class Estimate:
    """One layout on one cluster."""

    config: Config
    """A config that is valid for the cluster's devices, with a resolved mesh."""
    cluster: Cluster
    origin: Origin
    memory: Memory
    time: StepTime
    wires: tuple[Wire, ...]
    flops: float
    """Matmul FLOPs of a device in a step, recomputation included."""
    model_flops: float
    """FLOPs of the model itself in a step, of all devices together: what MFU counts (`telemetry.flops`)."""
    joules: float | None
    """Energy of all chips in a step; None if the chip's power is not published."""

    @property
    def fits(self) -> bool:
        """Return whether the fullest device has room."""
        return self.memory.total <= self.cluster.budget_bytes

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.train.global_batch_size * self.config.data.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s of the whole cluster."""
        return self.tokens / self.time.total

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: model FLOPs over what the chips could do at their peak; None without a known peak."""
        peak = self.cluster.chip.matmul_peak(self.config.model.dtype)
        return self.model_flops / (self.time.total * peak * self.cluster.devices) if peak else None

    @property
    def bubble(self) -> float:
        """Share of the step in which the busiest device waits for other stages."""
        return self.time.bubble / self.time.total

    @property
    def joules_per_token(self) -> float | None:
        """Energy per token; None if the chip's power is not published."""
        return None if self.joules is None else self.joules / self.tokens

    def score(self, objective: str) -> float:
        """Return the quantity ranked, smaller is better: joules a token for energy, else seconds a token (so money too)."""
        per_token = self.joules_per_token if objective == "energy" else None
        return 1 / self.tokens_per_second if per_token is None else per_token

    @property
    def mesh(self) -> dict[str, int]:
        """{axis: size} of the axes above 1."""
        return {axis: size for axis, size in zip(MESH_AXES, self.config.mesh.shape, strict=True) if size > 1}

    def sent(self, crosses_hosts: bool) -> float:
        """Return the bytes that a device sends in a step: between hosts, or inside its own."""
        return sum(wire.bytes for wire in self.wires if wire.crosses_hosts == crosses_hosts)


def axes_in_use(shape: Sequence[int]) -> frozenset[str]:
    """Return the kind of a mesh: its axes above 1, with data and fsdp as one, since both divide the batch."""
    return frozenset("fsdp" if axis == "data" else axis for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1)


@dataclass(frozen=True)
class Point:
    """One layout on the map of a search: its time against its memory."""

    seconds: float
    """Seconds of a step."""
    bytes: float
    """Bytes on the fullest device."""
    mesh: tuple[int, ...]
    """Sizes in the order of MESH_AXES."""
    fits: bool


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    ranked: tuple[Estimate, ...]
    """The best that fit, best first; may be empty."""
    candidates: int
    """Number of valid layouts examined."""
    pruned: Mapping[str, int]
    """{reason: layouts dropped before ranking}, e.g. {"does not fit": 1234}."""
    points: tuple[Point, ...]
    """A sample of all examined layouts, large enough to draw, with the Pareto front."""
    pareto: tuple[Estimate, ...]
    """Fitting layouts that no other beats in both time and memory, fastest first."""
    smallest: Cluster | None
    """If nothing fits, the smallest cluster of such hosts that holds a layout, if there is one; else None."""
    leanest: Estimate | None
    """The layout of least memory: how far from fitting the cluster is."""
    seconds: float
    """Duration of the search."""
    kinds: tuple[Estimate, ...] = ()
    """The best fitting layout found of each kind (`axes_in_use`) that is not among those ranked."""
