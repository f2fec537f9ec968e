"""The manual region of a step: loss and gradients, log-probabilities, evaluation. One shard_map over all mesh axes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import MESH_AXES, Config
from jaxtrain.models import decoder
from jaxtrain.models.building import make_decoder
from jaxtrain.models.decoder import Decoder
from jaxtrain.models.float8_weights import in_float8
from jaxtrain.models.trained import trained, trained_dims
from jaxtrain.objectives import COEFFICIENTS, PRETRAIN, SCORE, WEIGHTED, Objective, objective_of
from jaxtrain.ops.attention_order import in_sequence_order, share_out
from jaxtrain.ops.losses import IGNORED, OF_TOKENS, count_targets
from jaxtrain.parallel import pipeline
from jaxtrain.parallel.pipeline import Parameters
from jaxtrain.parallel.pipeline_schedule import forwards_of, schedule_of
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.sharding import (
    BATCH_AXES,
    Dims,
    gather_once,
    named,
    reduce_gradients,
    replicated,
    spec,
    specs,
    sum_over,
    vary,
)
from jaxtrain.train.exchange import own, under
from jaxtrain.train.state import params_dims
from jaxtrain.train.xla_options import deterministic_options

PyTree = Any
BATCH_DIMS = ("batch", "length")
_BATCH_AXES = (*BATCH_AXES, "context")
Step = Any  # a jitted function: called, or lowered


def replays_routing(config: Config) -> bool:
    """Return whether a batch says which experts each token goes to: those that rollouts sampled it with."""
    section = config.objective
    is_asked = section.kind == "grpo" and section.grpo.replay_routing
    return is_asked and config.model.moe is not None and config.model.parts.layer is None


def token_names(config: Config) -> tuple[str, ...]:
    """Return the arrays of a batch that the model reads, int32 [global_batch_size, sequence_length], and maybe "experts", with
    a dim [stacked layers x experts of a token] more, -1 for the router's own choice.
    """
    masks, replays = config.data.mask_documents, replays_routing(config)
    return ("tokens", "targets", "positions", *(("segments",) if masks else ()), *(("experts",) if replays else ()))


def batch_names(config: Config) -> tuple[str, ...]:
    """Return the names of a batch's arrays, [global_batch_size, sequence_length, ...]: the tokens', and the objective's."""
    return (*token_names(config), *objective_of(config).inputs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of each array of a batch."""
    return named(mesh, BATCH_DIMS)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch."""
    shape, floats = (config.train.global_batch_size, config.data.sequence_length), objective_of(config).inputs
    dtypes = {name: jnp.float32 if name in floats else jnp.int32 for name in batch_names(config)}
    widths = dict(getattr(objective_of(config), "widths", {}))
    if config.model.moe:
        widths["experts"] = config.model.stacked_layers * config.model.moe.experts_per_token
    shapes = {name: (*shape, widths[name]) if name in widths else shape for name in dtypes}
    return {name: jax.ShapeDtypeStruct(shapes[name], dtype, sharding=batch_sharding(mesh)) for name, dtype in dtypes.items()}


def _both(config: Config, params: PyTree) -> tuple[Parameters, Parameters]:
    """(master, compute) parameters."""
    dims, params = decoder.parameter_dims(config.model), vary(params)
    compute = decoder.to_compute(params, dims, config.model.dtype)
    if config.model.matmul_dtype == "float8":
        compute = in_float8(params, compute, dims)
    master, compute = gather_once(trained(config, params), compute, dims, config.sharding.zero)
    stacking = make_stacking(config)
    master, compute = (Parameters(tree["outer"], stacking.by_place(tree["layers"])) for tree in (master, compute))
    return master, compute


def _microbatches(batch: PyTree, count: int) -> PyTree:
    """[B, L] -> [microbatches, B / microbatches, L], on each device's own rows."""
    return jax.tree.map(lambda a: a.reshape(count, a.shape[0] // count, *a.shape[1:]), batch)


def make_loss_and_gradients(config: Config, mesh: Mesh, backend: str, model: Decoder | None = None) -> Step:
    """(params, batch) -> (metrics, reports of the layers, gradients): one shard_map, manual over all mesh axes.

    The loss is the token-weighted mean over the global batch, sum over sum: targets are counted over all devices first, and
    every microbatch's loss is scaled by that count, so neither microbatches nor mesh can change the result. Reports are summed
    over the global batch, [chunk, stage, layer, ...]. A sequence objective scores all rows first, in a shard_map of its own
    (`SequenceObjective`).

    If replicas are summed apart (`sync.sums_apart`) all this holds for each replica's own part of the batch: metrics are
    [replica], gradients [replica, ...], and so are reports if replicas differ. No byte leaves a replica then.

    Args:
      model: a decoder with further reports; by default that of `make_decoder`.
    """
    model, objective = model or make_decoder(config, mesh, backend), objective_of(config)
    if isinstance(objective, Objective):
        return _token_gradients(config, mesh, model, objective)
    gradients_of, score = _token_gradients(config, mesh, model, WEIGHTED), _scores(config, mesh, model)

    def weighed(params: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        with jax.named_scope("weigh"):
            coefficients, loss, more = objective.weigh(score(params, batch), batch)
        metrics, reports, gradients = gradients_of(params, batch | {COEFFICIENTS: coefficients})
        return metrics | more | {"loss": loss, "total_loss": metrics["total_loss"] + loss}, reports, gradients

    return weighed


def _token_gradients(config: Config, mesh: Mesh, model: Decoder, objective: Objective) -> Step:
    """Return `make_loss_and_gradients` of an objective of single tokens."""
    functions, schedule, names = model.loss_functions(objective), schedule_of(config), (*token_names(config), *objective.inputs)
    dims, held = trained_dims(config), params_dims(config)
    apart: Dims = ("replica",) if config.sync.sums_apart else ()
    differ: Dims = ("replica",) if config.sync.replicas_differ else ()

    def region(params: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        targets = sum_over(count_targets(batch["targets"]), _all_but(apart, _BATCH_AXES))
        microbatches = _placed_microbatches(config, model, objective, batch)
        microbatches["scale"] = jnp.full(config.train.microbatches, 1.0) / jnp.maximum(targets, 1)
        master, compute = _both(config, own(held, params))
        result = pipeline.loss_and_gradients(functions, schedule, master, compute, microbatches)
        reports = jax.tree.map(lambda leaf: leaf[:, None], result.reports)
        tree = {"outer": result.gradients.outer, "layers": model.stacking.from_places(result.gradients.layers)}
        gradients = reduce_gradients(tree, dims, config.train.reduce_dtype, config.sharding.zero, apart)
        sums, kept = _kept_apart(result.sums)
        metrics = {name: sum_over(value, _all_but(apart)) for name, value in sums.items()}
        metrics["total_loss"] += sum_over(result.auxiliary, _all_but(apart))
        reports = jax.tree.map(lambda leaf: sum_over(leaf, _all_but((*differ, "pipe"))), reports)
        metrics, gradients = jax.tree.map(
            lambda leaf: leaf[None] if apart else leaf, (metrics | {"targets": targets}, gradients)
        )
        return metrics, kept, jax.tree.map(lambda leaf: leaf[None] if differ else leaf, reports), gradients

    mapped = jax.shard_map(
        region,
        mesh=mesh,
        in_specs=(specs(held), specs(dict.fromkeys(names, BATCH_DIMS))),
        out_specs=(spec(apart), spec(BATCH_DIMS), spec((*differ, *decoder.STACKED)), specs(under(apart, dims))),
        check_vma=True,
    )

    def loss_and_gradients(params: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        metrics, kept, reports, gradients = mapped(params, {name: batch[name] for name in names})
        return metrics | _in_sequence_order(kept, model), reports, gradients

    return loss_and_gradients


def _placed_microbatches(config: Config, model: Decoder, objective: Objective, batch: PyTree) -> PyTree:
    """Return this device's rows as microbatches, which know their place where log-probabilities are kept."""
    count = config.train.microbatches
    microbatches = _microbatches(share_out(batch, model.attention.kind), count)
    return microbatches | ({"place": jnp.eye(count)} if objective.keeps_tokens else {})


def _kept_apart(sums: PyTree) -> tuple[PyTree, PyTree]:
    """Return (the sums, what is reported of each token: [B, L, ...] of this device's rows, in its order)."""
    kept = {name: sum_over(value, ("pipe", "tensor")) for name, value in sums.items() if name in OF_TOKENS}
    rest = {name: value for name, value in sums.items() if name not in OF_TOKENS}
    return rest, {name: value.reshape(-1, *value.shape[2:]) for name, value in kept.items()}


def _in_sequence_order(kept: PyTree, model: Decoder) -> PyTree:
    return {name: in_sequence_order(array, model.attention.kind, model.mesh.context) for name, array in kept.items()}


def _region_of_tokens(config: Config, model: Decoder, objective: Objective) -> Step:
    """Return what gives, inside the manual region, the objective's reports of each token: [B, L, ...] of this device's rows, in
    its order.
    """
    functions, held, count = model.loss_functions(objective), params_dims(config), config.train.microbatches
    schedule = forwards_of(config, count)

    def region(params: PyTree, batch: PyTree) -> PyTree:
        rows = _placed_microbatches(config, model, objective, batch) | {"scale": jnp.ones(count)}
        return _kept_apart(pipeline.forward(functions, schedule, *_both(config, own(held, params)), rows))[1]

    return region


def _of_tokens(config: Config, mesh: Mesh, model: Decoder, objective: Objective) -> Step:
    """(params, batch) -> what the objective reports of each token, float32 [B, L, ...]: chunk by chunk, as in training."""
    names, held = token_names(config), params_dims(config)
    mapped = jax.shard_map(
        _region_of_tokens(config, model, objective),
        mesh=mesh,
        in_specs=(specs(held), specs(dict.fromkeys(names, BATCH_DIMS))),
        out_specs=spec(BATCH_DIMS),
        check_vma=True,
    )

    def of_tokens(params: PyTree, batch: PyTree) -> PyTree:
        return _in_sequence_order(mapped(params, {name: batch[name] for name in names}), model)

    return of_tokens


def _scores(config: Config, mesh: Mesh, model: Decoder) -> Step:
    """(params, batch) -> log p of every target, float32 [B, L], 0 where there is none."""
    of_tokens = _of_tokens(config, mesh, model, replace(SCORE, temperature=getattr(objective_of(config), "temperature", 1.0)))
    return lambda params, batch: of_tokens(params, batch)["log_probs"]


def make_top_k(config: Config, mesh: Mesh, backend: str, count: int) -> Step:
    """Return the jitted (params, batch) -> {"top_ids", "top_log_probs"}, the most likely next tokens, float32 [B, L, count]."""
    of_tokens = _of_tokens(config, mesh, make_decoder(config, mesh, backend), replace(PRETRAIN, top_k=count))
    return jax.jit(of_tokens, out_shardings=batch_sharding(mesh), compiler_options=_reproducible(config, mesh))


def make_score(config: Config, mesh: Mesh, backend: str) -> Step:
    """Return the jitted (params, batch) -> log p of every target, float32 [B, L], 0 where there is none."""
    score = _scores(config, mesh, make_decoder(config, mesh, backend))
    return jax.jit(score, out_shardings=batch_sharding(mesh), compiler_options=_reproducible(config, mesh))


def _all_but(left_out: Dims, axes: Dims = MESH_AXES) -> Dims:
    return tuple(axis for axis in axes if axis not in left_out)


def make_evaluation_step(config: Config, mesh: Mesh, backend: str, groups: int = 0) -> Step:
    """Return the jitted (params, batch) -> {"loss": summed negative log likelihood in nats, "targets": their number}.

    Of a sequence objective: its loss and metrics, each times the pairs of the batch where it counts them, else its targets, and
    that number as "targets".

    Args:
      groups: give the sums of each of so many groups, float32 [groups]; the batch has the group of each token, "groups", int32
        [B, L].
    """
    model, objective = make_decoder(config, mesh, backend), objective_of(config)
    if not isinstance(objective, Objective):
        score = _scores(config, mesh, model)

        def weighed(params: PyTree, batch: PyTree) -> PyTree:
            _, loss, metrics = objective.weigh(score(params, batch), batch)
            count = metrics.pop("pairs", count_targets(batch["targets"]))
            return {name: value * count for name, value in (metrics | {"loss": loss}).items()} | {"targets": count}

        return jax.jit(weighed, out_shardings=replicated(mesh), compiler_options=_reproducible(config, mesh))
    log_probs_of, held = _region_of_tokens(config, model, SCORE), params_dims(config)
    names = (*token_names(config), *(("groups",) if groups else ()))

    def region(params: PyTree, batch: PyTree) -> PyTree:
        rows = {name: batch[name] for name in token_names(config)}
        own_order = share_out({name: batch[name] for name in names}, model.attention.kind)

        def total(values: jax.Array) -> jax.Array:
            values = values.reshape(-1)
            if groups:
                values = jax.ops.segment_sum(values, own_order["groups"].reshape(-1), num_segments=groups)
            return sum_over(values if groups else values.sum(), _BATCH_AXES)

        log_probs, counted = log_probs_of(params, rows)["log_probs"], (own_order["targets"] != IGNORED).astype(jnp.float32)
        return {"loss": total(-log_probs), "targets": total(counted)}

    in_specs = (specs(held), specs(dict.fromkeys(names, BATCH_DIMS)))
    mapped = jax.shard_map(region, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=True)
    return jax.jit(mapped, compiler_options=_reproducible(config, mesh))


def _reproducible(config: Config, mesh: Mesh) -> dict[str, Any] | None:
    """Return the compiler's options of a read-only program."""
    return deterministic_options(config, mesh.devices.flat[0].platform) or None
