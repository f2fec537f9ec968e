"""The decoder as pure functions over parameter trees {"outer": ..., "layers": ...}, cut for the pipeline executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxtrain.config import ModelConfig, TrainConfig
from jaxtrain.models.layers import Layer, Outer, Packing, rms_norm
from jaxtrain.ops.attention import CUDNN_FORWARD_PRIMITIVE
from jaxtrain.ops.losses import cross_entropy, mask_padded_vocabulary
from jaxtrain.parallel.pipeline import Functions, Weights
from jaxtrain.parallel.stacking import Stacking
from jaxtrain.sharding import all_gather, gather_weights, is_dims, vary

PyTree = Any
STACKED = ("chunk", "stage", "layer")


def _abstract(module: type[nnx.Module], config: ModelConfig) -> nnx.Module:
    return nnx.eval_shape(lambda: module(config, nnx.Rngs(params=0)))  # type: ignore[call-arg]


def _dims(module: type[nnx.Module], config: ModelConfig) -> PyTree:
    """Tree of logical dims, as the module declares them."""
    state = nnx.state(_abstract(module, config), nnx.Param)
    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(lambda p: p.get_metadata()["dims"], state, is_leaf=is_param))


def parameter_dims(config: ModelConfig) -> PyTree:
    """Logical dims of every parameter; the layers' leaves are stacked (`Stacking`)."""
    layers = jax.tree.map(lambda dims: (*STACKED, *dims), _dims(Layer, config), is_leaf=is_dims)
    return {"outer": _dims(Outer, config), "layers": layers}


def canonical_dims(config: ModelConfig) -> PyTree:
    """Logical dims in canonical form: the layers' leaves are [num_layers, ...]."""
    layers = jax.tree.map(lambda dims: ("layer", *dims), _dims(Layer, config), is_leaf=is_dims)
    return {"outer": _dims(Outer, config), "layers": layers}


def initialize(config: ModelConfig, key: jax.Array, layer_numbers: np.ndarray) -> PyTree:
    """Parameters at step 0. A layer's are a function of the key and its number alone; the vocabulary's padding is zero.

    Layers are made where they are to lie, not moved there afterwards: from a sharded result XLA can then make each device
    compute its own share only (a stack made in canonical order and reshaped was computed whole on every device).

    Args:
      layer_numbers: int, of the shape in which the layers are stacked; -1 for an empty slot, which is zero.
    """

    def build(module: type[nnx.Module], key: jax.Array) -> PyTree:
        return nnx.to_pure_dict(nnx.state(module(config, nnx.Rngs(params=key)), nnx.Param))  # type: ignore[call-arg]

    def clear_padding(dims: tuple[str, ...], value: jax.Array) -> jax.Array:
        if "vocab" not in dims:
            return value
        ids = lax.broadcasted_iota(jnp.int32, value.shape, dims.index("vocab"))
        return jnp.where(ids < config.vocab_size, value, 0)

    outer_key, layers_key = jax.random.split(key)

    def layer(number: jax.Array) -> PyTree:
        weights = build(Layer, jax.random.fold_in(layers_key, number))
        return jax.tree.map(lambda w: jnp.where(number >= 0, w, 0), weights)

    stacked = layer
    for _ in layer_numbers.shape:
        stacked = jax.vmap(stacked)
    outer = jax.tree.map(clear_padding, _dims(Outer, config), build(Outer, outer_key), is_leaf=is_dims)
    return {"outer": outer, "layers": stacked(jnp.asarray(layer_numbers))}


def to_compute(params: PyTree, dims: PyTree, dtype: str) -> PyTree:
    """Parameters in compute dtype; norms stay in float32."""

    def leaf(dims: tuple[str, ...], value: jax.Array) -> jax.Array:
        return value.astype(jnp.float32 if dims[-1] == "norm" else dtype)

    return jax.tree.map(leaf, dims, params, is_leaf=is_dims)


def _merge(module: type[nnx.Module], config: ModelConfig) -> Callable[[PyTree], Any]:
    """A function that puts a pure dict of weights into the module."""
    graph, state = nnx.split(_abstract(module, config), nnx.Param)

    def merge(weights: PyTree) -> Any:
        return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(weights)))

    return merge


