"""How a layout cuts the model, and the bytes of a device's share that last from step to step: the training state."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import NamedTuple

from jaxtrain.config import Config, ModelConfig
from jaxtrain.layout import layers_of_part, whole_moments
from jaxtrain.parallel.pipeline_schedule import SCHEDULES, count_slots, cut_into_runs
from jaxtrain.planner.layer_table import BYTES, FLOAT32, Weight, layer_weights, outer_weights


class Shares(NamedTuple):
    """Numbers of a device's share of some weights."""

    sharded: float
    """As the state holds them: matrices over fsdp and tensor, experts over expert, norms whole."""
    gathered: float
    """Whole over fsdp."""
    vectors: float
    """Of them, norms and biases."""
    float32: float
    """Of them, those that are kept in float32 whatever param_dtype says: norms, biases, routers."""


class Cut(NamedTuple):
    """A device's share of the model, and the slots in which its microbatches wait."""

    layer: Shares
    """Of one layer."""
    outer: Shares
    """Of what is outside of the stack of layers."""
    layers: int
    """Layers of one part of the stack."""
    chunks: int
    residuals: int
    """Slots for what a part's forward leaves for its backward, the one that nobody reads included; 1 without a pipeline."""
    boundaries: int
    """Slots for activations and gradients between stages."""
    is_loop: bool
    """Whether a step is a loop over ticks (several microbatches, or stages)."""
    is_pipe: bool
    runs: tuple[int, ...]
    """Ticks in each run of like ticks of the pipeline; a run of one tick is no loop to XLA."""

    @property
    def held(self) -> float:
        """Parameters: the share of all of the stage's layers (empty slots too) and of what is outside."""
        return self.chunks * self.layers * self.layer.sharded + self.outer.sharded


@functools.cache
def _table(schedule: str, stages: int, chunks: int, microbatches: int) -> tuple[int, int, tuple[int, ...]]:
    """(slots of residuals, slots of boundary activations and gradients, ticks of each run), from the schedule's table."""
    table = SCHEDULES[schedule](stages, chunks, microbatches)
    if table.is_accumulation:
        return 1, 0, ()
    activations, gradients, residuals = count_slots(table)
    return residuals + 1, activations + gradients + 2, tuple(run.stop - run.start for run in cut_into_runs(table))


@functools.lru_cache(maxsize=4096)
def _shares(model: ModelConfig, fsdp: int, tensor: int, expert: int) -> tuple[Shares, Shares]:
    """Return a device's share of one layer, and of what is outside of the stack."""
    sizes = {"fsdp": fsdp, "tensor": tensor, "expert": expert}

    def share(weights: Collection[Weight]) -> Shares:
        cut = [(w, w.elements / math.prod(sizes[axis] for axis in w.axes)) for w in weights]
        matrices, vectors = (sum(n for w, n in cut if w.is_matrix == is_matrix) for is_matrix in (True, False))
        fine = sum(n for w, n in cut if w.dtype("") == "float32")
        return Shares(matrices + vectors, fsdp * matrices + vectors, vectors, fine)

    return share(layer_weights(model).values()), share(outer_weights(model).values())


def cut_model(config: Config) -> Cut:
    """Return how a valid config cuts its model."""
    mesh, chunks, microbatches = config.mesh, config.pipeline.chunks, config.train.microbatches
    shares = _shares(config.model, mesh.fsdp, mesh.tensor, mesh.expert)
    residuals, boundaries, runs = _table(config.pipeline.schedule, mesh.pipe, chunks, microbatches)
    return Cut(*shares, layers_of_part(config), chunks, residuals, boundaries, microbatches > 1 or bool(runs), bool(runs), runs)


def parameter_bytes(config: Config, cut: Cut) -> float:
    """Return the bytes of the parameters: param_dtype, but float32 for norms, biases and routers."""
    fine = cut.chunks * cut.layers * cut.layer.float32 + cut.outer.float32
    return BYTES[config.model.param_dtype] * (cut.held - fine) + FLOAT32 * fine


def optimizer_state(config: Config, cut: Cut) -> float:
    """Return the bytes of the moments, float32 and sharded like the parameters.

    adamw keeps two, lion and sgd with momentum one. muon keeps one for layers' matrices and adamw's two for norms, table and
    head. adafactor keeps a mean over the outputs and one over the inputs of each matrix, whole on every device of a stage, and
    a whole moment of norms.
    """
    name, layers = config.optimizer.name, cut.chunks * cut.layers
    if name == "adafactor":
        return FLOAT32 * (layers * _factors(config.model, True) + _factors(config.model, False))
    if name == "muon":
        tables = head_numbers(config) / config.mesh.fsdp * (1 if config.model.tie_embeddings else 2)
        return FLOAT32 * (cut.held + layers * cut.layer.vectors + cut.outer.vectors + tables)
    return FLOAT32 * whole_moments(config.optimizer) * cut.held


@functools.lru_cache(maxsize=64)
def _factors(model: ModelConfig, of_layer: bool) -> int:
    """Adafactor's numbers for one layer, or for what is outside of layers: a + b for a matrix a x b (of each expert), and all
    of a norm. One side is the model's width, or the latent that heads are projected up from."""
    weights = layer_weights(model) if of_layer else outer_weights(model)
    return sum(w.layers * w.experts * (w.inputs + w.outputs) if w.is_matrix else w.elements for w in weights.values())


def sync_state(config: Config, cut: Cut) -> float:
    """Return the bytes of what keeps replicas together, sharded like the parameters (`parallel.sync.initial_state`).

    In float32: the anchor of local and diloco; diloco's momentum; what is set aside where an exchange overlaps steps; `delay`
    queued gradients of delayed; what compression lost, with error feedback.
    """
    sync = config.sync
    copies = 1 + bool(sync.outer[1]) + bool(sync.overlap) if sync.replicas_differ else sync.queued
    copies += sync.error_feedback and sync.compression != "none"
    return FLOAT32 * copies * cut.held


def head_numbers(config: Config) -> float:
    """Return the numbers of the head on one device, whole over fsdp."""
    return config.model.embed_dim * config.model.padded_vocab_size / config.mesh.tensor
