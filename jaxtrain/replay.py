"""`python -m jaxtrain.replay --config=... --step=120`: computes a recorded step again, and says where it comes out otherwise.

Takes the newest checkpoint before the step (or the initial state), goes on to the step, and computes it once more on the mesh
and in the dtype that the flags say: `--mesh.tensor=2 --model.dtype=float32`. Compared are loss and gradient norm with the row
of metrics.jsonl; or, with `--against "mesh.tensor=2,mesh.data=1"`, loss, the activations after every layer and the gradients of
every array with the same step computed in that layout, from the same bits. Reads run_dir, and writes nothing.

Exit codes: 0 the same within the tolerance, 1 not, or another error explained in one message, 2 wrong usage.
"""

from __future__ import annotations

if __name__ == "__main__":
    import jaxtrain.early  # noqa: F401, before all else: Ctrl-C ends the program from here on
    from jaxtrain import cli

    cli.run("jaxtrain.replay", joins=True)

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxtrain.checkpoint import check_same_run, committed_steps, read_metadata, restore
from jaxtrain.command_line import parse_command_line, parse_with_flags
from jaxtrain.config import Config
from jaxtrain.config_fields import split_items
from jaxtrain.config_rules import validate
from jaxtrain.data.pipeline import Data, open_data
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, UsageError
from jaxtrain.launch import distributed
from jaxtrain.launch.watchdog import Watchdog
from jaxtrain.main import ask_for_memory, count_devices
from jaxtrain.mesh import describe_mesh, make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.numerics import settle
from jaxtrain.processes import own_index
from jaxtrain.telemetry.heartbeat import Heartbeat
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.text import open_console
from jaxtrain.train.feed import owned_rows, to_global
from jaxtrain.train.layer_moments import Difference, LayerMoments, differences, make_layer_moments, relative
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.rollbacks import Rollbacks
from jaxtrain.train.run import metadata
from jaxtrain.train.state import Canonical, create_state
from jaxtrain.train.step import TrainSteps, batch_names, batch_sharding, choose_attention

PROG = "python -m jaxtrain.replay"
DESCRIPTION = "Compute a recorded step again, on any mesh, and compare it with the record or with another layout."
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
MOST_SHOWN = 12
PyTree = Any


@dataclass(frozen=True)
class ReplayFlags:
    """What to compute again, and what to compare it with."""

    step: int = 0
    """The step, from 1."""
    against: str = ""
    """Another layout, as flags over the config: "mesh.tensor=2,mesh.data=1,model.dtype=float32". Empty for the record."""
    tolerance: float = 0.0
    """Largest relative difference that is none; 0 for 1e-3, or 5e-2 where something is computed in bfloat16."""
    json: bool = False
    """Print JSON instead of a table."""


class Layout:
    """A config made ready on a mesh."""

    def __init__(self, config: Config):
        if config.sync.sums_apart:
            raise UsageError(
                f"replay computes steps of replicas that are summed together; sync.mode={config.sync.mode} with "
                f"compression={config.sync.compression} sums them apart"
            )
        self.config, self.mesh = config, make_mesh(config.mesh)
        self.optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
        self.backend, _ = choose_attention(config, self.mesh)
        self.sharding = batch_sharding(self.mesh)
        self.canonical = Canonical(config, self.mesh, self.optimizer)
        self.rollbacks = Rollbacks.load(config.directory)

    def __str__(self) -> str:
        return f"{describe_mesh(self.mesh)} in {self.config.model.dtype}"

    def batch(self, data: Data, steps_before: int) -> PyTree:
        """What the step with so many steps before it trains on, as global arrays; batches that the run left out are not."""
        number = self.rollbacks.batch(steps_before)
        size = self.config.train.global_batch_size
        rows = owned_rows(self.sharding, (size, self.config.data.sequence_length))
        return to_global(data.train_batch(number, rows), rows, size, batch_names(self.config), self.sharding)

    def state_before(self, step: int, data: Data) -> tuple[PyTree, int]:
        """(the state that the step began with, the step of the checkpoint that it was computed from)."""
        folder = self.config.directory / "checkpoints"
        first = max((saved for saved in committed_steps(folder) if saved < step), default=0)
        if first:
            saved = read_metadata(folder, first)
            check_same_run(saved, metadata(self.config, data, {}), folder)
            state = self.canonical.to_state(restore(folder, first, self.canonical.abstract), saved.get("guard"))
        else:
            state = create_state(self.config, self.mesh, self.optimizer)
        if first < step - 1:
            steps = TrainSteps(self.config, self.mesh, self.optimizer, self.backend, first, step - 1)
            for number in range(first, step - 1):
                state, metrics = steps(state, self.batch(data, number))
                jax.block_until_ready(metrics)
        return state, first

    def take(self, other: Layout, state: PyTree) -> PyTree:
        """A state of the other layout, bit for bit, in this one."""
        canonical = other.canonical.from_state(state)
        return self.canonical.to_state(
            jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), canonical, self.canonical.abstract)
        )

    def moments(self, state: PyTree, batch: PyTree) -> LayerMoments:
        """What the step comes to."""
        return make_layer_moments(self.config, self.mesh, self.backend)(state["params"], batch)


