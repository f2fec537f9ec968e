"""Check before a save that every number of the state is finite, and that all its copies are the same bit for bit.

A device that sometimes computes wrongly (silent data corruption), or whose memory loses a bit, changes its copy of the
parameters, and every sum over devices spreads that to all. So each device computes checksums of its shards (those of
`checkpoint/checksums.py`), and compares them with the minimum along the axes over which a leaf is replicated (data, replica in
step, and any other that does not shard it): 8 bytes per leaf are sent. Only if some differ are all checksums fetched, to find
the minority.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.checkpoint.checksums import word_sums
from jaxtrain.checkpoint.trees import leaves_by_path
from jaxtrain.config import MESH_AXES, Config
from jaxtrain.errors import NumbersError
from jaxtrain.sharding import RULES, Dims, is_dims, is_in_host_memory, on_device, spec, sum_over, vary
from jaxtrain.train.bad_steps import RollBack, check_budget
from jaxtrain.train.feed import on_every_host
from jaxtrain.train.loop import Hook
from jaxtrain.train.rollbacks import Rollbacks
from jaxtrain.train.state import state_dims
from jaxtrain.train.xla_options import options_of_rare_programs

PyTree = Any
SHOWN = 5  # arrays or devices that one message names
OF_EACH_DEVICE = PartitionSpec(MESH_AXES)


def local_sums(leaves: list[jax.Array]) -> jax.Array:
    """Return uint32 [leaves, 2], checksums of this device's own shards, inside the manual region."""
    return vary(jnp.stack([vary(word_sums(leaf)) for leaf in leaves]))


def copied_over(dims: Dims, mesh: Mesh) -> tuple[str, ...]:
    """Return the axes above 1 along which devices hold the same shard of an array with these dims."""
    sharding = {axis for name in dims for axis in _flat(RULES[name])}
    return tuple(axis for axis in MESH_AXES if axis not in sharding and mesh.shape[axis] > 1)


