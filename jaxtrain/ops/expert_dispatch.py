"""Bring tokens to their experts and back: sorted and dropless, or with a fixed capacity per expert.

Shape letters: T tokens of this device, K experts of a token, E experts, D width, S slots (rows that experts work on), P devices
along `expert`. A token's k-th choice is row t K + k. Destinations are integer indices (`row_of_slot`, `slot_of_row`, -1 for
none), so moving rows is a gather whose transpose is a gather too: no scatter, and a fixed order of sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.layout import KERNEL_TILE, exchange_rows, is_gpu, padded_rows, room_of_expert, rows_sent
from jaxtrain.sharding import all_gather, all_to_all, vary


class ExpertBackend(NamedTuple):
    """The way to move and multiply tokens on a platform. Every choice gives the same result."""

    ragged: bool
    """Whether dropless tokens move by `ragged_all_to_all`, else by `all_to_all` of padded slots."""
    tile: int
    """Rows of one group that the grouped matmul works on at a time: groups are padded to whole tiles."""
    reports_choices: bool = False
    """Whether layers report the experts of each token, as "experts": sampling keeps them."""


def choose_expert_backend(platform: str) -> ExpertBackend:
    """Return the platform's backend: CPU lacks `ragged_all_to_all`; `grouped_matmul`'s kernels pay only on GPUs."""
    return ExpertBackend(ragged=platform != "cpu", tile=KERNEL_TILE if is_gpu(platform) else 1)


class Dispatched(NamedTuple):
    """Tokens on the devices of their experts."""

    rows: jax.Array
    """dropless: [S, D], sorted by expert. capacity: [E/expert, S, D]. Unused slots are zero."""
    group_sizes: jax.Array | None
    """dropless: slots of each expert, int32 [E/expert]; slots beyond their sum are unused. capacity: None."""
    back: Callable[[jax.Array], jax.Array]
    """The experts' outputs for `rows` -> [T, K, D], zero for dropped rows."""
    kept_TK: jax.Array
    """bool, whether the row was not dropped."""
    expected_rows: int
    """Number of slots that hold a row, if all experts get equally many."""


# ---------------------------------------------------------------------------------------------------------------------
# Moving rows


def _gather_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], and zero where the index is -1."""
    return jnp.where((index >= 0)[:, None], x[jnp.maximum(index, 0)], 0)


@jax.custom_vjp
def take_rows(x_RD: jax.Array, index_S: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """x[index], zero where the index is -1; `inverse_R` gives for each row of x the one result that holds it, or -1."""
    return _gather_rows(x_RD, index_S)


take_rows.defvjp(
    lambda x, index, inverse: (_gather_rows(x, index), inverse),
    lambda inverse, gradient: (_gather_rows(gradient, inverse), None, None),
)


def _spread(x_TD: jax.Array, row_of_slot_S: jax.Array, slot_of_row_TK: jax.Array) -> jax.Array:
    k = slot_of_row_TK.shape[1]
    return _gather_rows(x_TD, jnp.where(row_of_slot_S >= 0, row_of_slot_S // k, -1))


def _spread_backward(slot_of_row_TK: jax.Array, gradient_SD: jax.Array) -> tuple[jax.Array, None, None]:
    rows = _gather_rows(gradient_SD, slot_of_row_TK.reshape(-1)).reshape(*slot_of_row_TK.shape, -1)
    return rows.astype(jnp.float32).sum(1).astype(gradient_SD.dtype), None, None


@jax.custom_vjp
def spread_tokens(x_TD: jax.Array, row_of_slot_S: jax.Array, slot_of_row_TK: jax.Array) -> jax.Array:
    """[S, D]: in each slot the token of its row. The gradients of a token's K rows are added in float32, in order of choice."""
    return _spread(x_TD, row_of_slot_S, slot_of_row_TK)


spread_tokens.defvjp(lambda x, row, slot: (_spread(x, row, slot), slot), _spread_backward)


def combine(rows_TKD: jax.Array, weights_TK: jax.Array) -> jax.Array:
    """sum_k weights_k rows_k, [T, D], added in float32 in order of choice, whatever the layout."""
    # Not an einsum: a GPU would compute it in TF32.
    return (rows_TKD.astype(jnp.float32) * weights_TK[..., None]).sum(1).astype(rows_TKD.dtype)


