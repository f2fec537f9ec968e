"""Compile the steps: `optimizer(gradients) after shard_map(loss_and_gradients)` in one jit and evaluation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.agreement import compare_program
from jaxtrain.config import MESH_AXES, Config
from jaxtrain.models import decoder
from jaxtrain.models.building import make_decoder
from jaxtrain.models.decoder import Decoder
from jaxtrain.models.trained import trained, trained_dims, with_trained
from jaxtrain.numerics import settled
from jaxtrain.objectives import COEFFICIENTS, SCORE, Objective, objective_of
from jaxtrain.ops.attention_order import in_sequence_order, share_out
from jaxtrain.ops.losses import count_targets
from jaxtrain.parallel import pipeline, sync
from jaxtrain.parallel.pipeline import Parameters
from jaxtrain.parallel.pipeline_schedule import forward_only, schedule_of
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.parallel.sync import ReplicaExchange
from jaxtrain.program import xla_costs
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
from jaxtrain.train.balance import expert_metrics, step_biases
from jaxtrain.train.exchange import (
    describe_exchange,
    exchanged_bytes,
    make_gradient_exchange,
    make_parameter_exchange,
    own,
    under,
)
from jaxtrain.train.rounding import apply_updates
from jaxtrain.train.schedule import Hyperparameters, hyperparameters
from jaxtrain.train.state import abstract_state, params_dims, state_shardings
from jaxtrain.train.step_acceptance import apply_if_good
from jaxtrain.train.xla_options import (
    compile_with_options,
    default_options,
    deterministic_options,
    parse_options,
)

PyTree = Any
BATCH_DIMS = ("batch", "length")
_BATCH_AXES = (*BATCH_AXES, "context")
Step = Any  # a jitted function: called, or lowered


def token_names(config: Config) -> tuple[str, ...]:
    """Return the arrays of a batch that the model reads, each int32 [global_batch_size, sequence_length]."""
    return ("tokens", "targets", "positions", *(("segments",) if config.data.mask_documents else ()))


def batch_names(config: Config) -> tuple[str, ...]:
    """Return the names of a batch's arrays, [global_batch_size, sequence_length] each: the tokens', and the objective's."""
    return (*token_names(config), *objective_of(config).inputs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of each array of a batch."""
    return named(mesh, BATCH_DIMS)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch."""
    shape, floats = (config.train.global_batch_size, config.data.sequence_length), objective_of(config).inputs
    dtypes = {name: jnp.float32 if name in floats else jnp.int32 for name in batch_names(config)}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for name, dtype in dtypes.items()}


def _both(config: Config, params: PyTree) -> tuple[Parameters, Parameters]:
    """(master, compute) parameters."""
    dims, params = decoder.parameter_dims(config.model), vary(params)
    compute = decoder.to_compute(params, dims, config.model.dtype)
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
    gradients_of, score = _token_gradients(config, mesh, model, objective.weighted), _scores(config, mesh, model)

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
    return microbatches | ({"place": jnp.eye(count)} if objective.keeps_log_probs else {})


def _kept_apart(sums: PyTree) -> tuple[PyTree, PyTree]:
    """Return (the sums, {"log_probs": [B, L] of this device's rows, in its order} where they are kept)."""
    sums = dict(sums)
    if "log_probs" not in sums:
        return sums, {}
    log_probs = sum_over(sums.pop("log_probs"), ("pipe", "tensor"))
    return sums, {"log_probs": log_probs.reshape(-1, log_probs.shape[-1])}


def _in_sequence_order(kept: PyTree, model: Decoder) -> PyTree:
    return {name: in_sequence_order(array, model.attention.kind, model.mesh.context) for name, array in kept.items()}


