"""One executor that runs any schedule table inside the manual region; it knows no model.

Gradient accumulation is this executor with one stage: F and B of a microbatch then share a tick, and nothing is stored.

The backward honours the remat policy instead of recomputing the stage: F takes `jax.vjp` and stores only those residuals that
are not (by identity) parameters; B rebuilds the closure. Where the table has W, B runs the closure's first part and stores the
operands of the second, which W runs (`backward_split`). Parameters come as two trees of one structure, master and compute (see
`sharding.gather_weight`); gradients are those of master, accumulated in float32, not yet reduced over devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtrain.ops.loops import scan_of_hidden_length
from jaxtrain.parallel.backward_split import Split
from jaxtrain.parallel.buffers import add, add_at, add_gradients, slot, write, zeros
from jaxtrain.parallel.pipeline_schedule import IDLE, Schedule, TickRun, cut_into_runs
from jaxtrain.parallel.pipeline_slots import Slots, allocate_slots
from jaxtrain.sharding import shift, vary, varying_axes

PyTree = Any
Weights = tuple[PyTree, PyTree]
"""(master, compute)."""


class Functions(NamedTuple):
    """A model cut for a pipeline. `outer` and `layers` are pairs (master, compute) of parameter trees.

    Every result is typed as varying over all mesh axes, except the loss, which may be equal on some of them.
    """

    embed: Callable[[Weights, PyTree], jax.Array]
    """(outer, microbatch) -> x, the input of part 0."""
    layers: Callable[[Weights, jax.Array, PyTree, jax.Array], tuple[jax.Array, jax.Array, PyTree]]
    """(layers of one chunk, x, microbatch, chunk) -> (x, this device's share of the layers' auxiliary losses, sums to report),
    through one part of the layer stack. Leaves of the sums are [layers_per_part, ...]."""
    loss: Callable[[Weights, jax.Array, PyTree], tuple[jax.Array, PyTree]]
    """(outer, x, microbatch) -> (this device's share of the loss, sums to report)."""


class Parameters(NamedTuple):
    """Parameter trees as this device holds them; leaves of `layers` begin with [chunks, ...]."""

    outer: PyTree
    layers: PyTree


class Result(NamedTuple):
    """The result of `loss_and_gradients`: this device's share, not yet summed over devices."""

    sums: PyTree
    """The sums that the loss reports."""
    auxiliary: jax.Array
    """The layers' auxiliary losses, float32 scalar."""
    reports: PyTree
    """The sums that the layers report, [chunks, layers_per_part, ...]."""
    gradients: Parameters
    """Gradients of the master parameters, float32."""


def _when(pattern: str, predicate: jax.Array, do: Callable[[], PyTree], otherwise: Callable[[], PyTree]) -> PyTree:
    """Return `do()` where the predicate holds, without a conditional where the table says that it always does.

    Buffers must not go through a conditional: XLA copies what a branch only hands on (seen in the CUDA program: the whole ring
    of residuals, twice a tick). So a branch returns what it computed, or zeros, and the buffers are written outside.
    """
    return do() if pattern == "all" else lax.cond(predicate, do, otherwise)


class _Residuals:
    """Takes a part's vjp closure apart and rebuilds it.

    Leaves that are parameters (by identity) are not stored, and are taken from the parameters when rebuilt.
    """

    def __init__(self, functions: Functions):
        self.functions = functions
        self.tree: Any = None
        self.parameter_of: list[int | None] = []
        self.split: Split | None = None
        """The closure in two parts, once `cut` has made it."""

    def forward(self, layers: Weights, x: jax.Array, microbatch: PyTree, chunk: jax.Array) -> tuple:
        """(y, (auxiliary loss, sums to report), residuals to store until the backward)."""

        def part(layers: Weights, x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
            y, auxiliary, reports = self.functions.layers(layers, x, microbatch, chunk)
            return vary((y, auxiliary)), reports

        (y, auxiliary), closure, reports = jax.vjp(part, layers, x, has_aux=True)
        leaves, self.tree = jax.tree.flatten(closure)
        place = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(layers))}
        self.parameter_of = [place.get(id(leaf)) for leaf in leaves]
        stored = [leaf for leaf, i in zip(leaves, self.parameter_of, strict=True) if i is None]
        return y, vary((auxiliary, reports)), vary(stored)

    def _leaves(self, layers: Weights, stored: list[jax.Array]) -> list[jax.Array]:
        parameters, rest = jax.tree.leaves(layers), iter(stored)
        return [next(rest) if i is None else parameters[i] for i in self.parameter_of]

    def _pull(self, *leaves_and_gradient: jax.Array) -> list[jax.Array]:
        """[gradient of each of the part's master parameters, ..., gradient of its input]"""
        *leaves, gradient = leaves_and_gradient
        (master, _), dx = jax.tree.unflatten(self.tree, leaves)((gradient, vary(jnp.ones(()))))
        return vary([*jax.tree.leaves(master), dx])

    def cut(self, layers: Weights, stored: list[jax.Array], gradient: jax.Array) -> None:
        """Cut the backward pass in two."""
        urgent = [False] * len(jax.tree.leaves(layers[0])) + [True]
        self.split = Split(self._pull, (*self._leaves(layers, stored), gradient), urgent)

    def backward(self, layers: Weights, stored: list[jax.Array], gradient: jax.Array) -> tuple[list, jax.Array, list]:
        """(gradients of the part's master parameters, None where W computes it; gradient of its input; operands for W)."""
        arguments = (*self._leaves(layers, stored), gradient)
        if self.split is None:
            *master, dx = self._pull(*arguments)
            return master, dx, []
        made, crossing = self.split.first(*arguments)
        *early, dx = vary(made)
        rest = iter(early)
        master = [None if waits else next(rest) for waits in self.split.waits[:-1]]
        operands = [value for value, i in zip(crossing, self._parameters_crossing(), strict=True) if i is None]
        return master, dx, vary(operands)

    def weights(self, layers: Weights, operands: list[jax.Array]) -> list[jax.Array | None]:
        """Return the gradients of the part's master parameters that `backward` left out, None for the others."""
        assert self.split is not None
        parameters, rest = jax.tree.leaves(layers), iter(operands)
        late = iter(vary(self.split.second([next(rest) if i is None else parameters[i] for i in self._parameters_crossing()])))
        return [next(late) if waits else None for waits in self.split.waits[:-1]]

    def _parameters_crossing(self) -> list[int | None]:
        """Return for each value that crosses from B to W the number of the parameter that it is, or None."""
        assert self.split is not None
        last = len(self.parameter_of)  # the gradient, which is no parameter
        return [None if i is None or i == last else self.parameter_of[i] for i in self.split.inputs]


