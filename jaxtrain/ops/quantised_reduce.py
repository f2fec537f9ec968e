"""Compute the mean over a mesh axis of slow links in few bytes: blockwise quantised, accumulated in float32.

A leaf of n numbers is cut into one chunk for each of the R devices along the axis. Every device quantises its chunks and sends
each to its owner (`all_to_all`); the owner sums them in float32, quantises the mean, and sends it to all (`all_gather`). All
devices decode the same bytes, so results are equal to the last bit. The messages are uint8, with the float32 scales of the
blocks inside, because XLA's CPU backend would widen bfloat16 and float8 collectives, and one message has less latency than two.

A block of values x_1..x_b with a = max |x_i| becomes

    int8     q = round(x / s),  s = a / 127              |x - s q| <= a / 254
    float8   q = float8_e4m3fn(x / s),  s = a / 448      |x - s q| <= max(|x| / 16, a / (448 * 1024))
    bfloat16 q = bfloat16(x), no scale                   |x - q|   <= |x| / 256

each within float32 rounding. So with e(x) that bound, a mean m of x_1..x_R comes out within mean_r e(x_r) + e(m'), where m' is
the mean of what was decoded. A block that holds an inf or a NaN comes out as NaN.

Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847) keeps the error and adds it the next time:
each device its own x - decode(encode(x)), and the owner of a chunk also R times the error of its second quantisation, which the
next mean divides by R again. So residuals have the shape of the leaf, and the sum loses nothing:
over any number of exchanges, sum of results = sum of exact means - mean over the devices of the last residual.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxtrain.config import Compression
from jaxtrain.sharding import sum_over, vary, varying_axes

PyTree = Any
LARGEST = {"int8": 127.0, "float8": 448.0}
_SMALLEST_SCALE = 2.0**-126
_SCALE_BYTES = 4
# On a GPU, transfers over slow links get a separate stream, with a separate limit of transfers in flight: otherwise none of
# them could span a loop over layers, whose own gathers use up the common limit.
OWN_STREAM = {"_xla_gpu_collective_stream": "p2p"}


@dataclass(frozen=True)
class Reduce:
    """The mean over a mesh axis, and its compression."""

    axis: str
    """The mesh axis."""
    compression: Compression = "none"
    """Format of a number in transfer; "none" is a plain float32 sum."""
    block: int = 256
    """Numbers that share a scale."""

    def wire_bytes(self, size: int, devices: int) -> float:
        """Return the bytes that one device sends for a leaf of `size` numbers (its own shard) over `devices` along the axis.

        2 (R - 1) / R of the leaf, for reduce-scatter and all-gather (a ring all-reduce is both), in 4 bytes per number, or 2,
        or 1 + 4 / block, padded to whole blocks on each device.
        """
        if self.compression == "none":
            return 2 * (devices - 1) / devices * 4 * size
        number = {"bfloat16": 2, "int8": 1, "float8": 1}[self.compression]
        scale = _SCALE_BYTES if self.compression in LARGEST else 0
        return 2 * (devices - 1) * self._blocks(size, devices) * (number * self.block + scale)

    def _blocks(self, size: int, devices: int) -> int:
        """Return the number of blocks of one chunk."""
        return math.ceil(size / (devices * self.block))

    def mean(self, tree: PyTree, residual: PyTree | None = None) -> tuple[PyTree, PyTree | None]:
        """(mean of every float32 leaf over the axis, compression error). Inside the manual region.

        The mean is typed as equal along the axis. Leaves of `residual` have the shapes of `tree`; without it, there is no error
        feedback, and None is returned.
        """
        leaves, structure = jax.tree.flatten(tree)
        kept = [None] * len(leaves) if residual is None else structure.flatten_up_to(residual)
        values = [x if lost is None else x + lost for x, lost in zip(leaves, kept, strict=True)]
        with jax.named_scope(f"mean_over_{self.axis}"):
            if self.compression == "none" or lax.axis_size(self.axis) == 1:
                means, lost = self._plain_means(values), [jnp.zeros_like(x) for x in values]
            else:
                means, lost = self._quantised_means(values)
        return structure.unflatten(means), None if residual is None else structure.unflatten(lost)

    def _plain_means(self, values: list[jax.Array]) -> list[jax.Array]:
        """Return the means, by one vector for each set of axes along which leaves are typed as varying."""
        means = dict(enumerate(values))
        for axes in dict.fromkeys(varying_axes(x) for x in values):
            members = [i for i, x in enumerate(values) if varying_axes(x) == axes]
            sums = joined(lambda x: sum_over(x, (self.axis,)), [values[i].reshape(-1) for i in members])
            for i, total in zip(members, sums, strict=True):
                means[i] = total.reshape(values[i].shape) / lax.axis_size(self.axis)
        return list(means.values())

    def _quantised_means(self, values: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """(means, errors)."""
        devices, number = lax.axis_size(self.axis), lax.axis_index(self.axis)
        chunks = [self._chunks(vary(x, (self.axis,)), devices) for x in values]
        sent = [encode(x, self.compression) for x in chunks]
        arrived = joined(lambda x: lax.all_to_all(x, self.axis, split_axis=0, concat_axis=0), sent)
        own = [jnp.sum(decode(x, self.compression), axis=0, keepdims=True) / devices for x in arrived]
        sent_on = [encode(x, self.compression) for x in own]
        everyone = joined(lambda x: lax.all_gather(x[0], self.axis, to="invarying"), sent_on)
        means, lost = [], []
        for i, x in enumerate(values):
            means.append(decode(everyone[i], self.compression).reshape(-1)[: x.size].reshape(x.shape))
            lost_in_mean = devices * (own[i] - decode(sent_on[i], self.compression))
            rest = (chunks[i] - decode(sent[i], self.compression)).at[number].add(lost_in_mean[0])
            lost.append(rest.reshape(-1)[: x.size].reshape(x.shape))
        return means, lost

    def _chunks(self, x: jax.Array, devices: int) -> jax.Array:
        """Return [devices, blocks, block], padded with zeros."""
        blocks = self._blocks(x.size, devices)
        return jnp.pad(x.reshape(-1), (0, devices * blocks * self.block - x.size)).reshape(devices, blocks, self.block)


def joined(move: Callable[[jax.Array], jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
    """Apply `move` to all arrays as one transfer: of vectors, or of arrays [devices, ...] whose rows go together.

    One transfer can stay in flight through a loop over layers, where many cannot; XLA would join them too, but then forgets the
    stream.
    """
    rows = [x if x.ndim == 1 else x.reshape(len(x), -1) for x in arrays]
    with set_xla_metadata(**OWN_STREAM):
        moved = move(jnp.concatenate(rows, axis=-1))
    ends = list(itertools.accumulate(row.shape[-1] for row in rows))
    parts = [lax.slice_in_dim(moved, end - row.shape[-1], end, axis=-1) for row, end in zip(rows, ends, strict=True)]
    return [part.reshape(*part.shape[:1], *x.shape[1:]) for part, x in zip(parts, arrays, strict=True)]


def encode(x: jax.Array, compression: str) -> jax.Array:
    """float32 [..., block] -> uint8 [..., bytes]: the numbers, then the block's scale where there is one."""
    if compression == "bfloat16":
        return lax.optimization_barrier(_to_bytes(x.astype(jnp.bfloat16)))
    # The smallest scale keeps a block of zeros, or of almost zeros, from dividing by 0. A NaN goes through `maximum`.
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LARGEST[compression], _SMALLEST_SCALE)
    # Rounded up by an ulp, the quotient of the largest number must not leave the range: float8 would make it a NaN.
    scaled = jnp.clip(x / scale, -LARGEST[compression], LARGEST[compression])
    numbers = jnp.round(scaled).astype(jnp.int8) if compression == "int8" else scaled.astype(jnp.float8_e4m3fn)
    # Without the barrier XLA may see that decoding undoes encoding, and lose what was lost.
    return lax.optimization_barrier(jnp.concatenate([_to_bytes(numbers), _to_bytes(scale)], axis=-1))


def decode(data: jax.Array, compression: str) -> jax.Array:
    """uint8 [..., bytes] -> float32 [..., block]."""
    if compression == "bfloat16":
        return _from_bytes(data, jnp.bfloat16).astype(jnp.float32)
    numbers, scale = data[..., :-_SCALE_BYTES], data[..., -_SCALE_BYTES:]
    dtype = jnp.int8 if compression == "int8" else jnp.float8_e4m3fn
    return _from_bytes(numbers, dtype).astype(jnp.float32) * _from_bytes(scale, jnp.float32)


def _to_bytes(x: jax.Array) -> jax.Array:
    data = lax.bitcast_convert_type(x, jnp.uint8)
    return data if x.dtype.itemsize == 1 else data.reshape(*x.shape[:-1], -1)


def _from_bytes(data: jax.Array, dtype: Any) -> jax.Array:
    size = jnp.dtype(dtype).itemsize
    return lax.bitcast_convert_type(data if size == 1 else data.reshape(*data.shape[:-1], -1, size), dtype)
