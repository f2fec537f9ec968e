"""One table from logical dims to mesh axes, and the named collectives of the model code.

Inside the manual region every array is a device's own shard, and typed as varying over every mesh axis (`vary`), so that no sum
is inserted automatically: every sum is a call that names its axis.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import MESH_AXES
from jaxtrain.layout import gathers_each_layer, reduces_each_pass

BATCH_AXES = ("replica", "data", "fsdp", "expert")

# Logical dim -> the mesh axis that shards it. Parameter leaves of the layers are stacked as [chunk, stage, layer, ...].
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "length": "context",
    "chunk": None,
    "stage": "pipe",
    "layer": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
    "bias": None,
    "mlp_bias": "tensor",
    "heads_bias": "tensor",
    "positions": None,
    "experts": "expert",
    "router": None,
    "replica": "replica",  # leading dim of arrays that differ between replicas
    "delay": None,
    "latent": "fsdp",
    "rank": None,
    "lora": None,
}
LORA = "lora"
"""Logical dim between the two factors of an adapter (`models/lora.py`)."""

Dims = tuple[str, ...]


def is_dims(value: Any) -> bool:
    """Return whether `value` is a leaf of a tree of dims: a plain tuple of names (not optax's empty NamedTuples)."""
    return type(value) is tuple and all(isinstance(name, str) for name in value)


def spec(dims: Dims) -> PartitionSpec:
    """Return the PartitionSpec of an array whose dims have these logical names."""
    return PartitionSpec(*(RULES[name] for name in dims))


def specs(dims_tree: Any) -> Any:
    """Return the PartitionSpec of every leaf of a tree of dims."""
    return jax.tree.map(spec, dims_tree, is_leaf=is_dims)


def named(mesh: Mesh, dims_tree: Any) -> Any:
    """Return the NamedSharding of every leaf of a tree of dims."""
    return jax.tree.map(lambda dims: NamedSharding(mesh, spec(dims)), dims_tree, is_leaf=is_dims)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


# ---------------------------------------------------------------------------------------------------------------------
# Memory of the host, which a device reads and writes by copies

HOST_MEMORY = "pinned_host"


class _OfDescribedDevices(NamedSharding):
    """A sharding into host memory over devices that programs can only be compiled for.

    JAX drops the memory's name from a NamedSharding of devices that list no memories; in a program's arguments XLA needs it.
    """

    @property
    def memory_kind(self) -> str:  # type: ignore[override]
        return HOST_MEMORY

    def update(self, **changed: Any) -> NamedSharding:
        return _OfDescribedDevices(changed.get("mesh", self.mesh), changed.get("spec", self.spec))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _OfDescribedDevices) and super().__eq__(other)

    def __hash__(self) -> int:
        return hash((HOST_MEMORY, super().__hash__()))


def into_host_memory(sharding: NamedSharding) -> NamedSharding:
    """Return the sharding with every device's shard in its host's pinned memory."""
    moved = sharding.with_memory_kind(HOST_MEMORY)
    return moved if moved.memory_kind == HOST_MEMORY else _OfDescribedDevices(sharding.mesh, sharding.spec)


def of_results(shardings: Any) -> Any:
    """Return shardings as `out_shardings` takes them: of described devices without the memory, which XLA finds by itself."""
    return jax.tree.map(lambda own: NamedSharding(own.mesh, own.spec, memory_kind=own.memory_kind), shardings)


def is_in_host_memory(x: Any) -> bool:
    """Return whether an array, or a value that is traced, lies in host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def on_device(x: jax.Array) -> jax.Array:
    """Return a value that is traced in the memory of its device."""
    return jax.device_put(x, jax.memory.Space.Device) if is_in_host_memory(x) else x


def on_host(x: jax.Array) -> jax.Array:
    """Return a value that is traced in host memory."""
    return jax.device_put(x, jax.memory.Space.Host)


# ---------------------------------------------------------------------------------------------------------------------
# Inside the manual region


def varying_axes(x: Any) -> frozenset[str]:
    """Return the mesh axes over which `x` is typed as varying."""
    return jax.typeof(x).manual_axis_type.varying


def vary(tree: Any, axes: Sequence[str] = MESH_AXES) -> Any:
    """Type every leaf as varying over `axes`. Moves no bytes; stops autodiff from inserting a sum over them."""

    def leaf(x: Any) -> Any:
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree)


def sum_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Return the sum of `x` over the devices along `axes`; the result is typed as equal on all of them."""
    return lax.psum(vary(x, axes), tuple(axes)) if axes else x


def all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Join the shards along a mesh axis into one array along dim `dim`. Its transpose is `reduce_scatter`."""
    return x if lax.axis_size(axis) == 1 else lax.all_gather(x, axis, axis=dim, tiled=True)


def reduce_scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Sum over a mesh axis and leave each device its own slice of dim `dim`. Its transpose is `all_gather`."""
    return x if lax.axis_size(axis) == 1 else lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