class _Shapes(NamedTuple):
    """Abstract values: a boundary activation, the loss's sums, the layers' sums, the residuals that F stores for B, the layers'
    gradients by B and by W (None: by the other), the operands that B stores for W."""

    x: Any
    sums: Any
    reports: Any
    stored: Any
    early: Any
    late: Any
    operands: Any


@dataclass(frozen=True)
class _Pass:
    """Constants shared by the ticks of one call."""

    functions: Functions
    schedule: Schedule
    slots: Slots
    master: Parameters
    compute: Parameters
    microbatches: PyTree
    stage: jax.Array
    residuals: _Residuals
    shapes: _Shapes

    @property
    def outer(self) -> Weights:
        return self.master.outer, self.compute.outer

    def layers(self, chunk: jax.Array) -> Weights:
        return slot(self.master.layers, chunk), slot(self.compute.layers, chunk)

    def is_first(self, chunk: jax.Array) -> jax.Array:
        return (self.stage == 0) & (chunk == 0)

    def is_last(self, chunk: jax.Array) -> jax.Array:
        return (self.stage == self.schedule.last_stage) & (chunk == self.schedule.chunks - 1)

    @property
    def ends(self) -> str:
        """ "all" if every part is both the first and the last one (one stage, one chunk), else "some"."""
        return "all" if self.schedule.parts == 1 else "some"


def _input(run: _Pass, row: dict, activation: jax.Array, microbatch: PyTree) -> jax.Array:
    """Return the input of this tick's F: the embedded tokens on part 0, else the activation from the part before."""
    return _when(
        run.ends,
        run.is_first(row["forward_chunk"]),
        lambda: vary(run.functions.embed(run.outer, microbatch)),
        lambda: slot(activation, row["activation_read"]),
    )


