"""Multiply rows by the matrix of their group, for mixtures of experts.

Shape letters: S rows, sorted by group, E groups, D and F widths.

XLA's GPU backend turns `lax.ragged_dot` into one dense matmul: every row, masked, by every group's matrix, so E times the
FLOPs, from an operand E times as large; and it computes rows without a group too. So there are Pallas (Triton) kernels for GPUs
here. Groups are padded to whole tiles, a tile belongs to one group, and tiles beyond the last group cost only the writing of
zeros: at most E (tile - 1) rows are computed in vain.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.experimental.xla_metadata import set_xla_metadata

from jaxtrain.ops.float8 import in_float8
from jaxtrain.sharding import Float8, vary, varying_axes

_BLOCK = 128  # result columns of one program
_DEPTH = 64  # elements of the summed dim that are loaded at a time
_TILES_TOGETHER = 8  # tiles with adjacent programs, which share the matrix's columns in the cache
_NARROWEST = 16  # smallest width of a tensor core
EXPECTED_ROWS = "expected_rows"
"""Attribute of a kernel's call in the compiled program: the number of rows it is expected to multiply."""

Refs = Any


def _kernels_fit(x_SD: jax.Array, w_EDF: jax.Array, tile: int) -> bool:
    """Return whether the kernels can take these operands; float32 is left to XLA, since a kernel would use TF32."""
    _, *widths = w_EDF.shape
    return tile % _DEPTH == 0 and x_SD.dtype in (jnp.bfloat16, jnp.float16) and all(n % _NARROWEST == 0 for n in widths)


class How(NamedTuple):
    """A kernel's static arguments."""

    expected_rows: int
    interpret: bool


def _call(kernel: Callable[..., None], programs: int, shape: tuple[int, ...], how: How, *operands: jax.Array) -> jax.Array:
    like = jax.typeof(operands[0])
    call = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=jax.ShapeDtypeStruct(shape, like.dtype, manual_axis_type=like.manual_axis_type),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=how.interpret,
        name="grouped_matmul",
    )
    with set_xla_metadata(**{EXPECTED_ROWS: str(how.expected_rows)}):
        return call(*operands)


