"""A training run, top to bottom, no way back up: data -> restore or initialise -> compile once -> loop -> save.

`Trainer` is what people call. A run has a folder to itself for as long as it lasts, and leaves files there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain.agreement import compare
from jaxtrain.checkpoint import Checkpoints, committed_steps
from jaxtrain.checkpoint.fast import FastTier
from jaxtrain.config import to_json
from jaxtrain.data.pipeline import Data
from jaxtrain.errors import CheckpointError, NumbersError, Stopped
from jaxtrain.files import AppendedFile, ReplacedFiles, user_path
from jaxtrain.hardware import resolve_chip
from jaxtrain.mesh import describe_mesh
from jaxtrain.numerics import settled
from jaxtrain.parallel.sync import couples
from jaxtrain.parts import digests
from jaxtrain.processes import LONG_SECONDS
from jaxtrain.telemetry.clock import RunWork, StepClock
from jaxtrain.telemetry.energy import EnergyLog, Meter, open_meter
from jaxtrain.telemetry.flops import describe_parameters
from jaxtrain.telemetry.metrics import MetricsLog, check_wandb
from jaxtrain.telemetry.profile import ProfileWindow
from jaxtrain.telemetry.progress import Progress
from jaxtrain.telemetry.run_log import RunLog, about_program, describe_program
from jaxtrain.telemetry.stragglers import Stragglers
from jaxtrain.text import readable_size
from jaxtrain.train.answers import Answering
from jaxtrain.train.bad_steps import BadSteps, RollBack
from jaxtrain.train.batch_feed import DataFeed, Feed
from jaxtrain.train.completion import completion_of
from jaxtrain.train.ending import Ended, draw, sample_words
from jaxtrain.train.evaluation import StageEvaluation, model_in_hand
from jaxtrain.train.export import export_apart
from jaxtrain.train.hooks import (
    HeartbeatHook,
    Logging,
    Profiling,
    Retrying,
    Saving,
    Telemetry,
    Validation,
    multiples,
)
from jaxtrain.train.initial_weights import keep_files
from jaxtrain.train.loop import Hooks, Loop
from jaxtrain.train.nan_probe import NanProbe
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.recompute_check import RecomputeCheck
from jaxtrain.train.resume import Resume, metadata
from jaxtrain.train.rollbacks import FILE as ROLLBACKS_FILE
from jaxtrain.train.rollbacks import Rollbacks, rollbacks_digest
from jaxtrain.train.rollouts import RewardEvaluation, Rollouts
from jaxtrain.train.run_dir import compilation_cache, largest_before, make_run_dir, only_run_in
from jaxtrain.train.sampler_limits import SamplerLimits
from jaxtrain.train.schedule import plan_words, rate_of_steps
from jaxtrain.train.state_check import StateCheck
from jaxtrain.train.step import TrainSteps
from jaxtrain.train.stop import StopOnSignal
from jaxtrain.train.tasks import Tasks, read_tasks

PyTree = Any
Held = tuple[PyTree, int, Rollbacks]
PICTURE = "loss.png"
DATA_WAY_OUT = "give every host the same data and tokenizer files, and a --run_dir that all hosts share"


class Run:
    """A run made ready: folder, log, data. `train` takes it to its end.

    Args:
      prepared: of a valid config.
      open_data: opens its data.
      progress: what the person sees.
      stop: entered by the caller; without it signals do what they always do.

    Raises:
      ExplainedError: the data, the run folder or the meter of energy cannot be had.
    """

    @settled()
    def __init__(self, prepared: Prepared, open_data: Callable[[], Data], progress: Progress, stop: StopOnSignal | None = None):
        self.prepared, self.config, self.mesh = prepared, prepared.config, prepared.mesh
        self.progress, self.stop, self.directory = progress, stop or StopOnSignal(progress), prepared.config.directory
        self._first_process = jax.process_index() == 0
        make_run_dir(self.directory)
        self.files, self.program = ReplacedFiles(progress.say), about_program() if self._first_process else {}
        self.log = progress.log = RunLog(self.directory, progress.say) if self._first_process else None
        if self._first_process:
            check_wandb(self.config.telemetry.wandb_project)
        self._say_what_it_is()
        self.meter = self._open_meter()
        with progress.during("reading data"), self.stop.breakable():
            self.data = open_data()
        compare("data", self._data_facts(), DATA_WAY_OUT, LONG_SECONDS)  # a peer may read its text for the first time
        progress.say(f"data       {self.data.description}")
        self.metadata = metadata(self.config, self.data, self.program)
        self.checkpoints: Checkpoints | None = None
        self.validation: Validation | None = None
        self.fast: FastTier | None = None
        self.state: PyTree = None
        """As trained, once `train` has returned."""

    def _say_what_it_is(self) -> None:
        config, say = self.config, self.progress.say
        say(f"run        {config.name} in {self.directory}")
        if self.program:
            say(f"program    {describe_program(self.program)}")
        for name, part in digests(config.parts, config.model.parts).items():
            say(f"plugged    {name}: {part}")
        say(f"model      {describe_parameters(config)}")
        say(f"mesh       {describe_mesh(self.mesh)}")
        say(f"attention  {self.prepared.backend} ({self.prepared.why_backend})")
        if self.prepared.matmuls:
            say(f"matmuls    {self.prepared.matmuls}")
        for line in plan_words(config):
            say(line)

    @settled()
    def train(self, held: Held | None = None) -> Ended:
        """Train, save, draw, sample.

        Args:
          held: (state, step, rollbacks) to go on from; None for the newest checkpoint, or a fresh start.

        Raises:
          ExplainedError: run_dir belongs to another run, or to a process that is training there; what is written or read on
            the way cannot be.
        """
        cache = compilation_cache(self.mesh, self.config.train.compilation_cache, self.progress.say)
        with contextlib.ExitStack() as log, cache:
            return self._train(log, held)

    def _train(self, log: contextlib.ExitStack, held: Held | None) -> Ended:
        """Train; the log is kept in `log` from when the folder is known to be ours."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(only_run_in(self.directory))
            self._keep_log(log)
            self.checkpoints = self._open_checkpoints(stack)
            if self.config.checkpoint.fast_every:
                fast_dir = user_path(self.config.checkpoint.fast_dir)
                self.fast = FastTier(fast_dir, self.directory, lambda: self.resume.rollbacks.to_json())
            self.resume = Resume(self.prepared, self.metadata, self.checkpoints, self.fast, self.progress)
            self.state, first = self._go_on_from(held) if held else self.resume.begin()
            if self._first_process:  # not before the run is known to go on here: it must not cover up another run's
                self.files.write(self.directory / "config.json", to_json(self.config) + "\n")
                keep_files(self.config)
            if (reached := self.resume.reached_before(first)) or first == self.config.train.steps:
                reason = reached or f"all {first} steps were done before; a larger --train.steps trains on"
                return self._nothing_left(first, reason)
            read_tasks(self.prepared)
            initial = lambda: (self.prepared.create_state() if first else self.state)["params"]  # noqa: E731
            with self.progress.during("reading other models"):
                self.completed = completion_of(self.prepared, lambda: self.data, initial, self.progress, self.stop.check)
            self.stop.check()
            step_function = self._compile(first)
            self.stop.check()
            self.stop.couples = functools.partial(couples, self.config.sync)
            ended = self._loop(step_function, first)
            while isinstance(ended, RollBack):
                self.state, first, row = self.resume.roll_back(ended, self.files)
                step_function.begin_at(first)
                ended = self._loop(step_function, first, row)
            step, reason = ended
        if self.fast is not None:
            self.fast.clear()  # the last step is saved
        self.files.retry()
        self._draw()
        number = self.stop.agreed()
        if number is not None and step < self.config.train.steps:
            return self._stopped(number, step)
        reason = reason or f"all {step} steps"
        self.progress.say(f"done       {reason}")
        if self.config.checkpoint.export_hf and self._first_process:
            with self.progress.during("exporting"):
                export_apart(self.directory, self.config.checkpoint.export_hf)
            self.progress.say(f"export     {self.config.checkpoint.export_hf}")
        if self.config.train.sample_tokens:
            with contextlib.suppress(Stopped):  # the run is done, with or without a sample
                self._sample()
        return Ended(step, reason)

    def _go_on_from(self, held: Held) -> tuple[PyTree, int]:
        """Return the state that the caller holds, and its step.

        Raises:
          CheckpointError: the folder holds later steps, which this state has not seen.
        """
        newest = max(committed_steps(self.directory / "checkpoints"), default=0)
        if newest > held[1]:
            raise CheckpointError(
                f"{self.directory} holds step {newest}, beyond step {held[1]} of this trainer; restore() that, "
                f"train a new Trainer with checkpoint.resume={held[1]}, or use another run_dir"
            )
        self.resume.rollbacks = held[2]
        return held[:2]

    def _nothing_left(self, step: int, reason: str) -> Ended:
        """Say so; draw what a process that died after its last save had no time to draw."""
        if self.fast is not None:
            self.fast.clear()
        if not (self.directory / PICTURE).exists():
            self._draw()
        self.progress.say(f"done       {reason}")
        return Ended(step, reason)

    def _stopped(self, number: int, step: int) -> Ended:
        if self.checkpoints:
            self.checkpoints.leave_the_mirror()
            reason = f"after saving step {step}; the same command goes on from there"
        else:
            reason = f"after step {step}; nothing is saved, since checkpoint.every=0"
        self.progress.say(f"stopped    {reason}")
        return Ended(step, reason, number, self.checkpoints is not None)

    def _open_checkpoints(self, stack: contextlib.ExitStack) -> Checkpoints | None:
        config, folder = self.config, self.directory / "checkpoints"
        if not config.checkpoint.every:
            return None
        with self.progress.during("opening checkpoints"):
            checkpoints = stack.enter_context(Checkpoints(folder, config.checkpoint, config.train.validation_metric))
        stack.callback(self.progress.now, "ending")  # before the checkpoints wait for their last copies
        self.stop.newest_saved = lambda: max(committed_steps(folder), default=0)
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
            "validation sets": {name: data.fingerprint for name, data in self.data.sets.items()},
            ROLLBACKS_FILE: rollbacks_digest(self.directory),
        }

    def _compile(self, first: int) -> TrainSteps | RecomputeCheck:
        prepared, batch_of, started = self.prepared, self.resume.rollbacks.batch, time.perf_counter()
        with self.progress.during("compiling"):
            steps = TrainSteps(prepared, first, self.config.train.steps, batch_of, lambda: self.progress.during("compiling"))
            evaluation = StageEvaluation(prepared, self.data, batch_of)
            validates = self.config.train.validate_every and self.answering is None and evaluation.batches
            self.evaluation, scoring = (evaluation, evaluation.compile(first, self.state)) if validates else (None, [])
        programs = (program.memory_analysis() for program in (*steps.programs.values(), *scoring))
        memory = max(programs, key=lambda program: program.temp_size_in_bytes)
        held, working = map(readable_size, (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
        self.progress.say(f"compiled   in {time.perf_counter() - started:.1f} s; a device holds {held}, works in {working}")
        if steps.description:
            self.progress.say(f"replicas   {steps.description}")
        every = self.config.guard.repeat_every
        return RecomputeCheck(prepared, steps, first, batch_of) if every else steps

    # ------------------------------------------------------------------------------------------------------------------
    # The loop and its hooks

    def _loop(
        self, steps: TrainSteps | RecomputeCheck, first: int, row: dict[str, Any] | None = None
    ) -> tuple[int, str | None] | RollBack:
        """Run the loop and save its end; return (the last step, the reason of an early end), or the need to go back.

        Args:
          row: to log first.
        """
        with contextlib.ExitStack() as stack:
            config, project = self.config, self.config.telemetry.wandb_project
            log = MetricsLog(self.directory, first, jax.process_index(), project, config.name, config, self.progress.say)
            stack.enter_context(log)
            if row:
                log.write(row)
            clock, energy = self._clocks(first)
            telemetry = Telemetry(log, self.progress, clock)
            self.feed = feed = self._feed(first, clock)
            stack.callback(feed.close)
            saving = self._saving(telemetry)
            hooks = self._hooks(telemetry, energy, saving)
            stack.callback(hooks.close)

            def take_step(state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
                state, metrics = steps(state, batch)
                return state, feed.stepped(metrics)

            theirs = self.config.parts.hooks
            outside = lambda hook: clock.paused() if hook in theirs else contextlib.nullcontext()  # noqa: E731
            step_function, wait = map(clock.timed_as_waiting, (take_step, jax.block_until_ready))
            loop = Loop(step_function, feed.next, wait, hooks, self.state, first, self.config.train.steps, outside)
            self.state = None  # the loop's alone, since it is donated
            clock.start()
            energy.start()
            try:
                reason = loop.run()
                if saving is not None:
                    saving.after_step(loop.step, loop.state, wait=True)
            except (RollBack, NumbersError) as bad:
                # The step under way: XLA:CPU hangs where another program's collectives join in.
                jax.block_until_ready(loop.state)
                if isinstance(bad, NumbersError):
                    raise
                return bad.with_traceback(None)  # which holds the state
            finally:
                self.state = loop.state
            return loop.step, reason

    def _feed(self, first: int, clock: StepClock) -> Feed:
        """Return what gives the steps after `first` their batches."""
        batch_of = self.resume.rollbacks.batch
        if self.answering is None:
            return DataFeed(self.prepared, self.data, first, batch_of, clock.waiting_for_data, self.completed)

        def ends_before(work: str, part: int) -> bool:
            return self.stop.ends_before(work, part) and self.stop.end_loop()

        return Rollouts(self.prepared, self.answering, self.data.prompts, first, self.progress, batch_of, ends_before)

    @functools.cached_property
    def answering(self) -> Answering | None:
        """The maker and judge of answers, where the objective learns from rewards."""
        return Answering(self.prepared, self.data.tokenizer) if self.config.objective.kind == "grpo" else None

    def _clocks(self, first: int) -> tuple[StepClock, EnergyLog]:
        chip = resolve_chip(self.config.telemetry.hardware, jax.devices()[0].device_kind)
        work, last = RunWork(self.config, self.mesh.devices.size, chip, self.resume.rollbacks.batch), self.config.train.steps
        logged = self.directory / "metrics.jsonl"
        clock = StepClock(work, last, first, largest_before(logged, first, "elapsed_seconds"))
        used = largest_before(logged, first, "energy_kwh")
        return clock, EnergyLog(self.meter, work.tokens, last, self.mesh.devices.size, first, used)

    def _hooks(self, telemetry: Telemetry, energy: EnergyLog, saving: Saving | None) -> Hooks:
        """Register what the config asks for, in the order in which a step is told of it."""
        config, progress, hooks = self.config, self.progress, Hooks()
        train, guard, checkpoint = config.train, config.guard, config.checkpoint
        if progress.heartbeat:
            hooks.add(HeartbeatHook(progress.heartbeat))
        hooks.add(Retrying(self.files, train.log_every))
        window = ProfileWindow(config.telemetry.profile, self.directory, jax.process_index(), progress.say)
        hooks.add(Profiling(window, progress))
        # Step 1 is logged whatever this process begins with: rows are a function of the step, not of interruptions.
        due = multiples(train.log_every, 1, train.steps)
        rates, batch_of = rate_of_steps(config), self.resume.rollbacks.batch
        rate = None if config.parts.optimizer is not None else lambda step, updates: rates(batch_of(step - 1), updates)
        stragglers = Stragglers(jax.process_index(), jax.process_count(), self.mesh, progress.say)
        hooks.add(Logging(telemetry, due, rate, energy, stragglers))
        diagnose = self._diagnose if guard.debug_nans else None
        hooks.add(BadSteps(config, telemetry.log, progress, self.resume.rollbacks, diagnose), every=int(guard.debug_nans))
        if self.answering is not None:
            hooks.add(SamplerLimits(config))
        if (validation := self._validation(telemetry)) is not None:
            hooks.add(validation, every=multiples(train.validate_every, train.steps))
        if train.tasks:
            hooks.add(Tasks(telemetry, self.prepared, self.data, self.stop), every=multiples(train.tasks_every, train.steps))
        for hook in config.parts.hooks:
            hooks.add(hook)
        hooks.add(self._check, every=guard.copies_every)
        if saving is not None:
            hooks.add(saving, every=checkpoint.every)
        if (fast := self.fast) is not None:
            saved = multiples(checkpoint.every, train.steps)
            taken = multiples(checkpoint.fast_every)

            def take_snapshot(step: int, state: PyTree) -> None:
                with telemetry.pause("taking a snapshot"):
                    fast.save(step, state, self.metadata | {"origin": self.prepared.origin})

            hooks.add(take_snapshot, every=lambda step: taken(step) and not saved(step))
        hooks.add(self.stop)
        return hooks

    def _saving(self, telemetry: Telemetry) -> Saving | None:
        """Return the hook that saves, where the config wants that; the state is checked before."""
        self._check = StateCheck(self.config, self.mesh, self.prepared.optimizer, self.resume.rollbacks)
        checkpoints = self.checkpoints
        if checkpoints is None:
            return None

        def save(step: int, state: PyTree, wait: bool) -> None:
            self._check(step, state)
            self.feed.save(step)
            described = self.resume.describe(state, self.validation.finite() if self.validation else {})
            checkpoints.save(step, self.resume.canonical.from_state(state), described, wait=wait)

        return Saving(telemetry, checkpoints, save, self.config.checkpoint.on_failure == "stop")

    def _validation(self, telemetry: Telemetry) -> Validation | None:
        """Return the validation hook, where there is held-out data and the config wants it looked at."""
        train = self.config.train
        if train.validate_every and self.answering is not None and self.data.validation_prompts.count:
            prompts = self.data.validation_prompts
            evaluate = RewardEvaluation(self.prepared, self.answering, prompts, train.validate_batches).of_state
            self.validation = Validation(telemetry, evaluate, self.stop.ends_before, 0.0)
            return self.validation
        if (evaluation := self.evaluation) is None:
            return None
        if self.data.gzip_bits_per_byte:
            self.progress.say(f"baseline   gzip -9 needs {self.data.gzip_bits_per_byte:.4f} bits/byte for the held-out text")
        limits = train.stop_at_validation_loss, train.validation_metric
        self.validation = Validation(telemetry, evaluation.of_state, self.stop.ends_before, *limits)
        return self.validation

    def _diagnose(self, state: PyTree, step: int) -> str:
        """Return where a step's numbers first went wrong, in words; `state` is that from before it."""
        at = self.prepared.at(self.resume.rollbacks.batch(step - 1))
        batch = self.feed.batch(step - 1)
        probe = NanProbe(at.of_rows(len(batch["targets"])).config, self.mesh, at.backend)
        return probe(jax.block_until_ready(state["params"]), batch)

    def _open_meter(self) -> Meter | None:
        """Return what measures the energy here; the log says which. Processes that log nothing need none."""
        if not self._first_process:
            return None
        local, count = jax.local_devices(), self.mesh.devices.size
        ordinals = [device.local_hardware_id or 0 for device in local]
        meter, words = open_meter(self.config.telemetry.energy, local[0].platform, ordinals)
        others = f", and the same for all {count}" if meter and 0 < meter.devices < count else ""
        if meter is not None:
            self.progress.say(f"energy     {words}{others}")
        return meter

    def _draw(self) -> None:
        """Draw loss.png in process 0."""
        if self._first_process:
            draw(self.config, self.data, self.directory / PICTURE, self.progress.say)

    def _sample(self) -> None:
        """Show a continuation of held-out text."""
        with self.progress.during("sampling"):
            model = model_in_hand(self.prepared.for_validation(self.config.train.steps), self.state["params"], self.data)
            self.progress.say(sample_words(model, self.data, self.stop.check))
