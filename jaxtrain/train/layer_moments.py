"""Summarise what each layer of a step computed in numbers that do not depend on the layout, to find where two runs differ.

For the residual stream before the first layer and after each one, with x[t, d] over all T tokens of the global batch and the
features d, the moments

    m1[d] = sum_t x[t, d] / T        m2[d] = sum_t x[t, d]^2 / T

are sums over tokens, so that any cut of the batch, the sequence and the microbatches gives the same ones; for each layer's
gradients the sum and the sum of squares of every array. They come from the very step that trains: the layers report them
(`Functions.layers`), and the pipeline carries them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxtrain.config import Config, ModelConfig
from jaxtrain.models.building import make_decoder
from jaxtrain.models.decoder import STACKED, Decoder, parameter_dims
from jaxtrain.models.trained import trained_dims
from jaxtrain.parallel.pipeline import Weights
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.sharding import Dims, is_dims, named, replicated, vary
from jaxtrain.train.gradients import batch_sharding, make_loss_and_gradients
from jaxtrain.train.xla_options import deterministic_options

PyTree = Any
SMALL = 1e-4
"""Share of the whole gradient's norm below which an array's gradient is too small to compare alone."""


@dataclass(frozen=True)
class LayerMoments:
    """The results of one computation of a step, on the host."""

    loss: float
    grad_norm: float
    moments: np.ndarray
    """[layers + 1, 2, D]: m1 and m2 of the stream before the first layer of the stack, then after each layer."""
    gradients: dict[str, np.ndarray]
    """{name: (sum / sqrt(n), sum of squares)} of every array of n numbers: [2], or [layers, 2] if each layer has one. The
    first is at most the root of the second."""
    first_layer: int
    """The number of the first layer of the stack."""


@dataclass(frozen=True)
class Difference:
    """The difference of two computations in one quantity."""

    what: str
    """The quantity: "the embedding", "layer 3", "the loss", "gradients of layer 3"."""
    difference: float
    """Relative: of activations to their root mean square, of a gradient to its norm."""
    where: str = ""
    """Its number with the largest difference."""


def _moments(xs: tuple[jax.Array, ...]) -> jax.Array:
    """Return this device's share of the sums over tokens, float32 [2, D]."""
    x = lax.stop_gradient(jnp.concatenate(xs)).astype(jnp.float32)
    return jnp.stack([x.sum((0, 1)), jnp.square(x).sum((0, 1))])


class LayerMomentsDecoder(Decoder):
    """A decoder whose layers report the moments of their inputs and outputs, as "moments"."""

    def _layer(self, config: ModelConfig, microbatch: PyTree, place: int = 0) -> Callable[..., Any]:
        layer = super()._layer(config, microbatch, place)

        def with_moments(xs: tuple[jax.Array, ...], weights: Weights, *more: Any) -> tuple:
            ys, auxiliary, reports, clock = layer(xs, weights, *more)
            return vary((ys, auxiliary, {**reports, "moments": jnp.stack([_moments(xs), _moments(ys)])}, clock))

        return with_moments