def recorded(config: Config, step: int) -> dict[str, float]:
    """Loss and gradient norm of a step as the run logged them.

    Raises:
      UsageError: it logged no row for that step; names the nearest that it did.
    """
    rows = {row["step"]: row for row in read_rows(config.directory / "metrics.jsonl") if "loss" in row and "grad_norm" in row}
    if step not in rows:
        near = sorted(sorted(rows, key=lambda logged: abs(logged - step))[:4])
        logged = f"steps near it: {', '.join(map(str, near))}" if near else "there are no rows at all"
        raise UsageError(
            f"--step={step} has no row in {config.directory / 'metrics.jsonl'} ({logged}); give one that has, or compare with "
            "another layout: --against mesh.data=2"
        )
    not_finite = rows[step].get("not_finite", {})
    return {name: float(not_finite.get(name, rows[step][name])) for name in ("loss", "grad_norm")}


def with_record(found: LayerMoments, record: dict[str, float]) -> list[Difference]:
    """Loss and gradient norm against the record."""
    return [
        Difference("the loss", relative(found.loss, record["loss"]), f"{found.loss:.6g}, recorded {record['loss']:.6g}"),
        Difference(
            "the gradient norm",
            relative(found.grad_norm, record["grad_norm"]),
            f"{found.grad_norm:.6g}, recorded {record['grad_norm']:.6g}",
        ),
    ]


def show(title: str, found: Sequence[Difference], tolerance: float) -> None:
    """Prints what was compared: all of it, or where it is long the parts that differ and those before."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for head in ("computed", "difference", "farthest apart", ""):
        table.add_column(head, justify="right" if head == "difference" else "left")
    wrong = [i for i, each in enumerate(found) if each.difference > tolerance]
    start = max(wrong[0] - 2, 0) if wrong and len(found) > MOST_SHOWN else 0
    for each in found[start : start + MOST_SHOWN]:
        differs = each.difference > tolerance
        table.add_row(
            each.what, f"{each.difference:.2g}", each.where, "differs" if differs else "=", style="red" if differs else ""
        )
    console = open_console(140)
    console.print(table)
    if len(found) > table.row_count:
        console.print(f"{len(found) - table.row_count} more were compared; --json has all")
    console.print(verdict(found, tolerance))


def verdict(found: Sequence[Difference], tolerance: float) -> str:
    """One line: the first that differs, in the order in which a step is computed."""
    wrong = [each for each in found if each.difference > tolerance]
    if not wrong:
        return f"the same: no more than {max(each.difference for each in found):.2g} apart (tolerance {tolerance:.2g})"
    return f"first to differ: {wrong[0].what}, by {wrong[0].difference:.2g} (tolerance {tolerance:.2g}; {wrong[0].where})"


def other_config(of_config: Sequence[str], against: str) -> Config:
    """The config with the flags of --against over it.

    Raises:
      UsageError: it is not of the form name=value,name=value.
    """
    parts = split_items(against)
    if any("=" not in part or part.startswith("-") for part in parts):
        raise UsageError(f"--against={against!r}: give flags over the config, e.g. --against mesh.tensor=2,mesh.data=1")
    return parse_command_line([*of_config, *(f"--{part}" for part in parts)], "The other layout.", PROG)


def without_own_flags(arguments: Sequence[str]) -> list[str]:
    """The command line without the verb's own flags, so that it can be read again with others over it."""
    own, rest, i = {field.name for field in dataclasses.fields(ReplayFlags)}, [], 0
    while i < len(arguments):
        name, equals, _ = arguments[i].partition("=")
        if name.removeprefix("--") in own and name.startswith("--"):
            i += 1 if equals or name == "--json" else 2
        else:
            rest.append(arguments[i])
            i += 1
    return rest


def main(arguments: Sequence[str]) -> int:
    """Parses, restores, computes, compares, prints; returns the exit code."""
    flags, config = parse_with_flags(arguments, ReplayFlags, DESCRIPTION, PROG)
    if flags.step < 1:
        raise UsageError(f"--step={flags.step}: give the number of a step, from 1")
    if not 0 <= flags.tolerance < 1:
        raise UsageError(f"--tolerance={flags.tolerance}: give a relative difference from 0 to 1")
    other_flags = other_config(without_own_flags(arguments), flags.against) if flags.against else None
    settle()
    place = distributed.start(config.distributed)
    heartbeat = Heartbeat.from_environment()
    heartbeat.phase("replaying")
    with Watchdog(config, heartbeat):
        return replay(config, flags, other_flags, place.local_processes if place else 1)


def replay(config: Config, flags: ReplayFlags, other_flags: Config | None, local_processes: int) -> int:
    """Restore, compute, compare, print; return the exit code."""
    devices = count_devices()
    config = validate(config, devices)
    ask_for_memory(config, local_processes, lambda line: print(line, file=sys.stderr))
    record = recorded(config, flags.step) if other_flags is None else {}
    layout = Layout(config)
    other = Layout(validate(other_flags, devices)) if other_flags is not None else None
    data = open_data(config)
    state, first = layout.state_before(flags.step, data)
    found = layout.moments(state, layout.batch(data, flags.step - 1))
    dtypes = {config.model.dtype}
    if other is None:
        compared, beside = with_record(found, record), "the record"
    else:
        there = other.moments(other.take(layout, state), other.batch(data, flags.step - 1))
        compared, beside = differences(found, there), str(other)
        dtypes.add(other.config.model.dtype)
    tolerance = flags.tolerance or max(TOLERANCE[dtype] for dtype in dtypes)
    same = all(each.difference <= tolerance for each in compared)
    if own_index() == 0:
        begin = f"the checkpoint of step {first}" if first else "the initial state"
        title = f"step {flags.step} of {config.name} from {begin}: {layout}, against {beside}"
        if flags.json:
            rows = [dataclasses.asdict(each) for each in compared]
            print(json.dumps({"same": same, "title": title, "tolerance": tolerance, "differences": rows}))
        else:
            show(title, compared, tolerance)
    return EXIT_DONE if same else EXIT_ERROR
