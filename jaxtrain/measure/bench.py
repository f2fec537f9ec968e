"""Measure the compiled train step on the devices at hand.

Data is synthetic, and nothing is saved. Bare steps (the compiled program alone, repeated on one batch) and loop steps (reading,
placing and packing batches, metrics, log files) alternate in one process, so that a noisy machine disturbs both alike; the host
overhead is the ratio of their means.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.config import Config, DataSource, ObjectiveConfig
from jaxtrain.data.pipeline import open_data
from jaxtrain.hardware import resolve_chip
from jaxtrain.mesh import describe_mesh
from jaxtrain.objectives import objective_of
from jaxtrain.telemetry.clock import RunWork, StepClock, memory_row
from jaxtrain.telemetry.metrics import MetricsLog
from jaxtrain.telemetry.progress import PlainProgress
from jaxtrain.train.hooks import Logging, Telemetry, multiples
from jaxtrain.train.loop import Hook, Hooks, Loop
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.step import compile_train_step, place_numbers

WARM_UP_STEPS = 3
MOST_STEPS_PER_ROUND = 20
SECONDS_PER_ROUND = 8.0
ROUNDS = 6
PyTree = Any


def bench_config(config: Config) -> Config:
    """Return the config with synthetic data and nothing that interrupts the steps.

    Its objective is plugged in, which asks for no pairs or prompts: the program is the same.
    """
    train = dataclasses.replace(config.train, validate_every=0, sample_tokens=0)
    data = dataclasses.replace(config.data, sources=(DataSource(kind="synthetic"),))
    parts = dataclasses.replace(config.parts, objective=objective_of(config))
    return dataclasses.replace(config, train=train, data=data, objective=ObjectiveConfig(), parts=parts)


class Bench(Prepared):
    """The compiled step of a valid config with a state to run it on."""

    def __init__(self, config: Config):
        super().__init__(config)
        config = self.config  # with model.matmul_dtype=auto decided
        self.data = open_data(config)
        started = time.perf_counter()
        self.program = compile_train_step(config, self.mesh, self.optimizer, self.backend)
        self.compile_seconds = time.perf_counter() - started
        self.state, self.numbers = self.create_state(), place_numbers(config, self.mesh)
        chip = resolve_chip(config.telemetry.hardware, jax.devices()[0].device_kind)
        self.run_work = RunWork(config, self.mesh.devices.size, chip)
        self.work = self.run_work.at(1)

    def step(self, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
        """Run one step: (state, metrics)."""
        return self.program(state, batch, self.numbers)

    def place(self, batch: Mapping[str, np.ndarray], num_rows: int | None = None) -> dict[str, jax.Array]:
        """Return global arrays, as `Prepared.place`; what the objective wants beside the data (a reference, a teacher, rewards)
        is zero here, and is not timed.
        """
        objective, shape = objective_of(self.config), batch["tokens"].shape
        widths = getattr(objective, "widths", {})
        missing = {name: (*shape, widths[name]) if name in widths else shape for name in objective.inputs if name not in batch}
        return super().place({**batch, **{name: np.zeros(size, np.float32) for name, size in missing.items()}}, num_rows)

    def bare_steps(self, count: int) -> list[float]:
        """Return the seconds of each of `count` steps, each dispatched before the metrics of the one before are waited for."""
        batch = self.place(self.data.train_batch(0, self.rows()))
        jax.block_until_ready(batch)
        seconds, last, before = [], None, time.perf_counter()
        for _ in range(count + 1):
            self.state, metrics = self.step(self.state, batch)
            if last is not None:
                jax.block_until_ready(last)
                now = time.perf_counter()
                seconds.append(now - before)
                before = now
            last = metrics
        jax.block_until_ready(last)
        return seconds

    def loop_steps(self, count: int, directory: Path) -> list[float]:
        """Return the seconds of each of `count` steps of the training loop with its data, clock, progress and log files."""

        class Stopwatch(Hook):
            """Records when each step's metrics were ready."""

            def __init__(self) -> None:
                self.times = [time.perf_counter()]

            def metrics_read(self, step: int, metrics: PyTree) -> None:
                self.times.append(time.perf_counter())

        stopwatch = Stopwatch()
        clock = StepClock(self.run_work, count + 1)
        with MetricsLog(directory) as log, self.data.train_batches(0, self.rows()) as batches:
            progress = PlainProgress(count + 1, io.StringIO())
            hooks, due = Hooks(), multiples(self.config.train.log_every, 1, count + 1)
            hooks.add(stopwatch)
            hooks.add(Logging(Telemetry(log, progress, clock), due))
            next_batch: Callable[[PyTree, int], PyTree] = lambda state, step: self.place(next(batches))  # noqa: E731
            loop = Loop(self.step, next_batch, jax.block_until_ready, hooks, self.state, 0, count + 1)
            loop.run()
        self.state = loop.state
        # The first step waits for the reader to start, and no step overlaps the last one.
        return [after - before for before, after in zip(stopwatch.times[1:-1], stopwatch.times[2:], strict=True)]

    def report(self) -> dict[str, Any]:
        """Run bare and loop rounds alternately; return all measurements."""
        pace = min(self.bare_steps(WARM_UP_STEPS))
        count = max(3, min(MOST_STEPS_PER_ROUND, int(SECONDS_PER_ROUND / pace)))
        bare, loop = [], []
        with tempfile.TemporaryDirectory() as directory:
            for round_number in range(ROUNDS):
                bare += self.bare_steps(count)
                loop += self.loop_steps(count, Path(directory) / str(round_number))
        median = float(np.median(bare))
        analysis = self.program.memory_analysis()
        return {
            "config": self.config.name,
            "mesh": describe_mesh(self.mesh),
            "jax": jax.__version__,
            "attention": self.backend,
            "matmuls": self.matmuls or self.config.model.dtype,
            "sequence_length": self.config.data.sequence_length,
            "global_batch_size": self.config.train.global_batch_size,
            "compile_seconds": self.compile_seconds,
            "steps_measured": len(bare),
            "step_seconds": median,
            "step_seconds_p10": float(np.percentile(bare, 10)),
            "step_seconds_p90": float(np.percentile(bare, 90)),
            **self.work.throughput(self.work.tokens_per_step / median),
            "host_overhead": float(np.mean(loop) / np.mean(bare)) - 1,
            "state_bytes": analysis.argument_size_in_bytes,
            "working_bytes": analysis.temp_size_in_bytes,
            **memory_row(),
        }


def table(report: dict[str, Any]) -> str:
    """Return the report as text lines."""

    def text(value: Any) -> str:
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    width = max(map(len, report))
    return "\n".join(f"{name:<{width}}  {text(value)}" for name, value in report.items())