def all_to_all(x: jax.Array, axis: str, dim: int, to_dim: int | None = None) -> jax.Array:
    """Cut dim `dim` into one part per device along a mesh axis, and join the received parts along `to_dim` (by default `dim`).

    Its transpose swaps the two dims.
    """
    to_dim = dim if to_dim is None else to_dim
    return x if lax.axis_size(axis) == 1 else lax.all_to_all(x, axis, split_axis=dim, concat_axis=to_dim, tiled=True)


def once(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Keep the replicated value on index 0 of `axes`, zero elsewhere, so that a later psum counts it once."""
    first = functools.reduce(operator.and_, (lax.axis_index(axis) == 0 for axis in axes))
    return jnp.where(first, x, jnp.zeros_like(x))


def shift(x: jax.Array, axis: str, by: int) -> jax.Array:
    """Send `x` to the device `by` places on along a mesh axis, as a ring."""
    size = lax.axis_size(axis)
    return x if size == 1 else lax.ppermute(x, axis, [(i, (i + by) % size) for i in range(size)])


def shift_in_group(x: jax.Array, axis: str, by: int) -> jax.Array:
    """Do `shift` by an all_gather along the axis, which involves only the axis's own group of devices.

    On XLA:CPU all devices of the mesh take part in a permute, so that one in a branch that other pipeline stages do not take is
    paired with another permute there and returns its data. On a GPU a permute involves only its own ring
    (`train/xla_options.py`).
    """
    size = lax.axis_size(axis)
    if size == 1:
        return x
    source = (lax.axis_index(axis) - by) % size
    return lax.dynamic_index_in_dim(lax.all_gather(x, axis), source, keepdims=False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Float8:
    """A matrix in float8, in place of its array (`ops.float8`)."""

    values: Any
    """float8_e4m3fn, of the matrix' shape."""
    scale: Any
    """float32: the matrix is scale * values. A scalar; of stacked layers one for each."""
    slot: Any = None
    """Zeros of the matrix' shape that nothing reads: the place of its gradient, which has the dtype of its primal, and is not
    to be rounded to float8. None for a matrix that is not trained."""

    def __getitem__(self, _: Any) -> Float8:
        """Return itself, since modules read a weight as `self.up[...]`."""
        return self


def _fsdp_dims(dims: Dims) -> list[int]:
    return [i for i, name in enumerate(dims) if RULES[name] == "fsdp"]


def _gather_over_fsdp(dims: Dims, x: Any) -> Any:
    if isinstance(x, Float8):
        return replace(x, values=_gather_over_fsdp(dims, x.values))
    for dim in _fsdp_dims(dims):
        x = all_gather(x, "fsdp", dim)
    return x


def _scatter_over_fsdp(dims: Dims, x: jax.Array) -> jax.Array:
    for dim in _fsdp_dims(dims):
        x = reduce_scatter(x, "fsdp", dim)
    return x


def _gather_stacks(dims_tree: Any, compute: Any) -> Any:
    """Make every leaf whole over fsdp, those of the layers in a loop over layers.

    A gather puts the dim that was cut first. Of a whole stack that is an order in which no layer lies in one piece, and XLA
    kept it beside the stack in the model's order: 8b on fsdp=64 with ZeRO 2 held its weights twice.
    """
    dims, structure = jax.tree.flatten(dims_tree, is_leaf=is_dims)
    leaves, stacks = structure.flatten_up_to(compute), defaultdict(list)
    for i, (names, x) in enumerate(zip(dims, leaves, strict=True)):
        if "layer" in names and _fsdp_dims(names):
            shape = (x.values if isinstance(x, Float8) else x).shape
            stacks[shape[: names.index("layer") + 1]].append(i)
        else:
            leaves[i] = _gather_over_fsdp(names, x)
    for leading, places in stacks.items():
        whole = _gather_stack(leading, [dims[i] for i in places], [leaves[i] for i in places])
        for i, x in zip(places, whole, strict=True):
            leaves[i] = x
    return structure.unflatten(leaves)


def _gather_stack(leading: tuple[int, ...], dims: Sequence[Dims], stack: Sequence[Any]) -> list[Any]:
    """Make layers whole over fsdp, which are stacked along dims of sizes `leading`."""

    def gather(layers: list[Any]) -> list[Any]:
        return [_gather_over_fsdp(names[len(leading) :], x) for names, x in zip(dims, layers, strict=True)]

    flat = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(leading) :]), x) for x in stack]
    return [jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), x) for x in lax.map(gather, flat)]


