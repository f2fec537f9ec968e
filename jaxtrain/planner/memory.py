"""Memory of the fullest device in closed form: what lasts, what a step keeps, and what is alive at its worst moment.

The parts are those that XLA's buffer assignment shows for the step compiled for H100s (`tests.planner.reference_layouts`).
Letters: B sequences in a microbatch of one device, L positions of a sequence that a device holds between
gathers over tensor (length / context), D embed_dim, H query heads, K kv heads, N head_dim, F mlp_dim, V padded vocabulary; t
and f devices along tensor and fsdp. bf16 is 2 bytes a number, float32 4.

A step has five moments that can be the worst one. In all the state, the compute copies of the weights and all activations kept
are there; the gradients, since XLA sets their buffers to zero before the layers' backward, in all but the first:

* **the loss**: the head is gathered whole over fsdp, its gradient is summed in float32, and a chunk of logits is there;
* **between forward and backward**: what experts gave back is laid anew, if it is kept;
* **the beginning of the backward**: the head's gradient is on its way to its shards;
* **the backward of a layer**: the layer is computed again as far as remat says, and its gradients are made;
* **that of the last one**: the table's gradient begins as zeros.

The optimizer's update is never worse: by then the activations are gone, and XLA updates the state in its own place.

Exact are the state, compute copies, accumulated gradients, and what layers keep (tests count them). Measured are the factors
of these moments, on those layouts and on others that `tests.planner.drawn_layouts` draws with seeds 1 to 4. Approximate,
for want of compiled programs to hold them against, are these factors for latent attention, for attention that is not cuDNN's,
for odd numbers of layers with experts, and with adapters or frozen weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from jaxtrain.config import Config
from jaxtrain.layout import (
    gathers_each_layer,
    inputs_on_host,
    keeps,
    layers_per_iteration,
    local_length,
    loss_chunks,
    microbatch_rows,
    most_layers_per_iteration,
    moves_activations,
    reduces_each_pass,
    reduces_layer_by_layer,
)
from jaxtrain.ops.attention_packed import working_bytes
from jaxtrain.planner.activations import Sizes, folds, kept_bytes, operand_bytes
from jaxtrain.planner.estimates import Memory
from jaxtrain.planner.layer_table import BYTES, FLOAT32
from jaxtrain.planner.other_models import other_weights
from jaxtrain.planner.rollouts import memory_of_device
from jaxtrain.planner.state_memory import (
    Cut,
    Shares,
    average_state,
    cut_model,
    head_numbers,
    moments_on_host,
    optimizer_state,
    parameter_bytes,
    sync_state,
    trains,
    trains_head,
)


def estimate_memory(config: Config, backend: str = "cudnn") -> Memory:
    """Estimate the memory of a valid config (no mesh axis -1) on its fullest device.

    Args:
      backend: of attention; cudnn, cudnn_dense, blockwise, or reference (the second and the last hold numbers of L^2).
    """
    cut, sizes = cut_model(config), Sizes.of(config)
    backward = _backward_moment(config, cut, sizes, backend)
    others = _loss_moment(config, cut, sizes), _first_moment(config, cut, sizes), _between_moment(config, cut, sizes, backward)
    worst = max(*others, backward, _last_moment(config, cut, backward), key=sum)
    weights, activations = _weights(config, cut), _activations(config, cut, sizes, backend)
    step = Memory(
        parameters=parameter_bytes(config, cut),
        optimizer=optimizer_state(config, cut) + sync_state(config, cut) + average_state(config, cut),
        gradients=worst.gradients,
        weights=weights,
        activations=activations,
        working=worst.working + _batch(config) + GAPS * (weights + activations + sum(worst)),
        other_models=other_weights(config),
        kernels=_kernels(config, sizes, backend),
    )
    held = step.parameters + step.optimizer + step.weights + step.other_models + memory_of_device(config)
    return replace(step, rollouts=max(0.0, held - step.total))


def host_bytes(config: Config) -> dict[str, float]:
    """Return what a valid config keeps in the host's memory for its fullest device, in bytes, by name."""
    inputs = config.model.num_layers * BYTES[config.model.dtype] * Sizes.of(config).stream * inputs_on_host(config.train)
    return {name: size for name, size in (("moments", moments_on_host(config)), ("layers' inputs", inputs)) if size}


