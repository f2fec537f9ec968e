"""Compile the steps: `optimizer(gradients) after shard_map(loss_and_gradients)` in one jit (`gradients.py` has the region)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtrain.agreement import compare_program
from jaxtrain.config import Config
from jaxtrain.config.stages import ResolvedStage
from jaxtrain.models.trained import trained, trained_dims, with_trained
from jaxtrain.numerics import settled
from jaxtrain.objectives import objective_of
from jaxtrain.parallel import sync
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.parallel.sync import ReplicaExchange
from jaxtrain.program import xla_costs
from jaxtrain.sharding import named, of_results, replicated
from jaxtrain.train.average import next_average
from jaxtrain.train.balance import expert_metrics, step_biases
from jaxtrain.train.exchange import describe_exchange, exchanged_bytes, make_gradient_exchange, make_parameter_exchange
from jaxtrain.train.gradients import abstract_batch, batch_sharding, make_loss_and_gradients
from jaxtrain.train.rounding import apply_updates
from jaxtrain.train.schedule import Hyperparameters, hyperparameters, stage_numbers
from jaxtrain.train.state import abstract_state, state_shardings
from jaxtrain.train.step_acceptance import applied_if, judge
from jaxtrain.train.xla_options import compile_with_options, default_options, deterministic_options, parse_options

if TYPE_CHECKING:
    from jaxtrain.train.prepared import Prepared

PyTree = Any
Step = Any  # a jitted function: called, or lowered


def abstract_arguments(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> tuple[PyTree, PyTree, PyTree]:
    """Return the shapes of (state, batch, numbers), the arguments of a train step."""
    numbers = jax.tree.map(
        lambda n: jax.ShapeDtypeStruct(n.shape, n.dtype, sharding=replicated(mesh)), hyperparameters(config.optimizer, 1)
    )
    return abstract_state(config, mesh, optimizer), abstract_batch(config, mesh), numbers


def place_numbers(config: Config, mesh: Mesh) -> Hyperparameters:
    """Return the step's third argument: `hyperparameters` of this config on every device, once for all steps."""
    return _placed(hyperparameters(config.optimizer, config.train.steps, config.train.seed), mesh)


def _placed(numbers: Hyperparameters, mesh: Mesh) -> Hyperparameters:
    whole = replicated(mesh)
    return jax.tree.map(lambda n: jax.make_array_from_callback(n.shape, whole, lambda index: np.asarray(n)[index]), numbers)