def remat_policy(train: TrainConfig) -> Callable[..., bool] | None:
    """Which intermediate results a layer keeps for its backward; None keeps only the layer's input.

    No policy keeps a gathered weight or a gathered sequence: they are refused by primitive, since a policy by name would
    still keep the value from just before its name.
    """
    if train.remat == "full":
        return None
    if train.remat == "none":
        return lambda primitive, *_, **__: primitive.name != "all_gather"
    names = train.remat_save if train.remat == "named" else ("attention",)
    by_name = jax.checkpoint_policies.save_only_these_names(*names)

    def keep(primitive: Any, *avals: Any, **parameters: Any) -> bool:
        # A name cannot reach into cuDNN's forward kernel, so keeping its result takes the primitive too.
        if primitive.name == CUDNN_FORWARD_PRIMITIVE:
            return "attention" in names
        if train.remat == "dots" and jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **parameters):
            return True
        return by_name(primitive, *avals, **parameters)

    return keep


@dataclass(frozen=True)
class Decoder:
    """The model bound to what the run decides about it."""

    config: ModelConfig
    train: TrainConfig
    stacking: Stacking
    backend: str
    """Attention backend, chosen."""

    def _layers(self) -> Callable[[Weights, jax.Array, PyTree, jax.Array], jax.Array]:
        dims, merge = _dims(Layer, self.config), _merge(Layer, self.config)
        counts = self.stacking.counts()

        def layers(weights: Weights, x: jax.Array, microbatch: PyTree, chunk: jax.Array) -> jax.Array:
            packing = Packing(microbatch["positions"], microbatch.get("segments"))

            def layer(x: jax.Array, weights: Weights) -> jax.Array:
                gathered = gather_weights(*weights, dims, self.train.reduce_dtype)
                return merge(gathered)(x, packing, self.backend)

            layer = jax.checkpoint(layer, policy=remat_policy(self.train), prevent_cse=False)

            def step(x: jax.Array, slot: tuple[Weights, jax.Array]) -> tuple[jax.Array, None]:
                weights, index = slot
                if self.stacking.is_even:
                    return layer(x, weights), None
                held = jnp.asarray(counts)[chunk, lax.axis_index("pipe")]
                return lax.cond(index < held, layer, lambda x, _: x, x, weights), None

            x, _ = lax.scan(step, x, (weights, jnp.arange(self.stacking.layers_per_part)))
            return x

        return layers

    def _embed(self) -> Callable[[Weights, PyTree], jax.Array]:
        dims, merge = _dims(Outer, self.config), _merge(Outer, self.config)

        def embed(weights: Weights, microbatch: PyTree) -> jax.Array:
            with jax.named_scope("embed"):
                return merge(gather_weights(*weights, dims, self.train.reduce_dtype)).embed(microbatch["tokens"])

        return embed

    def _head(self) -> Callable[[Weights, jax.Array], tuple[jax.Array, jax.Array]]:
        dims, merge = _dims(Outer, self.config), _merge(Outer, self.config)

        def head(weights: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            outer = merge(gather_weights(*weights, dims, self.train.reduce_dtype))
            return rms_norm(x, outer.norm[...], self.config.norm_epsilon), outer.head_DV()

        return head

    def loss_functions(self) -> Functions:
        """For training and validation. A microbatch holds int32 [B, L] tokens, targets, positions and (for document masks)
        segments, and a float32 scalar `scale`, by which its summed loss is multiplied."""
        head = self._head()

        def loss(weights: Weights, x: jax.Array, microbatch: PyTree) -> tuple[jax.Array, PyTree]:
            with jax.named_scope("loss"):
                x, head_DV = head(weights, x)
                terms: Any = cross_entropy(
                    x,
                    head_DV,
                    microbatch["targets"],
                    microbatch["scale"],
                    self.config.vocab_size,
                    self.train.loss_chunk,
                    self.train.z_loss,
                )
            total, likelihood = terms
            return total, {"loss": likelihood, "total_loss": lax.stop_gradient(total)}

        return Functions(self._embed(), self._layers(), loss)

    def logits_functions(self) -> Functions:
        """For sampling: reports `logits` [B, V] float32 at the position `position` of one microbatch."""
        head = self._head()

        def logits(weights: Weights, x: jax.Array, microbatch: PyTree) -> tuple[jax.Array, PyTree]:
            x, head_DV = head(weights, x)
            x_BD = lax.dynamic_index_in_dim(all_gather(x, "tensor", dim=1), microbatch["position"], axis=1, keepdims=False)
            logits = jnp.einsum("BD,DV->BV", x_BD, head_DV, preferred_element_type=jnp.float32)
            whole = all_gather(mask_padded_vocabulary(logits, self.config.vocab_size), "tensor", dim=1)
            once = jnp.where(lax.axis_index("tensor") == 0, whole, 0)
            return vary(jnp.zeros(())), {"logits": once}

        return Functions(self._embed(), self._layers(), logits)