def _kernels(config: Config, sizes: Sizes, backend: str) -> float:
    """Return the bytes that cuDNN needs beside the program's to compute gradients within documents."""
    if backend != "cudnn" or not config.data.mask_documents:
        return 0.0
    model, latent, is_whole = config.model, config.model.latent_attention, not folds(config)
    heads, kv_heads = model.num_heads, model.num_heads if latent else model.num_kv_heads
    width = max(model.head_dim + latent.rope_dim, latent.value_dim) if latent else model.head_dim
    share = config.mesh.tensor * (config.mesh.context if is_whole else 1)
    length = config.data.sequence_length // (1 if is_whole else config.mesh.context)
    return working_bytes(sizes.tokens / local_length(config) / sizes.parts, length, heads / share, kv_heads / share, width)


def _batch(config: Config) -> float:
    """Return the bytes of a step's tokens, targets, positions (and segments): int32."""
    arrays = 4 if config.data.mask_documents else 3
    return 4 * arrays * microbatch_rows(config) * config.train.microbatches * local_length(config)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in the compute dtype, gradients


def _weights(config: Config, cut: Cut) -> float:
    """Return the bytes of the copies of a device's parameters in the compute dtype, whole over fsdp at ZeRO 1 and 2.

    There are none where that is the dtype in which parameters are kept, nor of weights in few bits, which are gathered so.

    A gather puts the dim that was cut first, ticks outside of loops read that order, and loops another: a pipeline with both
    holds its layers twice, and three times where a loop is unrolled by two, since its first tick runs before it. Of several
    chunks, the one at work is copied out.
    """
    whole = not gathers_each_layer(config.sharding.zero) and config.mesh.fsdp > 1
    if not whole and config.model.dtype == config.model.param_dtype and config.model.matmul_dtype != "float8":
        return 0.0
    layer, outer = (_copy_bytes(config, share, whole) for share in (cut.layer, cut.outer))
    is_unrolled = not moves_activations(config.mesh) and max(cut.runs, default=0) > 3
    copies = cut.chunks * (1 + (whole and 1 in cut.runs) * (1 + is_unrolled)) + (whole and cut.chunks > 1)
    return copies * cut.layers * layer + outer


def _copy_bytes(config: Config, share: Shares, whole: bool) -> float:
    """Return the bytes of the copy of a share of the weights."""
    few = share.few * config.mesh.fsdp if whole else share.few
    is_cast = whole or config.model.dtype != config.model.param_dtype
    in_float8 = share.float8 * (config.mesh.fsdp if whole else 1)
    numbers = (share.gathered if whole else share.sharded) - few - in_float8
    return is_cast * BYTES[config.model.dtype] * numbers + BYTES["float8"] * in_float8 + whole * share.few_gathered


def _gradients(config: Config, cut: Cut, copies: int, late: int = 0) -> float:
    """Return the bytes of float32 gradients of what is trained: shards at ZeRO 2 and 3, whole over fsdp at 1.

    Accumulated over the step, those of all that the device holds; `copies` more of a tick's own part, and of `late` ticks that
    are not added up yet. In a step of one tick the table's is only made after the layers' backward.
    """
    is_whole = not reduces_each_pass(config.sharding.zero)
    of_layer, of_outer = (share.gathered if is_whole else share.sharded for share in (cut.trained, cut.trained_outer))
    of_head = trains_head(config) * head_numbers(config) / (1 if is_whole else config.mesh.fsdp)
    outer = (1 + (copies > 0) + late) * of_outer if cut.is_loop else of_head
    return FLOAT32 * ((cut.chunks + copies + late) * cut.layers * of_layer + outer)


# ---------------------------------------------------------------------------------------------------------------------
# Activations that wait


def _activations(config: Config, cut: Cut, sizes: Sizes, backend: str) -> float:
    """Return the bytes that wait for the backward: a part's layers in each slot of the ring, and boundary activations.

    Where weights' gradients are passes of their own, so do the operands of their matmuls, and a tick has a copy of a slot.

    A backward tick of a pipeline reads its slot into a buffer of its own. Without a pipeline nothing waits but the microbatch
    at hand.
    """
    part = cut.layers * kept_bytes(config, sizes, backend)
    copies = cut.residuals + cut.is_pipe
    if cut.operands:
        part_operands = cut.layers * operand_bytes(config, sizes)
        return copies * part + (cut.operands + 1) * part_operands + cut.boundaries * BYTES[config.model.dtype] * sizes.stream
    return copies * part + cut.boundaries * BYTES[config.model.dtype] * sizes.stream


