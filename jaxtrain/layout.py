"""Decisions that follow from a config alone and that both the trainer and the planner need: each is made here, and imported.

Imports no jax. `tests/test_layout.py` holds that no other file makes one of them again.
"""

from __future__ import annotations

import math

from jaxtrain.config import Config, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, ShardingConfig, TrainConfig

LAYERS_PER_ITERATION = 4
"""Layers in one iteration of the layer scan where activations move: the last transfers of one travel behind the matmuls of the
next."""
KERNEL_TILE = 128
"""Rows to which GPU kernels pad each expert's share (`ops.grouped_matmul`)."""
DOTS_BY_NAME = ("attention", "router", "expert_in", "expert_gate", "expert_up", "expert_out")
"""What remat `dots` keeps beside plain matmuls: attention, and the experts' matmuls with the tokens sent to them. Tokens are
sent, not gathered: keeping them repeats nothing on other devices, and sending them again would cost the slowest link."""
DOTS_BY_PRIMITIVE = ("query", "key", "value", "mlp_gate", "mlp_up")
"""Names of the plain matmuls that remat `dots` keeps, whatever their names."""


def is_gpu(platform: str) -> bool:
    """Return whether a jax platform is NVIDIA's GPUs."""
    return platform in ("gpu", "cuda")


# ---------------------------------------------------------------------------------------------------------------------
# Layers and the turns they take


def layers_per_part(layers: int, stages: int, chunks: int, period: int = 1) -> int:
    """Return the slots of each of stages x chunks parts of the stack: ceil(groups / parts) groups of `period` layers each."""
    return math.ceil(math.ceil(layers / period) / (stages * chunks)) * period


def stage_of_part(part: int, stages: int, folded: bool) -> int:
    """Return the stage of a part of the layer stack: part % stages, counted from the end in odd chunks of a folded stack."""
    chunk, position = divmod(part, stages)
    return stages - 1 - position if folded and chunk % 2 else position


def layers_of_part(config: Config) -> int:
    """Return the slots of one part of a config's stack: the layers that a pass through a chunk of a stage runs."""
    model = config.model
    return layers_per_part(model.stacked_layers, config.mesh.pipe, config.pipeline.chunks, len(model.kinds))


def moves_activations(mesh: MeshConfig) -> bool:
    """Return whether layers send activations between devices, so that parts of a microbatch take turns (`parallel.turns`)."""
    return mesh.tensor > 1 or mesh.expert > 1


def parts_in_turns(sharding: ShardingConfig, mesh: MeshConfig, rows: int) -> int:
    """Return into how many parts a microbatch's rows are cut: 2 where layers send activations and the rows can be halved."""
    return 2 if sharding.take_turns and moves_activations(mesh) and rows % 2 == 0 else 1


def most_layers_per_iteration(mesh: MeshConfig, platform: str) -> int:
    """Return how many layers one iteration of the layer scan runs at most."""
    return LAYERS_PER_ITERATION if moves_activations(mesh) and is_gpu(platform) else 1


