"""Accept or reject a step inside the compiled step, by its loss and gradient norm and those of the good steps before it.

A bad step is not applied: parameters, optimizer and the replicas' sync state stay unchanged, bit for bit. The choice is
a `where` that XLA fuses into the update. It waits for no more than the update does, since clipping needs the gradient norm
too. The good steps' values are kept in the state, so the decision is a function of state and batch alone: the same in every
process, on every mesh to rounding, and after a resume.

Only an upward jump is a spike: with m the median of a window of good steps and s = 1.4826 median |x_i - m|, the standard
deviation for a normal x (Rousseeuw & Croux 1993, section 1), x is a spike if (x - m) / s is above guard.spike_deviations. A
few outliers in the window move neither m nor s, whereas they would move a mean and a standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.config import GuardConfig
from jaxtrain.sharding import is_in_host_memory, replicated

PyTree = Any
GOOD, NOT_FINITE, LOSS_SPIKE, NORM_SPIKE = range(4)
NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
LEAST_SCALE = 1e-3  # of the median: in a window of equal numbers a rounding error must not be a spike
WATCHED = ("loss", "grad_norm")


def initial_record(guard: GuardConfig) -> dict[str, jax.Array]:
    """Return the record before the first step; empty if the step does not classify itself.

    skipped: number of steps that were not applied, int32. When watching for spikes also good: number of applied steps, int32,
    and loss and grad_norm, float32 [spike_window], of the newest of them: good step g (from 0) is at index g mod spike_window.
    """
    if not guard.classifies_steps:
        return {}
    record = {"skipped": jnp.zeros((), jnp.int32)}
    if guard.spike == "off":
        return record
    windows = {name: jnp.zeros(guard.spike_window, jnp.float32) for name in WATCHED}
    return record | {"good": jnp.zeros((), jnp.int32)} | windows


def record_dims(guard: GuardConfig) -> dict[str, tuple[str, ...]]:
    """Return the logical dims of the record, which is replicated."""
    return {name: ("norm",) * value.ndim for name, value in jax.eval_shape(lambda: initial_record(guard)).items()}


def deviations(window: jax.Array, good: jax.Array, x: jax.Array) -> jax.Array:
    """Return how many robust standard deviations x is above the median of the window; 0 before the window is half full.

    Args:
      window: float32 [W], of which the first min(good, W) entries are filled.
    """
    count = jnp.minimum(good, window.shape[0])
    middle = _median(window, count)
    scale = NORMAL * _median(jnp.abs(window - middle), count)
    scale = jnp.maximum(scale, jnp.maximum(LEAST_SCALE * jnp.abs(middle), np.finfo(np.float32).tiny))
    return jnp.where(2 * count >= window.shape[0], (x - middle) / scale, 0.0)


def _median(values: jax.Array, count: jax.Array) -> jax.Array:
    """Return the median of the first `count` values; the mean of the middle two if `count` is even."""
    ordered = jnp.sort(jnp.where(jnp.arange(values.shape[0]) < count, values, jnp.inf))
    last = jnp.maximum(count, 1) - 1
    return (ordered[last // 2] + ordered[(last + 1) // 2]) / 2


def classify(
    guard: GuardConfig, record: Mapping[str, jax.Array], loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """(kind: GOOD, NOT_FINITE, LOSS_SPIKE or NORM_SPIKE; the record with this step in it; metrics), in a jitted step."""
    kind = jnp.where(jnp.isfinite(loss) & jnp.isfinite(grad_norm), GOOD, NOT_FINITE)
    record, metrics = dict(record), {}
    if guard.spike != "off":
        seen = {"loss": loss, "grad_norm": grad_norm}
        far = {name: deviations(record[name], record["good"], x) for name, x in seen.items()}
        for name, spike in (("grad_norm", NORM_SPIKE), ("loss", LOSS_SPIKE)):
            kind = jnp.where((kind != NOT_FINITE) & (far[name] > guard.spike_deviations), spike, kind)
        place = record["good"] % guard.spike_window
        for name, x in seen.items():
            record[name] = record[name].at[place].set(jnp.where(kind == GOOD, x, record[name][place]))
        record["good"] += kind == GOOD
        metrics = {f"{name}_deviations": x for name, x in far.items()}
    record["skipped"] += kind != GOOD
    return kind, record, metrics | {"bad_step": kind, "skipped_steps": record["skipped"]}


def judge(
    guard: GuardConfig, record: Mapping[str, jax.Array], metrics: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """(whether the step is good, its record, metrics to add), before the update, in a jitted step.

    Args:
      metrics: the step's; losses may be [replica], beside targets [replica].
    """
    loss = _over_replicas(metrics, "loss")
    # The total loss may overflow alone, by its z term or an auxiliary loss.
    loss = jnp.where(jnp.isfinite(_over_replicas(metrics, "total_loss")), loss, jnp.nan)
    kind, record, more = classify(guard, record, loss, metrics["grad_norm"])
    return kind == GOOD, record, more


def applied_if(good: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Return `new` if the step is good, else the same parts of `old`; what lies in host memory is as the update left it."""
    return jax.tree.map(
        lambda n, o: n if is_in_host_memory(n) else jnp.where(good, n, o), new, {name: old[name] for name in new}
    )


def _over_replicas(metrics: Mapping[str, jax.Array], name: str) -> jax.Array:
    """Return a loss over the whole global batch."""
    value, targets = metrics[name], metrics["targets"]
    return value if value.ndim == 0 else jnp.sum(value * targets) / jnp.maximum(jnp.sum(targets), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Between runs the record is stored as plain numbers beside a checkpoint, so that guards can be turned on and off


def record_to_plain(record: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Return the record as exact JSON values, windows oldest first."""
    plain: dict[str, Any] = {name: int(np.asarray(value)) for name, value in record.items() if value.ndim == 0}
    for name in WATCHED:
        if name in record:
            window = np.asarray(record[name])
            count = min(plain["good"], len(window))
            plain[name] = [float(window[g % len(window)]) for g in range(plain["good"] - count, plain["good"])]
    return plain


def record_from_plain(guard: GuardConfig, plain: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Return this guard's record from `record_to_plain`'s values; missing ones are as before the first step."""
    shapes = jax.eval_shape(lambda: initial_record(guard))
    record = {name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    for name, value in record.items():
        if value.ndim == 0:
            value[...] = plain.get(name, 0)
    for name in WATCHED:
        newest = list(plain.get(name, []))[-guard.spike_window :] if name in record else []
        for back, value in enumerate(reversed(newest), start=1):
            record[name][(int(record["good"]) - back) % guard.spike_window] = value
    placed = {
        name: jax.make_array_from_callback(value.shape, replicated(mesh), lambda index, value=value: value[index])
        for name, value in record.items()
    }
    # A separate copy on each device: on CPU the arrays may alias numpy's memory, into which the step's donation would write
    # (seen: the process aborts).
    return jax.jit(lambda record: jax.tree.map(jnp.copy, record), out_shardings=replicated(mesh))(placed)