def _scores(config: Config, mesh: Mesh, model: Decoder) -> Step:
    """(params, batch) -> log p of every target, float32 [B, L], 0 where there is none: chunk by chunk, as in training."""
    functions, names = model.loss_functions(SCORE), token_names(config)
    held, count = params_dims(config), config.train.microbatches
    schedule = forward_only(config.mesh.pipe, config.pipeline.chunks, count)

    def region(params: PyTree, batch: PyTree) -> PyTree:
        rows = _placed_microbatches(config, model, SCORE, batch) | {"scale": jnp.ones(count)}
        return _kept_apart(pipeline.forward(functions, schedule, *_both(config, own(held, params)), rows))[1]

    mapped = jax.shard_map(
        region,
        mesh=mesh,
        in_specs=(specs(held), specs(dict.fromkeys(names, BATCH_DIMS))),
        out_specs=spec(BATCH_DIMS),
        check_vma=True,
    )

    def score(params: PyTree, batch: PyTree) -> jax.Array:
        return _in_sequence_order(mapped(params, {name: batch[name] for name in names}), model)["log_probs"]

    return score


def make_score(config: Config, mesh: Mesh, backend: str) -> Step:
    """Return the jitted (params, batch) -> log p of every target, float32 [B, L], 0 where there is none."""
    score = _scores(config, mesh, make_decoder(config, mesh, backend))
    return jax.jit(score, out_shardings=batch_sharding(mesh), compiler_options=_reproducible(config, mesh))


def _all_but(left_out: Dims, axes: Dims = MESH_AXES) -> Dims:
    return tuple(axis for axis in axes if axis not in left_out)


def abstract_arguments(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> tuple[PyTree, PyTree, PyTree]:
    """Return the shapes of (state, batch, numbers), the arguments of a train step."""
    numbers = jax.tree.map(
        lambda n: jax.ShapeDtypeStruct(n.shape, n.dtype, sharding=replicated(mesh)), hyperparameters(config.optimizer, 1)
    )
    return abstract_state(config, mesh, optimizer), abstract_batch(config, mesh), numbers


def place_numbers(config: Config, mesh: Mesh) -> Hyperparameters:
    """Return the step's third argument: `hyperparameters` of this config on every device, once for all steps."""
    numbers, whole = hyperparameters(config.optimizer, config.train.steps, config.train.seed), replicated(mesh)
    return jax.tree.map(lambda n: jax.make_array_from_callback(n.shape, whole, lambda index: np.asarray(n)[index]), numbers)


def _make_update(config: Config, optimizer: optax.GradientTransformation) -> Step:
    """(params, optimizer state, gradients, reports, numbers, step) -> (params, optimizer state, metrics), for each replica if
    they differ.
    """
    dims, layers = trained_dims(config), make_stacking(config).layer_numbers()
    optimizer = optax.with_extra_args_support(optimizer)

    def update(
        params: PyTree, optimizer_state: PyTree, gradients: PyTree, reports: PyTree, numbers: Hyperparameters, step: jax.Array
    ) -> tuple[PyTree, PyTree, PyTree]:
        metrics = {"grad_norm": optax.global_norm(gradients)}
        before = trained(config, params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, before, **numbers._asdict())
        after = apply_updates(before, updates, dims, layers, numbers.seed, step)
        after = step_biases(config.model, after, reports)
        params = with_trained(config, params, after)
        return params, optimizer_state, metrics | expert_metrics(config.model, make_stacking(config), reports)

    of_each = (0, 0, 0, 0, None, None)
    return jax.vmap(update, in_axes=of_each, spmd_axis_name="replica") if config.sync.replicas_differ else update


def make_train_step(
    config: Config,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    backend: str,
    exchange: ReplicaExchange = ReplicaExchange(),  # noqa: B008, it is frozen
) -> Step:
    """Return the jitted (state, batch, numbers) -> (state, metrics); the state is donated.

    The numbers are `Hyperparameters` (`place_numbers`): no learning rate and no count of steps is part of the program, so runs
    that differ only in these share it.

    Metrics, float32 scalars: loss (mean negative log likelihood in nats per token), total_loss (with the z term and auxiliary
    losses), grad_norm (before clipping), targets; for a mixture of experts also `expert_metrics`; in a step that sends
    parameters replica_divergence (`make_parameter_exchange`); if the step classifies itself bad_step, skipped_steps
    and the deviations of loss and grad_norm (`step_acceptance.classify`). If replicas are summed apart each metric has
    a leading dim [replica], so that no step waits for a slow link to report; `read_metrics` reads both. Where the objective
    keeps log-probabilities, (metrics, log p [B, L] under the parameters before the update) stands in place of the metrics.

    Args:
      exchange: what the step does between replicas (`sync.exchange_at`); the default is nothing beyond averaged gradients.
    """
    loss_and_gradients, update = make_loss_and_gradients(config, mesh, backend), _make_update(config, optimizer)
    keeps = getattr(objective_of(config), "keeps_log_probs", False)
    replicas, differ, apart = config.mesh.replica, config.sync.replicas_differ, config.sync.sums_apart

    def train_step(state: PyTree, batch: PyTree, numbers: Hyperparameters) -> tuple[PyTree, PyTree]:
        metrics, reports, gradients = loss_and_gradients(state["params"], batch)
        kept = metrics.pop("log_probs", None)
        params, optimizer_state, synced = state["params"], state["optimizer"], state["sync"]
        if apart and not differ:
            exchanged = make_gradient_exchange(config, mesh, exchange)
            gradients, synced = exchanged(gradients, metrics["targets"], state["step"], synced)
        more = {"grad_norm": jnp.zeros(())}
        if exchange.applies:
            with jax.named_scope("optimizer"):
                params, optimizer_state, more = update(params, optimizer_state, gradients, reports, numbers, state["step"])
        if differ and exchange != ReplicaExchange():
            exchanged = make_parameter_exchange(config, mesh, exchange)(trained(config, params), synced)
            params, synced = with_trained(config, params, exchanged[0]), exchanged[1]
            metrics |= exchanged[2]
        new = {"params": params, "optimizer": optimizer_state, "sync": synced}
        if config.guard.classifies_steps:
            new, kind = apply_if_good(config.guard, state, new, metrics | more)
            more |= kind
        if apart and not differ:
            more = jax.tree.map(lambda value: jnp.broadcast_to(value, (replicas, *value.shape)), more)
        return new | {"step": state["step"] + 1}, (metrics | more, kept) if keeps else metrics | more

    shardings, of_metrics = state_shardings(config, mesh, optimizer), named(mesh, ("replica",)) if apart else replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, (of_metrics, batch_sharding(mesh)) if keeps else of_metrics),
        donate_argnums=0,
    )