def _place(program: jax.Array, tiles: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """(tile, block of columns) of a program: all columns of a few tiles, then of the next few."""
    together, within = program // (_TILES_TOGETHER * columns), program % (_TILES_TOGETHER * columns)
    first = together * _TILES_TOGETHER
    rows = jnp.minimum(tiles - first, _TILES_TOGETHER)
    return first + within % rows, within // rows


def _rows_times_matrices(tile: int, turned: bool, how: How, x_SD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """y_s = x_s w_e; with `turned` the matrices are transposed, [E, F, D]."""
    tiles, width, depth = x_SD.shape[0] // tile, w_EDF.shape[1 if turned else 2], x_SD.shape[1]
    block, step = math.gcd(width, _BLOCK), math.gcd(depth, _DEPTH)
    ends = jnp.cumsum(sizes_E // tile)
    group = jnp.searchsorted(ends, jnp.arange(tiles, dtype=ends.dtype), side="right").astype(jnp.int32)

    def kernel(x: Refs, w: Refs, group: Refs, y: Refs) -> None:
        i, j = _place(pl.program_id(0), tiles, width // block)
        rows, columns, e = pl.ds(i * tile, tile), pl.ds(j * block, block), group[i]

        def add(d: jax.Array, total: jax.Array) -> jax.Array:
            part = pl.ds(d * step, step)
            left = triton.load(x.at[rows, part])
            right = triton.load(w.at[e, columns, part] if turned else w.at[e, part, columns])
            dims = (((1,), (1 if turned else 0,)), ((), ()))
            return total + lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)

        @pl.when(e < sizes_E.shape[0])
        def _() -> None:
            total = lax.fori_loop(0, depth // step, add, jnp.zeros((tile, block), jnp.float32))
            triton.store(y.at[rows, columns], total.astype(y.dtype))

        @pl.when(e >= sizes_E.shape[0])
        def _() -> None:
            triton.store(y.at[rows, columns], jnp.zeros((tile, block), y.dtype))

    return _call(kernel, tiles * (width // block), (x_SD.shape[0], width), how, x_SD, w_EDF, group)


def _rows_times_rows(how: How, x_SD: jax.Array, y_SF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """[E, D, F]: sum of x_s^T y_s over the rows s of each group."""
    groups, depth, width = sizes_E.shape[0], x_SD.shape[1], y_SF.shape[1]
    rows_block, block = math.gcd(depth, _BLOCK), math.gcd(width, _BLOCK)
    stops = jnp.cumsum(sizes_E // _DEPTH)
    starts = stops - sizes_E // _DEPTH
    blocks = (depth // rows_block) * (width // block)

    def kernel(x: Refs, y: Refs, starts: Refs, stops: Refs, w: Refs) -> None:
        e, within = pl.program_id(0) // blocks, pl.program_id(0) % blocks
        i, j = _place(within, depth // rows_block, width // block)
        own, columns = pl.ds(i * rows_block, rows_block), pl.ds(j * block, block)

        def add(s: jax.Array, total: jax.Array) -> jax.Array:
            rows = pl.ds(s * _DEPTH, _DEPTH)
            left, right = triton.load(x.at[rows, own]), triton.load(y.at[rows, columns])
            return total + lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        total = lax.fori_loop(starts[e], stops[e], add, jnp.zeros((rows_block, block), jnp.float32))
        triton.store(w.at[e, own, columns], total.astype(w.dtype))

    return _call(kernel, groups * blocks, (groups, depth, width), how, x_SD, y_SF, starts, stops)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernels(tile: int, how: How, x_SD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _rows_times_matrices(tile, False, how, x_SD, w_EDF, sizes_E)


def _by_kernels_forward(tile: int, how: How, x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, tuple]:
    return _rows_times_matrices(tile, False, how, x, w, sizes), (x, w, sizes)


def _by_kernels_backward(tile: int, how: How, kept: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = kept
    return _rows_times_matrices(tile, True, how, dy, w, sizes), _rows_times_rows(how, x, dy, sizes), None


_by_kernels.defvjp(_by_kernels_forward, _by_kernels_backward)


@dataclass(frozen=True)
class _Widened:
    """The products of float8 rows and matrices, which are exact in `dtype`: in it they are multiplied."""

    dtype: Any
    tile: int
    how: How

    def forward(self, x: jax.Array, w: jax.Array, dtype: Any, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(x.astype(self.dtype), w.astype(self.dtype), sizes, self.tile, *self.how).astype(dtype)

    def to_x(self, g: jax.Array, w: jax.Array, dtype: Any, sizes: jax.Array) -> jax.Array:
        x = jnp.zeros((g.shape[0], w.shape[1]), self.dtype)
        return self._gradients(x, w.astype(self.dtype), g, sizes)[0].astype(dtype)

    def to_w(self, x: jax.Array, g: jax.Array, dtype: Any, sizes: jax.Array) -> jax.Array:
        w = jnp.zeros((sizes.shape[0], x.shape[1], g.shape[1]), self.dtype)
        return self._gradients(x.astype(self.dtype), w, g, sizes)[1].astype(dtype)

    def _gradients(self, x: jax.Array, w: jax.Array, g: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(dx, dW); of the two XLA drops the one that nobody reads."""
        x, w = vary((x, w), tuple(varying_axes(g)))
        if _kernels_fit(x, w, self.tile):
            return _by_kernels_backward(self.tile, self.how, (x, w, sizes), g.astype(self.dtype))[:2]
        return jax.vjp(lambda x, w: lax.ragged_dot(x, w, sizes), x, w)[1](g.astype(self.dtype))


def grouped_matmul(
    x_SD: jax.Array,
    w_EDF: Any,
    sizes_E: jax.Array,
    tile: int,
    expected_rows: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y_s = x_s w_e for the rows s of group e, [S, F], summed in float32; rows beyond the last group are zero.

    In float8 where the matrices are (a `Float8`): in its numbers, though not yet at its speed.

    Kernels if `tile` is KERNEL_TILE and widths and dtype allow; else `lax.ragged_dot`, with the same result.

    Args:
      sizes_E: rows of each group, multiples of `tile`.
      tile: KERNEL_TILE for the kernels, which must divide S too; 1 for groups of any size.
      expected_rows: how many of the S rows will belong to a group; None: S. It changes no result: `program.hlo` counts the
        kernels' FLOPs by it.
      interpret: run the kernels without a GPU, slowly.
    """
    how = How(x_SD.shape[0] if expected_rows is None else expected_rows, interpret)
    if isinstance(w_EDF, Float8):
        return in_float8(_Widened(x_SD.dtype, tile, how), x_SD, w_EDF, sizes_E)
    if not _kernels_fit(x_SD, w_EDF, tile):
        return lax.ragged_dot(x_SD, w_EDF, sizes_E)
    return _by_kernels(tile, how, x_SD, w_EDF, sizes_E)
