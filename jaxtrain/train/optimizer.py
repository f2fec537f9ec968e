"""The update rule: clip to a global norm, turn gradients into a direction, decay matrices, scale by the learning rate.

    parameters += -learning_rate(step) * (direction(clip(gradients)) + weight_decay * parameters)

A layout never changes an update. Whatever is computed over a whole matrix (Adafactor's factors and norms, Muon's
orthogonalisation) is computed for each layer alone, however the layers are stacked, and an empty layer slot (all zeros) gets
the update 0. State and updates are float32, even if parameters are bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtrain.config import Config, OptimizerConfig, Recipe
from jaxtrain.errors import ExplainedError, nearest
from jaxtrain.models.trained import trained_dims
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.sharding import Dims, is_dims
from jaxtrain.train.leaf_axes import LeafAxes, axes_tree, leaf_axes
from jaxtrain.train.moments import in_8_bits, in_host_memory
from jaxtrain.train.muon import scale_by_muon
from jaxtrain.train.schedule import Hyperparameters, hyperparameters, learning_rate, make_learning_rate

PyTree = Any


# ---------------------------------------------------------------------------------------------------------------------
# Adafactor


class AdafactorState(NamedTuple):
    """Second moments. Each tree has the parameters' structure, with `optax.MaskedNode()` where it holds no array."""

    step: jax.Array
    """Steps taken, int32 scalar."""
    row: PyTree
    """Matrices: the mean over the outputs, [stacking..., inputs...]."""
    column: PyTree
    """Matrices: the mean over the inputs, [stacking..., outputs...]."""
    full: PyTree
    """Vectors: the moment itself, shaped like the parameter."""


def scale_by_adafactor(dims: PyTree, decay: float = 0.8) -> optax.GradientTransformation:
    """Return Adafactor's direction, each layer alone (Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5).

    With b = 1 - t^-decay, t = 1, 2, ..., and G2 = G^2 + 1e-30, for a matrix with inputs i and outputs o

        R_i = b R_i + (1 - b) mean_o G2,  C_o = b C_o + (1 - b) mean_i G2,  V = R_i C_o / mean_i R_i,

    for a vector V = b V + (1 - b) G2; then U = G / sqrt(V), and the direction is
    U / max(1, RMS(U)) * max(1e-3, RMS(parameter)), with RMS over one layer's leaf. So `peak_lr` is relative to the size of a
    parameter (the paper uses 1e-2). No first moment: beta1, beta2 and epsilon are not used.

    Unlike `optax.scale_by_factored_rms`, which factors the two largest dims of a leaf if both reach 128, a matrix is given by
    its logical dims, and is always factored.
    """
    axes = axes_tree(dims)

    def init(params: PyTree) -> AdafactorState:
        def zeros(keep: Callable[[LeafAxes], bool], over: Callable[[LeafAxes], tuple[int, ...]]) -> PyTree:
            def leaf(a: LeafAxes, p: jax.Array) -> Any:
                return jnp.zeros_like(jnp.sum(p, axis=over(a))) if keep(a) else optax.MaskedNode()

            return jax.tree.map(leaf, axes, params)

        return AdafactorState(
            step=jnp.zeros((), jnp.int32),
            row=zeros(lambda a: a.is_matrix, lambda a: a.outputs),
            column=zeros(lambda a: a.is_matrix, lambda a: a.inputs),
            full=zeros(lambda a: not a.is_matrix, lambda a: ()),
        )

    def update(gradients: PyTree, state: AdafactorState, params: PyTree = None) -> tuple[PyTree, AdafactorState]:
        step = state.step + 1
        b = 1 - step.astype(jnp.float32) ** -decay
        leaves, structure = jax.tree.flatten(gradients)
        trees = (axes, params, state.row, state.column, state.full)
        results = [_adafactor_leaf(b, g, *rest) for g, *rest in zip(leaves, *map(structure.flatten_up_to, trees), strict=True)]
        directions, *moments = (structure.unflatten(column) for column in zip(*results, strict=True))
        return directions, AdafactorState(step, *moments)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _adafactor_leaf(
    b: Any, gradient: jax.Array, axes: LeafAxes, parameter: jax.Array, row: Any, column: Any, full: Any
) -> tuple[jax.Array, Any, Any, Any]:
    """(direction, row, column, full) of one leaf."""
    squared = jnp.square(gradient) + 1e-30
    if axes.is_matrix:
        row = b * row + (1 - b) * jnp.mean(squared, axes.outputs)
        column = b * column + (1 - b) * jnp.mean(squared, axes.inputs)
        relative_row = row / jnp.mean(row, axes.inputs, keepdims=True)  # a row has the leaf's leading axes
        # Two roots, not the root of a product: both factors may be 1e-30.
        direction = gradient * jnp.expand_dims(relative_row**-0.5, axes.outputs) * jnp.expand_dims(column**-0.5, axes.inputs)
    else:
        full = b * full + (1 - b) * squared
        direction = gradient * full**-0.5

    def root_mean_square(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(x), axes.layer, keepdims=True))

    direction = direction / jnp.maximum(1.0, root_mean_square(direction))
    return direction * jnp.maximum(1e-3, root_mean_square(parameter)), row, column, full