def make_layer_moments(config: Config, mesh: Mesh, backend: str) -> Callable[[PyTree, PyTree], LayerMoments]:
    """(parameters in memory, batch) -> `LayerMoments` of the step that trains on them; nothing is updated.

    `config` is one whose replicas are summed together (not `sync.sums_apart`).
    """
    base = make_decoder(config, mesh, backend)
    model = LayerMomentsDecoder(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    loss_and_gradients, dims = make_loss_and_gradients(config, mesh, backend, model), parameter_dims(config.model)
    stacking, tokens = make_stacking(config), config.train.global_batch_size * config.data.sequence_length

    def sums(dims: Dims, gradient: jax.Array) -> jax.Array:
        own = tuple(range(3, gradient.ndim)) if dims[:3] == STACKED else None
        count = np.prod(gradient.shape[3:] if own else gradient.shape)
        both = jnp.stack([gradient.sum(own) / np.sqrt(count), jnp.square(gradient).sum(own)], axis=-1)
        return stacking.unstack(both) if dims[:3] == STACKED else both

    def step(params: PyTree, batch: PyTree) -> PyTree:
        metrics, reports, gradients = loss_and_gradients(params, batch)
        return {
            "loss": metrics["loss"],
            "moments": stacking.unstack(reports["moments"]) / tokens,
            "gradients": jax.tree.map(sums, trained_dims(config), gradients, is_leaf=is_dims),
        }

    program = jax.jit(
        step,
        in_shardings=(named(mesh, dims), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=deterministic_options(config, mesh.devices.flat[0].platform) or None,
    )

    def layer_moments(params: PyTree, batch: PyTree) -> LayerMoments:
        found = jax.tree.map(np.asarray, program(params, batch))
        moments = np.concatenate([found["moments"][:1, 0], found["moments"][:, 1]])
        leaves = jax.tree_util.tree_flatten_with_path(found["gradients"])[0]
        gradients = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
        norm = float(np.sqrt(sum(leaf[..., 1].sum(dtype=np.float64) for leaf in gradients.values())))
        return LayerMoments(float(found["loss"]), norm, moments, gradients, config.model.first_dense_layers)

    return layer_moments


def relative(one: float, other: float) -> float:
    """|a - b| / max(|a|, |b|); infinite if one of them is not a number."""
    if not (np.isfinite(one) and np.isfinite(other)):
        return 0.0 if repr(one) == repr(other) else float("inf")
    return abs(one - other) / max(abs(one), abs(other), 1e-30)


def differences(one: LayerMoments, other: LayerMoments) -> list[Difference]:
    """List the differences in order of computation: embedding, layers, loss, then gradients from last to first layer."""
    found = [_of_moments(one, other, index) for index in range(len(one.moments))]
    found += [Difference("the loss", relative(one.loss, other.loss))]
    layers = len(one.moments) - 1
    stacked = {name for name, leaf in one.gradients.items() if leaf.ndim == 2}
    last = [name for name in one.gradients if name not in stacked and ("head" in name or "norm" in name)]
    rest = [name for name in one.gradients if name not in stacked and name not in last]
    found += [_of_gradients("gradients of the head", one, other, dict.fromkeys(last))] if last else []
    for layer in reversed(range(layers)):
        what = f"gradients of layer {one.first_layer + layer}"
        found.append(_of_gradients(what, one, other, dict.fromkeys(sorted(stacked), layer)))
    return found + ([_of_gradients("gradients of the embedding", one, other, dict.fromkeys(rest))] if rest else [])


def _of_moments(one: LayerMoments, other: LayerMoments, index: int) -> Difference:
    (m1, m2), (n1, n2) = one.moments[index].astype(np.float64), other.moments[index].astype(np.float64)
    scale = max(m2.mean(), n2.mean(), 1e-30)
    apart = np.maximum(np.abs(m1 - n1) / np.sqrt(scale), np.abs(m2 - n2) / scale)
    apart = np.where(np.isfinite(apart), apart, np.inf)
    feature = int(apart.argmax())
    what = f"layer {one.first_layer + index - 1}" if index else "the embedding" + " and dense layers" * bool(one.first_layer)
    return Difference(what, float(apart[feature]), f"feature {feature}")


def _of_gradients(what: str, one: LayerMoments, other: LayerMoments, names: dict[str, int | None]) -> Difference:
    """Return the largest difference among the named arrays' gradients, each in its layer."""
    worst = Difference(what, -1.0)
    for name, layer in names.items():
        (s, q), (t, r) = (
            (leaf if layer is None else leaf[layer]).astype(np.float64) for leaf in (one.gradients[name], other.gradients[name])
        )
        scale = max(np.sqrt(q), np.sqrt(r), SMALL * max(one.grad_norm, other.grad_norm), 1e-30)
        apart = max(abs(np.sqrt(q) - np.sqrt(r)), abs(s - t)) / scale
        apart = float(apart) if np.isfinite(apart) else float("inf")
        if apart > worst.difference:
            worst = Difference(what, apart, name)
    return worst