def _map_segments(source_starts: jax.Array, target_starts: jax.Array, sizes: jax.Array, length: int) -> jax.Array:
    """Return for each of `length` target positions the source position that belongs there, or -1.

    Segment i begins at target_starts[i] (ascending) and source_starts[i] and has sizes[i] positions.
    """
    places = jnp.arange(length, dtype=jnp.int32)
    segment = jnp.searchsorted(target_starts, places, side="right").astype(jnp.int32) - 1
    within = places - target_starts[segment]
    return jnp.where(within < sizes[segment], source_starts[segment] + within, -1)


def _starts(sizes: jax.Array, axis: int = 0) -> jax.Array:
    """Return the exclusive cumulative sum of the sizes."""
    return jnp.cumsum(sizes, axis) - sizes


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1)


def _sort(keys_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the row at each sorted place, the sorted place of each row); equal keys keep their order."""
    order = jnp.argsort(keys_R, stable=True).astype(jnp.int32)
    places = vary(jnp.arange(keys_R.shape[0], dtype=jnp.int32))
    return order, jnp.zeros_like(places).at[order].set(places, unique_indices=True)


def _compose(first: jax.Array, then: jax.Array) -> jax.Array:
    """then[first], -1 where either is."""
    return jnp.where(first >= 0, then[jnp.maximum(first, 0)], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Rows between devices


class RowExchange(NamedTuple):
    """Starts and sizes of the rows exchanged along `expert`, int32 [P E/P]: a segment for each device and expert, by device."""

    send_starts: jax.Array
    """Where each segment for another device begins here."""
    send_sizes: jax.Array
    landing_starts: jax.Array
    """Where it will begin on that device."""
    receive_starts: jax.Array
    """Where each segment from another device will begin here."""
    receive_sizes: jax.Array
    origin_starts: jax.Array
    """Where it begins on that device."""

    def reversed(self) -> RowExchange:
        """Return the reverse exchange."""
        return RowExchange(*self[3:], *self[:3])


def plan_exchange(counts_PPE: jax.Array, kept_PPE: jax.Array, tile: int, me: jax.Array) -> RowExchange:
    """Return the exchange of rows sorted by expert into the slots of experts: by expert, then by the device they come from.

    One segment for each device and expert puts rows where the experts need them: received rows are not sorted again.

    Args:
      counts_PPE: rows from device (first dim) to device (second dim) for each of its experts.
      kept_PPE: those of them that are sent, the first of each segment.
      tile: an expert's slots are padded to whole tiles.
      me: this device's index.
    """
    at_source = _starts(counts_PPE.reshape(counts_PPE.shape[0], -1), 1).reshape(counts_PPE.shape)
    of_expert, _ = _padded_groups(kept_PPE.sum(0), tile)
    at_target = of_expert + _starts(kept_PPE, 0)
    sent = (at_source[me], kept_PPE[me], at_target[me])
    return RowExchange(*map(_flat, (*sent, at_target[:, me], kept_PPE[:, me], at_source[:, me])))


def _exchange_padded(rows: jax.Array, plan: RowExchange, length: int, room: int) -> jax.Array:
    """Emulate `ragged_all_to_all` by an `all_to_all` of `room` slots for each pair of devices."""
    devices = lax.axis_size("expert")

    def slots(sizes: jax.Array) -> jax.Array:
        within = _starts(sizes.reshape(devices, -1), 1)
        return _flat(jnp.arange(devices, dtype=jnp.int32)[:, None] * room + within)

    send, receive = slots(plan.send_sizes), slots(plan.receive_sizes)
    packed = _gather_rows(rows, _map_segments(plan.send_starts, send, plan.send_sizes, room * devices))
    received = all_to_all(packed, "expert", dim=0)
    # Segments in the order of their targets, and an empty one before that which begins in the same place.
    order = jnp.lexsort((plan.receive_sizes > 0, plan.receive_starts))
    moves = (receive[order], plan.receive_starts[order], plan.receive_sizes[order])
    return _gather_rows(received, _map_segments(*moves, length))


def _exchange(length: int, room: int, ragged: bool, rows: jax.Array, plan: RowExchange) -> jax.Array:
    if not ragged:
        return _exchange_padded(rows, plan, length, room)
    # Zeros of their own, made when the rows are there: XLA would make one array ahead, keep it, and copy it for each exchange.
    rows, zero = lax.optimization_barrier((rows, vary(jnp.zeros((), rows.dtype))))
    output = jnp.broadcast_to(zero, (length, *rows.shape[1:]))
    sizes = plan.send_starts, plan.send_sizes, plan.landing_starts, plan.receive_sizes
    return lax.ragged_all_to_all(rows, output, *sizes, axis_name="expert")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def exchange(length: int, room: int, ragged: bool, rows_RD: jax.Array, plan: RowExchange) -> jax.Array:
    """Send rows along `expert`: [length, D], rows of all devices in order, then zeros. Its transpose is the reverse exchange.

    Args:
      length: largest number of rows that may arrive.
      room: largest number of rows from one device to one other.
      ragged: use `lax.ragged_all_to_all`, which sends only real rows, where XLA has it (GPU, TPU). Else
        an `all_to_all` of padded slots, with the same result.
    """
    return _exchange(length, room, ragged, rows_RD, plan)


def _exchange_forward(length: int, room: int, ragged: bool, rows: jax.Array, plan: RowExchange) -> tuple:
    return _exchange(length, room, ragged, rows, plan), (plan, rows.shape[0])


def _exchange_backward(length: int, room: int, ragged: bool, kept: tuple, gradient: jax.Array) -> tuple:
    plan, sent = kept
    return _exchange(sent, room, ragged, gradient, plan.reversed()), None


exchange.defvjp(_exchange_forward, _exchange_backward)


# ---------------------------------------------------------------------------------------------------------------------
# Dropless


def _padded_groups(sizes_E: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """(start of each group, its size) when every group is padded to whole tiles."""
    padded = (sizes_E + tile - 1) // tile * tile
    return _starts(padded, -1), padded


def _dropless_here(x_TD: jax.Array, experts_TK: jax.Array, counts_E: jax.Array, tile: int) -> Dispatched:
    """Do `dispatch_dropless` with all experts on this device."""
    tokens, k = experts_TK.shape
    order, place = _sort(experts_TK.reshape(-1))
    sorted_starts = _starts(counts_E)
    starts, sizes = _padded_groups(counts_E, tile)
    length = padded_rows(tokens * k, counts_E.shape[0], tile)
    row_of_slot = _compose(_map_segments(sorted_starts, starts, counts_E, length), order)
    slot_of_row = _map_segments(starts, sorted_starts, counts_E, tokens * k)[place]

    def back(y_SD: jax.Array) -> jax.Array:
        return take_rows(y_SD, slot_of_row, row_of_slot).reshape(tokens, k, -1)

    rows = spread_tokens(x_TD, row_of_slot, slot_of_row.reshape(tokens, k))
    return Dispatched(rows, sizes, back, vary(jnp.ones(experts_TK.shape, bool)), tokens * k)


def _fitting(counts_PPE: jax.Array, rows: int) -> jax.Array:
    """Return how many of the counts each device takes if it has `rows` in all: its experts with most rows lose theirs first.

    All experts of a device take up to one level c, the largest for which sum_e min(n_e, c) <= rows: with counts in ascending
    order c = max_j (rows - sum_(i<j) n_i) / (E/P - j). Of an expert, rows are taken in the order of the devices they come from.
    """
    ascending_PE = jnp.sort(counts_PPE.sum(0), axis=-1)
    local = ascending_PE.shape[-1]
    levels = (rows - _starts(ascending_PE, -1)) // (local - jnp.arange(local, dtype=jnp.int32))
    level_P = jnp.where(ascending_PE.sum(-1) <= rows, ascending_PE[:, -1], levels.max(-1))
    return jnp.clip(level_P[:, None] - _starts(counts_PPE, 0), 0, counts_PPE)


def _dropless_exchanged(
    x_TD: jax.Array, experts_TK: jax.Array, counts_E: jax.Array, backend: ExpertBackend, factor: float
) -> Dispatched:
    """Do `dispatch_dropless` with sharded experts: sort by expert, and send each segment to its place among that expert's."""
    tokens, k = experts_TK.shape
    devices, me = lax.axis_size("expert"), lax.axis_index("expert")
    local = counts_E.shape[0] // devices
    room = exchange_rows(tokens, k, devices, local, factor)
    order, place = _sort(experts_TK.reshape(-1))
    counts_PPE = kept_PPE = all_gather(counts_E[None], "expert", dim=0).reshape(devices, devices, local)
    if factor:
        kept_PPE = _fitting(counts_PPE, room)
    plan = plan_exchange(counts_PPE, kept_PPE, backend.tile, me)
    length, most = padded_rows(room, local, backend.tile), min(room, rows_sent(tokens, k, local))
    sent = spread_tokens(x_TD, order, place.reshape(tokens, k))
    rows: jax.Array = exchange(length, most, backend.ragged, sent, plan)  # type: ignore[assignment]

    def back(y_SD: jax.Array) -> jax.Array:
        returned = exchange(tokens * k, most, backend.ragged, y_SD, plan.reversed())
        return take_rows(returned, place, order).reshape(tokens, k, -1)

    rank_TK = place.reshape(tokens, k) - _starts(counts_E)[experts_TK]
    kept_TK = rank_TK < _flat(kept_PPE[me])[experts_TK]
    _, sizes = _padded_groups(kept_PPE[:, me].sum(0), backend.tile)
    return Dispatched(rows, sizes, back, kept_TK, min(tokens * k, room))


