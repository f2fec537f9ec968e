"""How long one chip computes: matmuls by their shape, attention by its length, everything else by the bytes that it touches.

A matmul [m, k] x [k, n] of F = 2 m k n FLOPs takes

    max(F / (peak * CEILING * tile * waves * depth), bytes / bandwidth)

*tile*: what a kernel with tiles of that size reaches of the ceiling; *waves*: the share of the last round of tiles over the
chip's multiprocessors that is not idle (tile and wave quantisation: NVIDIA, "Matrix Multiplication Background User's Guide");
the tile size with the best product is taken, as cuBLAS and Triton's autotuner do; *depth* = k / (k + 256): filling and
draining a tile's pipeline. CEILING is the one constant fitted to published training runs (`tests.planner.published`); it
stands for clocks under power and for all that this model leaves out.

Fused attention reaches a share e L / (L + l) of peak on causal sequences of L tokens with heads of 128: (e, l) = (0.64, 900)
forward and (0.55, 1200) backward run through cuDNN's points in figures 5 and 6 of FlashAttention-3 (Shah et al. 2024,
arXiv:2407.08608); a head of 64 reaches two thirds of that, there too.

Everything else is limited by memory: it runs at STREAM of the bandwidth (the share that a copy reaches on H100 and A100).

Where a chip was calibrated (`jaxtrain calibrate`), its own fractions of the peak stand in place of CEILING, tiles,
waves and depth, of attention's curve, and of STREAM.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxtrain.config import Config
from jaxtrain.errors import ExplainedError
from jaxtrain.hardware import Chip
from jaxtrain.layout import inputs_on_host, local_length, loss_chunks, microbatch_rows, reduces_each_pass, whole_moments
from jaxtrain.ops.float8_choice import QUANTISED_BYTES
from jaxtrain.planner.activations import Sizes
from jaxtrain.planner.formulas import loss_positions, muon_flops, muon_shares
from jaxtrain.planner.layer_table import BYTES, count_norms, expert_rows, is_gated, layer_weights, matmuls, runs_again
from jaxtrain.planner.targets import TARGETS
from jaxtrain.train.muon_shares import MUON_ITERATIONS

CEILING = 0.73
"""Share of the peak that large matmuls reach in training."""
STREAM = 0.88
HOST = 0.78
"""Of `host_bandwidth`: 12.4 of the 15.8 GB/s of 16 lanes of PCIe Gen3 (README of NVIDIA's nvbandwidth)."""
ATTENTION = {"forward": (0.64, 900), "backward": (0.55, 1200)}
KERNEL_GAP = 2e-6
"""Seconds between two kernels that nothing hides."""
_TILES = ((256, 128, 1.0), (128, 128, 0.93), (128, 64, 0.78), (64, 64, 0.58))
"""(rows, columns, share of the ceiling): a smaller tile reads more for each FLOP."""
_FILL = 256
_KERNELS = {"forward": 18, "backward": 36}
"""Kernels of one layer: 7 matmuls (14 backward), attention, and about as many that XLA fuses between them."""


TRANSFER_CORES = 16
"""Multiprocessors that NCCL's kernels hold while they move bytes: compute beside them is slower by as much, and that counts as
exposed. NCCL takes one a channel, and has 16 to 32 channels on an H100."""


class Seconds(NamedTuple):
    """Seconds that a stretch of work computes, by what limits it."""

    matmul: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.matmul + self.attention + self.memory_bound + self.overhead

    def __add__(self, other: Seconds) -> Seconds:  # type: ignore[override]  # a sum of work, not of tuples
        return Seconds(*map(operator.add, self, other))


@dataclass(frozen=True)
class Roofline:
    """One chip at one compute dtype."""

    peak: float
    """FLOP/s."""
    bandwidth: float
    """Bytes/s that streaming kernels reach."""
    cores: int | None
    """Multiprocessors; None where they are not known, or matmuls are not cut over any (TPUs): waves are then not counted."""
    chip: Chip
    dtype: str
    attention_share: float = 1.0
    """Of what the formula says of attention: another kernel's."""
    operand_bytes: int = 2
    """Of a number that a matmul reads."""

    @property
    def taken(self) -> float:
        """Share of the multiprocessors that transfers hold while they travel behind compute."""
        return TRANSFER_CORES / self.cores if self.cores else 0.0

    def matmul(self, m: int, k: int, n: int, batch: int = 1) -> float:
        """Return the seconds of `batch` products [m, k] x [k, n] in one kernel; the result has 2 bytes a number."""
        flops, moved = 2.0 * m * k * n * batch, batch * (self.operand_bytes * (m * k + k * n) + 2.0 * m * n)
        reached = self.chip.matmul_fraction(self.dtype, m * batch, k, n)
        if reached is None:
            tiled = max(share * self._busy(m, n, batch, rows, columns) for rows, columns, share in _TILES)
            reached = CEILING * tiled * k / (k + _FILL)
        return max(flops / (self.peak * reached), moved / self.bandwidth)

    def _busy(self, m: int, n: int, batch: int, rows: int, columns: int) -> float:
        """Return the share of the multiprocessors' time that goes into the result and not into its padding, or idling."""
        tiles = batch * math.ceil(m / rows) * math.ceil(n / columns)
        whole = tiles if self.cores is None else math.ceil(tiles / self.cores) * self.cores
        return batch * m * n / (rows * columns * whole)

    def attention(self, flops: float, length: int, head_dim: int, direction: str) -> float:
        """Return the seconds of fused causal attention over sequences, or pieces, of `length` tokens."""
        reached = self.chip.attention_fraction(self.dtype, length)
        if reached is None:
            most, half = ATTENTION[direction]
            reached = self.attention_share * most * length / (length + half) * min(1.0, (head_dim / 128) ** 0.58)
        return flops / (self.peak * reached)

    def in_float8(self) -> Roofline:
        """Return the roofline of matmuls in float8; this one on a chip without any."""
        peak = self.chip.peak("float8")
        return replace(self, peak=peak, dtype="float8", operand_bytes=1) if peak else self

    def stream(self, moved: float) -> float:
        """Return the seconds of reading and writing so many bytes."""
        return moved / self.bandwidth


def roofline(chip: Chip, dtype: str, attention_share: float = 1.0) -> Roofline:
    """Return the roofline of a chip.

    Raises:
      ExplainedError: its maker states no peak for that dtype, or no memory bandwidth.
    """
    peak = chip.matmul_peak(dtype)
    if peak is None or chip.memory_bandwidth is None:
        raise ExplainedError(
            f"{chip.name}: peak FLOP/s in {dtype} ({peak}) and memory bytes/s ({chip.memory_bandwidth}) must be known to say "
            "how long a step takes; measure them with jaxtrain calibrate, or plan for a chip that has them"
        )
    streams = (chip.calibration and chip.calibration.memory) or STREAM
    cores = TARGETS[chip.target].cores if chip.target in TARGETS else None
    return Roofline(peak, streams * chip.memory_bandwidth, cores, chip, dtype, attention_share)


def layer_work(config: Config, chip: Roofline, parts: int = 1) -> tuple[Seconds, Seconds]:
    """(forward, backward) of one layer on one microbatch, recomputation in the backward; without transfers and `gradient_work`.

    Matmuls: each of the layer table; backward twice (for the input's gradient and for the weight's), once more where it is
    computed again. Where layers take turns (`parts` 2), each on half of the rows.
    """
    forward = backward = 0.0
    for weight, m, k, n, batch, again in matmuls(config, parts):
        # Experts' dropless kernels multiply float8 numbers in the compute dtype (`ops.grouped_matmul`).
        widened = weight.is_of_experts and config.model.moe is not None and config.model.moe.dispatch == "dropless"
        own = chip.in_float8() if weight.is_in_float8(config.model) and not widened else chip
        once = parts * own.matmul(m, k, n, batch)
        forward += once
        backward += parts * (own.matmul(m, n, k, batch) + own.matmul(k, m, n, batch)) + again * once
    ahead, back = _attention(config, chip, runs_again(config, "attention"))
    passing, passing_back = (
        chip.stream(moved + more) for moved, more in zip(_elementwise_bytes(config), _quantised_bytes(config), strict=True)
    )
    repeats = 0 if config.train.remat == "none" else 1
    gaps = KERNEL_GAP * parts
    backward_gaps = gaps * (_KERNELS["backward"] + repeats * _KERNELS["forward"])
    return (
        _beside_copies(config, chip, Seconds(forward, ahead, passing, gaps * _KERNELS["forward"])),
        _beside_copies(config, chip, Seconds(backward, back, passing_back + repeats * passing, backward_gaps)),
    )


def _beside_copies(config: Config, chip: Roofline, work: Seconds) -> Seconds:
    """Return a layer's work, and as overhead what the copy of its input to the host, or from there, takes longer."""
    if not inputs_on_host(config.train):
        return work
    copy = BYTES[config.model.dtype] * Sizes.of(config).stream / host_rate(chip.chip)
    return work._replace(overhead=work.overhead + max(0.0, copy - work.total))


def weight_seconds(config: Config, chip: Roofline) -> float:
    """Return the seconds of the matmuls of one layer's weight gradients on one microbatch: `zero_bubble`'s third pass."""
    own = {True: chip.in_float8(), False: chip}
    return sum(own[row.weight.is_in_float8(config.model)].matmul(row.k, row.m, row.n, row.batch) for row in matmuls(config))


def _attention(config: Config, chip: Roofline, again: bool) -> tuple[float, float]:
    """(forward, backward) seconds: causal half of the square, 2 matmuls forward and 5 backward (the scores once more).

    A sliding window sees W - W^2 / 2L keys in the mean where it would be L / 2; of a pattern it is the mean over its places.
    """
    model, length = config.model, config.data.sequence_length
    heads = model.num_heads / (config.mesh.tensor * config.mesh.context)
    square = 2.0 * microbatch_rows(config) * heads * length**2 * model.head_dim
    ahead = back = 0.0
    for kind in model.kinds:
        window = min(model.window_of(kind) or length, length)
        flops = square * (2 * window * length - window**2) / length**2 / len(model.kinds)
        piece = min(window, length // config.mesh.context)
        ahead += chip.attention(flops, piece, model.head_dim, "forward")
        back += chip.attention(2.5 * flops, piece, model.head_dim, "backward")
    return ahead, back + again * ahead


def _elementwise_bytes(config: Config) -> tuple[float, float]:
    """(forward, backward) bytes that one layer reads and writes between its matmuls, in compute dtype.

    A token, forward: norms (read D twice, write D) and two residual sums (read 2 D, write D), on this device's 1/t of the
    sequence; RoPE on H + K heads of N (read, write); SwiGLU (read 2 F, write F; without a gate F and F). Backward: norms (read
    4 D, write 2 D: two passes over x and the gradient) and residual sums; the gradients that Q, K, V and that gate and up send
    back to one input, added up (read 5 D, write 2 D; without a gate 3 D and D); RoPE; SwiGLU (read 3 F, write 2 F; without a
    gate 2 F and F). Experts' rows are brought into order and back (read D, write D, twice), both ways.
    """
    model, tensor = config.model, config.mesh.tensor
    tokens, d = microbatch_rows(config) * local_length(config), model.embed_dim
    norms, gated = count_norms(model), is_gated(model)
    wide = model.mlp_dim if not model.moe else model.moe.shared_experts * model.moe.mlp_dim
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    ahead = tokens * ((3 * norms + 6) * d + heads + (3 if gated else 2) * wide) / tensor
    added = 7 if gated or model.moe else 4
    back = tokens * ((6 * norms + 6) * d + added * d * tensor + heads + (5 if gated else 3) * wide) / tensor
    if model.moe:
        rows, expert = expert_rows(config), model.moe.mlp_dim / tensor
        ahead, back = ahead + rows * (4 * d + 3 * expert), back + rows * (4 * d + 5 * expert)
    return BYTES[model.dtype] * ahead, BYTES[model.dtype] * back


def _quantised_bytes(config: Config) -> tuple[float, float]:
    """(forward, backward) bytes that one layer moves to have the operands of its matmuls in float8.

    Those of `ops.float8_choice.QUANTISED_BYTES` for each input (queries, keys and values read one, gate and up another) and
    each result's gradient; and the weights, transposed (read, write) in each pass. Of weights themselves, quantised once a
    step, nothing is counted: 9 bytes a number of the device's own share.
    """
    moved, inputs = {"forward": 0.0, "backward": 0.0}, set()
    for weight, m, k, n, batch, _ in matmuls(config):
        if not weight.is_in_float8(config.model):
            continue
        block, of_input = weight.name.partition(".")[0], weight.dims[weight.is_of_experts]
        is_new = (block, of_input, k) not in inputs
        inputs.add((block, of_input, k))
        for way, (of_x, of_g) in QUANTISED_BYTES.items():
            moved[way] += batch * (m * (is_new * of_x * k + of_g * n) + 2.0 * k * n)
    return moved["forward"], moved["backward"]


def gradient_work(config: Config, chip: Roofline, at_once: bool = False) -> Seconds:
    """Time the sums of one layer's gradients in one backward pass.

    They are cast to the dtype in which they are summed (read 2, write b bytes), and added to what the microbatches before have
    left (read 4 and b, write 4), on the shard where fsdp has scattered them.

    Args:
      at_once: the matmuls that make gradients add them up (read 4, write 4).
    """
    summed = BYTES[config.train.reduce_dtype]
    weights = [w for w in layer_weights(config.model).values() if w.is_matrix]
    whole = sum(weight.shard(config, without=("fsdp",)) for weight in weights)
    kept = whole // config.mesh.fsdp if reduces_each_pass(config.sharding.zero) else whole
    moved = 8.0 * kept if at_once else whole * (BYTES[config.model.dtype] + summed) + kept * (8.0 + summed)
    return Seconds(memory_bound=chip.stream(moved))


def embedding_work(config: Config, chip: Roofline) -> tuple[Seconds, Seconds]:
    """(forward, backward) of the lookup of one microbatch: rows of the table in float32, added up over tensor."""
    tokens = microbatch_rows(config) * local_length(config) * config.model.embed_dim
    ahead = chip.stream(tokens * (4 + 2 * BYTES[config.model.dtype]))
    return Seconds(memory_bound=ahead), Seconds(memory_bound=chip.stream(tokens * 12.0))


def loss_work(config: Config, chip: Roofline) -> Seconds:
    """Time the head and the loss with their gradients, of one microbatch (`ops.losses.token_losses`).

    A chunk of positions takes three matmuls; float32 logits are written and read thrice; the head's float32 gradient is read
    and written for every chunk.
    """
    model, rows, positions = config.model, microbatch_rows(config), loss_positions(config)
    tensor = config.mesh.tensor
    chunks, _ = loss_chunks(local_length(config) // tensor, config.train.loss_chunk, tensor)
    width = model.padded_vocab_size // tensor
    m, k, n = max(1, rows * positions // chunks), model.embed_dim, width
    matmul = chunks * (chip.matmul(m, k, n) + chip.matmul(m, n, k) + chip.matmul(k, m, n))
    return Seconds(
        matmul, 0.0, chip.stream(16.0 * rows * positions * width + 8.0 * chunks * k * width), KERNEL_GAP * 12 * chunks
    )


def optimizer_seconds(config: Config, chip: Roofline, parameters: float) -> float:
    """Return the seconds of the update of so many parameters.

    Weight and gradient are read, the weight written, moments read and written, the gradient read twice more for its norm and
    its clipping, and the weight cast for the next step, in float32 but for that. adafactor goes over its direction once more,
    for the direction's norm. Moments in host memory come and go one after the other, since a layer's way in waits for the way
    out of the layer before; the update hides behind them.
    """
    moments = whole_moments(config.optimizer) + (config.optimizer.name == "adafactor") + bool(config.train.ema_decay)
    held = 2 if config.optimizer.moments_dtype == "int8" else 8
    each = 12 + held * moments + 8 + 4 + BYTES[config.model.dtype]
    copies = held * moments * parameters / host_rate(chip.chip) if config.optimizer.moments_memory == "host" else 0.0
    return max(chip.stream(each * parameters), copies)


def host_rate(chip: Chip) -> float:
    """Return the bytes/s of copies between a device and its host's memory; infinite where they are not known."""
    return HOST * (chip.host_bandwidth or math.inf)


def muon_work(config: Config, chip: Roofline) -> tuple[float, float]:
    """(FLOPs, seconds) of the matmuls of muon's iterations on one device in a step."""
    seconds = sum(
        share.each / share.at_once * sum(chip.matmul(*product, share.at_once) for product in share.products)
        for share in muon_shares(config)
    )
    return muon_flops(config), MUON_ITERATIONS * seconds
