"""What a train step computes on one device, in closed form: from the config alone, without compiling anything.

Letters: B sequences in a microbatch of one device, L sequence length, D embed_dim, H query heads, N head_dim; t, c: devices
along tensor and context. Every figure is that of the busiest device and of one step; what a conditional does counts in every
tick in which any stage does it, because the stages go in lock-step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtrain.config import MESH_AXES, Config
from jaxtrain.layout import layers_of_part, local_length, loss_chunks, microbatch_rows
from jaxtrain.objectives import objective_of
from jaxtrain.objectives.kinds import Objective
from jaxtrain.parallel.pipeline_counts import count_executed
from jaxtrain.planner.layer_table import layer_weights, matmuls, outer_weights, runs_again, trained_weights
from jaxtrain.train.leaf_axes import STACKING, leaf_axes
from jaxtrain.train.muon_shares import MUON_ITERATIONS, Share, shares


@dataclass(frozen=True)
class Ticks:
    """The work that the schedule gives every stage in a step."""

    forward: int
    """Ticks in which a forward pass runs (on any stage)."""
    backward: int
    weight: int
    """Ticks in which weights' gradients are computed: the backward ones, unless these are passes of their own. Their sums over
    devices are counted in the backward ticks all the same, which are up to (k-1)(S-1) fewer (k chunks, S stages)."""
    layers: int
    """Layers that a pass goes through: the slots of one part of the stack."""
    layers_held: int
    """Layers of all the parts that a stage holds."""


def count_ticks(config: Config) -> Ticks:
    """Count how often forward and backward passes run, and through how many layers each.

    1F1B in lock-step runs F in M + P - 1 ticks and B in as many, on P stages with M microbatches; gradient accumulation is
    P = 1. Counted are the ticks that the executor runs.
    """
    pipe, chunks = config.mesh.pipe, config.pipeline.chunks
    layers = layers_of_part(config)
    return Ticks(*count_executed(config.pipeline.schedule, pipe, chunks, config.train.microbatches), layers, layers * chunks)


def loss_positions(config: Config) -> int:
    """Return the positions of a sequence that go through the head, with those that pad it to whole chunks of loss_chunk."""
    tensor = config.mesh.tensor
    return tensor * math.prod(loss_chunks(local_length(config) // tensor, config.train.loss_chunk, tensor))


def attention_flops(config: Config, backend: str) -> tuple[float, float]:
    """(forward, backward with all that is recomputed) of one layer's attention on one microbatch.

    One matmul over the whole square is U = 2 B (H/t) L^2 N / c FLOPs: along context, devices share heads or queries evenly.
    cudnn runs half of the square under the causal mask, 2 U / 2 forward and 5 U / 2 backward (the scores once more); within
    documents that is counted as of one a row, the most it can be. remat that does not keep attention's result runs the forward
    again. reference runs the whole square, 2 U and 4 U; its scores are computed again unless everything is kept, and the
    product with V too under `full`.
    """
    model = config.model
    heads = model.num_heads / (config.mesh.tensor * config.mesh.context)
    square = 2.0 * microbatch_rows(config) * heads * config.data.sequence_length**2 * model.head_dim
    again = runs_again(config, "attention")
    if backend.startswith("cudnn"):
        return square, (2.5 + again) * square
    if backend == "reference":
        scores_again = config.train.remat != "none"
        return 2 * square, (4 + scores_again + again) * square
    raise ValueError(f"attention backend {backend!r}: its FLOPs have no closed form here; cudnn and reference have")


def layer_flops(config: Config, backend: str) -> tuple[float, float]:
    """(forward, backward) of one layer on one microbatch: a matmul costs as much again for its input's gradient, and for its
    weight's, and once more where it is recomputed."""
    rows = matmuls(config)
    ahead, back = attention_flops(config, backend)
    return ahead + sum(row.flops for row in rows), back + sum((2 + row.again) * row.flops for row in rows)


def head_flops(config: Config) -> float:
    """Return the FLOPs of the head on one microbatch: three matmuls, made together with the loss."""
    rows = microbatch_rows(config) * loss_positions(config)
    return 6.0 * rows * config.model.embed_dim * config.model.padded_vocab_size / config.mesh.tensor


def step_flops(config: Config, backend: str) -> float:
    """Return the matmul FLOPs of a step on one device, as its compiled program has them.

    Raises:
      ValueError: the attention backend has no closed form.
    """
    ticks, (ahead, back) = count_ticks(config), layer_flops(config, backend)
    weights = sum(row.flops for row in matmuls(config))
    training = ticks.forward * (ticks.layers * ahead + head_flops(config)) + ticks.backward * ticks.layers * (back - weights)
    training += ticks.weight * ticks.layers * weights
    return training + scoring_flops(config, ahead, ticks.forward * ticks.layers, ticks.forward) + muon_flops(config)


def scoring_flops(config: Config, layer_forward: float, layers: int, heads: int) -> float:
    """Return the matmul FLOPs of the forward pass that scores sequences before the step, where the objective needs it.

    Args:
      layer_forward: of one layer on one microbatch.
      layers, heads: how often a device computes a layer, and the head, which takes one matmul of three here.
    """
    scores = not isinstance(objective_of(config), Objective)
    return layers * layer_forward + heads * head_flops(config) / 3 if scores else 0.0


def muon_shares(config: Config) -> list[Share]:
    """Return how the devices share what muon orthogonalises; nothing for another optimizer."""
    if config.optimizer.name != "muon":
        return []
    stack = config.pipeline.chunks, config.mesh.pipe, layers_of_part(config)
    layer, outer = trained_weights(config.model, config.train.frozen)
    leaves = [((*STACKING, *weight.dims), (*stack, *weight.shape)) for weight in layer]
    leaves += [(("layer", *weight.dims), (weight.layers, *weight.shape)) for weight in outer]
    hidden = [leaf for leaf in leaves if leaf_axes(leaf[0]).is_hidden_matrix]
    return shares(hidden, dict(zip(MESH_AXES, config.mesh.shape, strict=True)))


def muon_flops(config: Config) -> float:
    """Return the matmul FLOPs of muon's iterations on one device in a step: 4 r^2 s + 2 r^3 each for a matrix r x s, r <= s."""
    one = ((share.each, m * k * n) for share in muon_shares(config) for m, k, n in share.products)
    return MUON_ITERATIONS * sum(2.0 * each * product for each, product in one)


def parameters_held(config: Config) -> int:
    """Return the parameters that one device holds: its share of its stage's layers (empty slots too) and of the rest."""
    slots = layers_of_part(config) * config.pipeline.chunks
    inner = sum(weight.shard(config) for weight in layer_weights(config.model).values())
    return slots * inner + sum(weight.shard(config) for weight in outer_weights(config.model).values())


def parameters_trained(config: Config) -> int:
    """Return those of `parameters_held` that the optimizer updates, and adapters."""
    slots = layers_of_part(config) * config.pipeline.chunks
    layer, outer = trained_weights(config.model, config.train.frozen)
    return slots * sum(weight.shard(config) for weight in layer) + sum(weight.shard(config) for weight in outer)