def _make_update(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> Step:
    """(params, optimizer state, gradients, reports, numbers, step) -> (params, optimizer state, metrics), for each replica if
    they differ. The numbers, by name, are those that the optimizer's `update` takes.
    """
    dims, layers = trained_dims(config), make_stacking(config).layer_numbers()
    optimizer = optax.with_extra_args_support(optimizer)

    def update(
        params: PyTree, optimizer_state: PyTree, gradients: PyTree, reports: PyTree, numbers: dict[str, Any], step: jax.Array
    ) -> tuple[PyTree, PyTree, PyTree]:
        before = trained(config, params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, before, mesh=mesh, **numbers)
        after = apply_updates(before, updates, dims, layers, numbers["seed"], step)
        after = step_biases(config.model, after, reports)
        params = with_trained(config, params, after)
        return params, optimizer_state, expert_metrics(config.model, make_stacking(config), reports)

    return _of_each_replica(config, update, (0, 0, 0, 0, None, None))


def _of_each_replica(config: Config, function: Step, in_axes: Any = 0) -> Step:
    """Return the function for each replica if they differ, else as it is."""
    return jax.vmap(function, in_axes=in_axes, spmd_axis_name="replica") if config.sync.replicas_differ else function


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
    loss_and_gradients, update = make_loss_and_gradients(config, mesh, backend), _make_update(config, mesh, optimizer)
    keeps, replicas = getattr(objective_of(config), "keeps_log_probs", False), config.mesh.replica
    differ, apart = config.sync.replicas_differ, config.sync.sums_apart

    def train_step(state: PyTree, batch: PyTree, numbers: Hyperparameters) -> tuple[PyTree, PyTree]:
        metrics, reports, gradients = loss_and_gradients(state["params"], batch)
        kept = metrics.pop("log_probs", None)
        params, optimizer_state, synced = state["params"], state["optimizer"], state["sync"]
        if apart and not differ:
            sums = make_gradient_exchange(config, mesh, exchange)
            gradients, synced = sums(gradients, metrics["targets"], state["step"], synced)
        norm = _of_each_replica(config, optax.global_norm)(gradients) if exchange.applies else jnp.zeros(())
        more, given, good, record = {"grad_norm": norm}, numbers._asdict(), jnp.ones((), bool), {}
        if config.guard.classifies_steps:
            good, record, judged = judge(config.guard, state["guard"], metrics | more)
            more |= judged
            given |= {"applies": good} if config.optimizer.moments_memory == "host" else {}
        if exchange.applies:
            with jax.named_scope("optimizer"):
                params, optimizer_state, seen = update(params, optimizer_state, gradients, reports, given, state["step"])
                more |= seen
        if differ and exchange != ReplicaExchange():
            exchanged = make_parameter_exchange(config, mesh, exchange)(trained(config, params), synced)
            params, synced = with_trained(config, params, exchanged[0]), exchanged[1]
            metrics |= exchanged[2]
        new = {"params": params, "optimizer": optimizer_state, "sync": synced} | next_average(config, state, params)
        new = applied_if(good, new, state) | {"guard": record} if config.guard.classifies_steps else new
        if apart and not differ:
            more = jax.tree.map(lambda value: jnp.broadcast_to(value, (replicas, *value.shape)), more)
        return new | {"step": state["step"] + 1}, (metrics | more, kept) if keeps else metrics | more

    shardings, of_metrics = state_shardings(config, mesh, optimizer), named(mesh, ("replica",)) if apart else replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(of_results(shardings), (of_metrics, batch_sharding(mesh)) if keeps else of_metrics),
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

    All programs are compiled here, before the run, but for batches of packed answers with fewer rows, which come when they
    come. Most sync modes need one or two; so do the stages, each with its shapes.

    Args:
      batch_of: steps before a step -> the number of its batch, which says its stage.
      compiling: gives a context for what is compiled later.
    """

    def __init__(
        self,
        prepared: Prepared,
        first: int,
        last: int,
        batch_of: Callable[[int], int] = lambda step: step,
        compiling: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        config, mesh = prepared.config, prepared.mesh
        self._prepared, self._compiling = prepared, compiling
        self._sync, self._step, self._batch_of, self._stage_at = config.sync, first, batch_of, prepared.recipe.at
        self._newest_divergence: dict[str, jax.Array] = {}
        kinds = dict.fromkeys(sync.exchange_at(config.sync, step) for step in range(first + 1, max(first + 1, last) + 1))
        begun = self._stage_at(batch_of(first)).first
        stages = [stage for stage in prepared.recipe.stages if stage.first >= begun]
        self.programs: dict[Any, Any] = {}
        for stage, kind in itertools.product(stages, kinds):
            self._program(stage, kind, stage.config.train.global_batch_size)
        self._numbers = {begin: _placed(numbers, mesh) for begin, numbers in stage_numbers(config).items()}
        self._bytes = {kind: exchanged_bytes(config, mesh, kind) for kind in kinds}
        self.description = describe_exchange(config, mesh)
        """One line on the exchange between replicas; empty for a single replica."""

    def begin_at(self, first: int) -> None:
        """Set the next step to first + 1; where it is of a stage before the compiled ones, that is compiled when it comes."""
        self._step, self._newest_divergence = first, {}

    def _program(self, stage: ResolvedStage, kind: ReplicaExchange, rows: int) -> Any:
        at = self._prepared.at(stage.first).of_rows(rows)
        is_whole = rows == stage.config.train.global_batch_size
        key = (stage.program, kind) if is_whole else (stage.program, kind, rows)
        if key not in self.programs:
            with self._compiling():
                self.programs[key] = compile_train_step(at.config, at.mesh, at.optimizer, at.backend, exchange=kind)
        return self.programs[key]

    def __call__(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        """Run the next step: (state, metrics).

        With several replicas, metrics include `exchanged_bytes`, and `replica_divergence` as of the newest exchange, so that a
        log of only some steps has it.
        """
        self._step += 1
        stage, kind = self._stage_at(self._batch_of(self._step - 1)), sync.exchange_at(self._sync, self._step)
        state, metrics = self._program(stage, kind, len(batch["targets"]))(state, batch, self._numbers[stage.first])
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
