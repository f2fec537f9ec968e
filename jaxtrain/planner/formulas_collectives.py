"""What a train step moves between devices, in closed form: mesh axes, kind, dtype, calls and bytes, each with its reason.

Letters: B sequences in a microbatch of one device, L length, D embed_dim, E experts, V padded vocabulary; t, c, f devices along
tensor, context and fsdp; P elements of a weight. A *payload* is the whole array (see `program.collectives`). `calls` are those
that the code makes: XLA joins neighbours into one and so makes fewer; it never makes more, and the bytes stay.

Each part of `PARTS` gives its transfers by *phase*: once per layer in a forward or a backward pass, per pass, per layer that a
stage holds ("held"), or per step ("once"). `collectives` multiplies them by how often a step does each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from jaxtrain.config import FOLDED_SCHEDULES, MESH_AXES, Config
from jaxtrain.errors import violated
from jaxtrain.layout import (
    gathers_each_layer,
    keeps,
    layers_of_part,
    local_length,
    loss_chunks,
    microbatch_rows,
    parts_in_turns,
    reduces_each_pass,
)
from jaxtrain.objectives import objective_of
from jaxtrain.objectives.kinds import Objective
from jaxtrain.ops.attention_choice import context_kind
from jaxtrain.planner.formulas import Ticks, count_ticks, loss_positions, muon_shares
from jaxtrain.planner.layer_table import (
    BYTES,
    HLO_DTYPE,
    Weight,
    adapters,
    expert_rows,
    is_read_again,
    layer_weights,
    outer_weights,
    runs_again,
    trained_weights,
)
from jaxtrain.program.collectives import wire_factor
from jaxtrain.sharding import RULES
from jaxtrain.train.leaf_axes import leaf_axes

TRANSPOSED = {"all-gather": "reduce-scatter", "reduce-scatter": "all-gather"}
"""What a collective's gradient does; of any other, the same."""


@dataclass(frozen=True)
class Transfers:
    """Like transfers of one device in one phase, or in a whole step."""

    phase: str
    """layer_forward, layer_backward, forward, backward, held or once."""
    axes: str
    """Mesh axes, "data+expert"."""
    kind: str
    dtype: str
    """As HLO writes it: bf16, f32."""
    calls: int
    payload: float
    """Bytes of all calls together."""
    purpose: str
    size: int
    """Devices in a group."""
    unread: float = 0.0
    """Bytes of the payload that nobody reads: where XLA sees that, it drops them."""
    is_stacked: bool = False
    """Whether one call carries all layers that a stage holds."""

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return self.payload * wire_factor(self.kind, self.size)

    def times(self, count: int) -> Transfers:
        """Return those of a step in which the phase happens so often."""
        calls = self.calls if self.is_stacked else self.calls * count
        return replace(self, calls=calls, payload=self.payload * count)


def collectives(config: Config) -> list[Transfers]:
    """Return every collective of a train step of a valid config. Axes of size 1 move nothing and are not listed.

    Raises:
      ValueError: the config has a part that no closed form here speaks of.
    """
    missing = uncovered(config)
    if missing:
        raise ValueError(f"no closed form here for {', '.join(missing)}")
    counts = phase_counts(count_ticks(config))
    every = [entry.times(counts[entry.phase]) for part in PARTS.values() for entry in part(config)]
    return [entry for entry in every if entry.size > 1 and entry.payload]


def phase_counts(ticks: Ticks) -> dict[str, int]:
    """{phase: how often a step does it}."""
    forward, backward = ticks.forward * ticks.layers, ticks.backward * ticks.layers
    counts = {"layer_forward": forward, "layer_backward": backward, "forward": ticks.forward, "backward": ticks.backward}
    return counts | {"held": ticks.layers_held, "once": 1}


def uncovered(config: Config) -> list[str]:
    """Return the fields of a config that have no closed form here."""
    fields = {
        "model.moe.first_dense_layers": config.model.first_dense_layers > 0,
        "model.latent_attention": config.model.latent_attention is not None,
        "model.sliding_window with mesh.context": config.mesh.context > 1 and "local" in config.model.kinds,
        f"sync.mode={config.sync.mode} between replicas": config.mesh.replica > 1 and config.sync.mode != "every_step",
        f"sync.compression={config.sync.compression}": config.mesh.replica > 1 and config.sync.compression != "none",
        "the forward pass that scores sequences": not isinstance(objective_of(config), Objective),
    }
    return violated(fields)


