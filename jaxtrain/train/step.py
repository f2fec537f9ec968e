"""The compiled steps: `optimizer(gradients) after shard_map(loss_and_gradients)` in one jit, and its two read-only sisters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import MESH_AXES, Config
from jaxtrain.models import decoder
from jaxtrain.models.decoder import Decoder
from jaxtrain.ops.attention import choose_backend
from jaxtrain.ops.expert_dispatch import choose_expert_backend
from jaxtrain.ops.losses import count_targets
from jaxtrain.parallel import pipeline
from jaxtrain.parallel.pipeline import Parameters
from jaxtrain.parallel.pipeline_schedule import forward_only, make_schedule
from jaxtrain.sharding import BATCH_AXES, gather_once, named, reduce_gradients, replicated, spec, specs, sum_over, vary
from jaxtrain.train.balance import expert_metrics, step_biases
from jaxtrain.train.state import abstract_state, make_stacking, state_shardings

PyTree = Any
BATCH_DIMS = ("batch", "length")
_BATCH_AXES = (*BATCH_AXES, "context")
Step = Any  # a jitted function: called, or lowered


def batch_names(config: Config) -> tuple[str, ...]:
    """The arrays of a batch, each int32 [global_batch_size, sequence_length]."""
    masks = ("segments",) if config.data.mask_documents else ()
    return ("tokens", "targets", "positions", *masks)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of each array of a batch."""
    return named(mesh, BATCH_DIMS)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch."""
    shape = (config.train.global_batch_size, config.data.sequence_length)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh)) for name in batch_names(config)}


def make_decoder(config: Config, mesh: Mesh, backend: str) -> Decoder:
    """The model of a resolved config, on this mesh's kind of device."""
    experts = choose_expert_backend(mesh.devices.flat[0].platform)
    return Decoder(config.model, config.train, make_stacking(config), backend, experts, config.sharding.zero)


def _local_parameters(params: PyTree) -> Parameters:
    """This device's parameters: its stage's layers, [chunks, layers_per_part, ...]."""
    return Parameters(params["outer"], jax.tree.map(lambda leaf: leaf[:, 0], params["layers"]))


def _both(config: Config, params: PyTree) -> tuple[Parameters, Parameters]:
    """(master, compute)"""
    dims = decoder.parameter_dims(config.model)
    master = vary(params)
    compute = decoder.to_compute(master, dims, config.model.dtype)
    master, compute = gather_once(master, compute, dims, config.sharding.zero)
    return _local_parameters(master), _local_parameters(compute)


