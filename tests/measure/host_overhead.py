"""What the host adds to a step of 50 ms on a device that is elsewhere: `python -m tests.measure.host_overhead`.

The step is a wait, so that the loop, its data and its log files do not compete with it for this machine's cores, as they do on
CPU. Everything else is the quickstart's: batches read and placed, metrics logged every 10 steps.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtrain.command import parse_config
from jaxtrain.config.rules import validate
from jaxtrain.measure import bench
from jaxtrain.telemetry.clock import StepClock
from jaxtrain.telemetry.metrics import MetricsLog
from jaxtrain.telemetry.progress import PlainProgress
from jaxtrain.train.hooks import Logging, Telemetry, multiples
from jaxtrain.train.loop import Hooks, Loop

STEPS, STEP_SECONDS = 200, 0.05


class Device:
    """Runs one step after the other, each for 50 ms from when it was dispatched or the one before ended."""

    def __init__(self) -> None:
        self.ready = 0.0

    def step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """Dispatches a step; its metrics are there when it is done."""
        self.ready = max(self.ready, time.perf_counter()) + STEP_SECONDS
        return state, {"ready": self.ready, "loss": 0.5, "grad_norm": 0.5, "targets": 1.0}

    def wait(self, metrics: Any) -> Any:
        """Blocks until the step is done."""
        time.sleep(max(0.0, metrics["ready"] - time.perf_counter()))
        return metrics


def main() -> None:
    """Prints the overhead."""
    arguments = ["--config=configs/quickstart.py", "--train.log_every=10"]
    work = bench.Bench(validate(bench.bench_config(parse_config(arguments)), 1))
    device = Device()
    with MetricsLog(Path(tempfile.mkdtemp())) as log, work.data.train_batches(0, work.rows()) as batches:
        progress, clock = PlainProgress(STEPS, io.StringIO()), StepClock(work.run_work, STEPS)
        hooks = Hooks()
        hooks.add(Logging(Telemetry(log, progress, clock), multiples(10, 1, STEPS)))
        loop = Loop(device.step, lambda state, step: work.place(next(batches)), device.wait, hooks, None, 0, STEPS)
        started = time.perf_counter()
        loop.run()
        seconds = (time.perf_counter() - started) / STEPS
    print(f"{seconds * 1e3:.3f} ms a step of {STEP_SECONDS * 1e3:.0f} ms: {seconds / STEP_SECONDS - 1:.2%} host overhead")


if __name__ == "__main__":
    main()
