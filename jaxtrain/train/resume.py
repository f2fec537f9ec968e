"""What a run goes on from: a snapshot, a checkpoint or the initial state; and the way back to one after a bad step."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxtrain.checkpoint import Checkpoints, check_same_run
from jaxtrain.checkpoint.addresses import find
from jaxtrain.checkpoint.branches import leave, newest_return
from jaxtrain.checkpoint.fast import FastTier
from jaxtrain.checkpoint.same_run import as_json_gives_it_back
from jaxtrain.config import Config, Recipe, to_plain
from jaxtrain.data.pipeline import Data
from jaxtrain.errors import CheckpointError
from jaxtrain.files import ReplacedFiles, replace_file, user_path
from jaxtrain.huggingface.importing import TRAVELLING_FOLDER
from jaxtrain.parts import digests
from jaxtrain.processes import from_first, in_first
from jaxtrain.telemetry.flops import num_parameters
from jaxtrain.telemetry.metrics import size_up_to
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.bad_steps import RollBack
from jaxtrain.train.initial_weights import from_words
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.rollbacks import FILE as ROLLBACKS_FILE
from jaxtrain.train.rollbacks import Rollbacks
from jaxtrain.train.state import abstract_state, check_same_replicas
from jaxtrain.train.step_acceptance import record_to_plain

PyTree = Any


def metadata(config: Config, data: Data, program: dict[str, str]) -> dict[str, Any]:
    """Return what a checkpoint says about the run that it belongs to, and the `program` that saved it (`about_program`)."""
    return {
        "program": program,
        "config": to_plain(config),
        "recipe": Recipe(config).to_plain(),
        "parts": digests(config.parts, config.model.parts),
        "data_fingerprint": data.fingerprint,
        "num_parameters": num_parameters(config.model).total,
        "validation_bytes": data.validation_bytes,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
    }


def described(
    now: dict[str, Any], origin: dict[str, Any], rollbacks: Rollbacks, state: PyTree, validated: dict[str, Any]
) -> dict[str, Any]:
    """Return the metadata of a checkpoint of this state.

    Args:
      now: `metadata`.
      origin: where the initial weights came from; empty if they were random.
      validated: the newest validation.
    """
    guard = record_to_plain(state.get("guard", {}))
    found = now | {"rollbacks": rollbacks.to_plain(), "guard": guard, "validation": validated}
    return found | ({"origin": origin} if origin else {})


def leave_later_steps(run_dir: Path, step: int, rollbacks: Rollbacks) -> Path:
    """Make a branch of what a run has after `step`, so that it goes on from there; return it. Process 0 alone calls it.

    Raises:
      OSError: the branch cannot be made.
    """
    files = {ROLLBACKS_FILE: rollbacks.until(step).to_json()} if len(rollbacks) else {}
    branch = leave(run_dir, step, files)
    if (run_dir / TRAVELLING_FOLDER).is_dir():
        (branch / TRAVELLING_FOLDER).symlink_to(os.path.join("..", "..", TRAVELLING_FOLDER))
    return branch


class Resume:
    """The beginning of a run, and what its checkpoints say of it.

    Args:
      checkpoints: None where the run saves nothing.
      fast: None where it takes no snapshots.
    """

    def __init__(
        self,
        prepared: Prepared,
        now: dict[str, Any],
        checkpoints: Checkpoints | None,
        fast: FastTier | None,
        progress: Progress,
    ):
        self._prepared, self._now, self._checkpoints, self._fast = prepared, now, checkpoints, fast
        self._config, self._progress = prepared.config, progress
        self._directory = prepared.config.directory
        self.canonical = prepared.canonical()
        self.rollbacks = Rollbacks()
        self.restored: dict[str, Any] = {}
        """Metadata of the checkpoint or snapshot that was restored; empty for a fresh state."""

    def begin(self) -> tuple[PyTree, int]:
        """Return the state to train on and the steps it has seen.

        Raises:
          CheckpointError: what is saved is of another run, or none can be restored.
        """
        notes: list[str] = []
        with self._progress.during("restoring"):
            self.rollbacks = Rollbacks.load(self._directory)
            chosen = self._chosen()
            found = snapshot = None if chosen else self._newest_snapshot(notes)
            if chosen:
                found = self._go_back_to(*chosen, notes)
            elif snapshot is None and self._checkpoints:
                found = self._checkpoints.restore_newest(self.canonical.abstract, self._acceptance(notes))
        state, step = self._state_of(found) if snapshot is None else (snapshot[1], snapshot[0])
        if snapshot is not None:
            self._prepared.origin = self.restored.get("origin", {})
        if found is None and self._prepared.origin:
            self._progress.say(f"weights    {from_words(self._prepared.origin)}")
        if found is not None:
            self._progress.advance(step)
            where = "" if snapshot is None else f", a snapshot in {self._config.checkpoint.fast_dir}"
            self._progress.say(f"resume     from step {step}{where}" + "".join(f"\n           changed: {n}" for n in notes))
        for first, last in self.rollbacks.left_out():
            self._progress.say(f"left out   batches {first} to {last}, by {ROLLBACKS_FILE}")
        return state, step

    def _chosen(self) -> tuple[str, int] | None:
        """Return (folder, step) of the checkpoint that checkpoint.resume names; None to go on from the newest here.

        Once the run has gone back to it, or begun from it, the same command goes on from the newest.
        """
        resume, checkpoints = self._config.checkpoint.resume, self._checkpoints
        if checkpoints is None or resume in ("auto", "never", "required"):
            return None
        own = os.fspath(checkpoints.directory)
        if resume.isdecimal():
            if from_first(newest_return(self._directory)) != int(resume):
                return own, int(resume)
            self._progress.say(
                f"resume     this run went back to step {resume} before, and goes on from its newest step; "
                f"`jaxtrain checkpoint rewind {self._directory}:{resume}` goes back once more"
            )
        run, _, step = resume.rpartition("@")
        if run and os.path.realpath(user_path(run)) == os.path.realpath(self._directory):
            raise CheckpointError(
                f"--checkpoint.resume={resume} is this run itself; give its step, as --checkpoint.resume={step}"
            )
        if resume.isdecimal() or checkpoints.step_to_resume() is not None:
            return None
        folder, chosen = _in_first(lambda: find(resume))
        return folder, chosen

    def _go_back_to(self, folder: str, step: int, notes: list[str]) -> tuple[int, PyTree]:
        """Return (step, state) of that checkpoint, of which the run goes on: what this folder has after it becomes a branch, or
        what another run has before it is this run's past.

        Raises:
          CheckpointError: it cannot be restored, is of another run, or its run_dir cannot be written; nothing has changed then.
        """
        assert self._checkpoints is not None
        found = self._checkpoints.restore_chosen(folder, step, self.canonical.abstract, self._acceptance(notes))
        here, there = self._directory, Path(folder).parent
        if here.absolute() == there:
            branch = _in_first(lambda: os.fspath(leave_later_steps(here, step, self.rollbacks)))
            self._checkpoints.went_back_to(step)
            self._progress.say(f"branch     what came after step {step} is kept in {branch}")
            self.rollbacks = self.rollbacks.until(step)
        else:
            _in_first(lambda: _take_past(there, here, step))
            self.rollbacks = Rollbacks.load(there).until(step)
            self.restored |= {"branched_from": {"run": os.fspath(there), "step": step}}
            self._progress.say(f"branch     of step {step} of {there}")
        return found

    def roll_back(self, why: RollBack, files: ReplacedFiles) -> tuple[PyTree, int, dict[str, Any]]:
        """Return (state, step) of the newest checkpoint, to go on from without the batches left out now, and a row to log."""
        assert self._checkpoints is not None, "config.rules asks for checkpoints"
        with self._progress.during("rolling back"):
            self._checkpoints.set_aside_after(why.step - 1, f"rolled back: {why.reason}")
            found = self._checkpoints.return_to_newest(self.canonical.abstract, self._acceptance([]))
            state, step = self._state_of(found)
            if self._fast is not None:
                self._fast.clear()  # else a restart would go on from after the return
            rollback = self.rollbacks.add(why.step, step, why.reason, why.batches)
            if jax.process_index() == 0:  # the next checkpoint's metadata has them too
                files.write(self._directory / ROLLBACKS_FILE, self.rollbacks.to_json(), durable=True)
        left_out = f", without batches {rollback.first_batch} to {rollback.last_batch} from now on" if why.batches else ""
        self._progress.advance(step)
        self._progress.say(f"rollback   step {why.step}: {why.reason}; back to step {step}{left_out}")
        row = {"step": step, "bad_step": why.reason, "policy": "rollback", "rolled_back_from": why.step}
        return state, step, row | {"first_batch": rollback.first_batch, "last_batch": rollback.last_batch}

    def describe(self, state: PyTree, validated: dict[str, Any]) -> dict[str, Any]:
        """Return the metadata of a checkpoint of this state; `validated` is the newest validation."""
        branched = {name: self.restored[name] for name in ("branched_from",) if name in self.restored}
        return described(self._now, self._prepared.origin, self.rollbacks, state, validated) | branched

    def reached_before(self, step: int) -> str | None:
        """Return why the run has nothing left at `step`, where it stopped for its validation loss and may not go below it."""
        saved, train = self.restored.get("validation", {}), self._config.train
        limit, loss = train.stop_at_validation_loss, saved.get(train.validation_metric, 0.0)
        if saved.get("step") != step or not 0 < loss <= limit:
            return None
        return (
            f"{train.validation_metric.replace('_', ' ')} {loss:.4f} had reached train.stop_at_validation_loss={limit} at "
            f"step {step}; a lower one trains on, 0 to train.steps"
        )

    def _acceptance(self, notes: list[str]) -> Callable[[int, dict[str, Any]], None]:
        """Return a check of checkpoints by their metadata, which it remembers; what has changed since goes into `notes`."""
        directory = self._directory / "checkpoints"

        def accept(step: int, saved: dict[str, Any]) -> None:
            last = self._config.train.steps
            done = Rollbacks.from_plain(saved.get("rollbacks", [])).batch(step - 1) + 1 if step else 0
            notes[:] = check_same_run(saved, self._now, directory, done)
            check_same_replicas(saved.get("config", {}), self._config, directory)
            if step > last:
                raise CheckpointError(
                    f"{directory} already holds step {step}, beyond train.steps={last}; "
                    f"use --train.steps={step} or more, or another --run_dir"
                )
            self.restored = saved
            earlier, recipe = saved.get("earlier_recipes", []), saved.get("recipe")
            if recipe and recipe != as_json_gives_it_back(self._now["recipe"]):
                earlier = [*earlier, {"to_step": step, **recipe}]
            self._now["earlier_recipes"] = earlier

        return accept

    def _state_of(self, found: tuple[int, PyTree] | None) -> tuple[PyTree, int]:
        """Return the state to train on and its step, from a restored checkpoint, or fresh where there is none."""
        if found is None:
            with self._progress.during("initialising"):
                return self._prepared.create_state(), 0
        self._prepared.origin = self.restored.get("origin", {})
        saved = Rollbacks.from_plain(self.restored.get("rollbacks", []))
        if len(saved) > len(self.rollbacks):  # the folder was moved without the file
            self.rollbacks = saved
        return self.canonical.to_state(found[1], self.restored.get("guard")), found[0]

    def _newest_snapshot(self, notes: list[str]) -> tuple[int, PyTree] | None:
        """Return (step, state) of a snapshot that is newer than every checkpoint, where all processes hold one."""
        if self._fast is None or self._checkpoints is None:
            return None
        abstract = abstract_state(self._config, self._prepared.mesh, self._prepared.optimizer)
        return self._fast.restore(self._checkpoints.step_to_resume() or 0, abstract, self._acceptance(notes))


def _in_first(work: Callable[[], Any]) -> Any:
    """Do `processes.in_first`; a failure is a CheckpointError."""
    return in_first(work, lambda problem: CheckpointError(f"--checkpoint.resume: {problem}"))


def _take_past(source: Path, run_dir: Path, step: int) -> None:
    """Copy a run's metrics up to `step`, and the files that go with its weights, into the folder of a run that goes on from it.

    Raises:
      OSError: they cannot be read or written.
    """
    metrics, beside = source / "metrics.jsonl", source / TRAVELLING_FOLDER
    if metrics.is_file():
        replace_file(run_dir / metrics.name, metrics.read_bytes()[: size_up_to(metrics, step)])
    if beside.is_dir() and not (run_dir / beside.name).exists():
        shutil.copytree(beside, run_dir / beside.name)