def _flat(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def make_check(mesh: Mesh, dims_tree: PyTree) -> Callable[[PyTree], dict[str, Any]]:
    """Return the state -> {"differ": int32 [leaves], "not_finite": int32 [leaves], "sums": () -> uint32 [devices, leaves, 2]}.

    The first two count devices. Sums stay on their devices until they are asked for, by all processes together. Leaves in host
    memory are copied to the devices one at a time, all others are checked by one program.
    """
    dims, structure = jax.tree.flatten(dims_tree, is_leaf=is_dims)

    @functools.cache
    def program(own: tuple[Dims, ...]) -> Any:
        mapped = jax.shard_map(
            functools.partial(_region, tuple(copied_over(each, mesh) for each in own)),
            mesh=mesh,
            in_specs=([spec(each) for each in own],),
            out_specs=(PartitionSpec(), PartitionSpec(), OF_EACH_DEVICE),
            check_vma=True,
        )
        options = options_of_rare_programs(mesh.devices.flat[0].platform)
        return jax.jit(lambda leaves: mapped([on_device(leaf) for leaf in leaves]), compiler_options=options)

    def check(state: PyTree) -> dict[str, Any]:
        leaves = structure.flatten_up_to(state)
        alone = [i for i, leaf in enumerate(leaves) if is_in_host_memory(leaf)]
        groups = [[i for i in range(len(leaves)) if i not in alone], *([i] for i in alone)]
        # One program at a time: XLA:CPU hangs where two with collectives are under way.
        found = [jax.block_until_ready(program(tuple(dims[i] for i in own))([leaves[i] for i in own])) for own in groups]
        differ, not_finite, sums = zip(*found, strict=True)
        order = np.argsort(np.concatenate(groups))
        counts = {name: np.concatenate(each)[order] for name, each in (("differ", differ), ("not_finite", not_finite))}
        return counts | {"sums": lambda: np.concatenate([on_every_host(each) for each in sums], axis=1)[:, order]}

    return check


def _region(axes_of: tuple[tuple[str, ...], ...], leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(devices whose copy differs, devices with numbers that are not finite, own sums [1, leaves, 2]), each of every leaf.

    Args:
      axes_of: `copied_over` of each leaf.
    """
    sums = local_sums(leaves)
    lowest = sums
    # One collective at a time, in the same order everywhere: on XLA:CPU concurrent ones may deadlock.
    for axes in dict.fromkeys(filter(None, axes_of)):
        members = np.array([i for i, own in enumerate(axes_of) if own == axes])
        own_sums, lowest = lax.optimization_barrier((sums[members], lowest))
        lowest = lowest.at[members].set(vary(lax.pmin(own_sums, axes)))
    wrong = [jnp.any(~jnp.isfinite(leaf)) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.bool_(False) for leaf in leaves]
    flags = jnp.stack([jnp.any(sums != lowest, axis=-1), jnp.stack([vary(flag) for flag in wrong])])
    differ, not_finite = sum_over(flags.astype(jnp.int32), MESH_AXES)
    return differ, not_finite, sums[None]


def odd_ones_out(sums: np.ndarray, axes: tuple[str, ...], shape: dict[str, int]) -> tuple[list[int], bool]:
    """(devices whose copy of one leaf differs from most of its group, in mesh order; whether every group has a majority).

    All devices of a group without a majority are named.

    Args:
      sums: [devices, 2].
      axes: the axes along which the leaf is replicated.
      shape: the mesh's.
    """
    places = list(np.ndindex(*shape.values()))
    copied = [list(shape).index(axis) for axis in axes]

    def shard(device: int) -> tuple[int, ...]:
        return tuple(0 if i in copied else at for i, at in enumerate(places[device]))

    odd, certain = [], True
    for _, group in itertools.groupby(sorted(range(len(sums)), key=shard), key=shard):
        devices = list(group)
        held = {device: tuple(sums[device].tolist()) for device in devices}
        most, count = collections.Counter(held.values()).most_common(1)[0]
        if count == len(devices):
            continue
        certain &= 2 * count > len(devices)
        odd += devices if 2 * count <= len(devices) else [device for device in devices if held[device] != most]
    return sorted(odd), certain


class StateCheck(Hook):
    """Checks the state where it is due, and whenever it is called; twice at one step costs nothing.

    A state that is not finite always ends the run: it must not be saved over a good one.
    """

    def __init__(self, config: Config, mesh: Mesh, optimizer: optax.GradientTransformation, rollbacks: Rollbacks):
        self._config, self._mesh, self._dims = config, mesh, state_dims(config, optimizer)
        self._rollbacks = rollbacks
        self._check = make_check(mesh, self._dims)
        self._passed = -1

    def after_step(self, step: int, state: PyTree) -> None:
        self(step, state)

    def __call__(self, step: int, state: PyTree) -> None:
        """Check the state after `step`.

        Raises:
          NumbersError: it is not finite, or copies differ and guard.copies is stop.
          RollBack: copies differ, and guard.copies is rollback.
        """
        if step == self._passed:
            return
        jax.block_until_ready(state)  # XLA:CPU hangs where two programs with collectives are under way
        found = self._check(state)
        names = ["/".join(path) for path in leaves_by_path(state)[0]]
        if found["not_finite"].any():
            bad = [names[i] for i in np.flatnonzero(found["not_finite"])]
            raise NumbersError(
                f"the state after step {step} is not finite and is not saved: {_some(bad, 'array')}. The update overflowed, "
                "though loss and gradients were finite; lower optimizer.peak_lr, or keep model.param_dtype=float32"
            )
        if found["differ"].any() and self._config.guard.copies != "off":
            reason = self._who_differs(step, names, found["differ"], found["sums"]())
            if self._config.guard.copies == "rollback":
                skipped = int(np.asarray(state["guard"]["skipped"])) if "guard" in state else 0
                check_budget(self._config, step, skipped + len(self._rollbacks) + 1, reason)
                raise RollBack(step, reason, 0)
            raise NumbersError(
                f"{reason}\nThey were equal bit for bit before, so a device computed wrongly, or its memory lost a bit. "
                "Nothing was saved since. Remove the device, see `jaxtrain preflight`, and start again from the "
                "newest checkpoint; --guard.copies=rollback does so automatically"
            )
        self._passed = step

    def _who_differs(self, step: int, names: list[str], differ: np.ndarray, sums: np.ndarray) -> str:
        dims = jax.tree.leaves(self._dims, is_leaf=is_dims)
        arrays: dict[int, list[str]] = {}
        certain = True
        for leaf in np.flatnonzero(differ):
            odd, known = odd_ones_out(sums[:, leaf], copied_over(dims[leaf], self._mesh), dict(self._mesh.shape))
            certain &= known
            for device in odd:
                arrays.setdefault(device, []).append(names[leaf])
        lines = [f"  - {describe_device(self._mesh, device)}: {_some(wrong, 'array')}" for device, wrong in arrays.items()]
        doubt = "" if certain else " Where only two hold a copy, or no majority agrees, all of them are named."
        return (
            f"after step {step}, devices hold other copies of the state than their peers:\n" + "\n".join(lines[:SHOWN]) + doubt
        )


def _some(names: list[str], kind: str) -> str:
    more = f" and {len(names) - SHOWN} {kind}s more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def describe_device(mesh: Mesh, index: int) -> str:
    """Describe a device by its place in the mesh: "device 5 of process 1 (data=1, tensor=1)"."""
    device = mesh.devices.flat[index]
    place = zip(mesh.axis_names, np.unravel_index(index, mesh.devices.shape), strict=True)
    words = ", ".join(f"{axis}={at}" for axis, at in place if mesh.shape[axis] > 1)
    return f"device {device.id} of process {device.process_index} ({words})"