def _entry(
    config: Config, phase: str, axes: Sequence[str], kind: str, dtype: str, payload: float, purpose: str, calls: int = 1
) -> Transfers:
    """Return one row; `payload` is that of one call."""
    axes = [axis for axis in MESH_AXES if axis in axes and getattr(config.mesh, axis) > 1]
    size = math.prod(getattr(config.mesh, axis) for axis in axes)
    return Transfers(phase, "+".join(axes), kind, dtype, calls, calls * payload, purpose, size)


def _both_ways(
    config: Config, axis: str, kind: str, dtype: str, payload: float, purpose: str, again: int, calls: int = 1
) -> Iterator[Transfers]:
    """Yield what a layer sends, its gradient the other way, and what its backward sends again."""
    yield _entry(config, "layer_forward", [axis], kind, dtype, payload, purpose, calls)
    back = f"gradients of {purpose}"
    yield _entry(config, "layer_backward", [axis], TRANSPOSED.get(kind, kind), dtype, payload, back, calls)
    if again:
        yield _entry(config, "layer_backward", [axis], kind, dtype, payload, f"{purpose}, again", again * calls)


def _tokens(config: Config) -> int:
    """B L/c, the tokens of one microbatch on one device."""
    return microbatch_rows(config) * local_length(config)


def _is_joined(config: Config) -> bool:
    """Return whether XLA sees that a tied table is read twice: embedding and loss of a microbatch stand in one tick."""
    return config.model.tie_embeddings and config.mesh.pipe * config.pipeline.chunks == 1


def _weights(config: Config) -> Iterator[Transfers]:
    """Send weights over fsdp, all-gathered in compute dtype (routers in float32), in float8, or in the few bits of `lora.base`.

    ZeRO 3: a layer's matrices (P/t elements gathered) once in its forward and once in its backward: every remat policy refuses
    to keep gathered weights. The table once in the forward (the embedding's backward does not need it), the head once with the
    loss, which makes its gradients at once; a tied table both, but for one stage, where XLA joins them.
    ZeRO 1 and 2: every matrix that the device holds a shard of, once a step.
    """
    own = layer_weights(config.model).values(), outer_weights(config.model).values()
    new = adapters(config.model) if config.lora.rank else ((), ())
    layer, outer = ([w for w in (*held, *more) if w.is_matrix] for held, more in zip(own, new, strict=True))

    def gathers(weights: list[Weight], phase: str, purpose: str) -> Iterator[Transfers]:
        for array, dtype in (pair for weight in weights for pair in weight.computed(config.model)):
            if array.is_matrix:
                payload = array.shard(config, without=("fsdp",)) * BYTES[dtype]
                yield _entry(config, phase, ["fsdp"], "all-gather", HLO_DTYPE[dtype], payload, purpose)

    if not gathers_each_layer(config.sharding.zero):
        yield from gathers(layer, "held", "weights of the layers, once a step")
        yield from gathers(outer, "once", "table and head, once a step")
        return
    yield from gathers(layer, "layer_forward", "weights of a layer, forward")
    yield from gathers(layer, "layer_backward", "weights of a layer, backward")
    yield from gathers(outer, "forward", "table and head")
    if config.model.tie_embeddings and not _is_joined(config):
        yield from gathers([w for w in outer if w.name == "table"], "forward", "table and head")


def _gradients(config: Config) -> Iterator[Transfers]:
    """Sum gradients of what is trained, in reduce_dtype.

    Over fsdp: matrices are reduce-scattered, payload P/t; at ZeRO 2 and 3 in each backward pass (the head in each forward, with
    the loss), at ZeRO 1 once a step. Over all other axes that do not shard a leaf (replica, data, and expert and context for
    what they do not shard): one all-reduce a step of the shard P/(t f). Outer weights are also summed over pipe. Norms, whole
    everywhere, are summed over every axis but, in layers, pipe.
    """
    dtype, bytes_each = HLO_DTYPE[config.train.reduce_dtype], BYTES[config.train.reduce_dtype]
    each_pass = reduces_each_pass(config.sharding.zero)
    for weights, is_outer in zip(trained_weights(config.model, config.train.frozen), (False, True), strict=True):
        for weight in weights:
            name = weight.name
            purpose, phase = f"gradient of {name}", "once" if is_outer else "held"
            if weight.is_matrix:
                phases = [phase]
                if each_pass:
                    phases = ["backward" if is_outer else "layer_backward"] if name != "head" else ["forward"]
                    phases += ["forward"] * (name == "table" and config.model.tie_embeddings and not _is_joined(config))
                payload = weight.shard(config, without=("fsdp",)) * bytes_each
                for when in phases:
                    yield _entry(config, when, ["fsdp"], "reduce-scatter", dtype, payload, purpose)
            axes = [axis for axis in MESH_AXES if axis not in weight.axes and (is_outer or axis != "pipe")]
            yield replace(
                _entry(config, phase, axes, "all-reduce", dtype, weight.shard(config) * bytes_each, purpose), is_stacked=True
            )