# ---------------------------------------------------------------------------------------------------------------------
# The five moments
#
# What is alive in them beyond the activations kept was read off the buffer assignment of compiled steps. The factors below are
# means over those programs, in units whose causes are known; all else is exact.

UNREDUCED, UNREDUCED_EXPERTS, UNREDUCED_IN_ORDER, UNREDUCED_EXPERTS_IN_ORDER = 1.2, 2.0, 0.3, 1.0
"""Layers whose gradients wait in reduce_dtype, whole over fsdp, until they are scattered: XLA sends them an iteration late, but
not where the trainer has them sent layer by layer (`parallel.turns.reduce_behind_next`). With experts there are also
their kernels' results, and weights gathered for the next layer."""
GAPS = 0.0025
"""Room that XLA's heap wastes between buffers, over all that is not the state: half of 85 layouts drawn with other seeds waste
more than was counted. It varies: a heap was up to 28% larger than all that is alive at its worst moment, and larger still where
activations move, whose factors were read off whole heaps."""
GATHERED = 1.0
"""Layers whose weights are gathered: the one at work and the start of the next."""


class Arrays(NamedTuple):
    """The number of arrays of each size that are alive in the backward of a layer, in compute dtype."""

    sequence: float
    """B L D, gathered over tensor."""
    stream: float
    """B L D / t."""
    mlp: float
    """B L F / t."""
    heads: float
    """B L H N / t."""
    wide_rows: float
    """Of the rows that experts may get, in the experts' width."""
    rows: float
    """Of the same rows, in the model's width."""
    choices: float
    """Of the rows that tokens send, in the model's width."""


RESIDENT = Arrays(0, 10, 4, 0, 4, 3, 2)
"""Where only weights move."""
PEELED = Arrays(0, 23, 12, 0, 8, 6, 4)
"""The same for an odd number of layers: XLA unrolls their loop by two, and the layer left over runs beside the last two."""
ALONE = Arrays(3.5, 1, 3, 3.5, 1.25, 3.25, 1.5)
"""Where activations move, for each layer of an iteration of the layer scan: what was gathered for one of them stays until the
gradients of its weights are made, and XLA makes the zeros into which rows are to be sent for all of them at once."""
IN_TURNS = Arrays(6.5, 4, 4, 7, 4.25, 4, 0)
"""The same of each of two parts that take turns: one part's arrays wait while the other part is computed."""
SHARED_EXPERTS = Arrays(0, 0, 0, 0, 4, 5, 2)
"""What experts need where each device has a share of them all (tensor): nothing is sent, so no zeros are made ahead, and each
layer of an iteration, and each part, has the place of the one before."""
ALONE_IN_ORDER, IN_TURNS_IN_ORDER = Arrays(3, 1, 1.6, 3, 0, 0, 0), Arrays(5.5, 3, 3.2, 6.5, 0, 0, 0)
"""Both where gradients are sent layer by layer: a layer's arrays go with them."""
IN_TURNS_RECOMPUTED = Arrays(5.5, 4, 2.75, 3.5, 0, 0, 0)
"""The last where remat keeps nothing: a layer is computed again while the next one's gradients are made, and not before."""
EXPERTS_ALONE, EXPERTS_IN_TURNS = Arrays(2, 1.75, 1.5, 1.5, 1.25, 1.75, 0.25), Arrays(4, 2.5, 2.5, 4, 2.5, 2.25, 0.5)
"""Both with experts along their axis, where gradients are sent, and layers computed again, layer by layer: read off mixtral on
fsdp=8 expert=8 with two sequences a device, and qwen3_30b_a3b with one (`tests.measure.alive`). What is in both numbers of the
first two sizes, without tensor, is split by what is gathered along it."""
IN_TURNS_IN_RINGS = Arrays(4.75, 2, 5, 16, 0, 0, 0)
"""`IN_TURNS_RECOMPUTED` with a ring along context: the pieces of its keys and values are there for all layers of an
iteration. 70b on fsdp=16 context=4 tensor=4, four microbatches of three sequences, is 1.2% too high by it."""
IN_TURNS_IN_STAGES = IN_TURNS._replace(wide_rows=3.75, rows=4.75, choices=4)
"""`IN_TURNS` in a pipeline where remat keeps nothing: what is sent to experts again is there beside what they give back."""


