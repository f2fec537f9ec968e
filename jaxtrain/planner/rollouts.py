"""Time and memory of the rollouts of objective.kind=grpo: train.global_batch_size answers, made by the arrays that are trained.

Prompts of P tokens (what data.sequence_length leaves beside objective.grpo.max_new_tokens) are a forward pass. Then each of
max_new_tokens tokens, of all rows at once, takes

    layers (matmuls + gathers + transfers) + cache / bandwidth + head,

where a matmul of few rows takes as long as its weights are read, fsdp gathers each layer for each token, and the whole cache is
read. Stages work one after another (`inference.forward`). Answers count as long as they may be; rewards take no time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from jaxtrain.config import Config
from jaxtrain.inference.cache import ROW_AXES, CacheSize
from jaxtrain.inference.engine import LARGEST_CHUNK, UNIT
from jaxtrain.planner.candidate import Candidate, with_layout
from jaxtrain.planner.estimates import Cluster
from jaxtrain.planner.generation_memory import cache_bytes, working_bytes
from jaxtrain.planner.layer_table import matmuls
from jaxtrain.planner.roofline import KERNEL_GAP, Roofline
from jaxtrain.planner.traffic import Flow, place, seconds
from jaxtrain.train.gradients import replays_routing

KERNELS = 18
"""Kernels of one layer, forward."""


class Costs(Protocol):
    """The part of `cost.CostModel` that rollouts are timed with."""

    base: Config
    chip: Roofline
    cluster: Cluster

    def rows(self, layout: Candidate) -> int:
        """Return the sequences of one microbatch on one device."""
        ...

    def flows(self, part: str, layout: Candidate, rows: int) -> Mapping[str, tuple[Flow, ...]]:
        """Return what a part of `cost.PARTS` moves, by phase."""
        ...


def cache_size(config: Config) -> CacheSize:
    """Return the cache that a rollout fills, of prompts as long as data.sequence_length allows (`Engine` rounds likewise)."""
    prompt = config.data.sequence_length + 1 - config.objective.grpo.max_new_tokens
    unit = math.prod(getattr(config.mesh, axis) for axis in (*ROW_AXES, "tensor"))
    rows = math.ceil(config.train.global_batch_size / unit) * unit
    chunk = math.ceil(min(LARGEST_CHUNK, 2 ** math.ceil(math.log2(prompt))) / config.mesh.tensor) * config.mesh.tensor
    return CacheSize(rows, math.ceil((config.data.sequence_length + 1) / UNIT) * UNIT, chunk, replays_routing(config))


def cache_of_device(config: Config) -> int:
    """Return a device's bytes of the cache of a rollout; 0 where there is none. A slot has its share of `cache_size().rows`."""
    return cache_bytes(config, cache_size(config)) if config.objective.kind == "grpo" else 0


def memory_of_device(config: Config) -> int:
    """Return the bytes that a device needs beside the state while it decodes: the cache, and logits; 0 without rollouts."""
    return cache_of_device(config) + working_bytes(config, cache_size(config)) if config.objective.kind == "grpo" else 0


def rollout_seconds(costs: Costs, layout: Candidate, layer_forward: float) -> float:
    """Return the seconds of a rollout for each of the updates on it; 0 where there is none.

    Args:
      layer_forward: seconds of one layer on a microbatch.
    """
    config, chip, count = with_layout(costs.base, layout), costs.chip, layout.microbatches
    if config.objective.kind != "grpo":
        return 0.0
    model, length, grpo = config.model, config.data.sequence_length, config.objective.grpo
    rows, placement = costs.rows(layout), place(layout.mesh, costs.cluster.devices_per_host)
    share = count / length
    """Of a microbatch's tokens, those that have one of each row."""
    layer = sum(chip.matmul(math.ceil(row.m * share), row.k, row.n, row.batch) for row in matmuls(config))
    for part in ("weights", "sequence", "experts"):
        for flow in costs.flows(part, layout._replace(zero=3), rows).get("layer_forward", ()):
            of_token = flow if part == "weights" else flow._replace(payload=flow.payload * share)
            layer += seconds(of_token, placement, costs.cluster.chip).total
    layer += KERNELS * KERNEL_GAP
    head = chip.matmul(count * rows, model.embed_dim, model.padded_vocab_size // config.mesh.tensor)
    token = model.num_layers * layer + config.mesh.pipe * chip.stream(cache_of_device(config)) + head
    prompts = model.num_layers * count * layer_forward * (length + 1 - grpo.max_new_tokens) / length
    return (prompts + grpo.max_new_tokens * token) / grpo.updates
