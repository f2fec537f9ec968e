"""Find where a step's numbers first went wrong: recompute it by microbatches, and check the result of each operation.

An operation is the origin if its result is not finite and all its inputs are: a masked score of minus infinity, put there on
purpose, is none, nor is an operation that passes on a NaN from elsewhere. The layers and the loss are traced to jaxprs and
evaluated equation by equation beside such flags, inside the one manual region, so it works on any mesh and in a pipeline; a
collective counts as an operation too. If all of the forward pass is finite, the gradients show how far the backward pass came:
it goes from the last layer to the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxtrain.config import Config, ModelConfig, SyncConfig
from jaxtrain.jax_private import user_frame
from jaxtrain.models.building import make_decoder
from jaxtrain.models.decoder import STACKED, Decoder, parameter_dims
from jaxtrain.objectives import PRETRAIN, Objective
from jaxtrain.parallel.pipeline import Functions, Weights
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.sharding import Dims, is_dims, named, replicated, vary
from jaxtrain.train.gradients import batch_sharding, make_loss_and_gradients

PyTree = Any
SHOWN = 4  # arrays that one message names
MOST_OPERATIONS = 4096  # of a layer, each with a flag
_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}
# Primitives that only move or reorder numbers.
_MOVES = frozenset(
    "reshape transpose broadcast_in_dim squeeze slice rev copy name pvary pcast optimization_barrier split expand_dims".split()
)


# ---------------------------------------------------------------------------------------------------------------------
# A function beside flags


@dataclass
class Watched:
    """`function` with flags: called inside the manual region, it returns (result, float32 [operations], 1 at an origin).

    The first flag is 1 if an input is not finite.
    """

    function: Callable[..., Any]
    labels: list[str] = field(default_factory=list)
    """Label of each flag; filled in at tracing."""

    def __call__(self, *inputs: Any) -> tuple[Any, jax.Array]:
        closed, shape = jax.make_jaxpr(self.function, return_shape=True)(*inputs)
        flat = jax.tree.leaves(inputs)
        fine = [_is_finite(x) for x in flat]
        self.labels[:] = ["the input"]
        counts = [~_all(fine)]
        results, _ = self._evaluate(closed.jaxpr, closed.consts, flat, fine, counts)
        counts = jnp.stack([vary(lax.stop_gradient(count.astype(jnp.float32))) for count in counts])
        return jax.tree.unflatten(jax.tree.structure(shape), results), counts

    def _evaluate(
        self,
        jaxpr: Any,
        consts: list[Any],
        inputs: list[Any],
        fine: list[jax.Array],
        counts: list[jax.Array],
        named: Sequence[str | None] = (),
        scope: str = "",
    ) -> tuple[list[Any], list[jax.Array]]:
        """(results, whether each is finite); appends to counts and labels.

        Args:
          named: what the caller names the results.
          scope: of the caller, where the operations do not say it themselves.
        """
        known: dict[Any, tuple[Any, jax.Array]] = {}
        known |= dict(zip(jaxpr.constvars, [(x, _is_finite(x)) for x in consts], strict=True))
        known |= dict(zip(jaxpr.invars, zip(inputs, fine, strict=True), strict=True))
        names = {id(variable): name for variable, name in zip(jaxpr.outvars, named, strict=False) if name}
        names |= {id(eqn.invars[0]): eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "name"}

        def read(variable: Any) -> tuple[Any, jax.Array]:
            return (variable.val, _is_finite(variable.val)) if hasattr(variable, "val") else known[variable]

        for eqn in jaxpr.eqns:
            given, given_fine = zip(*map(read, eqn.invars), strict=True) if eqn.invars else ((), ())
            called = [names.get(id(variable)) for variable in eqn.outvars]
            inner = eqn.params.get(_INLINED.get(eqn.primitive.name, ""))
            if inner is not None:
                jaxpr_in, consts_in = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, [])
                results, results_fine = self._evaluate(
                    jaxpr_in, consts_in, list(given), list(given_fine), counts, called, scope
                )
            elif eqn.primitive.name == "custom_vjp_call":  # its derivative is its own; its operations only raise flags
                results, body = _bind(eqn, given), eqn.params["call_jaxpr"]
                unlinked = [lax.stop_gradient(x) for x in given]
                _, results_fine = self._evaluate(
                    body.jaxpr, body.consts, unlinked, list(given_fine), counts, called, str(eqn.source_info.name_stack)
                )
            else:
                results = _bind(eqn, given)
                results_fine = _fine_after(eqn, given_fine, results)
                if eqn.primitive.name not in _MOVES and any(_is_float(x) for x in results):
                    counts.append(_all(given_fine) & ~_all(results_fine))
                    self.labels.append(_describe(eqn, called[0], scope))
            known |= dict(zip(eqn.outvars, zip(results, results_fine, strict=True), strict=True))
        out = [read(variable) for variable in jaxpr.outvars]
        return [x for x, _ in out], [is_fine for _, is_fine in out]


def _bind(eqn: Any, given: tuple[Any, ...]) -> list[Any]:
    """Apply the operation to other values."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _fine_after(eqn: Any, given_fine: tuple[jax.Array, ...], results: list[Any]) -> list[jax.Array]:
    if eqn.primitive.name not in _MOVES:
        return [_is_finite(x) for x in results]
    return list(given_fine) if len(given_fine) == len(results) else [_all(given_fine)] * len(results)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _is_finite(x: Any) -> jax.Array:
    """Return whether this device's whole array is finite."""
    return jnp.all(jnp.isfinite(lax.stop_gradient(x))) if _is_float(x) else jnp.bool_(True)


