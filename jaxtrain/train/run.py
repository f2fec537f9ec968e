"""A training run, top to bottom, no way back up: mesh -> data -> restore or initialise -> compile once -> loop -> save."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.agreement import compare
from jaxtrain.checkpoint import Checkpoints, check_same_run, committed_steps
from jaxtrain.checkpoint.fast import FastTier
from jaxtrain.config import Config, to_json
from jaxtrain.data.pipeline import Data, open_data
from jaxtrain.errors import EXIT_DONE, EXIT_STOPPED, CheckpointError, NumbersError, Stopped
from jaxtrain.files import AppendedFile, ReplacedFiles, user_path
from jaxtrain.generate import sample
from jaxtrain.hardware import resolve_chip
from jaxtrain.mesh import describe_mesh, make_mesh
from jaxtrain.numerics import settled
from jaxtrain.parallel.sync import couples
from jaxtrain.processes import LONG_SECONDS
from jaxtrain.telemetry.clock import StepClock, StepWork
from jaxtrain.telemetry.energy import EnergyLog, Meter, open_meter
from jaxtrain.telemetry.flops import num_parameters
from jaxtrain.telemetry.metrics import MetricsLog, check_wandb
from jaxtrain.telemetry.plots import plot_losses
from jaxtrain.telemetry.profile import ProfileWindow
from jaxtrain.telemetry.progress import Progress
from jaxtrain.telemetry.run_log import RunLog, about_program, describe_program
from jaxtrain.telemetry.stragglers import Stragglers
from jaxtrain.text import readable_size
from jaxtrain.train.bad_steps import BadSteps, RollBack
from jaxtrain.train.feed import owned_rows, to_global
from jaxtrain.train.hooks import HeartbeatHook, Logging, Profiling, Retrying, Saving, Snapshots, StopOnSignal, Validation
from jaxtrain.train.loop import Hook, Loop
from jaxtrain.train.nan_probe import NanProbe
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.recompute_check import RecomputeCheck
from jaxtrain.train.rollbacks import FILE as ROLLBACKS_FILE
from jaxtrain.train.rollbacks import Rollbacks, rollbacks_digest
from jaxtrain.train.run_dir import largest_before, make_run_dir, only_run_in, use_compilation_cache
from jaxtrain.train.schedule import make_learning_rate, warmup_steps
from jaxtrain.train.state import Canonical, abstract_state, check_same_replicas, create_state
from jaxtrain.train.state_check import StateCheck
from jaxtrain.train.step import (
    TrainSteps,
    batch_names,
    batch_sharding,
    choose_attention,
    make_evaluation_step,
    make_logits_step,
)
from jaxtrain.train.step_acceptance import record_to_plain

PyTree = Any
PICTURE = "loss.png"
DATA_WAY_OUT = "give every host the same data and tokenizer files, and a --run_dir that all hosts share"


def metadata(config: Config, data: Data, program: dict[str, str]) -> dict[str, Any]:
    """Return what a checkpoint says about the run that it belongs to, and the `program` that saved it (`about_program`)."""
    return {
        "program": program,
        "config": dataclasses.asdict(config),
        "data_fingerprint": data.fingerprint,
        "num_parameters": num_parameters(config.model).total,
        "validation_bytes": data.validation_bytes,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
    }


class Run:
    """A run made ready: mesh, data, optimizer. `train` takes it to its end.

    Args:
      config: valid and resolved (`config.validate`).
      progress: what the person sees.
      stop: entered by the caller; without it signals do what they always do.

    Raises:
      ExplainedError: the data, the run folder the attention backend or the meter of energy cannot be had.
    """

    @settled()
    def __init__(self, config: Config, progress: Progress, stop: StopOnSignal | None = None):
        self.config, self.progress, self.stop = config, progress, stop or StopOnSignal(progress)
        self.directory = config.directory
        make_run_dir(self.directory)
        self.files, self.program = ReplacedFiles(progress.say), about_program() if jax.process_index() == 0 else {}
        self.log = progress.log = RunLog(self.directory, progress.say) if jax.process_index() == 0 else None
        if jax.process_index() == 0:
            check_wandb(config.telemetry.wandb_project)
        use_compilation_cache(config, progress)
        self.mesh = make_mesh(config.mesh)
        self.chip = resolve_chip(config.telemetry.hardware, jax.devices()[0].device_kind)
        self.backend, why = choose_attention(config, self.mesh)
        self.optimizer = optimizer_of(config)
        self.sharding = batch_sharding(self.mesh)
        count = num_parameters(config.model)
        progress.say(f"run        {config.name} in {self.directory}")
        if self.program:
            progress.say(f"program    {describe_program(self.program)}")
        progress.say(f"model      {count.total:,} parameters ({count.non_embedding:,} without embeddings)")
        progress.say(f"mesh       {describe_mesh(self.mesh)}")
        progress.say(f"attention  {self.backend} ({why})")
        warmup = warmup_steps(config.optimizer, config.train.steps)
        if warmup < config.optimizer.warmup_steps:
            asked = f"optimizer.warmup_steps={config.optimizer.warmup_steps}"
            progress.say(f"schedule   warm-up of {warmup} steps: half of train.steps={config.train.steps}, for {asked}")
        self.meter = self._open_meter()
        with progress.during("reading data"), self.stop.breakable():
            self.data = open_data(config)
        compare("data", self._data_facts(), DATA_WAY_OUT, LONG_SECONDS)  # a peer may read its text for the first time
        progress.say(f"data       {self.data.description}")
        self.canonical = Canonical(config, self.mesh, self.optimizer)
        self.rollbacks = Rollbacks()
        self._restored_metadata: dict[str, Any] = {}
        self.validation: Validation | None = None
        self.fast: FastTier | None = None

    @settled()
    def train(self) -> int:
        """Trains, saves, draws, samples; returns the exit code.

        Raises:
          ExplainedError: run_dir belongs to another run, or to a process that is training there; what is written or read on
            the way cannot be.
        """
        with contextlib.ExitStack() as log:
            return self._train(log)

    def _train(self, log: contextlib.ExitStack) -> int:
        """Train; the log is kept in `log` from when the folder is known to be ours."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(only_run_in(self.directory))
            self._keep_log(log)
            checkpoints = self._open_checkpoints(stack)
            if self.config.checkpoint.fast_every:
                self.fast = FastTier(
                    user_path(self.config.checkpoint.fast_dir), self.directory, lambda: self.rollbacks.to_json()
                )
            state, first = self._begin(checkpoints)
            if jax.process_index() == 0:  # not before the run is known to go on here: it must not cover up another run's
                self.files.write(self.directory / "config.json", to_json(self.config) + "\n")
            if (reached := self._reached_before(first)) or first == self.config.train.steps:
                return self._nothing_left(reached or f"all {first} steps were done before; a larger --train.steps trains on")
            self.stop.check()
            step_function = self._compile(first)
            self.stop.check()
            self.stop.couples = functools.partial(couples, self.config.sync)
            ended = self._loop(checkpoints, step_function, state, first)
            while isinstance(ended, RollBack):
                state, first, row = self._roll_back(checkpoints, ended)
                step_function.begin_at(first)
                ended = self._loop(checkpoints, step_function, state, first, row)
            loop, reason = ended
        if self.fast is not None:
            self.fast.clear()  # the last step is saved
        self.files.retry()
        self._draw()
        number = self.stop.agreed()
        if number is not None and loop.step < self.config.train.steps:
            return self._stopped(number, loop.step, checkpoints)
        self.progress.say(f"done       {reason or f'all {loop.step} steps'}")
        if self.config.train.sample_tokens:
            with contextlib.suppress(Stopped):  # the run is done, with or without a sample
                self._sample(loop.state["params"])
        return EXIT_DONE

    def _reached_before(self, step: int) -> str | None:
        """Return why the run has nothing left at `step`, where it stopped for its validation loss and may not go below it."""
        saved = self._restored_metadata.get("validation", {})
        if saved.get("step") != step or not 0 < saved["validation_loss"] <= self.config.train.stop_at_validation_loss:
            return None
        return (
            f"validation loss {saved['validation_loss']:.4f} had reached train.stop_at_validation_loss="
            f"{self.config.train.stop_at_validation_loss} at step {step}; a lower one trains on, 0 to train.steps"
        )

    def _nothing_left(self, reason: str) -> int:
        """Say so; draw what a process that died after its last save had no time to draw."""
        if self.fast is not None:
            self.fast.clear()
        if not (self.directory / PICTURE).exists():
            self._draw()
        self.progress.say(f"done       {reason}")
        return EXIT_DONE

    def _stopped(self, number: int, step: int, checkpoints: Checkpoints | None) -> int:
        if checkpoints:
            checkpoints.leave_the_mirror()
            self.progress.say(f"stopped    after saving step {step}; the same command goes on from there")
            return EXIT_STOPPED
        self.progress.say(f"stopped    after step {step}; nothing is saved, since checkpoint.every=0")
        return 128 + number

    def _open_checkpoints(self, stack: contextlib.ExitStack) -> Checkpoints | None:
        if not self.config.checkpoint.every:
            return None
        with self.progress.during("opening checkpoints"):
            checkpoints = stack.enter_context(Checkpoints(self.directory / "checkpoints", self.config.checkpoint))
        stack.callback(self.progress.now, "ending")  # before the checkpoints wait for their last copies
        self.stop.newest_saved = lambda: max(committed_steps(self.directory / "checkpoints"), default=0)
        return checkpoints

    def _keep_log(self, stack: contextlib.ExitStack) -> None:
        """Have process 0 keep what it says in run_dir/log.txt, and what this start is in run_dir/starts.jsonl."""
        if self.log is None:
            return
        starts = AppendedFile(self.directory / "starts.jsonl", self.progress.say)
        stack.callback(starts.close)
        stack.enter_context(self.log)
        starts.append((json.dumps(self.program) + "\n").encode())

    def _data_facts(self) -> dict[str, Any]:
        """Return what this process found in its files, and all processes must find alike."""
        return {
            "tokenizer fingerprint": self.data.tokenizer.fingerprint,
            "data fingerprint": self.data.fingerprint,
            "training tokens": self.data.tokens_per_epoch,
            "held-out tokens": self.data.validation_tokens,
            "validation batches": self.data.num_validation_batches(self.config.train.global_batch_size),
            ROLLBACKS_FILE: rollbacks_digest(self.directory),
        }

    def _open_log(self, first: int) -> MetricsLog:
        config = self.config
        return MetricsLog(
            self.directory,
            first,
            jax.process_index(),
            config.telemetry.wandb_project,
            config.name,
            dataclasses.asdict(config),
            self.progress.say,
        )

    def _begin(self, checkpoints: Checkpoints | None) -> tuple[PyTree, int]:
        """The state to train on and the steps it has seen: from the newest checkpoint, or fresh."""
        notes: list[str] = []
        with self.progress.during("restoring"):
            self.rollbacks = Rollbacks.load(self.directory)
            found = snapshot = self._newest_snapshot(checkpoints, notes)
            if snapshot is None and checkpoints:
                found = checkpoints.restore_newest(self.canonical.abstract, self._acceptance(notes))
        state, step = self._state_of(found) if snapshot is None else (snapshot[1], snapshot[0])
        if found is not None:
            self.progress.advance(step)
            where = "" if snapshot is None else f", a snapshot in {self.config.checkpoint.fast_dir}"
            self.progress.say(f"resume     from step {step}{where}" + "".join(f"\n           changed: {n}" for n in notes))
        for first, last in self.rollbacks.left_out():
            self.progress.say(f"left out   batches {first} to {last}, by {ROLLBACKS_FILE}")
        return state, step

    def _acceptance(self, notes: list[str]) -> Callable[[int, dict[str, Any]], None]:
        """Return a check of checkpoints by their metadata, which it remembers; what has changed since goes into `notes`."""
        directory = self.directory / "checkpoints"

        def accept(step: int, saved: dict[str, Any]) -> None:
            now, last = metadata(self.config, self.data, self.program), self.config.train.steps
            notes[:] = check_same_run(saved, now, directory)
            check_same_replicas(saved.get("config", {}), self.config, directory)
            if step > last:
                raise CheckpointError(
                    f"{directory} already holds step {step}, beyond train.steps={last}; "
                    f"use --train.steps={step} or more, or another --run_dir"
                )
            self._restored_metadata = saved

        return accept

    def _state_of(self, found: tuple[int, PyTree] | None) -> tuple[PyTree, int]:
        """The state to train on and its step, from a restored checkpoint, or fresh where there is none."""
        if found is None:
            with self.progress.during("initialising"):
                return create_state(self.config, self.mesh, self.optimizer), 0
        saved = Rollbacks.from_plain(self._restored_metadata.get("rollbacks", []))
        if len(saved) > len(self.rollbacks):  # the folder was moved without the file
            self.rollbacks = saved
        return self.canonical.to_state(found[1], self._restored_metadata.get("guard")), found[0]

    def _newest_snapshot(self, checkpoints: Checkpoints | None, notes: list[str]) -> tuple[int, PyTree] | None:
        """(step, state) of a snapshot that is newer than every checkpoint, where all processes hold one."""
        if self.fast is None or checkpoints is None:
            return None
        newest, abstract = checkpoints.step_to_resume() or 0, abstract_state(self.config, self.mesh, self.optimizer)
        return self.fast.restore(newest, abstract, self._acceptance(notes))

    def _roll_back(self, checkpoints: Checkpoints | None, why: RollBack) -> tuple[PyTree, int, dict[str, Any]]:
        """(state, step) of the newest checkpoint, to go on from without the batches that are left out now; a row to log."""
        assert checkpoints is not None, "config.rules asks for checkpoints"
        with self.progress.during("rolling back"):
            checkpoints.set_aside_after(why.step - 1, f"rolled back: {why.reason}")
            state, step = self._state_of(checkpoints.return_to_newest(self.canonical.abstract, self._acceptance([])))
            if self.fast is not None:
                self.fast.clear()  # else a restart would go on from after the return
            rollback = self.rollbacks.add(why.step, step, why.reason, why.batches)
            if jax.process_index() == 0:  # the next checkpoint's metadata has them too
                self.files.write(self.directory / ROLLBACKS_FILE, self.rollbacks.to_json(), durable=True)
        left_out = f", without batches {rollback.first_batch} to {rollback.last_batch} from now on" if why.batches else ""
        self.progress.advance(step)
        self.progress.say(f"rollback   step {why.step}: {why.reason}; back to step {step}{left_out}")
        row = {"step": step, "bad_step": why.reason, "policy": "rollback", "rolled_back_from": why.step}
        return state, step, row | {"first_batch": rollback.first_batch, "last_batch": rollback.last_batch}

    def _compile(self, first: int) -> TrainSteps | RecomputeCheck:
        started = time.perf_counter()
        with self.progress.during("compiling"):
            steps = TrainSteps(self.config, self.mesh, self.optimizer, self.backend, first, self.config.train.steps)
        programs = [program.memory_analysis() for program in steps.programs.values()]
        memory = max(programs, key=lambda program: program.temp_size_in_bytes)
        held, working = map(readable_size, (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
        self.progress.say(f"compiled   in {time.perf_counter() - started:.1f} s; a device holds {held}, works in {working}")
        if steps.description:
            self.progress.say(f"replicas   {steps.description}")
        return RecomputeCheck(self.config, self.mesh, self.backend, steps, first) if self.config.guard.repeat_every else steps

    def _loop(
        self,
        checkpoints: Checkpoints | None,
        steps: TrainSteps | RecomputeCheck,
        state: PyTree,
        first: int,
        row: dict[str, Any] | None = None,
    ) -> tuple[Loop, str | None] | RollBack:
        """Runs the loop and saves its end: (the loop as it ended, the reason of an early end), or the need to go back.

        Args:
          row: to log first.
        """
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self._open_log(first))
            if row:
                log.write(row)
            clock, energy = self._clocks(first)
            check = StateCheck(self.config, self.mesh, self.optimizer, self.rollbacks)
            saving = self._saving(checkpoints, clock, check)
            hooks = self._hooks(stack, log, clock, energy, [check, *saving, *self._snapshots(clock)])
            rows = self._rows(self.config.train.global_batch_size)
            batches = stack.enter_context(self.data.train_batches(first, rows, self.rollbacks.batch))

            def next_batch() -> PyTree:
                with clock.waiting_for_data():
                    batch = next(batches)
                return self._place(batch, self.config.train.global_batch_size)

            step_function, wait = map(clock.timed_as_waiting, (steps, jax.block_until_ready))
            loop = Loop(step_function, next_batch, wait, hooks, state, first, self.config.train.steps)
            clock.start()
            energy.start()
            try:
                reason = loop.run()
                for hook in saving:
                    hook.save_now(loop.step, loop.state)
            except (RollBack, NumbersError) as bad:
                # The step under way: XLA:CPU hangs where another program's collectives join in.
                jax.block_until_ready(loop.state)
                if isinstance(bad, NumbersError):
                    raise
                return bad.with_traceback(None)  # which holds the state
            return loop, reason

    def _clocks(self, first: int) -> tuple[StepClock, EnergyLog]:
        work, last = StepWork.of(self.config, self.mesh.devices.size, self.chip), self.config.train.steps
        logged = self.directory / "metrics.jsonl"
        clock = StepClock(work, last, first, largest_before(logged, first, "elapsed_seconds"))
        used = largest_before(logged, first, "energy_kwh")
        return clock, EnergyLog(self.meter, work.tokens_per_step, last, self.mesh.devices.size, first, used)

    def _hooks(
        self, stack: contextlib.ExitStack, log: MetricsLog, clock: StepClock, energy: EnergyLog, last_hooks: list[Hook]
    ) -> list[Hook]:
        config, last = self.config, self.config.train.steps
        profiling = Profiling(
            ProfileWindow(config.telemetry.profile, self.directory, jax.process_index(), self.progress.say), self.progress
        )
        stack.callback(profiling.close)
        learning_rate = make_learning_rate(config.optimizer, last)
        # Step 1 is logged whatever this process begins with: rows are a function of the step, not of interruptions.
        every = config.train.log_every
        stragglers = Stragglers(jax.process_index(), jax.process_count(), self.mesh, self.progress.say)
        return [
            *([HeartbeatHook(self.progress.heartbeat)] if self.progress.heartbeat else []),
            Retrying(self.files, every),
            profiling,
            Logging(log, self.progress, clock, learning_rate, every, 1, last, energy, stragglers),
            BadSteps(config, log, self.progress, self.rollbacks, self._diagnose if config.guard.debug_nans else None),
            *self._validation(log, clock),
            *last_hooks,
            self.stop,
        ]

    def _open_meter(self) -> Meter | None:
        """What measures the energy here; the log says which. Processes that log nothing need none."""
        if jax.process_index() != 0:
            return None
        local, count = jax.local_devices(), self.mesh.devices.size
        ordinals = [device.local_hardware_id or 0 for device in local]
        meter, words = open_meter(self.config.telemetry.energy, local[0].platform, ordinals)
        others = f", and the same for all {count}" if meter and 0 < meter.devices < count else ""
        if meter is not None:
            self.progress.say(f"energy     {words}{others}")
        return meter

    def _saving(self, checkpoints: Checkpoints | None, clock: StepClock, check: StateCheck) -> list[Saving]:
        """The hook that saves, where the config wants that."""
        if checkpoints is None:
            return []
        now, every = metadata(self.config, self.data, self.program), self.config.checkpoint.every
        stop = self.config.checkpoint.on_failure == "stop"

        def beside(state: PyTree) -> dict[str, Any]:
            validated = self.validation.finite() if self.validation else {}
            guard = record_to_plain(state.get("guard", {}))
            return now | {"rollbacks": self.rollbacks.to_plain(), "guard": guard, "validation": validated}

        return [Saving(checkpoints, self.canonical.from_state, beside, self.progress, clock, every, check, stop)]

    def _snapshots(self, clock: StepClock) -> list[Hook]:
        """The hook that takes snapshots, where the config wants that."""
        if self.fast is None:
            return []
        now, checkpoint, last = metadata(self.config, self.data, self.program), self.config.checkpoint, self.config.train.steps
        return [Snapshots(self.fast, now, self.progress, clock, checkpoint.fast_every, checkpoint.every, last)]

    def _rows(self, num_rows: int) -> slice:
        return owned_rows(self.sharding, (num_rows, self.config.data.sequence_length))

    def _place(self, batch: Any, num_rows: int) -> PyTree:
        return to_global(batch, self._rows(num_rows), num_rows, batch_names(self.config), self.sharding)

    def _diagnose(self, state: PyTree, step: int) -> str:
        """Where a step's numbers first went wrong, in words; `state` is that from before it."""
        size = self.config.train.global_batch_size
        batch = self._place(self.data.train_batch(self.rollbacks.batch(step - 1), self._rows(size)), size)
        return NanProbe(self.config, self.mesh, self.backend)(jax.block_until_ready(state["params"]), batch)

    def _validation(self, log: MetricsLog, clock: StepClock) -> list[Hook]:
        """The validation hook, where there is held-out data and the config wants it looked at."""
        config = self.config
        size = config.train.global_batch_size
        count = self.data.num_validation_batches(size)
        count = min(count, config.train.validate_batches or count)
        if not count or not config.train.validate_every:
            return []
        step = make_evaluation_step(config, self.mesh, self.backend)

        def evaluate(params: PyTree) -> float:
            batches = (self._place(self.data.validation_batch(i, self._rows(size), size), size) for i in range(count))
            sums = [jax.device_get(step(params, batch)) for batch in batches]
            return float(np.sum([s["loss"] for s in sums], dtype=np.float64) / np.sum([s["targets"] for s in sums]))

        if self.data.gzip_bits_per_byte:
            self.progress.say(f"baseline   gzip -9 needs {self.data.gzip_bits_per_byte:.4f} bits/byte for the held-out text")
        every, threshold = config.train.validate_every, config.train.stop_at_validation_loss
        bits = self.data.bits_per_byte
        self.validation = Validation(evaluate, bits, log, self.progress, clock, every, config.train.steps, threshold)
        return [self.validation]

    def _draw(self) -> None:
        """loss.png, by process 0."""
        if jax.process_index() != 0:
            return
        baseline = self.data.gzip_bits_per_byte
        title = f"{self.config.name}: {num_parameters(self.config.model).total:,} parameters"
        picture = self.directory / PICTURE
        try:
            if plot_losses(self.directory / "metrics.jsonl", picture, title, {"gzip -9": baseline} if baseline else None):
                self.progress.say(f"picture    {picture}")
        except Exception as error:  # of the disk, or of matplotlib, which may be broken: a picture is no reason to fail
            self.progress.say(f"warning    {picture} was not drawn: {type(error).__name__}: {error}")

    def _sample(self, params: PyTree) -> None:
        """Shows a continuation of some held-out text."""
        config, num_rows = self.config, self.config.mesh.batch_shards
        step, rows = make_logits_step(config, self.mesh, self.backend), self._rows(self.config.mesh.batch_shards)
        to_host: Callable[[Any], Any] = functools.partial(multihost_utils.process_allgather, tiled=True)

        def next_logits(batch: dict[str, np.ndarray], position: int) -> np.ndarray:
            self.stop.check()
            copies = {name: array.repeat(rows.stop - rows.start, axis=0) for name, array in batch.items()}
            return to_host(step(params, self._place(copies, num_rows), np.int32(position)))[0]

        prompt = self.data.sample_prompt(min(64, config.data.sequence_length // 2))
        with self.progress.during("sampling"):
            made = sample(next_logits, config, prompt, config.train.sample_tokens)
        decode = self.data.tokenizer.decode
        self.progress.say(
            f"--- held-out text:\n{decode(prompt.tolist())}\n--- the model goes on:\n{decode(made.tolist())}\n---"
        )
