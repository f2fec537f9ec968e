"""What a train step computes and holds on one device, in closed form: from the config alone, without compiling anything.

Letters: B sequences in a microbatch of one device, L sequence length, D embed_dim, H query heads, K kv heads, N head_dim,
F mlp_dim, V padded vocabulary; t, c, f: devices along tensor, context, fsdp. Every figure is that of the busiest device and of
one step; what a conditional does counts in every tick in which any stage does it, because the stages go in lock-step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from jaxtrain.config import Config, ModelConfig
from jaxtrain.layout import (
    capacity_group,
    kept_names,
    layers_per_part,
    local_length,
    loss_chunks,
    microbatch_rows,
    room_of_expert,
)
from jaxtrain.parallel.pipeline_schedule import cut_into_runs, make_schedule

BYTES = {"bfloat16": 2, "float32": 4}
MATRIX = ("fsdp", "tensor")
HLO_DTYPE = {"bfloat16": "bf16", "float32": "f32"}


@dataclass(frozen=True)
class Weight:
    """One parameter of the model (of one layer, for a layer's)."""

    elements: int
    axes: tuple[str, ...]
    """Mesh axes that shard it, but for pipe."""
    compute: str = ""
    """Dtype in which it is used, where that is not the model's."""

    @property
    def is_matrix(self) -> bool:
        """Whether it is kept in shards over fsdp, and so gathered; norms, whole everywhere, are not."""
        return "fsdp" in self.axes

    def shard(self, config: Config, without: tuple[str, ...] = ()) -> int:
        """Elements on one device; `without` names axes over which it has been gathered."""
        return self.elements // math.prod(getattr(config.mesh, axis) for axis in self.axes if axis not in without)


@dataclass(frozen=True)
class Ticks:
    """What the schedule makes every stage do in a step."""

    forward: int
    """Ticks in which a forward pass runs (on any stage)."""
    backward: int
    layers: int
    """Layers that a pass goes through: the slots of one part of the stack."""
    layers_held: int
    """Layers of all the parts that a stage holds."""


def layer_weights(model: ModelConfig) -> Mapping[str, Weight]:
    """The weights of one decoder layer: Q (D x HN), K and V (D x KN), O (HN x D), gate and up (D x F), down (F x D), norms.

    Projections are sharded over fsdp along D and over tensor along heads or F; norms lie whole on every device. A mixture has a
    router (D x E, float32), and gate, up and down of all E experts, sharded over expert too, beside those of shared experts.
    """
    d = model.embed_dim
    weights = dict(_attention_weights(model)) | {"attention_norm": Weight(d, ()), "mlp_norm": Weight(d, ())}
    if not model.moe:
        return weights | dict.fromkeys(("gate", "up", "down"), Weight(d * model.mlp_dim, MATRIX))
    moe = model.moe
    expert = Weight(moe.num_experts * d * moe.mlp_dim, ("expert", *MATRIX))
    weights |= {"router": Weight(d * moe.num_experts, ("fsdp",), "float32")}
    weights |= dict.fromkeys(("expert_gate", "expert_up", "expert_down"), expert)
    if moe.bias_update_rate:
        weights |= {"bias": Weight(moe.num_experts, (), "float32")}
    if moe.shared_experts:
        weights |= dict.fromkeys(("gate", "up", "down"), Weight(d * moe.shared_experts * moe.mlp_dim, MATRIX))
    return weights


def _attention_weights(model: ModelConfig) -> Mapping[str, Weight]:
    """Q, K, V and O; of latent attention the projections down to latents of Q, C and R numbers, and up from them to heads."""
    d, n, heads, latent = model.embed_dim, model.head_dim, model.num_heads, model.latent_attention
    if latent is None:
        weights = {
            "query": Weight(d * heads * n, MATRIX),
            "key": Weight(d * model.num_kv_heads * n, MATRIX),
            "value": Weight(d * model.num_kv_heads * n, MATRIX),
            "out": Weight(heads * n * d, MATRIX),
        }
        return weights | {"query_norm": Weight(n, ()), "key_norm": Weight(n, ())} if model.qk_norm != "none" else weights
    weights = {
        "query": Weight((latent.query_rank or d) * heads * (n + latent.rope_dim), MATRIX),
        "key": Weight(latent.kv_rank * heads * n, MATRIX),
        "value": Weight(latent.kv_rank * heads * latent.value_dim, MATRIX),
        "out": Weight(heads * latent.value_dim * d, MATRIX),
        "kv_down": Weight(d * latent.kv_rank, ("fsdp",)),
        "rope_key": Weight(d * latent.rope_dim, ("fsdp",)),
        "kv_norm": Weight(latent.kv_rank, ()),
    }
    if latent.query_rank:
        weights |= {"query_down": Weight(d * latent.query_rank, ("fsdp",)), "query_norm": Weight(latent.query_rank, ())}
    return weights


def outer_weights(model: ModelConfig) -> Mapping[str, Weight]:
    """The embedding table (V x D), the output projection (D x V) unless it is tied, the final norm, and a mixture's first dense
    layers."""
    table = Weight(model.padded_vocab_size * model.embed_dim, MATRIX)
    weights = {"table": table, "norm": Weight(model.embed_dim, ())}
    first = model.first_dense_layers
    for name, weight in layer_weights(replace(model, moe=None)).items() if first else ():
        weights[f"first_{name}"] = replace(weight, elements=first * weight.elements)
    return weights if model.tie_embeddings else weights | {"head": table}


def count_ticks(config: Config) -> Ticks:
    """How often forward and backward passes run, and through how many layers each.

    1F1B in lock-step runs F in M + P - 1 ticks and B in as many, on P stages with M microbatches; gradient accumulation is
    P = 1. The executor runs an operation in all ticks of a run of like ticks (`cut_into_runs`), so those are counted.
    """
    pipe, chunks = config.mesh.pipe, config.pipeline.chunks
    layers = layers_per_part(config.model.stacked_layers, pipe, chunks)
    return Ticks(*_passes(config.pipeline.schedule, pipe, chunks, config.train.microbatches), layers, layers * chunks)


@functools.lru_cache(maxsize=1024)
def _passes(name: str, pipe: int, chunks: int, microbatches: int) -> tuple[int, int]:
    """Ticks with a forward pass, and with a backward pass; a table is made once."""
    schedule = make_schedule(name, pipe, chunks, microbatches)
    if pipe * chunks == 1 and np.array_equal(schedule.forward_microbatch, schedule.backward_microbatch):
        return microbatches, microbatches
    runs = cut_into_runs(schedule)
    forward = sum(run.stop - run.start for run in runs if run.forward != "no")
    backward = sum(run.stop - run.start for run in runs if run.backward != "no")
    return forward, backward


def loss_positions(config: Config) -> int:
    """Positions of a sequence that go through the head, with those that pad it to whole chunks of loss_chunk."""
    tensor = config.mesh.tensor
    return tensor * math.prod(loss_chunks(local_length(config) // tensor, config.train.loss_chunk, tensor))


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs


MADE_BY = {"attention_out": "out", "mlp_gate": "gate", "mlp_up": "up", "expert_out": "expert_down"}
"""Names that remat can keep, and the weight whose product each is, where they are called differently."""


def recomputed(config: Config) -> frozenset[str]:
    """Which of a layer's matmuls the backward pass runs a second time, by the name of their weight; "attention" for both of
    attention's.

    Remat `full` keeps the layer's input only: all but the last matmul, whose result nothing needs again (but the experts' last,
    which the gradient of the router's weights needs). `none` and `dots` keep the results of all matmuls. `named` keeps what it
    names: a projection whose result is kept is not run again.
    """
    again = {*layer_weights(config.model)} - {"down"} | {"attention"}
    if config.train.remat in ("none", "dots"):
        return frozenset()
    return frozenset(again - {MADE_BY.get(name, name) for name in kept_names(config.train)})


def attention_flops(config: Config, backend: str) -> tuple[float, float]:
    """(forward, backward with all that is recomputed) of one layer's attention on one microbatch.

    One matmul over the whole square is U = 2 B (H/t) L^2 N / c FLOPs: along context, devices share heads or queries evenly.
    cudnn runs half of the square under the causal mask, 2 U / 2 forward and 5 U / 2 backward (the scores once more); remat that
    does not keep attention's result runs the forward again. reference runs the whole square, 2 U and 4 U; its scores are
    computed again unless everything is kept, and the product with V too under `full`.
    """
    model = config.model
    heads = model.num_heads / (config.mesh.tensor * config.mesh.context)
    square = 2.0 * microbatch_rows(config) * heads * config.data.sequence_length**2 * model.head_dim
    again = "attention" in recomputed(config)
    if backend == "cudnn":
        return square, (2.5 + again) * square
    if backend == "reference":
        scores_again = config.train.remat != "none"
        return 2 * square, (4 + scores_again + again) * square
    raise ValueError(f"attention backend {backend!r}: its FLOPs have no closed form here; cudnn and reference have")


def expert_rows(config: Config) -> int:
    """Rows that all experts together take from one microbatch of one device, those left empty included.

    Capacity: E experts x (B L/c / G groups of G tokens) x ceil(factor G K / E). Dropless: B L/c K.
    """
    moe, tokens = config.model.moe, microbatch_rows(config) * local_length(config)
    assert moe is not None
    if moe.dispatch == "dropless":
        return tokens * moe.experts_per_token
    group = capacity_group(moe, local_length(config))
    room = room_of_expert(group, moe.experts_per_token, moe.num_experts, moe.capacity_factor)
    return moe.num_experts * (tokens // group) * room


def _rows_of(config: Config, name: str) -> float:
    """Rows that a weight multiplies in one pass, times the weight's whole share of them: experts share their rows out, and the
    router takes its slice of the sequence over tensor."""
    if name == "router":
        return microbatch_rows(config) * local_length(config) / config.mesh.tensor
    if not name.startswith("expert_"):
        return microbatch_rows(config) * local_length(config)
    assert config.model.moe is not None
    return expert_rows(config) * config.mesh.expert / config.model.moe.num_experts


def step_flops(config: Config, backend: str) -> float:
    """Matmul FLOPs of a step on one device.

    A projection with P weights costs 2 P FLOPs a token forward and 4 P backward, 2 P more where it is recomputed. All of the
    local tokens B L/c meet this device's 1/t of the weights; of experts, each meets its own rows (`expert_rows`, from all
    devices along expert). The head costs three matmuls, made together with the loss.
    """
    ticks, weights = count_ticks(config), layer_weights(config.model)
    once = {
        name: 2.0 * _rows_of(config, name) * weight.shard(config, without=("fsdp",))
        for name, weight in weights.items()
        if weight.is_matrix
    }
    forward, again = sum(once.values()), sum(once[name] for name in recomputed(config) if name in once)
    attention_forward, attention_backward = attention_flops(config, backend)
    rows = microbatch_rows(config) * loss_positions(config)
    head = 6.0 * rows * config.model.embed_dim * config.model.padded_vocab_size / config.mesh.tensor
    return ticks.forward * (ticks.layers * (forward + attention_forward) + head) + ticks.backward * ticks.layers * (
        2 * forward + again + attention_backward
    )


# ---------------------------------------------------------------------------------------------------------------------
# Memory that lasts


def parameters_held(config: Config) -> int:
    """Parameters that one device holds: its share of its stage's layers (empty slots too) and of the outer weights."""
    layers = count_ticks(config).layers_held
    inner = layers * sum(weight.shard(config) for weight in layer_weights(config.model).values())
    return inner + sum(weight.shard(config) for weight in outer_weights(config.model).values())