def layers_per_iteration(layers: int, most: int, period: int = 1) -> int:
    """Return the layers of one iteration of the layer scan: whole groups of `period` layers, one at least.

    Of groups it is the largest divisor with at most `most` layers that leaves two iterations or more: layers outside the loop
    would stand beside their own recomputation, and XLA would take the two for one and keep everything.
    """
    groups = layers // period
    return period * max((n for n in range(2, most // period + 1) if groups % n == 0 and groups >= 2 * n), default=1)


def reduces_layer_by_layer(model: ModelConfig, mesh: MeshConfig, in_iteration: int) -> bool:
    """Return whether each layer's gradients are reduced behind the next layer (`parallel.turns.reduce_behind_next`).

    Not along a pipeline: 405b has 13% of its bytes without a matmul so, and 9% without. Experts: mixtral on fsdp=8 expert=8 has
    39.7% of its bytes exposed so, and 44.6% without. Not tried where experts are shared out along tensor alone.
    """
    return in_iteration > 1 and mesh.pipe == 1 and (not model.moe or mesh.expert > 1)


def recomputes_layer_by_layer(model: ModelConfig, mesh: MeshConfig, remat: str, in_iteration: int) -> bool:
    """Return whether each layer is computed again behind the next layer (`parallel.turns.recompute_behind_next`).

    70b on fsdp=32 tensor=8 takes 18.4 GiB so, and 22.2 without. Not tried where a dense layer keeps more than its input.
    """
    return reduces_layer_by_layer(model, mesh, in_iteration) and (remat == "full" or (remat != "none" and bool(model.moe)))


# ---------------------------------------------------------------------------------------------------------------------
# What a layer keeps for its backward


def kept_names(train: TrainConfig) -> tuple[str, ...]:
    """Return the names (`config.REMAT_NAMES`) by which the remat policy keeps activations; `none` keeps all without names."""
    return {"named": train.remat_save, "dots": DOTS_BY_NAME}.get(train.remat, ())


def keeps(train: TrainConfig, name: str) -> bool:
    """Return whether the remat policy keeps the activation of that name."""
    by_primitive = train.remat == "dots" and name in DOTS_BY_PRIMITIVE
    return train.remat == "none" or by_primitive or name in kept_names(train)


def inputs_on_host(train: TrainConfig) -> bool:
    """Return whether layers' inputs wait in the host's memory; `none` and `dots` keep them among what stays on the device."""
    return train.layer_inputs_memory == "host" and train.remat in ("full", "named")


# ---------------------------------------------------------------------------------------------------------------------
# ZeRO levels


def gathers_each_layer(zero: int) -> bool:
    """Return whether weights stay in shards over fsdp and are gathered layer by layer (level 3), else once a step."""
    return zero == 3


def reduces_each_pass(zero: int) -> bool:
    """Return whether gradients are scattered over fsdp in every backward pass (levels 2 and 3), else once a step."""
    return zero > 1


# ---------------------------------------------------------------------------------------------------------------------
# Rows, positions and the room of experts


def rows_of_device(global_batch_size: int, mesh: MeshConfig, microbatches: int) -> int:
    """Return B, the sequences of one microbatch on one device."""
    return global_batch_size // (mesh.batch_shards * microbatches)


def microbatch_rows(config: Config) -> int:
    """Return B of a config."""
    return rows_of_device(config.train.global_batch_size, config.mesh, config.train.microbatches)


def fewer_rows(config: Config, needed: int) -> tuple[int, int]:
    """Return (rows, microbatches) of the smallest step that has `needed` rows, of those of a quarter, a half and so on.

    A microbatch keeps its rows where their number then divides into whole turns of a pipeline; else it gets fewer.
    """
    whole, count, pipe, shards = (
        config.train.global_batch_size,
        config.train.microbatches,
        config.mesh.pipe,
        config.mesh.batch_shards,
    )
    for quarters in (1, 2, 3):
        rows, fewer = whole * quarters // 4, count * quarters // 4
        for microbatches in (fewer, count) if count * quarters % (4 * pipe) == 0 else (count,):
            if 4 * rows == whole * quarters and rows >= needed and rows % (shards * microbatches) == 0:
                return rows, microbatches
    return whole, count


def local_length(config: Config) -> int:
    """Return L / context, the positions of a sequence that a device has between gathers over tensor."""
    return config.data.sequence_length // config.mesh.context


def loss_chunks(length: int, chunk: int, tensor: int) -> tuple[int, int]:
    """Return (number of chunks, positions of each on one device along tensor) in which the loss goes through a sequence.

    Args:
      length: positions of a sequence on one device along tensor; the last chunk is padded.
      chunk: `train.loss_chunk`, over all devices along tensor.
    """
    count = math.ceil(length / max(1, min(chunk // tensor, length)))
    return count, math.ceil(length / count)


def room_of_expert(group: int, experts_per_token: int, num_experts: int, capacity_factor: float) -> int:
    """Return the rows that an expert takes of a group of tokens: ceil(factor group K / E), never more than there are tokens."""
    return min(group, math.ceil(capacity_factor * group * experts_per_token / num_experts))


def capacity_rows(moe: MoEConfig, tokens: int, length: int) -> int:
    """Return the rows for which experts have room where `tokens` of sequences of `length` are dispatched by capacity."""
    group = moe.group(length)
    return (
        moe.num_experts * (tokens // group) * room_of_expert(group, moe.experts_per_token, moe.num_experts, moe.capacity_factor)
    )


def rows_sent(tokens: int, experts_per_token: int, local_experts: int) -> int:
    """Return the rows that one device may send to one other at most, dropless: T min(K, E / P)."""
    return tokens * min(experts_per_token, local_experts)


def exchange_rows(tokens: int, experts_per_token: int, devices: int, local_experts: int, factor: float) -> int:
    """Return the rows that a device's experts take of `tokens` of each of P devices: P T min(K, E / P), which drops none; with
    a factor (`moe.exchange_factor`) at most factor T K.
    """
    most = devices * rows_sent(tokens, experts_per_token, local_experts)
    return min(most, math.ceil(factor * tokens * experts_per_token)) if factor and devices > 1 else most


def padded_rows(rows: int, groups: int, tile: int) -> int:
    """Return how many slots are enough for any split of the rows into groups of whole tiles."""
    return rows if tile == 1 else math.ceil((rows + groups * (tile - 1)) / tile) * tile


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


def whole_moments(optimizer: OptimizerConfig) -> int:
    """Return how many float32 moments of a matrix's own size the optimizer keeps.

    adafactor keeps a row and a column in place of one; muon keeps one for the matrices of layers, and adamw's two for the rest.
    """
    return {"adamw": 2, "lion": 1, "sgd": int(optimizer.beta1 > 0), "muon": 1, "adafactor": 0}[optimizer.name]


def moments_on_device(optimizer: OptimizerConfig) -> int:
    """Return how many of `whole_moments` lie on the device between steps."""
    return whole_moments(optimizer) if optimizer.moments_memory == "device" else 0
