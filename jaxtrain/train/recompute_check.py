"""Compute gradients twice and compare them bit for bit (guard.repeat_every), to detect a device that sometimes errs.

The same compiled program on the same parameters and batch gives the same bits, unless a device errs in one of the two, or the
program sums in no fixed order (on GPUs some do). Each check costs the compute of two further steps, less the update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoint.trees import leaves_by_path
from jaxtrain.errors import NumbersError
from jaxtrain.models.trained import trained_dims
from jaxtrain.sharding import is_dims, replicated, specs
from jaxtrain.train.bad_steps import RollBack
from jaxtrain.train.exchange import under
from jaxtrain.train.gradients import make_loss_and_gradients
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.state_check import OF_EACH_DEVICE, SHOWN, describe_device, local_sums
from jaxtrain.train.step import TrainSteps
from jaxtrain.train.xla_options import deterministic_options

PyTree = Any


class RecomputeCheck:
    """Runs train steps; before each guard.repeat_every-th, its gradients are computed twice and compared."""

    def __init__(self, prepared: Prepared, steps: TrainSteps, first: int, batch_of: Callable[[int], int] = lambda step: step):
        config, mesh = prepared.config, prepared.mesh
        self._guard, self._mesh, self._steps, self._step = config.guard, mesh, steps, first
        self._prepared, self._batch_of = prepared, batch_of
        dims = under(("replica",) if config.sync.sums_apart else (), trained_dims(config))
        structure = jax.tree.structure(dims, is_leaf=is_dims)
        self._names = ["/".join(path) for path in leaves_by_path(jax.tree.unflatten(structure, range(structure.num_leaves)))[0]]
        self._sums_of_shards = jax.shard_map(
            lambda gradients: local_sums(jax.tree.leaves(gradients))[None],
            mesh=mesh,
            in_specs=(specs(dims),),
            out_specs=OF_EACH_DEVICE,
        )
        self._programs: dict[Any, Any] = {}
        self._differ = jax.jit(lambda a, b: jnp.any(a != b, axis=-1), out_shardings=replicated(mesh))

    def begin_at(self, first: int) -> None:
        """Set the next step to first + 1."""
        self._step = first
        self._steps.begin_at(first)

    def __call__(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        """Run the step, after a comparison if one is due.

        Raises:
          NumbersError: the two computations differ.
          RollBack: likewise, with guard.copies=rollback.
        """
        self._step += 1
        if self._step % self._guard.repeat_every == 0:
            jax.block_until_ready(state)  # XLA:CPU hangs where two programs with collectives are under way
            sums = self._sums(self._batch_of(self._step - 1), len(batch["targets"]))
            once, again = (jax.block_until_ready(sums(state["params"], batch)) for _ in range(2))
            differ = np.asarray(self._differ(once, again))
            if differ.any():
                self._tell(differ)
        return self._steps(state, batch)

    def _sums(self, batch: int, rows: int) -> Any:
        """Return the program of a batch's stage and rows: (params, batch) -> sums over the gradients' bits."""
        key, at = (self._prepared.recipe.at(batch).program, rows), self._prepared.at(batch).of_rows(rows)
        if key not in self._programs:
            loss_and_gradients = make_loss_and_gradients(at.config, at.mesh, at.backend)
            options = deterministic_options(at.config, at.mesh.devices.flat[0].platform) or None
            self._programs[key] = jax.jit(
                lambda params, batch: self._sums_of_shards(loss_and_gradients(params, batch)[2]), compiler_options=options
            )
        return self._programs[key]

    def _tell(self, differ: np.ndarray) -> None:
        """Report the differing leaves, [devices, leaves]."""
        devices = np.flatnonzero(differ.any(1))
        leaves = [self._names[i] for i in np.flatnonzero(differ.any(0))]
        if len(devices) == len(differ):
            who = "all devices, since what one of them computed wrong is summed into the gradients of all"
        else:
            who = ", ".join(describe_device(self._mesh, int(i)) for i in devices[:SHOWN])
        reason = (
            f"the gradients of step {self._step} came out otherwise when they were computed again: {len(leaves)} of "
            f"{differ.shape[1]} arrays ({', '.join(leaves[:SHOWN])}), on {who}"
        )
        if self._guard.copies == "rollback":
            raise RollBack(self._step, reason, 0)
        raise NumbersError(
            f"{reason}. A device computes wrongly, or the program is not deterministic, which on GPUs needs "
            "--train.deterministic=True. `jaxtrain preflight` checks the devices; --guard.repeat_every=0 "
            "turns this check off"
        )
