"""What a train step moves between devices, in closed form: mesh axes, kind, dtype, calls and bytes, each with its reason.

Letters as in `formulas`: B sequences in a microbatch of one device, L length, D embed_dim, V padded vocabulary; t, c, f devices
along tensor, context and fsdp; T_F and T_B ticks with a forward and with a backward pass (M each without a pipeline), l layers
that a pass goes through. A *payload* is the whole array (see `program.collectives`). `calls` are those that the code makes: XLA
joins neighbours into one and so makes fewer; it never makes more, and the bytes stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from jaxtrain.config import MESH_AXES, Config
from jaxtrain.layout import (
    gathers_each_layer,
    keeps,
    local_length,
    loss_chunks,
    microbatch_rows,
    parts_in_turns,
    reduces_each_pass,
)
from jaxtrain.ops.attention_choice import context_kind
from jaxtrain.planner.formulas import (
    BYTES,
    HLO_DTYPE,
    Ticks,
    Weight,
    count_ticks,
    expert_rows,
    layer_weights,
    loss_positions,
    outer_weights,
    recomputed,
)
from jaxtrain.program.collectives import wire_factor
from jaxtrain.train.optimizer import MUON_ITERATIONS


@dataclass(frozen=True)
class Transfers:
    """Like transfers of one step on one device."""

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

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return self.payload * wire_factor(self.kind, self.size)


def collectives(config: Config) -> list[Transfers]:
    """Every collective of a train step of a valid config. Axes of size 1 move nothing and are not listed.

    Raises:
      ValueError: the config has a part that no closed form here speaks of.
    """
    missing = uncovered(config)
    if missing:
        raise ValueError(f"no closed form here for {', '.join(missing)}")
    ticks = count_ticks(config)
    return [entry for part in PARTS.values() for entry in part(config, ticks) if entry.size > 1 and entry.payload]


def uncovered(config: Config) -> list[str]:
    """What of a config has no closed form here."""
    found = {
        "model.moe.first_dense_layers": config.model.first_dense_layers > 0,
        "model.latent_attention": config.model.latent_attention is not None,
        "model.sliding_window with mesh.context": config.mesh.context > 1 and config.model.sliding_window > 0,
        f"sync.mode={config.sync.mode} between replicas": config.mesh.replica > 1 and config.sync.mode != "every_step",
        f"sync.compression={config.sync.compression}": config.mesh.replica > 1 and config.sync.compression != "none",
        f"optimizer.name={config.optimizer.name}": config.optimizer.name == "adafactor",
        "optimizer.name=muon with tensor or experts": config.optimizer.name == "muon"
        and (config.mesh.tensor > 1 or config.model.moe is not None),
    }
    return [what for what, is_there in found.items() if is_there]


def totals(entries: Sequence[Transfers]) -> dict[tuple[str, str, str], float]:
    """Payload bytes by (axes, kind, dtype)."""
    sums: dict[tuple[str, str, str], float] = defaultdict(float)
    for entry in entries:
        sums[entry.axes, entry.kind, entry.dtype] += entry.payload
    return dict(sums)


def _entry(config: Config, axes: Sequence[str], kind: str, dtype: str, calls: int, payload: float, purpose: str) -> Transfers:
    """`payload` is that of one call."""
    axes = [axis for axis in MESH_AXES if axis in axes and getattr(config.mesh, axis) > 1]
    size = 1
    for axis in axes:
        size *= getattr(config.mesh, axis)
    return Transfers("+".join(axes), kind, dtype, calls, calls * payload, purpose, size)


def is_joined(config: Config) -> bool:
    """Whether embedding and loss of a microbatch stand in one tick, so that XLA sees that a tied table is read twice."""
    return config.mesh.pipe * config.pipeline.chunks == 1 and "head" not in outer_weights(config.model)


def _weights(config: Config, ticks: Ticks) -> Iterator[Transfers]:
    """All-gathers of weights over fsdp, in compute dtype (bf16: 2 bytes an element; routers in float32).

    ZeRO 3: a layer's matrices (P/t elements gathered) once in its forward and once in its backward: every remat policy refuses
    to keep gathered weights. l layers in each of T_F + T_B passes, in the busiest stage. The table once in the forward (the
    embedding's backward does not need it), the head once with the loss, which makes its gradients at once; a tied table both,
    but for one stage, where XLA joins them.
    ZeRO 1 and 2: every matrix that the device holds a shard of, once a step.
    """
    layer = [w for w in layer_weights(config.model).values() if w.is_matrix]
    outer = [w for w in outer_weights(config.model).values() if w.is_matrix]

    def gathers(weights: list[Weight], times: int, purpose: str) -> Iterator[Transfers]:
        for weight in weights:
            dtype = weight.compute or config.model.dtype
            payload = weight.shard(config, without=("fsdp",)) * BYTES[dtype]
            yield _entry(config, ["fsdp"], "all-gather", HLO_DTYPE[dtype], times, payload, purpose)

    if not gathers_each_layer(config.sharding.zero):
        yield from gathers(layer, ticks.layers_held, "weights of the layers, once a step")
        yield from gathers(outer, 1, "table and head, once a step")
        return
    yield from gathers(layer, ticks.forward * ticks.layers, "weights of a layer, forward")
    yield from gathers(layer, ticks.backward * ticks.layers, "weights of a layer, backward")
    yield from gathers(outer * (1 if is_joined(config) else 2 // len(outer)), ticks.forward, "table and head")


def _gradients(config: Config, ticks: Ticks) -> Iterator[Transfers]:
    """Sums of gradients, in reduce_dtype (float32: 4 bytes an element).

    Over fsdp: matrices are reduce-scattered, payload P/t; at ZeRO 2 and 3 in each backward pass (the head in each forward, with
    the loss), at ZeRO 1 once a step. Over all other axes that do not shard a leaf (replica, data, and expert and context for
    what they do not shard): one all-reduce a step of the shard P/(t f). Outer weights are also summed over pipe. Norms, whole
    everywhere, are summed over every axis but, in layers, pipe.
    """
    dtype, bytes_each = HLO_DTYPE[config.train.reduce_dtype], BYTES[config.train.reduce_dtype]
    layer, outer = layer_weights(config.model), outer_weights(config.model)
    for name, weight in (*layer.items(), *outer.items()):
        is_outer = name in outer
        if weight.is_matrix:
            passes = ticks.backward * ticks.layers
            if is_outer:
                twice = "head" not in outer and not is_joined(config)
                passes = ticks.forward if name == "head" else ticks.backward + (ticks.forward if twice else 0)
            calls = passes if reduces_each_pass(config.sharding.zero) else (1 if is_outer else ticks.layers_held)
            payload = weight.shard(config, without=("fsdp",)) * bytes_each
            yield _entry(config, ["fsdp"], "reduce-scatter", dtype, calls, payload, f"gradient of {name}")
        axes = [axis for axis in MESH_AXES if axis not in weight.axes and (is_outer or axis != "pipe")]
        copies = 1 if is_outer else ticks.layers_held
        yield _entry(config, axes, "all-reduce", dtype, 1, copies * weight.shard(config) * bytes_each, f"gradient of {name}")


def _sequence(config: Config, ticks: Ticks) -> Iterator[Transfers]:
    """Tensor parallelism with sequence sharding (Korthikanti et al. 2022): activations B L/c D in compute dtype.

    A layer gathers its normed input before Q, K, V and before gate, up, and reduce-scatters after O and after down: 2 and 2
    forward. Backward, each gather becomes a reduce-scatter and the other way round, 2 and 2; the gathered inputs are gathered
    once more for the gradients of the weights, 2, since no remat policy keeps them; and O's reduce-scatter runs again unless
    its result is kept (remat `none`, or `named` with attention_out). The embedding ends in a reduce-scatter, its backward in
    a gather.

    A mixture of experts gathers its input again only for shared experts, or where rows are sent again (expert_in not kept).
    """
    dtype = HLO_DTYPE[config.model.dtype]
    payload = microbatch_rows(config) * local_length(config) * config.model.embed_dim * BYTES[config.model.dtype]
    forward, backward = ticks.forward * ticks.layers, ticks.backward * ticks.layers
    out_again = config.train.remat != "none" and ("out" in recomputed(config) or config.train.remat == "dots")

    def entry(kind: str, calls: int, purpose: str) -> Transfers:
        return _entry(config, ["tensor"], kind, dtype, calls, payload, purpose)

    yield entry("all-gather", 2 * forward, "inputs of attention and MLP")
    yield entry("reduce-scatter", 2 * forward, "outputs of attention and MLP")
    yield entry("all-gather", 2 * backward, "gradients of the outputs")
    yield entry("reduce-scatter", 2 * backward, "gradients of the inputs")
    moe = config.model.moe
    again = 1 if moe and not moe.shared_experts and keeps(config.train, "expert_in") else 2
    yield entry("all-gather", again * backward, "the inputs again, for the gradients of the weights")
    if out_again:
        yield entry("reduce-scatter", backward, "attention's output, recomputed")
    yield entry("reduce-scatter", ticks.forward, "embedded tokens")
    yield entry("all-gather", ticks.backward, "their gradient")


def _loss(config: Config, ticks: Ticks) -> Iterator[Transfers]:
    """The vocabulary is sharded over tensor: each chunk's hidden states are gathered, their gradients reduce-scattered (both
    B L/c D in compute dtype over all chunks, in each forward pass), and for each position three float32 numbers are
    all-reduced: the largest logit, the sum of exponentials, the target's logit.
    """
    positions = microbatch_rows(config) * loss_positions(config)
    tensor = config.mesh.tensor
    chunks, _ = loss_chunks(local_length(config) // tensor, config.train.loss_chunk, tensor)
    payload, dtype = positions * config.model.embed_dim * BYTES[config.model.dtype] / chunks, HLO_DTYPE[config.model.dtype]
    calls = ticks.forward * chunks
    yield _entry(config, ["tensor"], "all-gather", dtype, calls, payload, "inputs of the head")
    yield _entry(config, ["tensor"], "reduce-scatter", dtype, calls, payload, "gradients of the inputs of the head")
    yield _entry(config, ["tensor"], "all-reduce", "f32", 3 * calls, 4 * positions / chunks, "softmax over the vocabulary")


def _pipe(config: Config, ticks: Ticks) -> Iterator[Transfers]:
    """Boundary activations B L/(c t) D go on by one stage after each forward pass, their gradients back after each backward.
    What the last of each sends, nobody reads."""
    length = local_length(config) // config.mesh.tensor
    payload = microbatch_rows(config) * length * config.model.embed_dim * BYTES[config.model.dtype]
    passes = {"activations to the next stage": ticks.forward, "gradients to the stage before": ticks.backward}
    for purpose, calls in passes.items():
        entry = _entry(config, ["pipe"], "collective-permute", HLO_DTYPE[config.model.dtype], calls, payload, purpose)
        yield replace(entry, unread=payload)


def _experts(config: Config, ticks: Ticks) -> Iterator[Transfers]:
    """Rows travel along expert to their experts and back, in compute dtype: 2 exchanges in a layer's forward, 2 of their
    gradients in its backward, and each of the first two once more unless its result is kept (expert_in, expert_out).

    The router's scores of all experts, float32 B L/c E, are gathered over tensor, once more unless they are kept (router), and
    their gradients reduce-scattered.

    Payload of one: `formulas.expert_rows` x D. Dropless rows go by ragged all-to-all, after an all-gather of the counts (int32,
    E from each device and each part that takes turns) in forward and backward; those with capacity by all-to-all.
    """
    moe = config.model.moe
    if moe is None:
        return
    dtype, width = config.model.dtype, config.model.embed_dim * BYTES[config.model.dtype]
    forward, backward = ticks.forward * ticks.layers, ticks.backward * ticks.layers
    scores = 4 * microbatch_rows(config) * local_length(config) * moe.num_experts
    calls = forward + (0 if keeps(config.train, "router") else backward)
    yield _entry(config, ["tensor"], "all-gather", "f32", calls, scores, "scores of the router")
    yield _entry(config, ["tensor"], "reduce-scatter", "f32", backward, scores, "gradients of the scores")
    kind = "ragged-all-to-all" if moe.dispatch == "dropless" else "all-to-all"
    again = sum(not keeps(config.train, name) for name in ("expert_in", "expert_out"))
    passes = {"rows to experts and back": 2 * forward, "their gradients": 2 * backward, "rows again": again * backward}
    for purpose, calls in passes.items():
        yield _entry(config, ["expert"], kind, HLO_DTYPE[dtype], calls, expert_rows(config) * width, purpose)
    if moe.dispatch == "dropless":
        counts = config.mesh.expert * moe.num_experts * 4
        calls = parts_in_turns(config.sharding, config.mesh, microbatch_rows(config)) * (forward + backward)
        yield _entry(config, ["expert"], "all-gather", "s32", calls, counts, "how many rows go where")


def _context(config: Config, ticks: Ticks) -> Iterator[Transfers]:
    """Keys and values along context, on C devices; R = B L/C N/t numbers of a head on all this device's K or H heads.

    ring: C - 1 permutes of K and V together (2 K R in compute dtype) forward, as many in the backward, as many again where
    attention is recomputed, but for the first of those, which is the backward's first too, and XLA joins them; and C - 1 of
    their gradients, in float32. C - 3 of the backward's carry both, as raw bits (u32). gather: an all-gather of K and of V
    (C K R each) in the same places, and a reduce-scatter of each one's gradient, in compute dtype; XLA joins the gathers of a
    recomputed forward with those of the backward. ulysses: an all-to-all of Q, K, V and the output (2 H + 2 K times R) forward,
    of their gradients backward, and again of all unless remat is none. Before all that, ring and gather bring the batch into
    zigzag order: one all-gather of its int32 arrays.
    """
    size, model = config.mesh.context, config.model
    if size == 1:
        return
    head = microbatch_rows(config) * local_length(config) * model.head_dim * BYTES[model.dtype] // config.mesh.tensor
    dtype, kind = HLO_DTYPE[model.dtype], context_kind(config)[0]
    forward, backward = ticks.forward * ticks.layers, ticks.backward * ticks.layers
    again = backward * ("attention" in recomputed(config))

    def entry(kind: str, calls: int, payload: float, purpose: str, dtype: str = dtype) -> Transfers:
        return _entry(config, ["context"], kind, dtype, calls, payload, purpose)

    pair = model.num_kv_heads * head
    if kind == "ulysses":
        calls = forward + backward * (1 if config.train.remat == "none" else 2)
        for name, heads in (("queries", model.num_heads), ("keys", model.num_kv_heads), ("values", model.num_kv_heads)):
            yield entry("all-to-all", calls, heads * head, f"{name}, heads for sequence")
        yield entry("all-to-all", calls, model.num_heads * head, "output, sequence for heads")
    elif kind == "ring":
        sends, both, sums = size - 1, max(0, size - 3), 2 * pair * 4 // BYTES[model.dtype]
        alone = sends * (forward + again) - again + (sends - both) * backward
        yield entry("collective-permute", alone, 2 * pair, "keys and values, round the ring")
        yield entry("collective-permute", (sends - both) * backward, sums, "their gradients", "f32")
        yield entry("collective-permute", both * backward, 2 * pair + sums, "keys and values with gradients", "u32")
    else:
        yield entry("all-gather", 2 * (forward + backward), size * pair, "keys and values of all devices")
        yield entry("reduce-scatter", 2 * backward, size * pair, "their gradients")
    arrays = (3 if kind != "ulysses" else 0) + config.data.mask_documents
    rows = microbatch_rows(config) * config.train.microbatches
    yield entry("all-gather", 1, 4 * arrays * rows * config.data.sequence_length, "the batch, in order", "s32")


def _scalars(config: Config, ticks: Ticks) -> Iterator[Transfers]:
    """Single float32 numbers: the count of targets over the batch; loss and total loss (with experts their auxiliary loss too)
    over all devices; and for the global norm of the gradients the sum of squares of each leaf over the axes that shard it, once
    for the metric and once for clipping."""
    batch = ["replica", "data", "fsdp", "expert", "context"]
    yield _entry(config, batch, "all-reduce", "f32", 1, 4, "number of targets")
    yield _entry(config, MESH_AXES, "all-reduce", "f32", 3 if config.model.moe else 2, 4, "losses")
    if config.model.moe:
        numbers = ticks.layers_held * (config.model.moe.num_experts + 3)
        axes = [axis for axis in MESH_AXES if axis != "pipe"]
        yield _entry(config, axes, "all-reduce", "f32", 4, numbers, "loads of experts and auxiliary losses")
    norms = 2 if config.optimizer.clip_norm else 1
    for name, weight in layer_weights(config.model).items():
        yield _entry(config, ("pipe", *weight.axes), "all-reduce", "f32", norms, 4, f"gradient norm of {name}")
    for name, weight in outer_weights(config.model).items():
        yield _entry(config, weight.axes, "all-reduce", "f32", norms, 4, f"gradient norm of {name}")


def _muon(config: Config, ticks: Ticks) -> Iterator[Transfers]:
    """What muon's `orthogonalise` moves over fsdp, for each hidden matrix of the layers held, in float32.

    Of a matrix D x C, fsdp cuts D. X is the matrix with its shorter side s first, so in each of the iterations
    X = a X + (b A + c A^2) X, A = X X^T:

    * where D is the shorter side, rows are cut: X is gathered for A, A for its square, X again: 2 D C + D^2 numbers;
    * else columns are cut: A is summed over the devices: s^2 numbers.

    With tensor or experts it is about this (`uncovered`).
    """
    model, d = config.model, config.model.embed_dim
    if config.optimizer.name != "muon":
        return
    calls = MUON_ITERATIONS * ticks.layers_held
    for name, weight in layer_weights(model).items():
        if not weight.is_matrix:
            continue
        copies = model.moe.num_experts if model.moe and name.startswith("expert_") else 1
        other, own = weight.elements // (d * copies), copies // (config.mesh.expert if copies > 1 else 1)
        ends_in_d = name.removeprefix("expert_") in ("out", "down")
        if d < other or (d == other and not ends_in_d):
            numbers = 2 * d * other // config.mesh.tensor + d * d
            yield _entry(config, ["fsdp"], "all-gather", "f32", calls, 4 * own * numbers, f"muon of {name}")
        else:
            yield _entry(config, ["fsdp"], "all-reduce", "f32", calls, 4 * own * min(d, other) ** 2, f"muon of {name}")
        yield _entry(config, ["fsdp"], "all-reduce", "f32", ticks.layers_held, 4 * own, f"muon's norm of {name}")


PARTS: Mapping[str, Callable[[Config, Ticks], Iterator[Transfers]]] = MappingProxyType(
    {
        "weights": _weights,
        "gradients": _gradients,
        "sequence": _sequence,
        "loss": _loss,
        "pipe": _pipe,
        "experts": _experts,
        "context": _context,
        "scalars": _scalars,
        "muon": _muon,
    }
)
"""What makes up `collectives`, by why it moves. Each is linear in F, F l, B, B l and the layers held, so that a planner can
tell what one pass of one layer moves; entries along axes of size 1 are among them."""