def _sequence(config: Config) -> Iterator[Transfers]:
    """Send activations along tensor, with sequence sharding (Korthikanti et al. 2022): B L/c D in compute dtype.

    A layer gathers its normed input before Q, K, V and before gate, up, and reduce-scatters after O and after down. Backward,
    each gather becomes a reduce-scatter and the other way round; the gathered inputs are gathered once more for the gradients
    of the weights, since no remat policy keeps them; and a reduce-scatter runs again where a norm reads its result, unless that
    is kept. The embedding ends in a reduce-scatter, its backward in a gather.

    A mixture of experts gathers its input again only for shared experts, or where rows are sent again (expert_in not kept).
    """
    dtype, moe, train = HLO_DTYPE[config.model.dtype], config.model.moe, config.train
    payload = _tokens(config) * config.model.embed_dim * BYTES[config.model.dtype]
    input_again = not moe or moe.shared_experts > 0 or not keeps(train, "expert_in")
    out_again, mlp_again = (
        is_read_again(config.model, name) and not keeps(train, name) for name in ("attention_out", "mlp_out")
    )
    for kind, purpose, again in (
        ("all-gather", "attention's input", True),
        ("reduce-scatter", "attention's output", out_again),
        ("all-gather", "the MLP's input", input_again),
        ("reduce-scatter", "the MLP's output", mlp_again),
    ):
        yield from _both_ways(config, "tensor", kind, dtype, payload, purpose, again)
    if config.model.qk_norm == "width":
        squares, again = 4 * _tokens(config), train.remat != "none"
        yield from _both_ways(config, "tensor", "all-reduce", "f32", squares, "sums of squares of Q and K", again, calls=2)
    yield _entry(config, "forward", ["tensor"], "reduce-scatter", dtype, payload, "embedded tokens")
    yield _entry(config, "backward", ["tensor"], "all-gather", dtype, payload, "their gradient")