# ---------------------------------------------------------------------------------------------------------------------
# Muon


def _muon_and_adamw(config: OptimizerConfig, dims: PyTree, dtype: str) -> optax.GradientTransformation:
    """Return Muon for hidden matrices, with Adam for embeddings, output head, norms and biases."""

    def chosen(own: Dims) -> Dims | optax.MaskedNode:
        return own if leaf_axes(own).is_hidden_matrix else optax.MaskedNode()

    # `optax.partition` passes a tree with MaskedNode for leaves of another label; the dims must have the same structure.
    hidden = jax.tree.map(chosen, dims, is_leaf=is_dims)
    labels = jax.tree.map(lambda own: "muon" if leaf_axes(own).is_hidden_matrix else "adamw", dims, is_leaf=is_dims)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    return optax.partition({"muon": scale_by_muon(hidden, config.beta1, dtype), "adamw": adam}, labels)


# ---------------------------------------------------------------------------------------------------------------------
# The whole update rule


def _direction(config: OptimizerConfig, dims: PyTree, dtype: str) -> optax.GradientTransformation:
    rules: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        "sgd": lambda: optax.trace(config.beta1) if config.beta1 else optax.identity(),
        "adafactor": lambda: scale_by_adafactor(dims),
        "lion": lambda: optax.scale_by_lion(config.beta1, config.beta2),
        "muon": lambda: _muon_and_adamw(config, dims, dtype),
    }
    if config.name not in rules:
        raise ExplainedError(f"optimizer.name={config.name!r}: {nearest(config.name, rules)}")
    return rules[config.name]()