class Moment(NamedTuple):
    """Bytes beside the state, the compute copies of weights and the activations kept."""

    gradients: float
    working: float


def _gathers(config: Config) -> bool:
    """Return whether weights are gathered layer by layer."""
    return config.mesh.fsdp > 1 and gathers_each_layer(config.sharding.zero)


def _loss_moment(config: Config, cut: Cut, sizes: Sizes) -> Moment:
    """Return the moment of the loss.

    There are the head in compute dtype, and the sum of its gradient in float32; the logits of a chunk, and their gradient;
    hidden states and their gradient, in and out of chunks. Of gradients there are only those of ticks before, and in a pipeline
    zeros for a tick's own, but not where activations move.
    """
    bytes_each = BYTES[config.model.dtype]
    tensor = config.mesh.tensor
    _, chunk = loss_chunks(local_length(config) // tensor, config.train.loss_chunk, tensor)
    logits = microbatch_rows(config) * chunk * config.model.padded_vocab_size
    head = FLOAT32 * trains_head(config) + bytes_each * _gathers(config)
    working = head * head_numbers(config) + (FLOAT32 + bytes_each) * logits + bytes_each * 4 * sizes.stream
    copies = int(cut.is_pipe and not moves_activations(config.mesh))
    return Moment(_gradients(config, cut, copies) * cut.is_loop, working)


def _first_moment(config: Config, cut: Cut, sizes: Sizes) -> Moment:
    """Return the moment at the beginning of the layers' backward, where the loss is not inside of a pipeline's tick.

    The gradient of the head is there whole over fsdp, until it is scattered.
    """
    scatters = config.mesh.fsdp > 1 and reduces_each_pass(config.sharding.zero) and not cut.is_pipe
    head = FLOAT32 * trains_head(config) * scatters * head_numbers(config)
    weights = 2 * GATHERED * _gathers(config) * _copy_bytes(config, cut.layer, True)
    return Moment(_gradients(config, cut, int(cut.is_loop)), head + weights + BYTES[config.model.dtype] * 4 * sizes.stream)


def _backward_moment(config: Config, cut: Cut, sizes: Sizes, backend: str) -> Moment:
    """Return the moment of a layer's backward.

    There are gathered weights (with adapters, their sums too) and whole gradients of about a layer; the layer's own arrays. A
    loop over ticks has the gradients of the tick's part beside the accumulated ones; and where XLA unrolls a pipeline's by two
    (double buffering, `train.xla_options`), the next tick's zeros too.
    """
    layer = cut.layer.gathered
    sums = BYTES[config.model.dtype] * layer * bool(config.lora.rank)
    weights = GATHERED * (sums + _gathers(config) * _copy_bytes(config, cut.layer, True))
    waiting = UNREDUCED_EXPERTS if config.model.moe and moves_activations(config.mesh) else UNREDUCED
    if _in_order(config, cut):
        waiting = UNREDUCED_EXPERTS_IN_ORDER if config.model.moe else UNREDUCED_IN_ORDER
    scatters = config.mesh.fsdp > 1 and reduces_each_pass(config.sharding.zero)
    whole = waiting * BYTES[config.train.reduce_dtype] * layer * scatters
    by_two = cut.is_pipe and not moves_activations(config.mesh)
    # Outside of loops XLA adds ticks' gradients up late: of single ticks, and of runs so short that unrolling leaves no loop.
    is_straight = cut.chunks == 1 and (1 < max(cut.runs, default=0) <= 3 if by_two else 1 in cut.runs)
    copies = cut.is_loop + by_two
    working = weights + whole + _layer_arrays(config, cut, sizes)
    working += _scores(config, backend) + _first_layers(config, backend)
    return Moment(_gradients(config, cut, copies, int(is_straight)), working)


def _last_moment(config: Config, cut: Cut, backward: Moment) -> Moment:
    """Return the moment of the last layer's backward: the table's gradient begins as zeros, in no pipeline's tick.

    Weights are not needed any more, but in further ticks. With experts the zeros are there from the beginning: their program
    is ordered by computed times.
    """
    zeros = FLOAT32 * head_numbers(config) * trains(config, "table") * (not cut.is_pipe)
    gone = GATHERED * _gathers(config) * _copy_bytes(config, cut.layer, True) + (0 if cut.is_loop else _weights(config, cut))
    return Moment(backward.gradients, backward.working + zeros - (0 if config.model.moe else gone))


def _between_moment(config: Config, cut: Cut, sizes: Sizes, backward: Moment) -> Moment:
    """Return the moment between forward and backward: what experts gave back in all layers, where it is kept, is laid anew."""
    remat, bytes_each = config.train.remat, BYTES[config.model.dtype]
    is_kept = remat != "none" and keeps(config.train, "expert_out")
    working = is_kept * bytes_each * cut.layers * sizes.choices * config.model.embed_dim
    return Moment(backward.gradients, working)


def _scores(config: Config, backend: str) -> float:
    """Return the bytes of L^2 that attention holds.

    The reference holds its scores and weights, and the gradients of both; cuDNN, where it is given the mask as an array, a bias
    and its gradient. The other kernels hold none.
    """
    square = BYTES[config.model.dtype] * microbatch_rows(config) * local_length(config) ** 2
    if backend == "reference":
        heads = config.model.num_heads / config.mesh.tensor
        return 2 * (1 + FLOAT32 / BYTES[config.model.dtype]) * square * heads
    return 2 * square if backend == "cudnn_dense" else 0.0


def _first_layers(config: Config, backend: str) -> float:
    """Return the bytes that a mixture's first dense layers keep: they run again in the first stage's backward."""
    if not config.model.first_dense_layers:
        return 0.0
    dense = replace(config, model=replace(config.model, moe=None))
    return config.model.first_dense_layers * kept_bytes(dense, Sizes.of(dense), backend)


def _unrolled(config: Config, cut: Cut) -> int:
    """Return the layers in one iteration of the layer scan."""
    return layers_per_iteration(cut.layers, most_layers_per_iteration(config.mesh, "gpu"), len(config.model.kinds))


def _in_order(config: Config, cut: Cut) -> bool:
    """Return whether gradients are sent layer by layer."""
    return reduces_layer_by_layer(config.model, config.mesh, _unrolled(config, cut))


def _layer_arrays(config: Config, cut: Cut, sizes: Sizes) -> float:
    """Return the bytes of activations and gradients alive in the backward of the layers of one iteration."""
    if _in_order(config, cut):
        again = IN_TURNS_IN_RINGS if folds(config) else IN_TURNS_RECOMPUTED
        turns = again if config.train.remat == "full" else IN_TURNS_IN_ORDER
        turns, alone = (EXPERTS_IN_TURNS, EXPERTS_ALONE) if config.model.moe else (turns, ALONE_IN_ORDER)
        arrays, layers = turns if sizes.parts > 1 else alone, _unrolled(config, cut)
    elif moves_activations(config.mesh):
        turns = IN_TURNS_IN_STAGES if cut.is_pipe and config.train.remat == "full" else IN_TURNS
        arrays, layers = turns if sizes.parts > 1 else ALONE, _unrolled(config, cut)
    else:
        arrays, layers = PEELED if cut.layers % 2 else RESIDENT, 1
    moe, width = config.model.moe, config.model.embed_dim
    numbers = arrays.sequence * sizes.sequence + arrays.stream * sizes.stream
    numbers += arrays.mlp * sizes.mlp + arrays.heads * sizes.query
    numbers *= layers
    if moe:
        is_shared = moves_activations(config.mesh) and config.mesh.expert == 1
        rows, times = (SHARED_EXPERTS, sizes.parts) if is_shared else (arrays, layers)
        dispatched = sizes.rows * (rows.wide_rows * moe.mlp_dim / config.mesh.tensor + rows.rows * width)
        numbers += times * (dispatched + rows.choices * sizes.choices * width)
    return BYTES[config.model.dtype] * numbers / sizes.parts
