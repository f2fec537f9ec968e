"""Turn the experts' reported loads into metrics, and balance the router without an auxiliary loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.config import ModelConfig
from jaxtrain.parallel.stacking import Stacking

PyTree = Any


def expert_metrics(model: ModelConfig, stacking: Stacking, reports: PyTree) -> dict[str, jax.Array]:
    """Return metrics of a step from its layers' reports, summed over the global batch; empty for a dense model.

    balance_loss (mean over tokens and layers, without its weight; 1 is perfect balance), router_z_loss (likewise),
    expert_load_max (the busiest expert's load / the mean load of its layer, in the worst layer), with dispatch=capacity
    dropped_share (of all choices), and the array expert_load [stacked_layers, num_experts]: counted tokens that chose each.

    Args:
      reports: leaves [chunk, stage, layer, ...], as the executor stacks them; empty slots are zero.
    """
    if model.moe is None:
        return {}
    load = stacking.unstack(reports["expert_load"])
    mean = jnp.maximum(load.mean(-1), 1e-9)
    tokens = jnp.maximum(load.sum() / model.moe.experts_per_token, 1)  # times layers
    metrics = {name: reports[name].sum() / tokens for name in ("balance_loss", "router_z_loss")}
    metrics |= {"expert_load_max": jnp.max(load.max(-1) / mean), "expert_load": load}
    if model.moe.dispatch == "capacity":
        metrics["dropped_share"] = reports["dropped"].sum() / jnp.maximum(load.sum(), 1)
    return metrics


def step_biases(model: ModelConfig, params: PyTree, reports: PyTree) -> PyTree:
    """Move every router's bias in params: b_e += rate * sign(mean load - load_e) (DeepSeek-V3, arXiv:2412.19437, 2.1.2).

    Loads are those of the whole global batch. The bias is a parameter without gradient: clipping, decay and the optimizer do
    not change it, since they turn a zero gradient into 0 (and only matrices decay). A frozen one, None in params, stays.
    """
    if model.moe is None or not model.moe.bias_update_rate or params["layers"]["moe"]["bias"] is None:
        return params
    load = reports["expert_load"]
    step = model.moe.bias_update_rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    block = params["layers"]["moe"]
    return params | {"layers": params["layers"] | {"moe": block | {"bias": block["bias"] + step}}}
