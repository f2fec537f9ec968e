"""The compiled programs: logits of whole sequences, new tokens into the cache, and decoding steps.

All are one `shard_map`, manual over all mesh axes, over the parameters as training holds them. Rows are sharded over
`ROW_AXES`; pipeline stages work one after another on all rows of a device.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import Config, ModelConfig
from jaxtrain.inference.cache import ROW_AXES, CachedAttention, CacheSize, cache_shapes, cache_specs
from jaxtrain.inference.sampling import Choice, choose
from jaxtrain.inference.whole import at_level_three
from jaxtrain.layout import stage_of_part
from jaxtrain.models.building import make_decoder
from jaxtrain.models.decoder import Decoder, parameter_dims, to_compute
from jaxtrain.models.layers import run_layer
from jaxtrain.models.packing import Packing
from jaxtrain.ops.losses import Logits
from jaxtrain.parallel.pipeline import Parameters
from jaxtrain.parallel.turns import alone
from jaxtrain.sharding import all_gather, is_dims, replicated, shift, specs, vary

PyTree = Any
APART_BYTES = 64 << 20
"""Bytes of the layers from which on `apart` has them one by one."""
STEPS = 8
"""Most decoding steps between two looks at the host: a row that ends rests for the others."""


class Rows(NamedTuple):
    """The state of each row of the cache; rows are sharded, [B]."""

    token: jax.Array
    """int32, the newest token, which the cache does not hold yet."""
    length: jax.Array
    """int32, tokens that the cache holds."""
    number: jax.Array
    """int32, tokens made so far."""
    left: jax.Array
    """int32, tokens still to be made; 0 for a row at rest."""
    seen: jax.Array
    """bool [B, V], tokens that the row holds."""
    ends: jax.Array
    """int32 [B, E], tokens that end the row; -1 for none."""
    choice: Choice


class Places(NamedTuple):
    """The positions of new tokens, and the lengths of their rows."""

    positions_BL: jax.Array
    """int32; -1 for padding."""
    lengths_B1: jax.Array
    """int32, tokens of the whole row: of its prompt, or with the new token."""


def _layers(
    decoder: Decoder, weights: Parameters, x: jax.Array, places: Places, chunk: int, caches: tuple
) -> tuple[jax.Array, tuple]:
    """Run one part of the stack over its caches, one of each place in the pattern."""
    config, stacking = decoder.config, decoder.stacking
    period, groups = stacking.period, stacking.layers_per_part // stacking.period
    held = jnp.asarray(stacking.counts())[chunk, lax.axis_index("pipe")]

    def group(carry: tuple, slot: tuple) -> tuple[tuple, None]:
        (x, caches), (own, index) = carry, slot
        for place in range(period):
            y, entries = _layer(decoder, config, own[place], place, x, places, caches[place], index)
            x = y if stacking.is_even else jnp.where(index * period + place < held, y, x)
            caches = (*caches[:place], entries, *caches[place + 1 :])
        return (x, caches), None

    of_chunk = jax.tree.map(lambda leaf: leaf[chunk], weights.layers)
    return lax.scan(group, (x, caches), (of_chunk, jnp.arange(groups)))[0]


def _one_by_one(decoder: Decoder, layers: list, x: jax.Array, places: Places, caches: list) -> tuple[jax.Array, list]:
    """Run layers that are `apart`, each with a cache of its own."""
    period, held = decoder.stacking.period, int(decoder.stacking.counts()[0, 0])
    for number, weights in enumerate(layers[:held]):
        x, entries = _layer(decoder, decoder.config, weights, number % period, x, places, caches[number], jnp.int32(0))
        caches = [*caches[:number], entries, *caches[number + 1 :]]
    return x, caches


def _caches_apart(stack: tuple) -> list:
    """Return the cache of each layer, [1, ...]: XLA:CPU would copy it out of the stack, and the stack at every step."""
    groups = jax.tree.leaves(stack)[0].shape[2]
    return [jax.tree.map(lambda leaf, i=i: leaf[0, 0, i : i + 1], own) for i in range(groups) for own in stack]


def _caches_stacked(caches: list, period: int) -> tuple:
    """Return the caches of `_caches_apart` as they were."""
    places = (caches[place::period] for place in range(period))
    return tuple(jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[None, None], *own) for own in places)


def _layer(
    decoder: Decoder,
    config: ModelConfig,
    weights: PyTree,
    place: int,
    x: jax.Array,
    places: Places,
    entries: Any,
    index: jax.Array,
) -> tuple[jax.Array, Any]:
    """Run one layer; return (x, the cache with its new entries)."""
    rule = decoder.attention.rule._replace(window=config.window_of(config.kinds[place]))
    attention = CachedAttention(entries, index, places.positions_BL, rule)
    positions, lengths = (array.reshape(x.shape[0], -1) for array in places)
    packing = Packing(jnp.maximum(positions, 0), None, None, None, lengths)
    layer = decoder.layer(config, (weights, weights), place)
    x, _, reports = alone(run_layer(layer, x, packing, attention, decoder.experts))  # type: ignore[arg-type]
    if "experts" in reports:
        attention.keep_experts(reports["experts"])
    return x, attention.entries


def _through_stages(decoder: Decoder, weights: Parameters, x: jax.Array, places: Places, stack: Any) -> tuple[jax.Array, Any]:
    """Run the whole stack, stage after stage; every stage ends with the result."""
    if isinstance(weights.layers, list):
        return _one_by_one(decoder, weights.layers, x, places, stack)
    stages, stage = decoder.stacking.stages, lax.axis_index("pipe")
    parts = stages * decoder.stacking.chunks
    for chunk in range(decoder.stacking.chunks):
        caches = jax.tree.map(lambda leaf, chunk=chunk: leaf[chunk, 0], stack)
        for turn in range(chunk * stages, (chunk + 1) * stages):
            here, after = (stage_of_part(part % parts, stages, decoder.stacking.folded) for part in (turn, turn + 1))

            def part(x: jax.Array, caches: tuple, chunk: int = chunk) -> tuple[jax.Array, tuple]:
                return _layers(decoder, weights, x, places, chunk, caches)

            if stages == 1:
                x, caches = part(x, caches)
            else:
                x, caches = lax.cond(stage == here, part, lambda x, caches: (x, caches), x, caches)
                x = shift(x, "pipe", after - here) if after != here else x
        stack = jax.tree.map(lambda leaf, new, chunk=chunk: leaf.at[chunk, 0].set(new), stack, caches)
    if stages > 1:  # the result is on the stage of the first part
        x = lax.psum(jnp.where(stage == 0, x, 0), "pipe")
    return x, stack


def _forward(
    decoder: Decoder, weights: Parameters, cache: PyTree, tokens_BL: jax.Array, places: Places, last_B: jax.Array
) -> tuple[PyTree, jax.Array]:
    """Return (the cache with the new tokens, logits [B, V] after token `last_B` of each row).

    One new token a row goes through the layers as one sequence of B tokens, so that `tensor` has a length to cut.
    """
    rows, count = tokens_BL.shape
    shape = (1, rows) if count == 1 else (rows, count)
    outer = decoder.outer((weights.outer, weights.outer))
    positions_BL = places.positions_BL
    x = outer.embed(jnp.where(positions_BL >= 0, tokens_BL, 0).reshape(shape), jnp.maximum(positions_BL, 0).reshape(shape))
    first, config = cache["first"], decoder.dense_config()
    for index in range(decoder.config.first_dense_layers):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], weights.outer["first_layers"])
        x, first = _layer(decoder, config, one, 0, x, places, first, jnp.int32(index))
    x, stack = _through_stages(decoder, weights, x, places, cache["stack"])
    x_BLD = all_gather(x, "tensor", dim=1).reshape(rows, count, -1)
    x_B1D = jnp.take_along_axis(x_BLD, last_B[:, None, None], axis=1)
    to_logits = Logits(decoder.config.vocab_size, decoder.config.logit_softcap)
    logits = to_logits.of(outer.head_input(x_B1D), *outer.head_with_dims())
    return {"first": first, "stack": stack}, all_gather(logits, "tensor", dim=2)[:, 0, : decoder.config.vocab_size]


def apart(params: PyTree, mesh: Mesh, in_few_bits: bool = False) -> PyTree:
    """Return the parameters with a list of layers in place of the stacked ones, in the same memory: to decode on one CPU.

    XLA:CPU copies a layer's matrix out of a stack before each matmul, which takes as long as the matmul of few rows. Small
    layers, and those on other devices, stay stacked: a program of unrolled layers takes longer to compile. So do weights in few
    bits: XLA would compute the numbers of all layers before the loop over steps, and hold them.
    """
    leaves = jax.tree.leaves(params["layers"])
    is_small = sum(leaf.nbytes for leaf in leaves) < APART_BYTES
    if in_few_bits or mesh.size > 1 or mesh.devices.flat[0].platform != "cpu" or is_small:
        return params
    views = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0))[0, 0], params["layers"])
    layers = [jax.tree.map(lambda view, i=i: view[i], views) for i in range(leaves[0].shape[2])]
    return params | {"layers": jax.device_put(layers, replicated(mesh))}  # copies none of 64 bytes' alignment


class Programs:
    """The compiled programs of a model on a mesh with a cache of one size."""

    def __init__(self, config: Config, mesh: Mesh, room: CacheSize, ends: int):
        """Build the programs; each is compiled when it is first called.

        Args:
          config: resolved; experts take all tokens (`moe.dispatch=dropless`), whatever it says.
          room: its rows are a multiple of the devices along `ROW_AXES` times those along `tensor`.
          ends: E, tokens that may end a row.
        """
        model = config.model
        if model.moe:
            model = replace(model, moe=replace(model.moe, dispatch="dropless"))
        self.config, self.mesh, self.room = at_level_three(replace(config, model=model)), mesh, room
        decoder = make_decoder(self.config, mesh, "reference")
        self._decoder = replace(decoder, experts=decoder.experts._replace(reports_choices=room.keeps_experts))
        rows = PartitionSpec(ROW_AXES)
        self._row_spec = rows
        self._cache_specs, self._ends = cache_specs(self.config, room.keeps_experts), ends
        self.begin = self._jit(self._begin, (rows, rows, rows), rows)
        """(params, cache, rows, tokens [B, L], new tokens of each row, tokens of its prompt) -> (cache, rows, made)."""
        self.admit = jax.jit(_admit, donate_argnums=0)
        """(rows, new rows, which) -> rows."""
        self.rewind = jax.jit(_rewind, donate_argnums=0)
        """(rows, which) -> rows."""
        self.decode = self._decode_program()
        """(params, cache, rows, steps) -> (cache, rows, (tokens or -1, log-probabilities) [STEPS, B])."""
        self.empty = self._empty_program()
        """() -> (a cache without tokens, rows at rest)."""

    def _jit(self, region: Any, extra: tuple, outputs: PyTree, donate: tuple[int, ...] = (1, 2)) -> Any:
        """Return the jit of a region (params, cache, rows, *extra) -> (cache, rows, outputs)."""
        results, dims = (self._cache_specs, self._row_spec, outputs), parameter_dims(self.config.model)

        def program(params: PyTree, *more: Any) -> Any:
            weights = PartitionSpec() if isinstance(params["layers"], list) else specs(dims)
            inputs = (weights, self._cache_specs, self._row_spec, *extra)
            # Unchecked: what devices along tensor and pipe return is equal because each gathers it whole.
            mapped = jax.shard_map(region, mesh=self.mesh, in_specs=inputs, out_specs=results, check_vma=False)
            return mapped(params, *more)

        return jax.jit(program, donate_argnums=donate)

    def _empty_program(self) -> Any:
        count, shapes = self.room.rows, cache_shapes(self.config, self.room)

        def zeros() -> tuple[PyTree, Rows]:
            def of(dtype: Any, *more: int) -> jax.Array:
                return jnp.zeros((count, *more), dtype)

            floats, ints = functools.partial(of, jnp.float32), functools.partial(of, jnp.int32)
            choice = Choice(floats(), ints(), floats(), floats(), floats(), of(jnp.uint32), jnp.ones(count))
            seen, ends = of(jnp.bool_, self.config.model.vocab_size), ints(self._ends)
            cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            return cache, Rows(ints(), ints(), ints(), ints(), seen, ends, choice)

        places = jax.tree.map(lambda place: NamedSharding(self.mesh, place), (self._cache_specs, self._row_spec))
        return jax.jit(zeros, out_shardings=places)

    def _weights(self, params: PyTree) -> Parameters:
        layers, dims, stacking = params["layers"], parameter_dims(self.config.model), self._decoder.stacking
        if isinstance(layers, list):
            of_layer = jax.tree.map(lambda dims: dims[3:], dims["layers"], is_leaf=is_dims)
            dims = dims | {"layers": [of_layer] * len(layers)}
        params = to_compute(vary(params), dims, self.config.model.dtype)
        layers = params["layers"]
        return Parameters(params["outer"], layers if isinstance(layers, list) else stacking.by_place(layers))

    def _begin(
        self, params: PyTree, cache: PyTree, rows: Rows, tokens_BL: jax.Array, count_B: jax.Array, prompt_B: jax.Array
    ) -> tuple[PyTree, Rows, tuple]:
        """Put `count_B` new tokens into each row; where they end its prompt, choose the first token of its answer."""
        index = jnp.arange(tokens_BL.shape[1])
        positions_BL = jnp.where(index < count_B[:, None], rows.length[:, None] + index, -1)
        last_B = jnp.maximum(count_B - 1, 0)
        places = Places(positions_BL, prompt_B[:, None])
        cache, logits = _forward(self._decoder, self._weights(params), cache, tokens_BL, places, last_B)
        here = jnp.where(positions_BL >= 0, tokens_BL, self.config.model.vocab_size)
        seen = rows.seen.at[jnp.arange(here.shape[0])[:, None], here].set(True, mode="drop")
        rows = rows._replace(length=rows.length + count_B, seen=seen)
        is_end_B = (count_B > 0) & (rows.length == prompt_B)
        return cache, *_advance(rows, logits, is_end_B & (rows.left > 0))

    def _decode_program(self) -> Any:
        """Return the program of some decoding steps, at most STEPS: one for any number, since a compile takes seconds."""

        def region(params: PyTree, cache: PyTree, rows: Rows, steps: jax.Array) -> tuple[PyTree, Rows, tuple]:
            weights = self._weights(params)
            is_apart, count = isinstance(weights.layers, list), rows.left.shape[0]
            cache = cache | {"stack": _caches_apart(cache["stack"])} if is_apart else cache
            none = (jnp.full((STEPS, count), -1, jnp.int32), jnp.zeros((STEPS, count), jnp.float32))

            def step(number: jax.Array, carry: tuple) -> tuple:
                cache, rows, made = carry
                active = (rows.left > 0) & (rows.number > 0)
                places = Places(jnp.where(active, rows.length, -1)[:, None], rows.length[:, None] + 1)
                zeros = jnp.zeros_like(rows.length)
                cache, logits = _forward(self._decoder, weights, cache, rows.token[:, None], places, zeros)
                rows = rows._replace(length=rows.length + active)
                rows, new = _advance(rows, logits, active)
                return cache, rows, jax.tree.map(lambda held, own: held.at[number].set(own), made, new)

            cache, rows, made = lax.fori_loop(0, steps, step, (cache, rows, none))
            period = self._decoder.stacking.period
            return cache | {"stack": _caches_stacked(cache["stack"], period)} if is_apart else cache, rows, made

        return self._jit(region, (PartitionSpec(),), PartitionSpec(None, ROW_AXES))


def _admit(rows: Rows, new: Rows, which_B: jax.Array) -> Rows:
    """Return the rows with some replaced."""

    def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(which_B.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(leaf, rows, new)


def _rewind(rows: Rows, which_B: jax.Array) -> Rows:
    """Return the rows, some with a cache that holds nothing of them."""
    return rows._replace(length=jnp.where(which_B, 0, rows.length))


def _advance(rows: Rows, logits_BV: jax.Array, active_B: jax.Array) -> tuple[Rows, tuple]:
    """Choose the next token of the active rows; return (rows, (token or -1, log-probability))."""
    token, log_p = choose(logits_BV, rows.seen, rows.choice, rows.number)
    ended = (token[:, None] == rows.ends).any(1)
    seen = rows.seen.at[jnp.arange(token.shape[0]), jnp.where(active_B, token, logits_BV.shape[1])].set(True, mode="drop")
    rows = rows._replace(
        token=jnp.where(active_B, token, rows.token),
        number=rows.number + active_B,
        left=jnp.where(active_B, jnp.where(ended, 0, rows.left - 1), rows.left),
        seen=seen,
    )
    return rows, (jnp.where(active_B, token, -1), log_p)
