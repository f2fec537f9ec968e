"""Memory of the fullest device in closed form: what lasts, what a step keeps, and what is alive at its worst moment.

The parts are those that XLA's buffer assignment shows for the step compiled for H100s (`reference_layouts` holds them against
the compiled program). Letters: B sequences in a microbatch of one device, L positions of a sequence that a device holds between
gathers over tensor (length / context), D embed_dim, H query heads, K kv heads, N head_dim, F mlp_dim, V padded vocabulary; t
and f devices along tensor and fsdp. bf16 is 2 bytes a number, float32 4.

A step has two moments that can be the worst one. In both the state, the compute copies of the weights, the gradients and all
activations kept are there, since XLA sets the gradients' buffers to zero before the loss:

* **the loss**: the head is gathered whole over fsdp, its gradient is summed in float32, and a chunk of logits is there;
* **the backward of a layer**: the layer is computed again as far as remat says, and its gradients are made.

The optimizer's update is never worse: by then the activations are gone, and XLA updates the state in its own place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtrain.config import Config, ModelConfig, MoEConfig
from jaxtrain.parallel.pipeline_schedule import allocate_slots, make_schedule
from jaxtrain.planner.estimates import Memory
from jaxtrain.planner.formulas import BYTES, Weight, layer_weights, local_length, microbatch_rows, outer_weights
from jaxtrain.planner.formulas_collectives import context_kind

FLOAT32 = 4
KERNEL_TILE = 128
"""Rows to which an expert's share is padded on GPUs (`ops.grouped_matmul`)."""
LAYERS_PER_ITERATION = 4
"""Layers in one iteration of the layer scan where activations move (`train.xla_options`)."""
KEPT_BY_DOTS = ("query", "key", "value", "attention", "mlp_gate", "mlp_up", "router")
KEPT_BY_DOTS += ("expert_in", "expert_gate", "expert_up", "expert_out")
"""What remat `dots` keeps, by names that `named` could say (`models.decoder.remat_policy`)."""


def estimate_memory(config: Config, backend: str = "cudnn") -> Memory:
    """Memory of a valid config (no mesh axis -1) on its fullest device.

    Args:
      backend: of attention; cudnn, blockwise, or reference (which holds scores of L^2).
    """
    cut, sizes = _cut(config), _Sizes.of(config)
    worst = max(_loss_moment(config, cut, sizes), _backward_moment(config, cut, sizes), key=sum)
    return Memory(
        parameters=cut.held * BYTES[config.model.param_dtype],
        optimizer=optimizer_state(config, cut) + sync_state(config, cut),
        gradients=worst.gradients,
        weights=_weights(config, cut),
        activations=_activations(config, cut, sizes, backend),
        working=worst.working + _batch(config),
    )


# ---------------------------------------------------------------------------------------------------------------------
# How the layers are cut, and a device's share of a model


class Shares(NamedTuple):
    """Numbers of a device's share of some weights."""

    sharded: float
    """As the state holds them: matrices over fsdp and tensor, experts over expert, norms whole."""
    gathered: float
    """Whole over fsdp."""
    vectors: float
    """Of them, norms and biases."""


class Cut(NamedTuple):
    """A device's share of the model, and the slots in which its microbatches wait."""

    layer: Shares
    """Of one layer."""
    outer: Shares
    """Of what is outside of the stack of layers."""
    layers: int
    """Layers of one part of the stack."""
    chunks: int
    residuals: int
    """Slots for what a part's forward leaves for its backward, the one that nobody reads included; 1 without a pipeline."""
    boundaries: int
    """Slots for activations and gradients between stages."""
    is_loop: bool
    """Whether a step is a loop over ticks (several microbatches, or stages)."""
    is_pipe: bool

    @property
    def held(self) -> float:
        """Parameters: the share of all of the stage's layers (empty slots too) and of what is outside."""
        return self.chunks * self.layers * self.layer.sharded + self.outer.sharded