def dispatch_dropless(
    x_TD: jax.Array, experts_TK: jax.Array, num_experts: int, backend: ExpertBackend, exchange_factor: float = 0.0
) -> Dispatched:
    """Send every token to all its experts: rows sorted by expert, and within an expert by device, token and choice.

    Along `expert` counts are exchanged first, then rows, into a buffer for the worst case: P T min(K, E / P) rows, if every
    token of every device comes here. With one device it is T K rows, and nothing is sent.

    Args:
      backend: an expert's slots are padded to a multiple of its `tile`.
      exchange_factor: if not 0, the buffer has this many times T K rows at most, and what does not fit is dropped (`_fitting`).
    """
    counts_E = (experts_TK.reshape(-1, 1) == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    if lax.axis_size("expert") == 1:
        return _dropless_here(x_TD, experts_TK, counts_E, backend.tile)
    return _dropless_exchanged(x_TD, experts_TK, counts_E, backend, exchange_factor)


# ---------------------------------------------------------------------------------------------------------------------
# Capacity


def _places_in_experts(experts_CK: jax.Array, num_experts: int, room: int) -> tuple[jax.Array, jax.Array]:
    """(row [E, room] of each place of each expert, place [C, K] of each row or -1 if dropped), for one group of tokens.

    First choices are placed before second choices, and so on, each in token order (GShard, arXiv:2006.16668, algorithm 1).
    """
    tokens, k = experts_CK.shape
    by_choice = experts_CK.T.reshape(-1)  # [K C]
    order, place = _sort(by_choice)
    counts = (by_choice[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    starts = _starts(counts)
    rank = place - starts[by_choice]
    place_CK = jnp.where(rank < room, rank, -1).reshape(k, tokens).T
    sorted_ER = starts[:, None] + jnp.arange(room, dtype=jnp.int32)
    inside = jnp.arange(room) < counts[:, None]
    choice_major = order[jnp.minimum(sorted_ER, tokens * k - 1)]
    row_ER = choice_major % tokens * k + choice_major // tokens
    return jnp.where(inside, row_ER, -1), place_CK


def dispatch_capacity(
    x_TD: jax.Array, experts_TK: jax.Array, num_experts: int, group: int, capacity_factor: float
) -> Dispatched:
    """Dispatch at most `room_of_expert` rows of each group of consecutive tokens to an expert, in GShard's order; drop others.

    A dropped row adds nothing to its token, whose other experts keep their weights. A group lies whole on one device, so the
    layout does not change what is dropped.

    Args:
      group: tokens of a group; divides T.
    """
    tokens, k = experts_TK.shape
    groups, devices = tokens // group, lax.axis_size("expert")
    room = room_of_expert(group, k, num_experts, capacity_factor)
    row_GER, place_GCK = jax.vmap(lambda e: _places_in_experts(e, num_experts, room))(experts_TK.reshape(groups, group, k))
    first_row = (jnp.arange(groups, dtype=jnp.int32) * group * k)[:, None, None]
    row_of_slot = jnp.where(row_GER >= 0, row_GER + first_row, -1).transpose(1, 0, 2).reshape(-1)  # [E, groups, room]
    place_TK, group_T = place_GCK.reshape(tokens, k), jnp.arange(tokens, dtype=jnp.int32) // group
    slot_TK = jnp.where(place_TK >= 0, (experts_TK * groups + group_T[:, None]) * room + place_TK, -1)

    local, slots = num_experts // devices, groups * room

    def back(y_ESD: jax.Array) -> jax.Array:
        y = y_ESD.reshape(local, devices, slots, -1).swapaxes(0, 1).reshape(num_experts * slots, -1)
        return take_rows(all_to_all(y, "expert", dim=0), slot_TK.reshape(-1), row_of_slot).reshape(tokens, k, -1)

    sent = spread_tokens(x_TD, row_of_slot, slot_TK)
    received = all_to_all(sent, "expert", dim=0).reshape(devices, local, slots, -1)
    rows = received.swapaxes(0, 1).reshape(local, devices * slots, -1)
    return Dispatched(rows, None, back, slot_TK >= 0, num_experts * slots)
