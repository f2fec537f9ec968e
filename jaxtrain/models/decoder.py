"""The decoder as pure functions over parameter trees {"outer": ..., "layers": ...}, cut for the pipeline executor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.config import REMAT_NAMES, MeshConfig, ModelConfig, ShardingConfig, TrainConfig
from jaxtrain.layout import (
    inputs_on_host,
    keeps,
    kept_names,
    layers_per_iteration,
    parts_in_turns,
    recomputes_layer_by_layer,
    reduces_layer_by_layer,
)
from jaxtrain.models import lora
from jaxtrain.models.layers import EmbeddingAndHead, Packing, layer_kind, run_layer
from jaxtrain.models.parameters import declare, held_dtype
from jaxtrain.models.quantised_weights import Quantised, check_groups, dequantised, held_dims, is_held, is_weight, quantised
from jaxtrain.objectives import PRETRAIN, Objective
from jaxtrain.ops.attention_context import AttentionPlan
from jaxtrain.ops.attention_cudnn import CUDNN_FORWARD_PRIMITIVE
from jaxtrain.ops.expert_dispatch import ExpertBackend
from jaxtrain.ops.float8 import SCALE_NAME
from jaxtrain.ops.losses import IGNORED, OF_TOKENS, Logits, token_losses
from jaxtrain.parallel.pipeline import Functions, Weights
from jaxtrain.parallel.stacking import Stacking
from jaxtrain.parallel.turns import gradients_together, recompute_behind_next, reduce_behind_next, take_turns
from jaxtrain.sharding import HOST_MEMORY, Float8, all_gather, gather_weights, is_dims, vary

PyTree = Any
STACKED = ("chunk", "stage", "layer")
LAYER_INPUT = "layer_input"
"""Name of a layer's input under remat, where it is kept in the host's memory."""


@functools.lru_cache(maxsize=64)
def _dims(module: type[nnx.Module], config: ModelConfig) -> PyTree:
    """Return a module's tree of logical dims; it is cached and shared, so do not mutate it."""
    state = nnx.state(declare(module, config), nnx.Param)
    is_param = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(lambda p: p.get_metadata()["dims"], state, is_leaf=is_param))


@functools.lru_cache(maxsize=64)
def _layer_dims(config: ModelConfig) -> PyTree:
    """Return the logical dims of a layer's parameters, adapters included; cached and shared, as `_dims`."""
    return held_dims(config.adapters, lora.with_adapters(config.adapters, _dims(*layer_kind(config)), _declared(config)))


@functools.lru_cache(maxsize=64)
def _outer_dims(config: ModelConfig) -> PyTree:
    """Return the logical dims of embedding and head; cached and shared, as `_dims`."""
    return held_dims(config.adapters, _dims(EmbeddingAndHead, config))


def _declared(config: ModelConfig) -> PyTree:
    """Return the shapes of a layer's own parameters."""
    return nnx.to_pure_dict(nnx.state(declare(*layer_kind(config)), nnx.Param))


def cut_rows(tree: PyTree, parts: int) -> tuple[PyTree, ...]:
    """Cut the tree into equal parts along the first dim of its leaves; scalars go to all parts."""
    leaves, treedef = jax.tree.flatten(tree)
    cut = [[leaf] * parts if leaf.ndim == 0 else jnp.split(leaf, parts) for leaf in leaves]
    return tuple(treedef.unflatten(part) for part in zip(*cut, strict=True))


def _dense(config: ModelConfig) -> ModelConfig:
    """Return the config of the first dense layers."""
    return replace(config, moe=None)


def _under(lead: tuple[str, ...], dims: PyTree) -> PyTree:
    """Return the dims with `lead` in front of every leaf's own."""
    return jax.tree.map(lambda own: (*lead, *own), dims, is_leaf=is_dims)


def parameter_dims(config: ModelConfig, lead: tuple[str, ...] = STACKED) -> PyTree:
    """Return the logical dims of every parameter; the layers' leaves are stacked (`Stacking`).

    The first dense layers of a mixture of experts differ from the others, so they are beside the embedding, as
    outer["first_layers"] of [first_dense_layers, ...], and run before the stack.
    """
    outer = dict(_outer_dims(config))
    if config.first_dense_layers:
        outer["first_layers"] = _under(("layer",), _layer_dims(_dense(config)))
    return {"outer": outer, "layers": _under(lead, _layer_dims(config))}