@functools.cache
def _slots(schedule: str, stages: int, chunks: int, microbatches: int) -> tuple[int, int]:
    """(slots of residuals, slots of boundary activations and gradients), from the table's own lifetimes."""
    slots = allocate_slots(make_schedule(schedule, stages, chunks, microbatches))
    return slots.residual_count + 1, slots.activation_count + slots.gradient_count + 2


@functools.lru_cache(maxsize=4096)
def _shares(model: ModelConfig, fsdp: int, tensor: int, expert: int) -> tuple[Shares, Shares]:
    """Of one layer, and of what is outside."""
    sizes = {"fsdp": fsdp, "tensor": tensor, "expert": expert}

    def share(weights: Iterable[Weight]) -> Shares:
        cut = [(w.elements / math.prod(sizes[axis] for axis in w.axes), w.is_matrix) for w in weights]
        matrices, vectors = sum(n for n, is_matrix in cut if is_matrix), sum(n for n, is_matrix in cut if not is_matrix)
        return Shares(matrices + vectors, fsdp * matrices + vectors, vectors)

    return share(layer_weights(model).values()), share(outer_weights(model).values())


def _cut(config: Config) -> Cut:
    mesh, pipeline, microbatches = config.mesh, config.pipeline, config.train.microbatches
    shares = _shares(config.model, mesh.fsdp, mesh.tensor, mesh.expert)
    layers = math.ceil(config.model.stacked_layers / (mesh.pipe * pipeline.chunks))
    if mesh.pipe == 1 and pipeline.schedule != "gpipe":
        return Cut(*shares, layers, 1, 1, 0, microbatches > 1, False)
    residuals, boundaries = _slots(pipeline.schedule, mesh.pipe, pipeline.chunks, microbatches)
    return Cut(*shares, layers, pipeline.chunks, residuals, boundaries, True, True)


# ---------------------------------------------------------------------------------------------------------------------
# What lasts from step to step


def optimizer_state(config: Config, cut: Cut) -> float:
    """Bytes of the moments, float32 and sharded like the parameters: two for adamw, one for lion and for sgd with momentum.

    muon keeps one for layers' matrices and adamw's two for norms, table and head. adafactor keeps a mean over the outputs and
    one over the inputs of each matrix, whole on every device of a stage, and a whole moment of norms.
    """
    name, layers = config.optimizer.name, cut.chunks * cut.layers
    if name == "adafactor":
        return FLOAT32 * (layers * _factors(config.model, True) + _factors(config.model, False))
    if name == "muon":
        tables = _head(config) / config.mesh.fsdp * (1 if config.model.tie_embeddings else 2)
        return FLOAT32 * (cut.held + layers * cut.layer.vectors + cut.outer.vectors + tables)
    moments = {"adamw": 2, "lion": 1, "sgd": 1 if config.optimizer.beta1 else 0}
    return FLOAT32 * moments[name] * cut.held


@functools.lru_cache(maxsize=64)
def _factors(model: ModelConfig, of_layer: bool) -> int:
    """Adafactor's numbers for one layer, or for what is outside of layers: a + b for a matrix a x b (of each expert), and all
    of a norm. One side is the model's width, or the latent that heads are projected up from."""
    latent, d = model.latent_attention, model.embed_dim
    sides = {"query": latent.query_rank or d, "key": latent.kv_rank, "value": latent.kv_rank} if latent else {}
    total = 0
    for name, weight in (layer_weights(model) if of_layer else outer_weights(model)).items():
        copies = model.moe.num_experts if model.moe and name.startswith("expert_") else 1
        side = copies * sides.get(name.removeprefix("first_"), d)
        total += side + weight.elements * copies // side if weight.is_matrix else weight.elements
    return total