def _loss_pass(run: _Pass, y: jax.Array, microbatch: PyTree) -> tuple[PyTree, PyTree, jax.Array]:
    """(sums to report, gradients of the outer parameters, gradient of y)."""
    master, compute = run.outer

    def loss(master: PyTree, y: jax.Array) -> tuple[jax.Array, PyTree]:
        return run.functions.loss((master, compute), y, microbatch)

    value, closure, sums = jax.vjp(loss, master, y, has_aux=True)
    # A gradient that is always zero is typed as equal on all devices: hence the `vary` here and elsewhere.
    outer, dy = closure(vary(jnp.ones((), value.dtype), tuple(varying_axes(value))))
    return vary((sums, outer, dy))


def _backward_pass(run: _Pass, row: dict, stored: list[jax.Array], gradient: jax.Array) -> tuple[list, PyTree, jax.Array, list]:
    """(gradients of one part's layers, of outer parameters through the embedding on part 0, of the part's input; operands)."""
    chunk, microbatch = row["backward_chunk"], slot(run.microbatches, row["backward_microbatch"])
    layers, dx, operands = run.residuals.backward(run.layers(chunk), stored, gradient)
    master, compute = run.outer

    def embed_backward() -> PyTree:
        _, closure = jax.vjp(lambda master: vary(run.functions.embed((master, compute), microbatch)), master)
        return vary(closure(dx)[0])

    return layers, _when(run.ends, run.is_first(chunk), embed_backward, lambda: zeros(master)), dx, operands


def _tick_at_once(run: _Pass, carry: dict, row: dict) -> dict:
    """Run one stage and one chunk, B in the tick of its F, so that nothing is stored."""
    microbatch = slot(run.microbatches, row["forward_microbatch"])
    x = vary(run.functions.embed(run.outer, microbatch))
    y, reports, stored = run.residuals.forward(run.layers(row["forward_chunk"]), x, microbatch, row["forward_chunk"])
    sums, outer, dy = _loss_pass(run, y, microbatch)
    layers, outer_embed, *_ = _backward_pass(run, row, stored, dy)
    return {
        "sums": add(carry["sums"], sums),
        "reports": add_at(carry["reports"], reports, row["forward_chunk"]),
        "outer": add(add(carry["outer"], outer), outer_embed),
        "layers": add_gradients(carry["layers"], layers, row["backward_chunk"]),
    }


def _forward_tick(run: _Pass, pattern: str, carry: dict, row: dict) -> tuple[dict, jax.Array]:
    """Run F of this tick, and the loss after the last part; return also the activation for the next part."""
    idle = zeros((run.shapes.sums, run.master.outer, run.shapes.x))

    def forward() -> tuple:
        microbatch, chunk = slot(run.microbatches, row["forward_microbatch"]), row["forward_chunk"]
        x = _input(run, row, carry["activation"], microbatch)
        y, reports, stored = run.residuals.forward(run.layers(chunk), x, microbatch, chunk)
        return y, reports, stored, _when(run.ends, run.is_last(chunk), lambda: _loss_pass(run, y, microbatch), lambda: idle)

    # An idle stage rewrites its slot's own value, which needs no extra slot (dynamic indices clamp to the last slot).
    nothing = idle[2], zeros(run.shapes.reports)
    y, reports, stored, (sums, outer, dy) = _when(
        pattern,
        row["forward_microbatch"] != IDLE,
        forward,
        lambda: (*nothing, slot(carry["residual"], row["residual_write"]), idle),
    )
    return carry | {
        "sums": add(carry["sums"], sums),
        "reports": add_at(carry["reports"], reports, row["forward_chunk"]),
        "outer": add(carry["outer"], outer),
        "residual": write(carry["residual"], stored, row["residual_write"]),
        "gradient": write(carry["gradient"], dy, row["gradient_write_loss"]),
    }, y