@settled()
def compile_train_step(
    config: Config,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    backend: str,
    options: dict[str, Any] | None = None,
    exchange: ReplicaExchange = ReplicaExchange(),  # noqa: B008, it is frozen
) -> Any:
    """Lower and compile a train step from shapes alone; telemetry and planner read the compiled program.

    `options` are XLA options over those of `train.xla_options`, which are over the table of `xla_options.py`. A program for
    which XLA lacks duration estimates is compiled twice (`xla_costs.py`).

    Raises:
      PeersDiffer: processes lowered different programs.
      ExplainedError: XLA rejects a requested option.
    """
    step = make_train_step(config, mesh, optimizer, backend, exchange)
    lowered = step.lower(*abstract_arguments(config, mesh, optimizer))
    compare_program("train step", lowered)
    platform = mesh.devices.flat[0].platform
    asked = parse_options(config.train.xla_options) | deterministic_options(config, platform) | (options or {})
    defaults = default_options(config, platform)
    compiled = compile_with_options(lowered, defaults, asked)
    if not xla_costs.needs_costs(config, mesh) or xla_costs.OPTION in asked:
        return compiled
    return compile_with_options(lowered, defaults | xla_costs.costs_option(compiled, mesh), asked)


class TrainSteps:
    """The train steps first + 1 .. last, to be called in order; each runs the compiled program of its exchange.

    All programs are compiled here, before the run. Most sync modes need one or two.
    """

    def __init__(
        self, config: Config, mesh: Mesh, optimizer: optax.GradientTransformation, backend: str, first: int, last: int
    ):
        self._sync, self._step, self._numbers = config.sync, first, place_numbers(config, mesh)
        self._newest_divergence: dict[str, jax.Array] = {}
        kinds = dict.fromkeys(sync.exchange_at(config.sync, step) for step in range(first + 1, max(first + 1, last) + 1))
        self.programs = {kind: compile_train_step(config, mesh, optimizer, backend, exchange=kind) for kind in kinds}
        self._bytes = {kind: exchanged_bytes(config, mesh, kind) for kind in kinds}
        self.description = describe_exchange(config, mesh)
        """One line on the exchange between replicas; empty for a single replica."""

    def begin_at(self, first: int) -> None:
        """Set the next step to first + 1, which must be among the compiled ones."""
        self._step, self._newest_divergence = first, {}

    def __call__(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        """Run the next step: (state, metrics).

        With several replicas, metrics include `exchanged_bytes`, and `replica_divergence` as of the newest exchange, so that a
        log of only some steps has it.
        """
        self._step += 1
        kind = sync.exchange_at(self._sync, self._step)
        state, metrics = self.programs[kind](state, batch, self._numbers)
        if isinstance(metrics, tuple):
            metrics, log_probs = metrics
            metrics |= {"log_probs": log_probs}
        newest = {name: value for name, value in metrics.items() if name == "replica_divergence"}
        self._newest_divergence = newest or self._newest_divergence
        sent = self._bytes[kind]
        return state, metrics | self._newest_divergence | ({} if sent is None else {"exchanged_bytes": sent})


def read_metrics(metrics: PyTree) -> dict[str, float]:
    """Return the scalar metrics of a step on the host.

    Metrics [replica] are combined over the replicas of which this process holds a part: losses weighted by targets, the sum of
    targets, and the mean of the rest.
    """
    values = {name: _own_replicas(value) for name, value in metrics.items()}
    targets = values.get("targets", np.ones(()))
    read = {}
    for name, value in values.items():
        if value.ndim == 1 and name == "targets":
            read[name] = float(value.sum())
        elif value.ndim == 1:
            weights = targets if name in ("loss", "total_loss") and targets.sum() else None
            read[name] = float(np.average(value, weights=weights))
        elif value.ndim == 0:
            read[name] = float(value)
    return read


def _own_replicas(value: Any) -> np.ndarray:
    """Return this process's part of a metric, each replica once."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return np.asarray(value)
    shards = {str(shard.index): np.asarray(shard.data) for shard in value.addressable_shards}
    parts = list(shards.values())
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def make_evaluation_step(config: Config, mesh: Mesh, backend: str) -> Step:
    """Return the jitted (params, batch) -> {"loss": summed negative log likelihood in nats, "targets": their number}.

    Of a sequence objective: its loss and metrics, each times the pairs of the batch where it counts them, else its targets, and
    that number as "targets".
    """
    model, objective = make_decoder(config, mesh, backend), objective_of(config)
    if not isinstance(objective, Objective):
        score = _scores(config, mesh, model)

        def weighed(params: PyTree, batch: PyTree) -> PyTree:
            _, loss, metrics = objective.weigh(score(params, batch), batch)
            count = metrics.pop("pairs", count_targets(batch["targets"]))
            return {name: value * count for name, value in (metrics | {"loss": loss}).items()} | {"targets": count}

        return jax.jit(weighed, out_shardings=replicated(mesh), compiler_options=_reproducible(config, mesh))
    functions = model.loss_functions()
    microbatches, held = config.train.microbatches, params_dims(config)
    schedule = forward_only(config.mesh.pipe, config.pipeline.chunks, microbatches)

    def region(params: PyTree, batch: PyTree) -> PyTree:
        rows = _microbatches(share_out(batch, model.attention.kind), microbatches) | {"scale": jnp.ones(microbatches)}
        sums = pipeline.forward(functions, schedule, *_both(config, own(held, params)), rows)
        return {"loss": sum_over(sums["loss"], MESH_AXES), "targets": sum_over(count_targets(batch["targets"]), _BATCH_AXES)}

    return _jit_region(config, mesh, region, outputs=PartitionSpec())


def _reproducible(config: Config, mesh: Mesh) -> dict[str, Any] | None:
    """Return the compiler's options of a read-only program."""
    return deterministic_options(config, mesh.devices.flat[0].platform) or None


def _jit_region(config: Config, mesh: Mesh, region: Step, outputs: PartitionSpec) -> Step:
    """Return the jit of a read-only region over (params, batch)."""
    dims = params_dims(config)
    rows = specs(dict.fromkeys(token_names(config), BATCH_DIMS))
    mapped = jax.shard_map(region, mesh=mesh, in_specs=(specs(dims), rows), out_specs=outputs, check_vma=True)
    return jax.jit(mapped, compiler_options=_reproducible(config, mesh))