def sync_state(config: Config, cut: Cut) -> float:
    """Bytes of what keeps replicas together, float32 and sharded like the parameters (`parallel.sync.initial_state`).

    local and diloco: the anchor; diloco's momentum; what is set aside where an exchange overlaps steps. delayed: `delay`
    queued gradients. Error feedback: what compression lost.
    """
    sync = config.sync
    copies = 1 + bool(sync.outer[1]) + bool(sync.overlap) if sync.replicas_differ else sync.queued
    copies += sync.error_feedback and sync.compression != "none"
    return FLOAT32 * copies * cut.held


def _batch(config: Config) -> float:
    """Bytes of a step's tokens, targets, positions (and segments): int32."""
    arrays = 4 if config.data.mask_documents else 3
    return 4 * arrays * microbatch_rows(config) * config.train.microbatches * local_length(config)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in the compute dtype, gradients


def _weights(config: Config, cut: Cut) -> float:
    """Copies of a device's parameters in the compute dtype (none where that is the dtype they are kept in), whole over fsdp at
    ZeRO 1 and 2."""
    whole = config.sharding.zero < 3 and config.mesh.fsdp > 1
    if not whole and config.model.dtype == config.model.param_dtype:
        return 0.0
    layer, outer = (share.gathered if whole else share.sharded for share in (cut.layer, cut.outer))
    return BYTES[config.model.dtype] * (cut.chunks * cut.layers * layer + outer)


def moves_activations(config: Config) -> bool:
    """Whether layers send activations between devices (`train.xla_options`): then they take turns, several to an iteration."""
    return config.mesh.tensor > 1 or config.mesh.expert > 1


def _gradients(config: Config, cut: Cut, copies: int) -> float:
    """Float32 gradients: shards at ZeRO 2 and 3, whole over fsdp at 1.

    Accumulated over the step, those of all that the device holds; `copies` more of a tick's own part. In a step of one tick the
    head's gradient is what the loss sums up, and is counted there where it is not also cut into shards.
    """
    of_layer, of_outer = (share.gathered if config.sharding.zero == 1 else share.sharded for share in (cut.layer, cut.outer))
    outer_copies = 1 + (copies > 0) if cut.is_loop else int(of_outer < cut.outer.gathered)
    return FLOAT32 * ((cut.chunks + copies) * cut.layers * of_layer + outer_copies * of_outer)


# ---------------------------------------------------------------------------------------------------------------------
# Activations