def _backward_tick(run: _Pass, pattern: str, carry: dict, row: dict) -> tuple[dict, jax.Array]:
    """Run B of this tick; return also the gradient for the part before."""

    def backward() -> tuple:
        stored = slot(carry["residual"], row["residual_read"])
        return _backward_pass(run, row, stored, slot(carry["gradient"], row["gradient_read"]))

    def idle() -> tuple:
        nothing = (run.shapes.early, run.master.outer, run.shapes.x)
        return *zeros(nothing), slot(carry["operand"], row["operand_write"])

    layers, outer, dx, operands = _when(pattern, row["backward_microbatch"] != IDLE, backward, idle)
    return carry | {
        "operand": write(carry["operand"], operands, row["operand_write"]),
        "layers": add_gradients(carry["layers"], layers, row["backward_chunk"]),
        "outer": add(carry["outer"], outer),
    }, dx


def _weight_tick(run: _Pass, pattern: str, carry: dict, row: dict) -> dict:
    """Run W of this tick."""
    chunk = row["weight_chunk"]
    layers = _when(
        pattern,
        row["weight_microbatch"] != IDLE,
        lambda: run.residuals.weights(run.layers(chunk), slot(carry["operand"], row["operand_read"])),
        lambda: zeros(run.shapes.late),
    )
    return carry | {"layers": add_gradients(carry["layers"], layers, chunk)}


def _send(run: _Pass, value: jax.Array, step: int) -> list[jax.Array]:
    """Return what arrives when every stage sends a value on (step 1) or back (-1), for each of `Schedule.ways`."""
    return [shift(value, "pipe", step * way) if way else value for way in run.schedule.ways]


def _receive(buffer: jax.Array, arrived: list[jax.Array], slots: jax.Array) -> jax.Array:
    for value, i in zip(arrived, slots, strict=True):
        buffer = write(buffer, value, i)
    return buffer


def _tick(run: _Pass, patterns: TickRun, carry: dict, row: dict) -> dict:
    """Run F, send the activation on, run B, send the gradient back, run W."""
    arrived = None
    if patterns.forward != "no":
        carry, y = _forward_tick(run, patterns.forward, carry, row)
        arrived = _send(run, y, +1)
    if patterns.backward != "no":
        carry, dx = _backward_tick(run, patterns.backward, carry, row)
        carry = carry | {"gradient": _receive(carry["gradient"], _send(run, dx, -1), row["gradient_write"])}
    if patterns.weight != "no":
        carry = _weight_tick(run, patterns.weight, carry, row)
    if arrived is not None:
        carry = carry | {"activation": _receive(carry["activation"], arrived, row["activation_write"])}
    return carry


def _rows(schedule: Schedule, slots: Slots, run: TickRun) -> dict[str, np.ndarray]:
    """Return the table's columns for the ticks of a run, each [ticks, stages], or [ticks, stages, ways]."""
    columns = {
        name: getattr(source, name)
        for source, names in (
            (schedule, [f.name for f in fields(schedule) if f.name.endswith(("_microbatch", "_chunk"))]),
            (slots, [f.name for f in fields(slots) if not f.name.endswith("_count")]),
        )
        for name in names
    }
    return {name: column[run.start : run.stop] for name, column in columns.items()}


def _run_table(run: _Pass, tick: Callable[[TickRun, dict, dict], dict], carry: dict) -> dict:
    """Run the ticks in order: one `scan` for each run of like ticks."""
    for patterns in cut_into_runs(run.schedule):

        def step(carry: dict, rows: dict, patterns: TickRun = patterns) -> tuple[dict, None]:
            return tick(patterns, carry, {name: column[run.stage] for name, column in rows.items()}), None

        rows = _rows(run.schedule, run.slots, patterns)
        with jax.named_scope(f"ticks_{patterns.start}_{patterns.stop}"):
            if patterns.stop - patterns.start == 1:
                carry, _ = step(carry, {name: jnp.asarray(column[0]) for name, column in rows.items()})
            elif run.schedule.is_accumulation:
                carry, _ = scan_of_hidden_length(step, carry, {name: jnp.asarray(column) for name, column in rows.items()})
            else:  # a hidden length saves nothing in a pipeline
                carry, _ = lax.scan(step, carry, rows)
    return carry