def _all(flags: Any) -> jax.Array:
    """Return whether all flags hold."""
    return jnp.all(jnp.stack(vary(list(flags)))) if flags else jnp.bool_(True)


def _describe(eqn: Any, name: str | None, caller: str) -> str:
    """Describe an operation: "mlp_hidden: mul in mlp_block, models/layers.py:112"."""
    frame = user_frame(eqn.source_info.traceback)
    place = f", {'/'.join(Path(frame.file_name).parts[-2:])}:{frame.start_line}" if frame else ""
    scope = "/".join(filter(None, (caller, str(eqn.source_info.name_stack))))
    function = eqn.params.get("name", "")  # of a custom_vjp_call, which is looked at as a whole
    operation = eqn.primitive.name + (f" {function}" if isinstance(function, str) and function else "")
    return (f"{name}: " if name else "") + operation + (f" in {scope}" if scope else "") + place


# ---------------------------------------------------------------------------------------------------------------------
# The step


@dataclass(frozen=True)
class WatchedDecoder(Decoder):
    """A decoder whose layers and loss report the origins of non-finite numbers, as "origins"."""

    labels: dict[str, list[str]] = field(default_factory=dict)
    """Labels of the origins under "layer 0" (of each place in the pattern) and "loss"; filled in at tracing."""

    def _layer(self, config: ModelConfig, microbatch: PyTree, place: int = 0) -> Callable[..., Any]:
        watched = Watched(super()._layer(config, microbatch, place))

        def layer(xs: Any, weights: Weights, *more: Any) -> tuple:
            (ys, auxiliary, reports, clock), origins = watched(xs, weights, *more)
            if config is self.config:
                self.labels[f"layer {place}"] = watched.labels
            # Layers at different places of the pattern have different numbers of operations.
            origins = vary(jnp.pad(origins, (0, MOST_OPERATIONS - origins.shape[0])))
            return vary((ys, auxiliary, {**reports, "origins": origins}, clock))

        return jax.checkpoint(layer, prevent_cse=False)

    def loss_functions(self, objective: Objective = PRETRAIN) -> Functions:
        functions = super().loss_functions(objective)
        watched = Watched(functions.loss)
        self.labels["loss"] = watched.labels

        def loss(weights: Weights, x: jax.Array, microbatch: PyTree) -> tuple[jax.Array, PyTree]:
            (total, sums), origins = watched(weights, x, microbatch)
            return total, {**sums, "origins": origins}

        return functions._replace(loss=loss)


