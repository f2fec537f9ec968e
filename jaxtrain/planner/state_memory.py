"""How a layout cuts the model, and the bytes of a device's share that last from step to step: the training state."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import NamedTuple

from jaxtrain.config import Config, MeshConfig, ModelConfig
from jaxtrain.layout import layers_of_part, whole_moments
from jaxtrain.models.quantised_weights import is_held
from jaxtrain.parallel.pipeline_schedule import SCHEDULES, cut_into_runs
from jaxtrain.parallel.pipeline_slots import count_slots
from jaxtrain.planner.layer_table import BYTES, FLOAT32, Weight, adapters, layer_weights, outer_weights, trained_weights
from jaxtrain.train.leaf_axes import leaf_axes
from jaxtrain.train.moments import block_of


class Shares(NamedTuple):
    """Numbers of a device's share of some weights."""

    sharded: float
    """As the state holds them: matrices over fsdp and tensor, experts over expert, norms whole."""
    gathered: float
    """Whole over fsdp."""
    second: float
    """Of them, those of which muon keeps adamw's two moments: all but hidden matrices."""
    float32: float
    """Of them, those that are kept in float32 whatever param_dtype says: norms, biases, routers."""
    few: float
    """Of them, those that `lora.base` holds in few bits."""
    few_bytes: float
    """Bytes of these, scales included."""
    few_gathered: float
    """The same bytes whole over fsdp."""
    float8: float
    """Of them, those that are multiplied in float8."""
    moment_bytes: float
    """Bytes of one moment of them in 8 bits."""
    second_moment_bytes: float
    """The same of those of which muon keeps two."""
    vectors: float
    """Of the numbers, those of no matrix, whose moments are float32 and never in host memory."""


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
    operands: int
    """Slots for the operands of weight gradients that a backward pass leaves for later, the one that nobody reads included."""
    is_loop: bool
    """Whether a step is a loop over ticks (several microbatches, or stages)."""
    is_pipe: bool
    runs: tuple[int, ...]
    """Ticks in each run of like ticks of the pipeline; a run of one tick is no loop to XLA."""
    trained: Shares
    """Of one layer, what is trained."""
    trained_outer: Shares
    """Of what is outside, what is trained."""
    adapters: float
    """Numbers of all adapters, float32, that are not among `layer` and `outer`."""

    @property
    def held(self) -> float:
        """Parameters: the share of all of the stage's layers (empty slots too) and of what is outside."""
        return self.chunks * self.layers * self.layer.sharded + self.outer.sharded

    @property
    def moving(self) -> float:
        """Parameters of the same that are trained."""
        return self.chunks * self.layers * self.trained.sharded + self.trained_outer.sharded


@functools.cache
def _table(schedule: str, stages: int, chunks: int, microbatches: int) -> tuple[int, int, int, tuple[int, ...]]:
    """(slots of residuals, of boundary activations and gradients, of operands, ticks of each run), from its table."""
    table = SCHEDULES[schedule](stages, chunks, microbatches)
    if table.is_accumulation:
        return 1, 0, 0, ()
    activations, gradients, residuals, operands = count_slots(table)
    runs = tuple(run.stop - run.start for run in cut_into_runs(table))
    return residuals + 1, activations + gradients + 2, operands + (operands > 0), runs


def _share(weights: Collection[Weight], mesh: MeshConfig, model: ModelConfig) -> Shares:
    def numbers(weight: Weight) -> float:
        return weight.elements / math.prod(getattr(mesh, axis) for axis in weight.axes)

    cut = [(w, numbers(w)) for w in weights]
    few = [(w, n, w.arrays(model, "bfloat16")) for w, n in cut if is_held(model.adapters, w.dims)]
    pieces = [(array, BYTES[dtype] * numbers(array)) for _, _, arrays in few for array, dtype in arrays]
    whole = sum(size * (mesh.fsdp if array.is_matrix else 1) for array, size in pieces)
    matrices, vectors = (sum(n for w, n in cut if w.is_matrix == is_matrix) for is_matrix in (True, False))
    fine = sum(n for w, n in cut if w.dtype("") == "float32")
    second = sum(n for w, n in cut if not leaf_axes(w.dims).is_hidden_matrix)
    in_few = sum(n for _, n, _ in few), sum(size for _, size in pieces), whole
    in_float8 = sum(n for w, n in cut if w.is_in_float8(model))
    in_8_bits = [(leaf_axes(w.dims).is_hidden_matrix, _moment_bytes(w) * n) for w, n in cut]
    moments = sum(size for _, size in in_8_bits), sum(size for is_hidden, size in in_8_bits if not is_hidden)
    return Shares(matrices + vectors, mesh.fsdp * matrices + vectors, second, fine, *in_few, in_float8, *moments, vectors)


def _moment_bytes(weight: Weight) -> float:
    """Return the bytes of a number's moment in 8 bits, with its share of the block's scale (`train.moments`)."""
    _, length = block_of(weight.dims, weight.shape)
    return 1 + FLOAT32 / length if length else FLOAT32


class _Held(NamedTuple):
    layer: Shares
    outer: Shares
    trained: Shares
    trained_outer: Shares
    layer_adapters: float
    outer_adapters: float