def _decay(weight_decay: float, decays: PyTree) -> optax.GradientTransformationExtraArgs:
    """update + weight_decay * parameter, for the leaves that decay."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **numbers: Any) -> tuple[PyTree, PyTree]:
        rate = numbers.get("weight_decay", weight_decay)
        return jax.tree.map(lambda u, p, is_due: u + rate * p if is_due else u, updates, params, decays), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _scale_by_learning_rate(
    config: OptimizerConfig, total_steps: int, schedules: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """-learning_rate(updates made so far) * update."""
    own = hyperparameters(config, total_steps)

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, mesh: Mesh | None = None, applies: Any = True, **numbers: Any
    ) -> tuple[PyTree, PyTree]:
        del params, mesh, applies
        rate = learning_rate(schedules, Hyperparameters(**(own._asdict() | numbers)), state.count)
        return jax.tree.map(lambda u: -rate * u, updates), optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Compute in float32, with float32 state and update, whatever the dtype of parameters and gradients."""
    inner = optax.with_extra_args_support(inner)

    def cast(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def init(params: PyTree) -> PyTree:
        return inner.init(cast(params))

    def update(gradients: PyTree, state: PyTree, params: PyTree = None, **numbers: Any) -> tuple[PyTree, PyTree]:
        return inner.update(cast(gradients), state, cast(params), **numbers)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def optimizer_of(config: Config) -> optax.GradientTransformationExtraArgs:
    """Return the update rule of a run: the optax transform that is plugged in, in float32, or that of section `optimizer`."""
    if config.parts.optimizer is not None:
        return in_float32(config.parts.optimizer)
    recipe = Recipe(config)
    most = max(stage.config.optimizer.weight_decay for stage in recipe.all)
    optimizer = replace(config.optimizer, weight_decay=most)  # each step's own is an input; 0 leaves it out of the program
    dims, layers = trained_dims(config), make_stacking(config).layer_numbers()
    return make_optimizer(optimizer, config.train.steps, dims, config.model.dtype, recipe.schedules, layers)


def make_optimizer(
    config: OptimizerConfig,
    total_steps: int,
    dims: PyTree,
    dtype: str = "float32",
    schedules: Sequence[str] = (),
    layer_numbers: np.ndarray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return the whole update rule, for `optax.apply_updates`.

    - adamw: M / (sqrt(V) + epsilon), both bias-corrected (Loshchilov & Hutter 2019, arXiv:1711.05101).
    - sgd: the gradient, or with beta1 the trace T = beta1 T + G. With beta1, clip_norm and weight_decay 0 a step is exactly
      parameters - learning_rate * gradients.
    - adafactor: `scale_by_adafactor`. muon: `scale_by_muon`, with adamw for all but hidden matrices.
    - lion: sign(beta1 M + (1 - beta1) G), then M = beta2 M + (1 - beta2) G (Chen et al. 2023, arXiv:2302.06675).

    Gradients whose norm over all parameters is above clip_norm are first scaled to it. Weight decay is decoupled and, as in
    PyTorch, times the learning rate; only matrices decay (`LeafAxes.is_matrix`: embeddings and output head too).

    `update(gradients, state, params, **numbers)` takes the fields of `schedule.Hyperparameters` as traced numbers, so that
    they are inputs of the program it is compiled into. Without them they are those of this config, and constants. With `mesh`,
    the mesh that shards the arrays, Muon shares its work out among the devices; without it, it must be called on one device or
    takes XLA's choice of transfers. `applies` is that of `moments.in_host_memory`.

    Args:
      total_steps: optimizer steps in the whole run.
      dims: the parameter tree with a tuple of logical dim names for each leaf; stacked leaves begin with STACKING.
      dtype: of Muon's products; everything else is float32.
      schedules: names of all schedules of the run, where there are several.
      layer_numbers: `Stacking.layer_numbers`, which moments in 8 bits or in host memory need (`train/moments.py`).

    Returns:
      A transformation whose state is {"clip", config.name, "decay", "learning_rate"}; moments are float32, or in 8 bits, in
      trees of the parameters' structure and, but for Adafactor's rows and columns, of their shapes.

    Raises:
      ExplainedError: an unknown optimizer or schedule.
    """
    decays = jax.tree.map(lambda a: a.is_matrix, axes_tree(dims))
    make_learning_rate(config, total_steps)  # raises
    direction = _direction(config, dims, dtype)
    if config.moments_dtype == "int8":
        assert layer_numbers is not None
        direction = in_8_bits(direction, dims, layer_numbers, by_layer=config.name != "muon")
    elif config.moments_memory == "host":
        assert layer_numbers is not None
        direction = in_host_memory(direction, dims, layer_numbers)
    return in_float32(
        optax.named_chain(
            ("clip", optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()),
            (config.name, direction),
            ("decay", _decay(config.weight_decay, decays) if config.weight_decay else optax.identity()),
            ("learning_rate", _scale_by_learning_rate(config, total_steps, schedules or (config.schedule,))),
        )
    )