def adapter_factors(config: ModelConfig) -> list[dict[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
    """Return `lora.factors` of one layer, of each kind of layer."""
    kinds = [config, *([_dense(config)] if config.first_dense_layers else [])]
    return [lora.factors(kind.adapters, _dims(*layer_kind(kind)), _declared(kind)) for kind in kinds]


def layer_kinds_dims(config: ModelConfig) -> list[PyTree]:
    """Return the logical dims of one layer's own parameters, without adapters, of each kind of layer."""
    kinds = [config, *([_dense(config)] if config.first_dense_layers else [])]
    return [_dims(*layer_kind(kind)) for kind in kinds]


@functools.lru_cache(maxsize=64)
def check_base(config: ModelConfig, mesh: MeshConfig) -> None:
    """Check that the groups of weights in few bits divide them, and their parts on a mesh.

    Raises:
      ConfigError: they do not.
    """
    kinds = [config, *([_dense(config)] if config.first_dense_layers else [])]
    for module, kind in ((EmbeddingAndHead, config), *(layer_kind(kind) for kind in kinds)):
        shapes = nnx.to_pure_dict(nnx.state(declare(module, kind), nnx.Param))
        for own, leaf in zip(jax.tree.leaves(_dims(module, kind), is_leaf=is_dims), jax.tree.leaves(shapes), strict=True):
            if is_held(config.adapters, own):
                check_groups(config.adapters, own, leaf.shape, lambda axis: max(getattr(mesh, axis), 1))


def canonical_dims(config: ModelConfig) -> PyTree:
    """Return the logical dims in canonical form: the layers' leaves are [stacked_layers, ...]."""
    return parameter_dims(config, ("layer",))


def initialize(config: ModelConfig, key: jax.Array, layer_numbers: np.ndarray) -> PyTree:
    """Return the parameters at step 0, adapters included. A layer's depend on the key and its number alone; the vocabulary's
    padding is zero.

    Layers are made in their final order: from a sharded result XLA can then make each device compute only its own share
    (a stack made in canonical order and then reshaped was computed whole on every device).

    Args:
      layer_numbers: int, of the shape in which the layers are stacked; -1 for an empty slot, which is zero. Counted from
        the first layer of the stack.
    """

    def build(module: type[nnx.Module], config: ModelConfig, key: jax.Array) -> PyTree:
        return nnx.to_pure_dict(nnx.state(module(config, nnx.Rngs(params=key)), nnx.Param))  # type: ignore[call-arg]

    def clear_padding(dims: tuple[str, ...], value: jax.Array) -> jax.Array:
        if "vocab" not in dims:
            return value
        ids = lax.broadcasted_iota(jnp.int32, value.shape, dims.index("vocab"))
        return jnp.where(ids < config.vocab_size, value, 0)

    outer_key, layers_key = jax.random.split(key)

    first = config.first_dense_layers

    def layer(number: jax.Array) -> PyTree:
        weights = build(*layer_kind(config), jax.random.fold_in(layers_key, first + number))
        weights |= _new_adapters(config, key, first + number)
        return jax.tree.map(lambda w: jnp.where(number >= 0, w, 0), weights)

    stacked = layer
    for _ in layer_numbers.shape:
        stacked = jax.vmap(stacked)
    outer = jax.tree.map(
        clear_padding, _dims(EmbeddingAndHead, config), build(EmbeddingAndHead, config, outer_key), is_leaf=is_dims
    )
    if first:

        def dense(number: jax.Array) -> PyTree:
            weights = build(*layer_kind(_dense(config)), jax.random.fold_in(layers_key, number))
            return weights | _new_adapters(_dense(config), key, number)

        outer["first_layers"] = jax.vmap(dense)(jnp.arange(first))
    return quantised(config.adapters, {"outer": outer, "layers": stacked(jnp.asarray(layer_numbers))}, parameter_dims(config))


def _new_adapters(config: ModelConfig, key: jax.Array, number: jax.Array) -> PyTree:
    """Return a layer's branch of adapters at step 0, {} without any; the other parameters are the same with and without."""
    dims = _dims(*layer_kind(config))
    if not lora.targets_of(config.adapters, dims):
        return {}
    shapes = _declared(config)
    own_key = jax.random.fold_in(jax.random.fold_in(key, lora.KEY), number)
    return {lora.BRANCH: lora.initial_adapters(config.adapters, dims, shapes, own_key)}


def add_adapters(config: ModelConfig, params: PyTree, key: jax.Array, layer_numbers: np.ndarray) -> PyTree:
    """Return the parameters with the adapters of `initialize` where the model has some and `params` none."""
    outer, layers, first = params["outer"], params["layers"], "first_layers"
    if not config.adapters.rank or lora.BRANCH in (*layers, *outer.get(first, ())):
        return params

    def add(found: PyTree, new: PyTree) -> PyTree:
        return found | {name: tree for name, tree in new.items() if name == lora.BRANCH}

    new = initialize(config, key, layer_numbers)
    outer = outer | {first: add(outer[first], new["outer"][first])} if first in outer else outer
    return {"outer": outer, "layers": add(layers, new["layers"])}


def to_compute(params: PyTree, dims: PyTree, dtype: str) -> PyTree:
    """Return the parameters in compute dtype; norms and routers stay in float32, weights in few bits as they are."""

    def leaf(dims: Any, value: Any) -> Any:
        return value if isinstance(dims, Quantised) else value.astype(held_dtype(dims, dtype))

    return jax.tree.map(leaf, dims, params, is_leaf=is_weight)


@functools.lru_cache(maxsize=64)
def _merge(module: type[nnx.Module], config: ModelConfig) -> Callable[[PyTree], Any]:
    """Return a function that puts a pure dict of weights into the module."""
    graph, state = nnx.split(declare(module, config), nnx.Param)
    is_float8 = lambda node: isinstance(node, Float8)  # noqa: E731

    def merge(weights: PyTree) -> Any:
        return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(weights, is_leaf=is_float8)))

    return merge


