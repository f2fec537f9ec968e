"""Logits and log-probabilities of whole sequences, by the layers, stages and attention of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.config import Config
from jaxtrain.models.building import choose_attention, make_decoder
from jaxtrain.models.decoder import parameter_dims, to_compute
from jaxtrain.ops.attention_order import in_sequence_order, share_out
from jaxtrain.parallel import pipeline
from jaxtrain.parallel.pipeline import Parameters
from jaxtrain.parallel.pipeline_schedule import forwards_of
from jaxtrain.sharding import BATCH_AXES, replicated, specs, vary

PyTree = Any


def at_level_three(config: Config) -> Config:
    """Return the config at ZeRO level 3, whatever a run trains with: parameters lie in shards over fsdp at every level."""
    return replace(config, sharding=replace(config.sharding, zero=3))


def _region(config: Config, mesh: Mesh) -> Any:
    """Return (params, batch) -> logits [B, L, padded vocabulary], sharded over batch, context and tensor."""
    config = at_level_three(config)
    model = make_decoder(config, mesh, choose_attention(config, mesh)[0])
    functions, dims = model.logits_functions(), parameter_dims(config.model)
    schedule = forwards_of(config, 1)

    def region(params: PyTree, batch: PyTree) -> jax.Array:
        params = to_compute(vary(params), dims, config.model.dtype)
        held = Parameters(params["outer"], model.stacking.by_place(params["layers"]))
        rows = jax.tree.map(lambda array: array[None], share_out(batch, model.attention.kind))
        return lax.psum(pipeline.forward(functions, schedule, held, held, rows)["logits"], "pipe")

    names = ("tokens", "positions", *(("segments",) if config.data.mask_documents else ()))
    sharded = dict.fromkeys(names, PartitionSpec(BATCH_AXES, "context"))
    logits = PartitionSpec(BATCH_AXES, "context", "tensor")

    def in_order(params: PyTree, batch: PyTree) -> jax.Array:
        inputs = (specs(dims), sharded)
        mapped = jax.shard_map(region, mesh=mesh, in_specs=inputs, out_specs=logits, check_vma=True)
        logits_BLV = mapped(params, {name: batch[name] for name in names})
        return in_sequence_order(logits_BLV, model.attention.kind, config.mesh.context)

    return in_order


def make_logits(config: Config, mesh: Mesh) -> Any:
    """Return the jitted (params, batch) -> float32 logits [B, L, padded vocabulary].

    Args:
      config: resolved; its batch size and sequence length are those of the batch, int32 tokens, positions and (with
        data.mask_documents) segments, [B, L]. Other arrays of a batch are not read.
    """
    return jax.jit(_region(config, mesh))


def make_scores(config: Config, mesh: Mesh) -> Any:
    """Return the jitted (params, batch) -> (log p of each token after the first, whether it is the likeliest), [B, L - 1]."""
    region = _region(config, mesh)

    def scores(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        log_ps, targets = jax.nn.log_softmax(region(params, batch)[:, :-1], axis=-1), batch["tokens"][:, 1:]
        return jnp.take_along_axis(log_ps, targets[..., None], axis=-1)[..., 0], jnp.argmax(log_ps, axis=-1) == targets

    return jax.jit(scores, out_shardings=replicated(mesh))
