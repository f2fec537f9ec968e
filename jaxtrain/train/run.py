"""A training run, top to bottom, no way back up: mesh -> data -> restore or initialise -> compile once -> loop -> save."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.checkpoint import Checkpoints, check_same_run
from jaxtrain.config import Config, to_json
from jaxtrain.data.pipeline import Data, open_data
from jaxtrain.errors import EXIT_DONE, EXIT_STOPPED, ExplainedError
from jaxtrain.generate import sample
from jaxtrain.hardware import resolve_chip
from jaxtrain.mesh import describe_mesh, make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.telemetry.clock import StepClock, Work
from jaxtrain.telemetry.flops import num_parameters
from jaxtrain.telemetry.metrics import MetricsLog
from jaxtrain.telemetry.plots import plot_losses
from jaxtrain.telemetry.profile import ProfileWindow
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.feed import owned_rows, to_global
from jaxtrain.train.hooks import Logging, Profiling, Saving, StopOnSignal, Validation
from jaxtrain.train.loop import Hook, Loop
from jaxtrain.train.optimizer import make_optimizer, make_schedule
from jaxtrain.train.state import Canonical, create_state
from jaxtrain.train.step import (
    batch_names,
    batch_sharding,
    choose_attention,
    compile_train_step,
    make_evaluation_step,
    make_logits_step,
)

PyTree = Any


def make_run_dir(config: Config) -> Path:
    """Creates run_dir and writes config.json into it.

    Raises:
      ExplainedError: it cannot be written.
    """
    directory = config.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".config.json.{os.getpid()}"
        temporary.write_text(to_json(config) + "\n")
        temporary.replace(directory / "config.json")
    except OSError as error:
        raise ExplainedError(f"--run_dir={directory} cannot be written: {error.strerror}; give another --run_dir") from error
    return directory


def use_compilation_cache(config: Config) -> None:
    """Turns on jax's persistent compilation cache, so that a restart compiles nothing again."""
    if config.train.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.train.compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def metadata(config: Config, data: Data) -> dict[str, Any]:
    """What a checkpoint says about the run that it belongs to."""
    return {
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

    Raises:
      ExplainedError: the data, the run folder or the attention backend cannot be had.
    """

    def __init__(self, config: Config, progress: Progress):
        self.config, self.progress = config, progress
        self.directory = make_run_dir(config)
        use_compilation_cache(config)
        self.mesh = make_mesh(config.mesh)
        self.chip = resolve_chip(config.telemetry.hardware, jax.devices()[0].device_kind)
        self.backend, why = choose_attention(config, self.mesh)
        self.optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
        self.sharding = batch_sharding(self.mesh)
        count = num_parameters(config.model)
        progress.say(f"run        {config.name} in {self.directory}")
        progress.say(f"model      {count.total:,} parameters ({count.non_embedding:,} without embeddings)")
        progress.say(f"mesh       {describe_mesh(self.mesh)}")
        progress.say(f"attention  {self.backend} ({why})")
        self.data = open_data(config)
        progress.say(f"data       {self.data.description}")
        self.canonical = Canonical(config, self.mesh, self.optimizer)

    def train(self) -> int:
        """Trains, saves, draws, samples; returns the exit code."""
        with contextlib.ExitStack() as stack:
            checkpoints = self._open_checkpoints(stack)
            state, first = self._begin(checkpoints)
            step_function = self._compile()
            log = stack.enter_context(self._open_log(first))
            reason, stopped, state, step = self._loop(stack, step_function, checkpoints, log, state, first)
        self._draw()
        if stopped:
            words = f"saved step {step}; the same command goes on from there" if checkpoints else "nothing is saved"
            self.progress.say(f"stopped    {reason}; {words}")
            return EXIT_STOPPED
        self.progress.say(f"done       {reason or f'all {step} steps'}")
        if self.config.train.sample_tokens:
            self._sample(state["params"])
        return EXIT_DONE

    def _open_checkpoints(self, stack: contextlib.ExitStack) -> Checkpoints | None:
        if not self.config.checkpoint.every:
            return None
        return stack.enter_context(Checkpoints(self.directory / "checkpoints", self.config.checkpoint))

    def _open_log(self, first: int) -> MetricsLog:
        config = self.config
        return MetricsLog(
            self.directory,
            first,
            jax.process_index(),
            config.telemetry.wandb_project,
            config.name,
            dataclasses.asdict(config),
        )

    def _begin(self, checkpoints: Checkpoints | None) -> tuple[PyTree, int]:
        """The state to train on and the steps it has seen: from the newest checkpoint, or fresh."""
        step = checkpoints.step_to_resume() if checkpoints else None
        if step is None or checkpoints is None:
            return create_state(self.config, self.mesh, self.optimizer), 0
        now = metadata(self.config, self.data)
        notes = check_same_run(checkpoints.read_metadata(step), now, checkpoints.directory)
        state = self.canonical.to_state(checkpoints.restore(step, self.canonical.abstract))
        self.progress.say(f"resume     from step {step}" + "".join(f"\n           changed: {note}" for note in notes))
        return state, step

    def _compile(self) -> Any:
        started = time.perf_counter()
        compiled = compile_train_step(self.config, self.mesh, self.optimizer, self.backend)
        memory = compiled.memory_analysis()
        held, working = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
        self.progress.say(
            f"compiled   in {time.perf_counter() - started:.1f} s; a device holds {held:.2f} GiB, works in {working:.2f} GiB"
        )
        return compiled

    def _loop(
        self,
        stack: contextlib.ExitStack,
        step_function: Any,
        checkpoints: Checkpoints | None,
        log: MetricsLog,
        state: PyTree,
        first: int,
    ) -> tuple[str | None, bool, PyTree, int]:
        """Runs the loop and saves its end: (reason of an early end, whether it was a signal, state, steps done)."""
        config, last = self.config, self.config.train.steps
        clock = StepClock(Work.of(config, self.mesh.devices.size, self.chip), last, first)
        saving = (
            Saving(checkpoints, self.canonical.from_state, metadata(config, self.data), clock, config.checkpoint.every)
            if checkpoints
            else None
        )
        window = ProfileWindow(config.telemetry.profile, self.directory, jax.process_index())
        stack.callback(window.close)
        stop = stack.enter_context(StopOnSignal(self.progress))
        learning_rate = make_schedule(config.optimizer, last)
        hooks: list[Hook] = [
            Profiling(window, self.progress),
            Logging(log, self.progress, clock, lambda s: float(learning_rate(s)), config.train.log_every, first + 1, last),
            *self._validation(log, clock),
            *([saving] if saving else []),
            stop,
        ]
        batches = stack.enter_context(self.data.train_batches(first, self._rows(config.train.global_batch_size)))

        def next_batch() -> PyTree:
            with clock.waiting_for_data():
                batch = next(batches)
            return self._place(batch, config.train.global_batch_size)

        loop = Loop(step_function, next_batch, jax.block_until_ready, hooks, state, first, last)
        clock.start()
        reason = loop.run()
        if saving:
            saving.save_now(loop.step, loop.state)
        return reason, stop.received is not None, loop.state, loop.step

    def _rows(self, num_rows: int) -> slice:
        return owned_rows(self.sharding, (num_rows, self.config.data.sequence_length))

    def _place(self, batch: Any, num_rows: int) -> PyTree:
        return to_global(batch, self._rows(num_rows), num_rows, batch_names(self.config), self.sharding)

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
        return [Validation(evaluate, bits, log, self.progress, clock, every, config.train.steps, threshold)]

    def _draw(self) -> None:
        """loss.png, by process 0."""
        if jax.process_index() != 0:
            return
        baseline = self.data.gzip_bits_per_byte
        title = f"{self.config.name}: {num_parameters(self.config.model).total / 1e6:.1f} M parameters"
        picture = self.directory / "loss.png"
        if plot_losses(self.directory / "metrics.jsonl", picture, title, {"gzip -9": baseline} if baseline else None):
            self.progress.say(f"picture    {picture}")

    def _sample(self, params: PyTree) -> None:
        """Shows a continuation of some held-out text."""
        config, num_rows = self.config, self.config.mesh.batch_shards
        step, rows = make_logits_step(config, self.mesh, self.backend), self._rows(self.config.mesh.batch_shards)
        to_host: Callable[[Any], Any] = functools.partial(multihost_utils.process_allgather, tiled=True)

        def next_logits(batch: dict[str, np.ndarray], position: int) -> np.ndarray:
            copies = {name: array.repeat(rows.stop - rows.start, axis=0) for name, array in batch.items()}
            return to_host(step(params, self._place(copies, num_rows), np.int32(position)))[0]

        prompt = self.data.sample_prompt(min(64, config.data.sequence_length // 2))
        made = sample(next_logits, config, prompt, config.train.sample_tokens)
        decode = self.data.tokenizer.decode
        self.progress.say(
            f"--- held-out text:\n{decode(prompt.tolist())}\n--- the model goes on:\n{decode(made.tolist())}\n---"
        )