def remat_policy(train: TrainConfig, has_adapters: bool = False, in_float8: bool = False) -> Callable[..., bool] | None:
    """Return the policy of which intermediates a layer keeps for its backward; None keeps only the layer's input.

    No policy keeps a gathered weight or a gathered sequence: they are refused by primitive (a sequence also as the output of
    `take_turns`' barriers), since a policy by name would still keep the value from just before its name. With adapters,
    whose sum with a weight is an array of its own, `none` and `dots` keep what has a name. In float8 all keep the scales.
    """
    scales = (SCALE_NAME,) if in_float8 else ()
    if train.remat == "full":
        return jax.checkpoint_policies.save_only_these_names(*scales) if scales else None
    if train.remat == "none" and not has_adapters:
        return lambda primitive, *_, **__: primitive.name not in ("all_gather", "optimization_barrier")
    names = tuple(name for name in REMAT_NAMES if keeps(train, name)) if has_adapters else kept_names(train)
    by_name, dots = jax.checkpoint_policies.save_only_these_names(*names, *scales), train.remat == "dots" and not has_adapters

    def keep(primitive: Any, *avals: Any, **parameters: Any) -> bool:
        # A name cannot reach into cuDNN's forward kernel, so its result is kept by primitive too.
        if primitive.name == CUDNN_FORWARD_PRIMITIVE:
            return "attention" in names
        if dots and jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **parameters):
            return True
        return by_name(primitive, *avals, **parameters)

    return keep


def _offload_inputs(policy: Callable[..., bool] | None) -> Callable[..., Any]:
    """Return the policy with a layer's input kept in the host's memory."""
    offload = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=(LAYER_INPUT,),
        offload_src="device",
        offload_dst=HOST_MEMORY,
    )

    def keep(primitive: Any, *avals: Any, **parameters: Any) -> Any:
        if primitive.name == "name" and parameters["name"] == LAYER_INPUT:
            return offload(primitive, *avals, **parameters)
        return policy is not None and policy(primitive, *avals, **parameters)

    return keep