def gather_once(master: Any, compute: Any, dims_tree: Any, zero: int) -> tuple[Any, Any]:
    """(master, compute) for the layers, prepared at the start of a step; see `sharding.zero` in the config.

    Level 3 leaves compute in shards. Levels 1 and 2 gather it over fsdp.

    A gradient has the shape and dtype of its primal, and a microbatch's are float32, at level 1 whole over fsdp. So a master
    that differs is replaced by float32 zeros of the gradient's shape. They are never read, so XLA drops them. A frozen weight's
    master is None, as its gradient.
    """

    def gradient_like(dims: Dims, shard: jax.Array | None) -> jax.Array | None:
        if shard is None:
            return None
        if reduces_each_pass(zero) and shard.dtype == jnp.float32:
            return shard
        factors = [
            lax.axis_size("fsdp") if not reduces_each_pass(zero) and i in _fsdp_dims(dims) else 1 for i in range(len(dims))
        ]
        return vary(jnp.zeros([n * f for n, f in zip(shard.shape, factors, strict=True)], jnp.float32))

    if not gathers_each_layer(zero):
        with jax.named_scope("fsdp_once"):
            compute = _gather_stacks(dims_tree, compute)
    return jax.tree.map(gradient_like, dims_tree, master, is_leaf=is_dims), compute


def gather_weight(master: jax.Array | None, compute: Any, dims: Dims, reduce_dtype: str, zero: int = 3) -> Any:
    """Return the whole weight (over fsdp) in compute dtype, from `gather_once`'s version of this device's shard.

    `compute` is `master` cast to the compute dtype; it is cast once, outside, so that the gather moves the small dtype and no
    cast copy is ever kept for the backward pass. The gradient reaches `master` alone: it is cast to `reduce_dtype`,
    reduce-scattered over fsdp (except at ZeRO level 1), and cast to master's dtype, float32. It is dropped if master is None.

    Where `compute` is a `Float8`, so is the result: the gather moves float8, and the gradient is that of its slot.
    """

    def gather(master: jax.Array | None, compute: Any) -> Any:
        whole = _gather_over_fsdp(dims, compute) if gathers_each_layer(zero) else compute
        if isinstance(whole, Float8) and master is not None:
            return replace(whole, slot=vary(jnp.zeros(whole.values.shape, reduce_dtype)))
        return whole

    if master is None:
        with jax.named_scope("fsdp"):
            return gather(None, lax.stop_gradient(compute))

    # Not the differentiable call itself: a remat policy would see only that call, not the all_gather inside.
    def forward(master: jax.Array, compute: Any) -> tuple[Any, None]:
        return gather(master, compute), None

    def backward(_: None, gradient: Any) -> tuple[jax.Array, Any]:
        gradient = (gradient.slot if isinstance(gradient, Float8) else gradient).astype(reduce_dtype)
        if reduces_each_pass(zero):
            gradient = _scatter_over_fsdp(dims, gradient)
        return gradient.astype(master.dtype), vary(jax.tree.map(jnp.zeros_like, compute))

    differentiable = jax.custom_vjp(gather)
    differentiable.defvjp(forward, backward)
    with jax.named_scope("fsdp"):
        return differentiable(master, compute)


def gather_weights(master: Any, compute: Any, dims_tree: Any, reduce_dtype: str, zero: int = 3) -> Any:
    """Apply `gather_weight` to every leaf of a tree."""

    def leaf(dims: Dims, master: Any, compute: Any) -> jax.Array:
        return gather_weight(master, compute, dims, reduce_dtype, zero)

    return jax.tree.map(leaf, dims_tree, master, compute, is_leaf=is_dims)


def reduce_gradients(gradients: Any, dims_tree: Any, reduce_dtype: str, zero: int = 3, but: Sequence[str] = ()) -> Any:
    """Sum each gradient leaf over every mesh axis that does not shard it, in `reduce_dtype`; not over the axes `but`.

    Leaves are already reduce-scattered over fsdp (`gather_weight`), except at ZeRO level 1, which does it here, once. The rest
    is `data`, and for a leaf that is whole on an axis (norms over tensor and fsdp, the embedding over pipe) the sum of the
    devices' shares.
    """

    def leaf(dims: Dims, gradient: jax.Array) -> jax.Array:
        sharding_axes = {RULES[name] for name in dims}
        axes = tuple(axis for axis in MESH_AXES if axis not in sharding_axes and axis not in but)
        reduced = gradient.astype(reduce_dtype)
        if not reduces_each_pass(zero):
            reduced = _scatter_over_fsdp(dims, reduced)
        return sum_over(reduced, axes).astype(gradient.dtype)

    with jax.named_scope("reduce_gradients"):
        return jax.tree.map(leaf, dims_tree, gradients, is_leaf=is_dims)