def _loss(config: Config) -> Iterator[Transfers]:
    """Send each chunk's hidden states along tensor, which shards the vocabulary.

    They are gathered, their gradients reduce-scattered (both B L/c D in compute dtype over all chunks, in each forward pass),
    and for each position three float32 numbers are all-reduced: the largest logit, the sum of exponentials, the target's logit.
    """
    positions = microbatch_rows(config) * loss_positions(config)
    tensor, dtype = config.mesh.tensor, HLO_DTYPE[config.model.dtype]
    chunks, _ = loss_chunks(local_length(config) // tensor, config.train.loss_chunk, tensor)
    payload = positions * config.model.embed_dim * BYTES[config.model.dtype] / chunks
    purpose = "gradients of the inputs of the head"
    yield _entry(config, "forward", ["tensor"], "all-gather", dtype, payload, "inputs of the head", chunks)
    yield _entry(config, "forward", ["tensor"], "reduce-scatter", dtype, payload, purpose, chunks)
    softmax = 4 * positions / chunks
    yield _entry(config, "forward", ["tensor"], "all-reduce", "f32", softmax, "softmax over the vocabulary", 3 * chunks)


def _pipe(config: Config) -> Iterator[Transfers]:
    """Send boundary activations B L/(c t) D to the next stage after each forward pass, their gradients back after each
    backward; in a folded stack both to the next and to the stage before. What the last of each sends, nobody reads."""
    ways = 2 if config.pipeline.schedule in FOLDED_SCHEDULES else 1
    payload = _tokens(config) // config.mesh.tensor * config.model.embed_dim * BYTES[config.model.dtype]
    for phase, purpose in (("forward", "activations to the next stage"), ("backward", "gradients to the stage before")):
        entry = _entry(config, phase, ["pipe"], "collective-permute", HLO_DTYPE[config.model.dtype], payload, purpose, ways)
        yield replace(entry, unread=payload)


def _experts(config: Config) -> Iterator[Transfers]:
    """Send rows along expert to their experts and back, in compute dtype: `expert_rows` x D numbers, and again unless they are
    kept (expert_in, expert_out).

    The router's scores of all experts, float32 B L/c E, are gathered over tensor, once more unless they are kept (router).
    Dropless rows go by ragged all-to-all, after an all-gather of the counts (int32, E from each device and each part that takes
    turns) in forward and backward; those with capacity by all-to-all.
    """
    moe, train = config.model.moe, config.train
    if moe is None:
        return
    dtype, payload = config.model.dtype, expert_rows(config) * config.model.embed_dim * BYTES[config.model.dtype]
    scores, again = 4 * _tokens(config) * moe.num_experts, not keeps(train, "router")
    yield from _both_ways(config, "tensor", "all-gather", "f32", scores, "scores of the router", again)
    kind = "ragged-all-to-all" if moe.dispatch == "dropless" else "all-to-all"
    for name, purpose in (("expert_in", "rows to experts"), ("expert_out", "rows back from experts")):
        yield from _both_ways(config, "expert", kind, HLO_DTYPE[dtype], payload, purpose, not keeps(train, name))
    if moe.dispatch == "dropless":
        counts = config.mesh.expert * moe.num_experts * 4
        calls = parts_in_turns(config.sharding, config.mesh, microbatch_rows(config))
        for phase in ("layer_forward", "layer_backward"):
            yield _entry(config, phase, ["expert"], "all-gather", "s32", counts, "how many rows go where", calls)


def _context(config: Config) -> Iterator[Transfers]:
    """Send keys and values along context, on C devices; R = B L/C N/t numbers of a head on all this device's K or H heads.

    gather: an all-gather of K and of V (C K R each), again in the backward, where XLA joins the gathers of a recomputed forward
    with those of the backward. ulysses: an all-to-all of Q, K, V and the output (2 H + 2 K times R), again unless remat is
    none. Before all that, ring and gather bring the batch into zigzag order: one all-gather of its int32 arrays.
    """
    size, model = config.mesh.context, config.model
    if size == 1:
        return
    head = _tokens(config) * model.head_dim * BYTES[model.dtype] // config.mesh.tensor
    dtype, kind, pair = HLO_DTYPE[model.dtype], context_kind(config)[0], model.num_kv_heads * head
    if kind == "ulysses":
        again = config.train.remat != "none"
        for name in ("queries", "keys", "values", "output"):
            payload = pair if name in ("keys", "values") else model.num_heads * head
            yield from _both_ways(config, "context", "all-to-all", dtype, payload, f"{name}, heads for sequence", again)
    elif kind == "ring":
        yield from _ring(config, dtype, pair)
    else:
        yield from _both_ways(config, "context", "all-gather", dtype, size * pair, "keys and values of all devices", 1, calls=2)
    arrays = (3 if kind != "ulysses" else 0) + config.data.mask_documents
    payload = 4 * arrays * microbatch_rows(config) * config.train.microbatches * config.data.sequence_length
    yield _entry(config, "once", ["context"], "all-gather", "s32", payload, "the batch, in order")


def _ring(config: Config, dtype: str, pair: int) -> Iterator[Transfers]:
    """Send K and V together (2 K R in compute dtype) round the ring: C - 1 permutes forward, as many in the backward, as many
    again where attention is recomputed, but for the first of those, which is the backward's first too, and XLA joins them; and
    C - 1 of their gradients, in float32. C - 3 of the backward's carry both, as raw bits (u32)."""
    sends, again = config.mesh.context - 1, runs_again(config, "attention")
    both, sums = max(0, sends - 2), 2 * pair * 4 // BYTES[config.model.dtype]

    def permutes(phase: str, calls: int, payload: float, purpose: str, dtype: str = dtype) -> Transfers:
        return _entry(config, phase, ["context"], "collective-permute", dtype, payload, purpose, calls)

    alone = again * (sends - 1) + sends - both
    yield permutes("layer_forward", sends, 2 * pair, "keys and values, round the ring")
    yield permutes("layer_backward", alone, 2 * pair, "keys and values, round the ring")
    yield permutes("layer_backward", sends - both, sums, "their gradients", "f32")
    yield permutes("layer_backward", both, 2 * pair + sums, "keys and values with gradients", "u32")


def _scalars(config: Config) -> Iterator[Transfers]:
    """Sum single float32 numbers.

    The count of targets over the batch; loss and total loss (with experts their auxiliary loss too) over all devices; and for
    the global norm of the gradients the sum of squares of each leaf over the axes that shard it, once for the metric and once
    for clipping.
    """
    moe = config.model.moe

    def numbers(axes: Sequence[str], purpose: str, calls: int) -> Transfers:
        return _entry(config, "once", axes, "all-reduce", "f32", 4, purpose, calls)

    yield numbers(["replica", "data", "fsdp", "expert", "context"], "number of targets", 1)
    yield numbers(MESH_AXES, "losses", 3 if moe else 2)
    if moe:
        axes, purpose = [axis for axis in MESH_AXES if axis != "pipe"], "loads of experts and auxiliary losses"
        loads = _entry(config, "held", axes, "all-reduce", "f32", moe.num_experts + 3, purpose, 4)
        yield replace(loads, is_stacked=True)
    if maxima := sum(weight.is_in_float8(config.model) for weight in layer_weights(config.model).values()):
        scales = _entry(config, "held", ["fsdp", "expert", "tensor"], "all-reduce", "f32", 4 * maxima, "maxima of weights")
        yield replace(scales, is_stacked=True)
    norms = 2 if config.optimizer.clip_norm else 1
    layer, outer = trained_weights(config.model, config.train.frozen)
    for weight in layer:
        yield numbers(("pipe", *weight.axes), f"gradient norm of {weight.name}", norms)
    for weight in outer:
        yield numbers(weight.axes, f"gradient norm of {weight.name}", norms)


def _optimizer(config: Config) -> Iterator[Transfers]:
    """Send what the update rule needs of other devices: nothing but for matrices of muon and adafactor."""
    yield from {"muon": _muon, "adafactor": _adafactor}.get(config.optimizer.name, lambda _: ())(config)


def _muon(config: Config) -> Iterator[Transfers]:
    """Send the matrices that muon orthogonalises to their devices and back (`train.muon_shares`), in compute dtype.

    Two all-to-alls over the axes that cut a matrix, and an all-gather over those whose copies divide the matrices.
    """
    dtype = config.model.dtype
    for share in muon_shares(config):
        payload, cut = share.each * share.rows * share.columns * BYTES[dtype], share.row_axes + share.column_axes
        what = f"muon's matrices {share.rows} x {share.columns}"
        yield _entry(config, "once", cut, "all-to-all", HLO_DTYPE[dtype], payload, f"{what}, there and back", 2)
        payload *= share.copies
        yield _entry(config, "once", share.copy_axes, "all-gather", HLO_DTYPE[dtype], payload, f"{what}, from copies")


def _adafactor(config: Config) -> Iterator[Transfers]:
    """Send the means of squared gradients over one side of each matrix, float32, K numbers of the other side a matrix.

    They are summed over the axes that cut the side of the mean, and then gathered over those that cut the other side and over
    expert, as every device of a stage keeps them whole. Two sums of squares a matrix give the norms of direction and parameter.
    """
    held = config.pipeline.chunks * layers_of_part(config)
    for weights, layers in zip(trained_weights(config.model, config.train.frozen), (held, 1), strict=True):
        for weight in weights:
            roles, lead = leaf_axes(weight.dims), ("expert",) if weight.is_of_experts else ()
            stack = layers * weight.layers * weight.experts // (config.mesh.expert if lead else 1)
            sides = [(_cutting(weight, own), math.prod(weight.shape[i] for i in own)) for own in (roles.inputs, roles.outputs)]
            cuts = [axis for axis in weight.axes if axis not in lead]
            yield _entry(config, "once", cuts, "all-reduce", "f32", 4 * stack, f"norms of {weight.name}", 2)
            for (summed, _), (kept, length) in (sides, sides[::-1]) if roles.is_matrix else ():
                cut, what = math.prod(getattr(config.mesh, axis) for axis in kept), f"adafactor's means of {weight.name}"
                yield _entry(config, "once", summed, "all-reduce", "f32", 4 * stack * length / cut, what)
                yield _entry(config, "once", kept, "all-gather", "f32", 4 * stack * length, what)
                yield _entry(config, "once", lead, "all-gather", "f32", 4 * stack * config.mesh.expert * length, what)


def _cutting(weight: Weight, side: Sequence[int]) -> list[str]:
    """Return the mesh axes that cut some dims of a weight."""
    return [str(RULES[weight.dims[i]]) for i in side if RULES[weight.dims[i]]]


PARTS: Mapping[str, Callable[[Config], Iterator[Transfers]]] = MappingProxyType(
    {
        "weights": _weights,
        "gradients": _gradients,
        "sequence": _sequence,
        "loss": _loss,
        "pipe": _pipe,
        "experts": _experts,
        "context": _context,
        "scalars": _scalars,
        "optimizer": _optimizer,
    }
)
"""What makes up `collectives`, by why it moves; entries along axes of size 1 are among them."""