class NanProbe:
    """Called with a step's parameters and batch, describes where they first go wrong. All processes call it."""

    def __init__(self, config: Config, mesh: Mesh, backend: str):
        """Prepare the probe for `config`, whose replicas must not differ."""
        self._microbatches, self._stacking = config.train.microbatches, make_stacking(config)
        size = config.train.global_batch_size // self._microbatches
        self._config = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, microbatches=1, global_batch_size=size),
            sharding=dataclasses.replace(config.sharding, take_turns=False),
            sync=SyncConfig(),
        )
        self._dims, self._mesh, self._backend = parameter_dims(config.model), mesh, backend
        self._sharding = batch_sharding(mesh)
        self._count = jax.jit(self._wrong_numbers, in_shardings=(named(mesh, self._dims),), out_shardings=replicated(mesh))

    def __call__(self, params: PyTree, batch: PyTree) -> str:
        """Return what went wrong first: parameters; or microbatch, layer and operation; or gradients."""
        bad = self._names(jax.tree.map(np.asarray, self._count(params)))
        if bad:
            return f"parameters are not finite before the step: {_some(bad)}"
        base = make_decoder(self._config, self._mesh, self._backend)
        model = WatchedDecoder(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
        step = jax.jit(
            self._step(make_loss_and_gradients(self._config, self._mesh, self._backend, model)),
            in_shardings=(named(self._mesh, self._dims), self._sharding, None),
            out_shardings=replicated(self._mesh),
        )
        for number in range(self._microbatches):
            found = jax.tree.map(np.asarray, step(params, batch, np.int32(number)))
            words = self._origin(model, found) or self._gradients(found["gradients"])
            if words:
                return f"first in microbatch {number} of 0 to {self._microbatches - 1}: {words}"
        return (
            "computed again, microbatch by microbatch, everything is finite: the sum over microbatches overflowed, or a device "
            "computed wrong (--guard.repeat_every and `jaxtrain preflight` look for that)"
        )

    def _step(self, loss_and_gradients: Any) -> Callable[[PyTree, PyTree, jax.Array], PyTree]:
        shards, parts = self._config.mesh.batch_shards, self._microbatches

        def step(params: PyTree, batch: PyTree, number: jax.Array) -> PyTree:
            def rows(a: jax.Array) -> jax.Array:
                cut = a.reshape(shards, parts, -1, a.shape[1])
                own = lax.dynamic_index_in_dim(cut, number, axis=1, keepdims=False)
                return lax.with_sharding_constraint(own.reshape(-1, a.shape[1]), self._sharding)

            metrics, reports, gradients = loss_and_gradients(params, jax.tree.map(rows, batch))
            return {
                "loss": metrics["origins"],
                "layers": self._stacking.unstack(reports["origins"]),
                "gradients": self._wrong_numbers(gradients),
            }

        return step

    def _wrong_numbers(self, tree: PyTree) -> PyTree:
        """Count the non-finite numbers of each leaf, of a stacked leaf in each layer, [layers]; None where it is frozen."""

        def leaf(dims: Dims, value: jax.Array | None) -> jax.Array | None:
            if value is None:
                return None
            wrong = ~jnp.isfinite(value)
            if dims[:3] != STACKED:
                return jnp.sum(wrong)
            return self._stacking.unstack(jnp.sum(wrong, axis=tuple(range(3, value.ndim))))

        return jax.tree.map(leaf, self._dims, tree, is_leaf=is_dims)

    def _origin(self, model: WatchedDecoder, found: PyTree) -> str:
        """Describe the first origin in the forward pass; empty if that is finite."""
        first = self._config.model.first_dense_layers
        for layer, origins in enumerate(found["layers"]):
            places = np.flatnonzero(origins)
            if places.size and places[0] == 0:
                return "the embedding" + (" or the first dense layers" if first else "") + " gave numbers that are not finite"
            if places.size:
                labels = model.labels[f"layer {layer % self._stacking.period}"]
                return f"layer {first + layer}, {labels[places[0]]}, gave numbers that are not finite"
        places = np.flatnonzero(found["loss"])
        return f"the loss, {model.labels['loss'][places[0]]}, gave numbers that are not finite" if places.size else ""

    def _gradients(self, counts: PyTree) -> str:
        """Describe the gradients that the backward pass reaches first; empty if all are finite."""
        head = self._names({"outer": {n: c for n, c in counts["outer"].items() if n in ("head", "norm")}})
        layers = np.any([np.asarray(leaf) for leaf in jax.tree.leaves(counts["layers"])], axis=0)
        if head:
            return f"the forward pass is finite, and the gradients of the head are not: {_some(head)}"
        if layers.any():
            last = int(np.flatnonzero(layers)[-1])
            bad = self._names({"layers": jax.tree.map(lambda leaf: leaf[last], counts["layers"])})
            number = self._config.model.first_dense_layers + last
            return (
                f"the forward pass is finite, and going back layer {number} is the first whose gradients are not: {_some(bad)}"
            )
        rest = self._names(counts)
        return f"the forward pass is finite, and gradients are not: {_some(rest)}" if rest else ""

    def _names(self, counts: PyTree) -> list[str]:
        """Return the names and layers of the arrays with non-finite numbers."""
        names = []
        for path, count in jax.tree_util.tree_flatten_with_path(counts)[0]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if count.ndim and count.any():
                first = self._config.model.first_dense_layers
                names.append(f"{name} of layer {', '.join(str(first + i) for i in np.flatnonzero(count))}")
            elif count.any():
                names.append(name)
        return names


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} arrays more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
