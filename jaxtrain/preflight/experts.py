"""Check the experts' exchange: one block at the config's sizes must agree with padded all-to-alls, gradients too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.config import Config
from jaxtrain.layout import microbatch_rows
from jaxtrain.models.decoder import to_compute
from jaxtrain.models.moe import MoE
from jaxtrain.ops.expert_dispatch import ExpertBackend, choose_expert_backend
from jaxtrain.parallel.turns import alone
from jaxtrain.preflight.checks import Check, Finding, Site, judge_errors, relative_error
from jaxtrain.sharding import BATCH_AXES, gather_weights, reduce_gradients, specs, vary

LARGEST_ERROR = 0.02
"""Of the norm of what the padded exchange gives: the rows are the same, so that only the order of sums may differ."""


def _block(config: Config) -> tuple[Any, Any, Any]:
    """(graph, parameters, logical dims) of one block; parameters are to be made under jit."""
    graph, state = nnx.split(MoE(config.model, nnx.Rngs(params=0)), nnx.Param)
    dims = jax.tree.map(lambda p: p.get_metadata()["dims"], state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    return graph, nnx.to_pure_dict(state), nnx.to_pure_dict(dims)


def expert_errors(site: Site, backend: ExpertBackend) -> dict[str, float]:
    """Return the error of the output and of every gradient against the padded exchange, as a share of the norm.

    Every device has the rows of a microbatch, of normal numbers, and routes them by a fresh router.
    """
    config, mesh, found = site.config, site.mesh, {}

    def shapes() -> Any:
        found["graph"], params, found["dims"] = _block(config)
        return params

    jax.eval_shape(shapes)
    graph, dims = found["graph"], found["dims"]
    spec, rows = specs(dims), PartitionSpec(("pipe", *BATCH_AXES), ("context", "tensor"))
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), spec, is_leaf=lambda s: isinstance(s, PartitionSpec))
    params = jax.jit(lambda: _block(config)[1], out_shardings=shardings)()
    shape = (
        microbatch_rows(config) * config.mesh.batch_shards * config.mesh.pipe,
        config.data.sequence_length,
        config.model.embed_dim,
    )
    both = NamedSharding(mesh, PartitionSpec(None, *rows))
    x, dy = jax.jit(lambda: jax.random.normal(jax.random.key(1), (2, *shape), config.model.dtype), out_shardings=both)()

    def region(backend: ExpertBackend, params: Any, x: jax.Array, dy: jax.Array) -> Any:
        params, x, dy = vary((params, x, dy))
        counted = vary(jnp.ones((x.shape[0], x.shape[1] * config.mesh.tensor), bool))

        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            compute = jax.lax.stop_gradient(to_compute(params, dims, config.model.dtype))
            block = nnx.merge(graph, gather_weights(params, compute, dims, config.train.reduce_dtype))
            y, _, _ = alone(block(x, counted_BL=counted, scale=vary(jnp.ones(())), backend=backend))
            return (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(), y

        (_, y), (d_params, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return y, dx, reduce_gradients(vary(d_params), dims, "float32")

    def compare(params: Any, x: jax.Array, dy: jax.Array) -> dict[str, jax.Array]:
        runs = [
            jax.shard_map(lambda *a, b=b: region(b, *a), mesh=mesh, in_specs=(spec, rows, rows), out_specs=(rows, rows, spec))
            for b in (backend, backend._replace(ragged=False))
        ]
        (y, dx, got), (right_y, right_dx, right) = (run(params, x, dy) for run in runs)
        pairs = {"the output": (y, right_y), "the gradient of the input": (dx, right_dx)}
        return {n: relative_error(*p) for n, p in (pairs | {f"the gradient of {n}": (got[n], right[n]) for n in got}).items()}

    return {name: float(error) for name, error in jax.jit(compare)(params, x, dy).items()}


def look_at_experts(site: Site) -> dict[str, float]:
    """Return the errors over all devices, the same in every process."""
    return expert_errors(site, choose_expert_backend(site.mesh.devices.flat[0].platform))


def judge_experts(site: Site, seen: list[dict[str, float]]) -> list[Finding]:
    """Name what is worst; all processes have the same errors."""
    errors = [("the experts' exchange", seen[0])]
    findings, worst = judge_errors(site, "experts", errors, LARGEST_ERROR, "--model.moe.dispatch=capacity")
    return findings or [Finding("experts", "ok", f"the exchange is within {worst:.2%} of a padded one, gradients too", seen[0])]


def checks(site: Site) -> list[Check]:
    """Return the single check, if rows move by a collective that only some devices have."""
    moe, platform = site.config.model.moe, site.mesh.devices.flat[0].platform
    moves = moe is not None and moe.dispatch == "dropless" and site.config.mesh.expert > 1
    return [Check("experts", look_at_experts, judge_experts)] if moves and choose_expert_backend(platform).ragged else []