def _microbatches(batch: PyTree, count: int) -> PyTree:
    """[B, L] -> [microbatches, B / microbatches, L], on each device's own rows."""
    return jax.tree.map(lambda a: a.reshape(count, a.shape[0] // count, *a.shape[1:]), batch)


def make_loss_and_gradients(config: Config, mesh: Mesh, backend: str) -> Step:
    """(params, batch) -> (metrics, reports of the layers, gradients): one shard_map, manual over all mesh axes.

    The loss is the token-weighted mean over the global batch, sum over sum: targets are counted over all devices first, and
    every microbatch's loss is scaled by that count, so neither microbatches nor mesh can change the answer. Reports are summed
    over the global batch, [chunk, stage, layer, ...].
    """
    functions = make_decoder(config, mesh, backend).loss_functions()
    schedule = make_schedule(config.pipeline.schedule, config.mesh.pipe, config.pipeline.chunks, config.train.microbatches)
    dims = decoder.parameter_dims(config.model)

    def region(params: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        targets = sum_over(count_targets(batch["targets"]), _BATCH_AXES)
        microbatches = _microbatches(batch, config.train.microbatches)
        microbatches["scale"] = jnp.full(config.train.microbatches, 1.0) / jnp.maximum(targets, 1)
        master, compute = _both(config, params)
        result = pipeline.loss_and_gradients(functions, schedule, master, compute, microbatches)
        layers, reports = jax.tree.map(lambda leaf: leaf[:, None], (result.gradients.layers, result.reports))
        tree = {"outer": result.gradients.outer, "layers": layers}
        gradients = reduce_gradients(tree, dims, config.train.reduce_dtype, config.sharding.zero)
        metrics = {name: sum_over(value, MESH_AXES) for name, value in result.sums.items()}
        metrics["total_loss"] += sum_over(result.auxiliary, MESH_AXES)
        return metrics | {"targets": targets}, _whole_reports(reports), gradients

    return jax.shard_map(
        region,
        mesh=mesh,
        in_specs=(specs(dims), specs(dict.fromkeys(batch_names(config), BATCH_DIMS))),
        out_specs=(PartitionSpec(), spec(decoder.STACKED), specs(dims)),
        check_vma=True,
    )


def _whole_reports(reports: PyTree) -> PyTree:
    """Sums what the layers report over all devices but those of other stages."""
    return jax.tree.map(lambda leaf: sum_over(leaf, tuple(axis for axis in MESH_AXES if axis != "pipe")), reports)


def make_train_step(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation, backend: str) -> Step:
    """The jitted (state, batch) -> (state, metrics); the state is donated.

    Metrics, float32 scalars: loss (mean negative log likelihood in nats a token), total_loss (with the z term and auxiliary
    losses), grad_norm (before clipping), targets; for a mixture of experts also `expert_metrics`.
    """
    loss_and_gradients = make_loss_and_gradients(config, mesh, backend)

    def train_step(state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        metrics, reports, gradients = loss_and_gradients(state["params"], batch)
        with jax.named_scope("optimizer"):
            metrics["grad_norm"] = optax.global_norm(gradients)
            updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            params = step_biases(config.model, params, reports)
        metrics |= expert_metrics(config.model, make_stacking(config), reports)
        return {"params": params, "optimizer": optimizer_state, "step": state["step"] + 1}, metrics

    shardings = state_shardings(config, mesh, optimizer)
    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def compile_train_step(
    config: Config, mesh: Mesh, optimizer: optax.GradientTransformation, backend: str, options: dict[str, Any] | None = None
) -> Any:
    """Lowers and compiles the train step once, from shapes alone; telemetry and planner read the compiled program.

    `options` are XLA options over those of `compiler_options`.
    """
    step = make_train_step(config, mesh, optimizer, backend)
    lowered = step.lower(abstract_state(config, mesh, optimizer), abstract_batch(config, mesh))
    return lowered.compile(compiler_options(mesh.devices.flat[0].platform) | (options or {}))


def compiler_options(platform: str) -> dict[str, bool | int | str]:
    """XLA options for a platform. On GPUs: overlap of collectives with compute, also across iterations of the layer scan."""
    if platform not in ("gpu", "cuda"):
        return {}
    return {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        "xla_gpu_enable_while_loop_double_buffering": True,
        "xla_gpu_all_gather_combine_threshold_bytes": 256 * 2**20,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 256 * 2**20,
        "xla_gpu_all_reduce_combine_threshold_bytes": 256 * 2**20,
    }


def make_evaluation_step(config: Config, mesh: Mesh, backend: str) -> Step:
    """The jitted (params, batch) -> {"loss", "targets"}: summed negative log likelihood in nats, and the count of targets."""
    functions = make_decoder(config, mesh, backend).loss_functions()
    microbatches = config.train.microbatches
    schedule = forward_only(config.mesh.pipe, config.pipeline.chunks, microbatches)

    def region(params: PyTree, batch: PyTree) -> PyTree:
        rows = _microbatches(batch, microbatches) | {"scale": jnp.ones(microbatches)}
        sums = pipeline.forward(functions, schedule, *_both(config, params), rows)
        return {"loss": sum_over(sums["loss"], MESH_AXES), "targets": sum_over(count_targets(batch["targets"]), _BATCH_AXES)}

    return _jit_region(config, mesh, region, extra=(), outputs=PartitionSpec())


def make_logits_step(config: Config, mesh: Mesh, backend: str) -> Step:
    """The jitted (params, batch, position) -> float32 logits [global_batch_size, padded vocab] of the token after position."""
    functions = make_decoder(config, mesh, backend).logits_functions()
    schedule = forward_only(config.mesh.pipe, config.pipeline.chunks, 1)

    def region(params: PyTree, batch: PyTree, position: jax.Array) -> jax.Array:
        rows = _microbatches(batch, 1) | {"position": position[None]}
        logits = pipeline.forward(functions, schedule, *_both(config, params), rows)["logits"]
        return sum_over(logits, tuple(axis for axis in MESH_AXES if axis not in BATCH_AXES))

    return _jit_region(config, mesh, region, extra=(PartitionSpec(),), outputs=spec(("batch",)))


def _jit_region(config: Config, mesh: Mesh, region: Step, extra: tuple, outputs: PartitionSpec) -> Step:
    """jit of a read-only region over (params, batch, *extra)."""
    dims = decoder.parameter_dims(config.model)
    rows = specs(dict.fromkeys(batch_names(config), BATCH_DIMS))
    return jax.jit(jax.shard_map(region, mesh=mesh, in_specs=(specs(dims), rows, *extra), out_specs=outputs, check_vma=True))


def choose_attention(config: Config, mesh: Mesh) -> tuple[str, str]:
    """The attention backend for this mesh's devices, and why.

    Raises:
      ExplainedError: the config asks for one that cannot work here.
    """
    device = mesh.devices.flat[0]
    return choose_backend(
        config.model.attention,
        platform=device.platform,
        dtype=config.model.dtype,
        head_dim=config.model.head_dim,
        sequence_length=config.data.sequence_length,
        masks_documents=config.data.mask_documents,
        compute_capability=float(getattr(device, "compute_capability", None) or 8.0),
    )
