"""Compute a recorded step again, on any mesh and in any dtype, and compare it with the record or with another layout.

Starts from the newest checkpoint before the step (or the initial state), trains up to the step, and computes it once more.
Compared are loss and gradient norm with the row of metrics.jsonl; or, with another layout, loss, the activations after every
layer and the gradients of every array with the same step computed in that layout, from the same bits. Reads run_dir, and writes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from jaxtrain.checkpoint import check_same_run, committed_steps, read_metadata, restore
from jaxtrain.config import Config
from jaxtrain.data.pipeline import Data, open_data
from jaxtrain.errors import UsageError
from jaxtrain.telemetry.metrics import read_rows
from jaxtrain.train.completion import Completion, completion_of
from jaxtrain.train.layer_moments import Difference, LayerMoments, differences, make_layer_moments, relative
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.resume import metadata
from jaxtrain.train.rollbacks import Rollbacks
from jaxtrain.train.step import TrainSteps

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
PyTree = Any


class ReplayedLayout(Prepared):
    """A config made ready on a mesh, to compute a step of its run again."""

    def __init__(self, config: Config):
        if config.objective.kind == "grpo":
            raise UsageError("replay computes steps on batches of the data again; those of objective.kind=grpo are rollouts")
        if config.sync.sums_apart:
            raise UsageError(
                f"replay computes steps of replicas that are summed together; sync.mode={config.sync.mode} with "
                f"compression={config.sync.compression} sums them apart"
            )
        super().__init__(config)
        self.canonical_form, self.rollbacks = self.canonical(), Rollbacks.load(config.directory)
        self._completed: Completion | None = None

    def batch(self, data: Data, steps_before: int) -> PyTree:
        """Return the global arrays of the step that has `steps_before` steps before it, with left-out batches skipped."""
        if self._completed is None:
            self._completed = completion_of(self, lambda: data, lambda: self.create_state()["params"])
        number = self.rollbacks.batch(steps_before)
        at = self.at(number)
        return self._completed(at.place(data.train_batch(number, at.rows())))

    def state_before(self, step: int, data: Data) -> tuple[PyTree, int]:
        """(the state before the step, the step of the checkpoint that it was computed from)."""
        folder = self.config.directory / "checkpoints"
        first = max((saved for saved in committed_steps(folder) if saved < step), default=0)
        if first:
            saved = read_metadata(folder, first)
            check_same_run(saved, metadata(self.config, data, {}), folder, step - 1)
            state = self.canonical_form.to_state(restore(folder, first, self.canonical_form.abstract), saved.get("guard"))
        else:
            state = self.create_state()
        if first < step - 1:
            steps = TrainSteps(self, first, step - 1, self.rollbacks.batch)
            for number in range(first, step - 1):
                state, metrics = steps(state, self.batch(data, number))
                jax.block_until_ready(metrics)
        return state, first

    def take(self, other: ReplayedLayout, state: PyTree) -> PyTree:
        """Convert a state of the other layout into this one, bit for bit."""
        canonical = other.canonical_form.from_state(state)
        return self.canonical_form.to_state(
            jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), canonical, self.canonical_form.abstract)
        )

    def moments(self, state: PyTree, batch: PyTree) -> LayerMoments:
        return make_layer_moments(self.config, self.mesh, self.backend)(state["params"], batch)

    def moments_of(self, state: PyTree, data: Data, step: int) -> LayerMoments:
        """Return the moments of a step, from 1, of the run's data."""
        return self.at(self.rollbacks.batch(step - 1)).moments(state, self.batch(data, step - 1))


def recorded(config: Config, step: int) -> dict[str, float]:
    """Return the logged loss and gradient norm of a step.

    Raises:
      UsageError: the step has no logged row; names the nearest that has.
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
    """Compare the loss and gradient norm with the record."""
    return [
        Difference("the loss", relative(found.loss, record["loss"]), f"{found.loss:.6g}, recorded {record['loss']:.6g}"),
        Difference(
            "the gradient norm",
            relative(found.grad_norm, record["grad_norm"]),
            f"{found.grad_norm:.6g}, recorded {record['grad_norm']:.6g}",
        ),
    ]


@dataclass(frozen=True)
class Replayed:
    """A recomputed step's differences from its record or from another layout."""

    title: str
    differences: list[Difference]
    tolerance: float

    @property
    def same(self) -> bool:
        """Return whether all differences are within the tolerance."""
        return all(each.difference <= self.tolerance for each in self.differences)


def replay(config: Config, step: int, against: Config | None = None, tolerance: float = 0.0) -> Replayed:
    """Restore, compute, compare.

    Args:
      config: a valid config with a resolved mesh, as `against`.
      step: step number, from 1.
      against: another layout; None: compare with the record.
      tolerance: largest relative difference to accept; 0: that of the dtypes (`TOLERANCE`).
    """
    record = recorded(config, step) if against is None else {}
    layout, other = ReplayedLayout(config), None if against is None else ReplayedLayout(against)
    data = open_data(config)
    state, first = layout.state_before(step, data)
    found = layout.moments_of(state, data, step)
    dtypes = {config.model.dtype}
    if other is None:
        compared, beside = with_record(found, record), "the record"
    else:
        there = other.moments_of(other.take(layout, state), data, step)
        compared, beside = differences(found, there), str(other)
        dtypes.add(other.config.model.dtype)
    begin = f"the checkpoint of step {first}" if first else "the initial state"
    title = f"step {step} of {config.name} from {begin}: {layout}, against {beside}"
    return Replayed(title, compared, tolerance or max(TOLERANCE[dtype] for dtype in dtypes))