def _begin(functions: Functions, schedule: Schedule, master: Parameters, compute: Parameters, microbatches: PyTree) -> _Pass:
    master, compute, microbatches = vary((master, compute, microbatches))
    first, chunk = slot(microbatches, 0), jnp.zeros((), jnp.int32)
    outer, layers = (master.outer, compute.outer), (slot(master.layers, chunk), slot(compute.layers, chunk))
    residuals = _Residuals(functions)
    x = jax.eval_shape(lambda: vary(functions.embed(outer, first)))
    sums = jax.eval_shape(lambda x: functions.loss(outer, x, first)[1], x)
    reports, stored, early, late, operands = None, [], jax.tree.leaves(layers[0]), [], []
    if (schedule.backward_microbatch != IDLE).any():
        reports, stored = jax.eval_shape(lambda x: residuals.forward(layers, x, first, chunk)[1:], x)
    if schedule.splits_backward and not schedule.is_accumulation:
        jax.eval_shape(lambda stored, dy: residuals.cut(layers, stored, dy), stored, x)
        early, operands = jax.eval_shape(lambda stored, dy: residuals.backward(layers, stored, dy)[::2], stored, x)
        late = jax.eval_shape(lambda operands: residuals.weights(layers, operands), operands)
    shapes = _Shapes(x, sums, reports, stored, early, late, operands)
    slots, stage = allocate_slots(schedule), lax.axis_index("pipe")
    return _Pass(functions, schedule, slots, master, compute, microbatches, stage, residuals, shapes)


def loss_and_gradients(
    functions: Functions, schedule: Schedule, master: Parameters, compute: Parameters, microbatches: PyTree
) -> Result:
    """Return the gradients of loss + auxiliary losses, summed over the microbatches, whose leaves are [microbatches, ...]."""
    run = _begin(functions, schedule, master, compute, microbatches)
    carry = {
        "outer": zeros(run.master.outer, jnp.float32),
        "layers": zeros(run.master.layers, jnp.float32),
        "sums": zeros(run.shapes.sums),
        "reports": zeros(run.shapes.reports, slots=schedule.chunks),
    }
    if schedule.is_accumulation:
        carry = _run_table(run, lambda patterns, carry, row: _tick_at_once(run, carry, row), carry)
    else:
        carry |= {
            "activation": zeros(run.shapes.x, slots=run.slots.activation_count + 1),
            "gradient": zeros(run.shapes.x, slots=run.slots.gradient_count + 1),
            "residual": zeros(run.shapes.stored, slots=run.slots.residual_count + 1),
            "operand": zeros(run.shapes.operands, slots=run.slots.operand_count + 1),
        }
        carry = _run_table(run, lambda patterns, carry, row: _tick(run, patterns, carry, row), carry)
    auxiliary, reports = carry["reports"]
    return Result(carry["sums"], auxiliary.sum(), reports, Parameters(carry["outer"], carry["layers"]))


def forward(functions: Functions, schedule: Schedule, master: Parameters, compute: Parameters, microbatches: PyTree) -> PyTree:
    """Return the sums of `functions.loss` over all microbatches, this device's share; `schedule` holds forwards only."""
    run = _begin(functions, schedule, master, compute, microbatches)
    carry = {"sums": zeros(run.shapes.sums), "activation": zeros(run.shapes.x, slots=run.slots.activation_count + 1)}
    idle = zeros((run.shapes.x, run.shapes.sums))

    def tick(patterns: TickRun, carry: dict, row: dict) -> dict:
        def part() -> tuple[jax.Array, PyTree]:
            microbatch, chunk = slot(run.microbatches, row["forward_microbatch"]), row["forward_chunk"]
            x = _input(run, row, carry["activation"], microbatch)
            y, _, _ = functions.layers(run.layers(chunk), x, microbatch, chunk)
            last = run.is_last(chunk)
            return y, _when(run.ends, last, lambda: functions.loss(run.outer, y, microbatch)[1], lambda: idle[1])

        y, sums = _when(patterns.forward, row["forward_microbatch"] != IDLE, part, lambda: idle)
        activation = _receive(carry["activation"], _send(run, y, +1), row["activation_write"])
        return {"sums": add(carry["sums"], sums), "activation": activation}

    return _run_table(run, tick, carry)["sums"]