@dataclass(frozen=True)
class _Sizes:
    """Numbers (not bytes) of one microbatch's activations on one device."""

    tokens: int
    """B L: rows of a matmul."""
    parts: int
    """Parts of the microbatch that take turns."""
    stream: float
    """B L D / t: the residual stream."""
    sequence: float
    """B L D: gathered over tensor."""
    query: float
    """B L H N / t; of latent attention with the part that RoPE turns."""
    key: float
    """B L K N / t; of latent attention without that part, which all heads share."""
    value: float
    """B L K M / t, M the width of a value head."""
    result: float
    """B L H M / t: attention's result."""
    latents: float
    """B L (Q + C + R) / t: latent attention's projections down."""
    mlp: float
    """B L F / t."""
    statistics: float
    """B L H / t: logsumexp."""
    rows: float
    """Rows that a device's experts may get."""
    choices: float
    """B L x experts of a token."""

    @staticmethod
    def of(config: Config) -> _Sizes:
        model, tensor = config.model, config.mesh.tensor
        batch = microbatch_rows(config)
        tokens = batch * local_length(config)
        parts = 2 if config.sharding.take_turns and moves_activations(config) and batch % 2 == 0 else 1
        width = model.moe.shared_experts * model.moe.mlp_dim if model.moe else model.mlp_dim
        latent, wide = model.latent_attention, model.head_dim
        turned, value = (latent.rope_dim, latent.value_dim) if latent else (0, wide)
        down = latent.query_rank + latent.kv_rank + latent.rope_dim if latent else 0
        return _Sizes(
            tokens=tokens,
            parts=parts,
            stream=tokens * model.embed_dim / tensor,
            sequence=tokens * model.embed_dim,
            query=tokens * model.num_heads * (wide + turned) / tensor,
            key=tokens * model.num_kv_heads * wide / tensor,
            value=tokens * model.num_kv_heads * value / tensor,
            result=tokens * model.num_heads * value / tensor,
            latents=tokens * down / tensor,
            mlp=tokens * width / tensor,
            statistics=tokens * model.num_heads / tensor,
            rows=parts * _expert_rows(config, model.moe, tokens // parts) if model.moe else 0,
            choices=tokens * model.moe.experts_per_token if model.moe else 0,
        )


def _expert_rows(config: Config, moe: MoEConfig, tokens: int) -> int:
    """Rows for which there is room where `tokens` are dispatched.

    Dropless: P T min(K, E / P) on P devices, since every token of every device may come here, and each expert padded to whole
    tiles. Capacity: E x groups x ceil(factor G K / E).
    """
    devices, local = config.mesh.expert, moe.num_experts // config.mesh.expert
    if moe.dispatch == "dropless":
        here = devices * tokens * min(moe.experts_per_token, local) if devices > 1 else tokens * moe.experts_per_token
        return math.ceil((here + local * (KERNEL_TILE - 1)) / KERNEL_TILE) * KERNEL_TILE
    group = moe.capacity_group or local_length(config)
    room = min(group, math.ceil(moe.capacity_factor * group * moe.experts_per_token / moe.num_experts))
    return moe.num_experts * (tokens // group) * room


def _folds(config: Config) -> bool:
    """Whether attention is folded from pieces along context (ring, gather)."""
    return config.mesh.context > 1 and context_kind(config) != "ulysses"


def _kept(config: Config, sizes: _Sizes, backend: str) -> float:
    """Bytes that one layer keeps of one microbatch until its backward: the residuals of its vjp under the remat policy."""
    remat, bytes_each = config.train.remat, BYTES[config.model.dtype]
    stream = bytes_each * sizes.stream
    if remat == "full":
        return stream
    if remat == "none":
        return _kept_of_everything(config, sizes, backend)
    names = set(config.train.remat_save) if remat == "named" else KEPT_BY_DOTS
    numbers = _named(config, sizes, backend)
    kept = sum(numbers[name] for name in names)
    # `dots` keeps what attention's projection makes before it is summed over tensor, so over the whole length; and latents.
    return stream + kept + (bytes_each * (sizes.sequence + sizes.latents) if remat == "dots" else 0)


def _attention_kept(config: Config, sizes: _Sizes, backend: str) -> float:
    """Attention's result and logsumexp. Of cuDNN's kernel the policy keeps the result twice: as the primitive's output, which
    names cannot reach (in latent attention padded to the width of queries), and under its name."""
    by_kernel = max(sizes.query, sizes.result) if backend == "cudnn" and not _folds(config) else 0.0
    statistics = 0.0 if backend == "reference" else FLOAT32 * sizes.statistics
    return BYTES[config.model.dtype] * (by_kernel + sizes.result) + statistics


def _named(config: Config, sizes: _Sizes, backend: str) -> dict[str, float]:
    """Bytes of each value that remat can keep by name. The last of a block, mlp_out, nothing needs again."""
    bytes_each, moe = BYTES[config.model.dtype], config.model.moe
    width = moe.mlp_dim / config.mesh.tensor if moe else 0
    numbers = dict.fromkeys(("mlp_gate", "mlp_up", "mlp_hidden"), bytes_each * sizes.mlp)
    numbers |= dict.fromkeys(("expert_gate", "expert_up", "expert_hidden"), bytes_each * sizes.rows * width)
    return numbers | {
        "query": bytes_each * sizes.query,
        "key": bytes_each * sizes.key,
        "value": bytes_each * sizes.value,
        "attention": _attention_kept(config, sizes, backend),
        "attention_out": bytes_each * sizes.stream,
        "mlp_out": 0.0,
        "router": FLOAT32 * sizes.tokens * moe.num_experts if moe else 0.0,
        "expert_in": bytes_each * sizes.rows * config.model.embed_dim,
        "expert_out": bytes_each * sizes.choices * config.model.embed_dim,
    }


def _kept_of_everything(config: Config, sizes: _Sizes, backend: str) -> float:
    """Remat none. An RMSNorm keeps three float32 of its input's size and hands on one in compute dtype; SwiGLU keeps six of its
    width (gate, up, the sigmoid and their products). Taking turns keeps what goes through its barriers too: half a residual
    stream, and attention's projection before it is summed over tensor."""
    model, bytes_each = config.model, BYTES[config.model.dtype]
    kept = 6 * FLOAT32 * sizes.stream + 2 * bytes_each * sizes.stream + 6 * bytes_each * sizes.mlp
    kept += bytes_each * (sizes.query + sizes.key + sizes.value) + _attention_kept(config, sizes, backend)
    kept += (3 * FLOAT32 + bytes_each) * sizes.latents
    if sizes.parts > 1:
        kept += bytes_each * (sizes.sequence + sizes.stream / 2)
    if model.qk_norm:
        kept += 3 * FLOAT32 * (sizes.query + sizes.key)
    if backend == "reference":
        kept += (FLOAT32 + bytes_each) * sizes.statistics * config.data.sequence_length
    if model.moe:
        width = model.moe.mlp_dim / config.mesh.tensor
        kept += bytes_each * sizes.rows * (model.embed_dim + 6 * width) - bytes_each * sizes.stream
        kept += FLOAT32 * (sizes.sequence + sizes.choices * model.embed_dim + 3 * sizes.tokens * model.moe.num_experts)
    return kept


def _activations(config: Config, cut: Cut, sizes: _Sizes, backend: str) -> float:
    """What waits for the backward: a part's layers in each slot of the ring, and the boundary activations.

    A backward tick of a pipeline reads its slot into a buffer of its own. Without a pipeline nothing waits but the microbatch
    at hand; where XLA unrolls the loop over microbatches by two, the next one's buffer is there already.
    """
    part = cut.layers * _kept(config, sizes, backend)
    copies = cut.residuals + (1 if cut.is_pipe else int(cut.is_loop and not moves_activations(config)))
    return copies * part + cut.boundaries * BYTES[config.model.dtype] * sizes.stream


# ---------------------------------------------------------------------------------------------------------------------
# The two moments
#
# What is alive in them beyond the activations kept was read off the buffer assignment of compiled steps. The factors below are
# means over those programs, in units whose causes are known; all else is exact.

HEAD_SUMS = 3
"""Float32 arrays of the head's size in the loss: the running sum of its gradient, what a chunk adds, and the zeros it began
with, which XLA does not write over."""
HEAD_SUMS_LEFT = 2
"""Of those, alive still while the layers' backward runs in a step of one tick: the gradient, until it is scattered, and the
zeros. In a loop over microbatches that XLA unrolls by two, twice as many; in a pipeline none: there the loss ends in a tick."""
UNREDUCED = 1.2
"""Layers whose gradients wait in reduce_dtype, whole over fsdp, until they are scattered; XLA sends them an iteration late."""
GATHERED = 1.0
"""Layers whose weights are gathered: the one at work and the start of the next."""
RESIDENT = (10.0, 4.0)
"""Where only weights move: arrays of the size of the residual stream, and of the MLP's width."""
PEELED = (23.0, 12.0)
"""The same for an odd number of layers: XLA unrolls their loop by two, and the layer left over runs beside the last two."""
ALONE = (4.0, 1.0, 3.0, 3.5, 0.0)
"""Where activations move, for each layer of an iteration of the layer scan (XLA keeps what was gathered for all of them until
the gradients of their weights are made): arrays of the size of the gathered sequence, of the residual stream, of the MLP's
width, of all heads, and of the experts' rows beyond those of the layers."""
IN_TURNS = (6.5, 4.0, 4.0, 7.0, 1.0)
"""The same of each of two parts that take turns: both parts' arrays wait for each other."""
EXPERT_ARRAYS = (4, 4)
"""Arrays of all rows that experts may get, for each layer of an iteration: of the experts' width, and of the model's."""


class Moment(NamedTuple):
    """Bytes beside the state, the compute copies of weights and the activations kept."""

    gradients: float
    working: float


def _head(config: Config) -> float:
    """Numbers of the head on one device, whole over fsdp."""
    return config.model.embed_dim * config.model.padded_vocab_size / config.mesh.tensor


def _gathers(config: Config) -> bool:
    """Whether weights are gathered layer by layer."""
    return config.mesh.fsdp > 1 and config.sharding.zero == 3


def _loss_moment(config: Config, cut: Cut, sizes: _Sizes) -> Moment:
    """The head in compute dtype, and `HEAD_SUMS` of it in float32; the gradient of a chunk's logits; hidden states and their
    gradient, in and out of chunks; the last layer's weights, where XLA gathers an iteration ahead. No tick's gradients yet."""
    bytes_each = BYTES[config.model.dtype]
    chunk = microbatch_rows(config) * min(config.train.loss_chunk, local_length(config))
    logits = chunk * config.model.padded_vocab_size / config.mesh.tensor
    ahead = cut.layer.gathered * (_gathers(config) and not moves_activations(config))
    sums = HEAD_SUMS * FLOAT32 + bytes_each * _gathers(config)
    copies = int(cut.is_loop and not cut.is_pipe)
    return Moment(_gradients(config, cut, copies), sums * _head(config) + bytes_each * (logits + ahead + 4 * sizes.stream))


def _backward_moment(config: Config, cut: Cut, sizes: _Sizes) -> Moment:
    """Gathered weights and whole gradients of about a layer; what is left of the loss; the layer's own arrays.

    A loop over ticks has the gradients of the tick's part beside the accumulated ones; and where XLA unrolls that loop by two
    (double buffering, `train.xla_options`), the next tick's zeros too.
    """
    layer = cut.layer.gathered
    weights = GATHERED * BYTES[config.model.dtype] * layer * _gathers(config)
    whole = UNREDUCED * BYTES[config.train.reduce_dtype] * layer * (config.mesh.fsdp > 1 and config.sharding.zero > 1)
    by_two = cut.is_loop and not moves_activations(config)
    sums = 0 if cut.is_pipe else HEAD_SUMS_LEFT * (1 + by_two)
    copies = cut.is_loop + by_two
    working = weights + whole + sums * FLOAT32 * _head(config) + _layer_arrays(config, cut, sizes)
    return Moment(_gradients(config, cut, copies), working)


def _unrolled(cut: Cut) -> int:
    """Layers in one iteration of the layer scan where activations move: a divisor, with two iterations at least."""
    fits = [n for n in range(2, LAYERS_PER_ITERATION + 1) if cut.layers % n == 0 and cut.layers >= 2 * n]
    return max(fits, default=1)


def _layer_arrays(config: Config, cut: Cut, sizes: _Sizes) -> float:
    """Activations and their gradients that are alive in the backward of the layers of one iteration."""
    bytes_each = BYTES[config.model.dtype]
    if not moves_activations(config):
        streams, widths = PEELED if cut.layers % 2 else RESIDENT
        return bytes_each * (streams * sizes.stream + widths * sizes.mlp)
    sequences, streams, widths, heads, more = IN_TURNS if sizes.parts > 1 else ALONE
    layers, width = _unrolled(cut), config.model.moe.mlp_dim / config.mesh.tensor if config.model.moe else 0
    arrays = sequences * sizes.sequence + streams * sizes.stream + widths * sizes.mlp + heads * sizes.query
    wide, narrow = EXPERT_ARRAYS
    rows = sizes.rows * ((wide * layers + more) * width + narrow * layers * config.model.embed_dim)
    return bytes_each * (layers * arrays + rows) / sizes.parts