@dataclass(frozen=True)
class Decoder:
    """The model with the run's choices: attention, experts, layers per iteration."""

    config: ModelConfig
    train: TrainConfig
    stacking: Stacking
    attention: AttentionPlan
    """The chosen attention."""
    experts: ExpertBackend
    """The chosen way for tokens to reach their experts."""
    sharding: ShardingConfig
    mesh: MeshConfig
    layers_at_once: int = 1
    """Largest number of layers in one iteration of the layer scan."""

    def _gathered(self, weights: Weights, dims: PyTree) -> PyTree:
        gathered = gather_weights(*weights, dims, self.train.reduce_dtype, self.sharding.zero)
        return dequantised(gathered, dims, self.config.dtype)

    def layer(self, config: ModelConfig, weights: Weights, place: int = 0) -> Any:
        """Return the module of a layer at a place of the pattern, with its weights gathered."""
        held = lora.merged(config.adapters, self._gathered(weights, _layer_dims(config)))
        return _merge(*layer_kind(config, place))(held)

    def dense_config(self) -> ModelConfig:
        """Return the config of the first dense layers."""
        return _dense(self.config)

    def _layer(
        self, config: ModelConfig, microbatch: PyTree, place: int = 0
    ) -> Callable[..., tuple[tuple[jax.Array, ...], jax.Array, PyTree, jax.Array]]:
        """Return a layer at a place of the pattern, on this microbatch and under the remat policy.

        (x of each part, weights, the clock of `take_turns`, experts of `Packing`) -> (x of each part, auxiliary loss, sums to
        report, the clock).
        """
        window = config.window_of(config.kinds[place])
        attention = self.attention._replace(rule=self.attention.rule._replace(window=window))
        targets, on_host = microbatch.get("targets"), inputs_on_host(self.train)
        counted = None if targets is None else targets != IGNORED
        packing = Packing(microbatch["positions"], microbatch.get("segments"), counted, microbatch.get("scale"))

        def layer(
            xs: tuple[jax.Array, ...], weights: Weights, clock: jax.Array, experts: jax.Array | None = None
        ) -> tuple[tuple[jax.Array, ...], jax.Array, PyTree, jax.Array]:
            xs = tuple(checkpoint_name(x, LAYER_INPUT) for x in xs) if on_host else xs
            apply, packings = self.layer(config, weights, place), cut_rows(packing._replace(experts=experts), len(xs))
            parts = [run_layer(apply, x, own, attention, self.experts) for x, own in zip(xs, packings, strict=True)]
            results, clock = take_turns(parts, clock)
            ys, auxiliary, reports = zip(*results, strict=True)
            return vary((ys, sum(auxiliary), jax.tree.map(lambda *shares: sum(shares), *reports), clock))

        policy = remat_policy(self.train, bool(config.adapters.rank), config.matmul_dtype == "float8")
        return jax.checkpoint(layer, policy=_offload_inputs(policy) if on_host else policy, prevent_cse=False)

    def _layers(self) -> Callable[[Weights, jax.Array, PyTree, jax.Array], tuple[jax.Array, jax.Array, PyTree]]:
        counts, period, slots_of_part = self.stacking.counts(), self.stacking.period, self.stacking.layers_per_part
        groups, in_iteration = slots_of_part // period, layers_per_iteration(slots_of_part, self.layers_at_once, period)

        def layers(weights: Weights, x: jax.Array, microbatch: PyTree, chunk: jax.Array) -> tuple[jax.Array, jax.Array, PyTree]:
            in_order = reduces_layer_by_layer(self.config, self.mesh, in_iteration)
            again = recomputes_layer_by_layer(self.config, self.mesh, self.train.remat, in_iteration)
            places = [self._layer(self.config, microbatch, place) for place in range(period)]
            if again:
                places = [recompute_behind_next(layer) for layer in places]

            def step(layer: Any, carry: tuple, slot: tuple[Weights, jax.Array]) -> tuple[tuple, PyTree]:
                (xs, auxiliary, clock, reduced, begun), ((master, compute), index) = carry, slot
                if in_order:
                    xs, reduced, master = reduce_behind_next(xs, reduced, master)
                arguments = (xs, (master, compute), clock, self._experts(microbatch, chunk, index))
                if again:
                    begun, *made = layer(begun, *arguments)
                else:
                    made = layer(*arguments)
                ys, more, reports, clock = made
                if not self.stacking.is_even:
                    # An empty slot's layer runs too, on zero weights, and is discarded: its stage would only wait for the
                    # others, and transfers inside a conditional could not overlap with anything.
                    held = index < jnp.asarray(counts)[chunk, lax.axis_index("pipe")]
                    keep = lambda new, old: jnp.where(held, new, old)  # noqa: E731
                    ys = jax.tree.map(keep, ys, xs)
                    more, reports = jax.tree.map(lambda new: keep(new, jnp.zeros_like(new)), (more, reports))
                return (ys, auxiliary + more, clock, reduced, begun), reports

            def group(carry: tuple, slots: tuple[Weights, jax.Array]) -> tuple[tuple, PyTree]:
                (master, compute), indices = slots
                reports = []
                for place, layer in enumerate(places):
                    carry, more = step(layer, carry, ((master[place], compute[place]), indices[place]))
                    reports.append(more)
                return carry, jax.tree.map(lambda *of_places: jnp.stack(of_places), *reports)

            slots = (weights, jnp.arange(slots_of_part).reshape(groups, period))
            start = (cut_rows(x, parts_in_turns(self.sharding, self.mesh, x.shape[0])), *vary([jnp.zeros(())] * 4))
            (xs, auxiliary, clock, *_), reports = lax.scan(group, start, slots, unroll=in_iteration // period)
            reports = jax.tree.map(lambda leaf: leaf.reshape(slots_of_part, *leaf.shape[2:]), reports)
            # The clock is zero; if unused, XLA would drop it, and the order with it.
            return jnp.concatenate(xs), auxiliary + clock, reports

        return layers

    def _experts(self, microbatch: PyTree, chunk: jax.Array, slot: jax.Array) -> jax.Array | None:
        """Return the experts that a layer's tokens are to go to, int32 [B, L, K]; None if its router chooses."""
        if "experts" not in microbatch or self.config.moe is None:
            return None
        experts, count = microbatch["experts"], self.config.moe.experts_per_token
        number = jnp.asarray(self.stacking.layer_numbers())[chunk, lax.axis_index("pipe"), slot]
        return lax.dynamic_slice_in_dim(experts, number * count, count, axis=2)

    def outer(self, weights: Weights) -> Any:
        """Return the outer module with its weights gathered; XLA drops the gathers of unused ones."""
        dims = _outer_dims(self.config)
        master, compute = ({name: tree[name] for name in dims} for tree in weights)
        return _merge(EmbeddingAndHead, self.config)(self._gathered((master, compute), dims))

    def _embed(self) -> Callable[[Weights, PyTree], jax.Array]:
        """Return the function of the embedding and the first dense layers."""

        def embed(weights: Weights, microbatch: PyTree) -> jax.Array:
            with jax.named_scope("embed"):
                x = self.outer(weights).embed(microbatch["tokens"], microbatch["positions"])
            if self.config.first_dense_layers:
                layer = self._layer(_dense(self.config), microbatch)
                first, clock = (weights[0]["first_layers"], weights[1]["first_layers"]), vary(jnp.zeros(()))
                with jax.named_scope("first_layers"):
                    (x,), _ = lax.scan(lambda xs, weights: (layer(xs, weights, clock)[0], None), (vary(x),), first)
            return x

        return embed

    def _head(self) -> Callable[[Weights, jax.Array], tuple[jax.Array, jax.Array]]:
        def head(weights: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            outer = self.outer(weights)
            return outer.head_input(x), outer.head_DV()

        return head

    def loss_functions(self, objective: Objective = PRETRAIN) -> Functions:
        """Return the functions for training, and for validation with the pretraining objective.

        A microbatch holds int32 [B, L] tokens, targets, positions and (for document masks) segments, as `share_out` gives them,
        the objective's float32 inputs, maybe the int32 [B, L, stacked layers K] experts of `Packing`, and a float32 scalar
        `scale` that multiplies its summed loss. Where numbers of single tokens are reported, `place` is 1 in the microbatch's
        own row of [microbatches] and 0 elsewhere, and they are [microbatches, B, L, ...].
        """
        head, output = self._head(), "table" if self.config.tie_embeddings else "head"

        def loss(weights: Weights, x: jax.Array, microbatch: PyTree) -> tuple[jax.Array, PyTree]:
            with jax.named_scope("loss"):
                # XLA would reduce the head's gradient at the end of the step, and hold it whole until then.
                x, own = gradients_together(x, weights[0][output])
                x, head_DV = head(({**weights[0], output: own}, weights[1]), x)
                losses: Any = token_losses(
                    x,
                    head_DV,
                    microbatch["targets"],
                    microbatch["scale"],
                    Logits(self.config.vocab_size, self.config.logit_softcap, objective.temperature),
                    self.train.loss_chunk,
                    self.train.z_loss,
                    objective.terms,
                    {name: microbatch[name] for name in objective.inputs},
                )
            total, reported = losses
            for name in reported.keys() & OF_TOKENS:
                reported[name] = jnp.tensordot(microbatch["place"], reported[name], axes=0)
            return total, {**reported, "total_loss": lax.stop_gradient(total)}

        return Functions(self._embed(), self._layers(), loss)

    def logits_functions(self) -> Functions:
        """Return the functions for `logits`, float32 [B, L, V/tensor] of one microbatch, in the devices' order of positions."""
        head = self._head()

        def logits(weights: Weights, x: jax.Array, microbatch: PyTree) -> tuple[jax.Array, PyTree]:
            x, head_DV = head(weights, x)
            to_logits = Logits(self.config.vocab_size, self.config.logit_softcap)
            return vary(jnp.zeros(())), {"logits": to_logits.of(all_gather(x, "tensor", dim=1), head_DV)}

        return Functions(self._embed(), self._layers(), logits)