@functools.lru_cache(maxsize=4096)
def _shares(model: ModelConfig, frozen: tuple[str, ...], fsdp: int, tensor: int, expert: int) -> _Held:
    """Return a device's share of one layer, and of what is outside of the stack; the same of what is trained; adapters."""
    mesh, (layer, outer), new = MeshConfig(fsdp=fsdp, tensor=tensor, expert=expert), trained_weights(model, frozen), ((), ())
    if model.adapters.rank:
        new = adapters(model)
    weights = layer_weights(model).values(), outer_weights(model).values(), layer, outer
    own, outside, moving, moving_outside = (_share(each, mesh, model) for each in weights)
    return _Held(own, outside, moving, moving_outside, *(_share(each, mesh, model).sharded for each in new))


def cut_model(config: Config) -> Cut:
    """Return how a valid config cuts its model."""
    mesh, chunks, microbatches = config.mesh, config.pipeline.chunks, config.train.microbatches
    held = _shares(config.model, config.train.frozen, mesh.fsdp, mesh.tensor, mesh.expert)
    layers = layers_of_part(config)
    residuals, boundaries, operands, runs = _table(config.pipeline.schedule, mesh.pipe, chunks, microbatches)
    slots = (residuals, boundaries, operands, microbatches > 1 or bool(runs), bool(runs), runs)
    new = chunks * layers * held.layer_adapters + held.outer_adapters
    return Cut(held.layer, held.outer, layers, chunks, *slots, held.trained, held.trained_outer, new)


def parameter_bytes(config: Config, cut: Cut) -> float:
    """Return the bytes of the parameters: param_dtype, but float32 for norms, biases, routers and adapters, and few bits for
    what `lora.base` holds so.
    """
    fine, few, few_bytes = (
        cut.chunks * cut.layers * getattr(cut.layer, name) + getattr(cut.outer, name)
        for name in ("float32", "few", "few_bytes")
    )
    return BYTES[config.model.param_dtype] * (cut.held - fine - few) + FLOAT32 * (fine + cut.adapters) + few_bytes


def optimizer_state(config: Config, cut: Cut) -> float:
    """Return the bytes of the moments on the device: with `optimizer.moments_memory` host those of norms and biases."""
    if config.optimizer.moments_memory == "host":
        return FLOAT32 * whole_moments(config.optimizer) * _vectors(cut)
    return _moments(config, cut)


def moments_on_host(config: Config) -> float:
    """Return the bytes of the fullest device's moments that lie in its host's memory."""
    cut = cut_model(config)
    return _moments(config, cut) - optimizer_state(config, cut)


def _vectors(cut: Cut) -> float:
    return cut.chunks * cut.layers * cut.trained.vectors + cut.trained_outer.vectors


def _moments(config: Config, cut: Cut) -> float:
    """Return the bytes of all moments, float32 or in 8 bits, and sharded like the trained parameters.

    adamw keeps two, lion and sgd with momentum one. muon keeps one for layers' matrices and adamw's two for norms, table and
    head. adafactor keeps a mean over the outputs and one over the inputs of each matrix, whole on every device of a stage, and
    a whole moment of norms.
    """
    name, layers = config.optimizer.name, cut.chunks * cut.layers
    if config.optimizer.moments_dtype == "int8":
        once, twice = (
            layers * getattr(cut.trained, part) + getattr(cut.trained_outer, part)
            for part in ("moment_bytes", "second_moment_bytes")
        )
        return whole_moments(config.optimizer) * once + twice * (name == "muon")
    if name == "adafactor":
        of_layer, of_outer = map(_factors, trained_weights(config.model, config.train.frozen))
        return FLOAT32 * (layers * of_layer + of_outer)
    if name == "muon":
        return FLOAT32 * (cut.moving + layers * cut.trained.second + cut.trained_outer.second)
    return FLOAT32 * whole_moments(config.optimizer) * cut.moving


@functools.lru_cache(maxsize=64)
def _factors(weights: tuple[Weight, ...]) -> int:
    """Adafactor's numbers for some weights: a + b for a matrix a x b (of each expert), and all of a norm."""

    def of(weight: Weight) -> int:
        axes = leaf_axes(weight.dims)
        if not axes.is_matrix:
            return weight.elements
        sides = (math.prod(weight.shape[axis] for axis in side) for side in (axes.inputs, axes.outputs))
        return weight.layers * weight.experts * sum(sides)

    return sum(map(of, weights))


def sync_state(config: Config, cut: Cut) -> float:
    """Return the bytes of what keeps replicas together, sharded like the parameters (`parallel.sync.initial_state`).

    In float32: the anchor of local and diloco; diloco's momentum; what is set aside where an exchange overlaps steps; `delay`
    queued gradients of delayed; what compression lost, with error feedback.
    """
    sync = config.sync
    copies = 1 + bool(sync.outer[1]) + bool(sync.overlap) if sync.replicas_differ else sync.queued
    copies += sync.error_feedback and sync.compression != "none"
    return FLOAT32 * copies * cut.moving


def average_state(config: Config, cut: Cut) -> float:
    """Return the bytes of the moving average of train.ema_decay, sharded like the trained parameters."""
    return FLOAT32 * cut.moving * bool(config.train.ema_decay)


def head_numbers(config: Config) -> float:
    """Return the numbers of the head on one device, whole over fsdp."""
    return config.model.embed_dim * config.model.padded_vocab_size / config.mesh.tensor


def trains_head(config: Config) -> bool:
    """Return whether the output projection has a gradient."""
    return trains(config, "table" if config.model.tie_embeddings else "head")


def trains(config: Config, name: str) -> bool:
    """Return whether a weight outside of the layers has a gradient."""
    return any(weight.name == name for weight in trained_weights(config.model, config.train.frozen)[1])
