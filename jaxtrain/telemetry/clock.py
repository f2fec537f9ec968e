"""Measure times, throughput and memory of a run without making the device wait.

The loop calls `start` just before the first step and `step_done` once for every step whose metrics it has read. Since metrics
are read one step late, the time between two such calls is the time of one step in steady state, whatever the device and the
host overlap.
"""

from __future__ import annotations

import bisect
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax

from jaxtrain.config import Config, Recipe
from jaxtrain.hardware import Chip
from jaxtrain.telemetry.flops import mfu, model_flops_per_token

T = TypeVar("T")
ROW_SHARE = "row_share"
"""A metric of a step: its rows over train.global_batch_size."""
Row = dict[str, float | int | str | None]
"""A logged row, under the names of metrics.jsonl."""


@dataclass(frozen=True)
class StepWork:
    """The work of one step, to turn seconds into throughput."""

    tokens_per_step: float
    """Tokens in the global batch, padding included."""
    num_devices: int
    """Devices that share the step."""
    flops_per_token_full: float
    """Model FLOPs per token with the full attention square (see flops.py)."""
    flops_per_token_causal: float
    """Model FLOPs per token with half of the attention square."""
    peak_flops: float | None
    """Peak matmul FLOP/s of one device in the compute dtype; None if unknown."""

    @classmethod
    def of(cls, config: Config, num_devices: int, chip: Chip) -> StepWork:
        """Return the work of one step of `config` over `num_devices` chips."""
        length = config.data.sequence_length
        return cls(
            tokens_per_step=config.train.global_batch_size * length,
            num_devices=num_devices,
            flops_per_token_full=model_flops_per_token(config.model, length, "full"),
            flops_per_token_causal=model_flops_per_token(config.model, length, "causal"),
            peak_flops=chip.matmul_peak(config.model.dtype),
        )

    def throughput(self, tokens_per_second: float) -> Row:
        """Return a row with tokens/s over all devices, and TFLOP/s per device and MFU in both attention conventions."""
        per_device = tokens_per_second / self.num_devices
        full, causal = per_device * self.flops_per_token_full, per_device * self.flops_per_token_causal
        return {
            "tokens_per_second": tokens_per_second,
            "tflops_per_second_per_device_full": full / 1e12,
            "tflops_per_second_per_device_causal": causal / 1e12,
            "mfu_full": mfu(full, self.peak_flops),
            "mfu_causal": mfu(causal, self.peak_flops),
        }


class RunWork:
    """The work of each step of a run, over its stages.

    Args:
      batch_of: steps before a step -> the number of its batch, which says its stage.
    """

    def __init__(self, config: Config, num_devices: int, chip: Chip, batch_of: Callable[[int], int] = lambda step: step):
        self._recipe, self._batch_of = Recipe(config), batch_of
        self._works = {stage.first: StepWork.of(stage.config, num_devices, chip) for stage in self._recipe.stages}
        self._has_stages = bool(config.train.stages)

    def at(self, step: int) -> StepWork:
        """Return the work of a step, from 1."""
        return self._works[self._recipe.at(self._batch_of(step - 1)).first]

    def tokens(self, steps: int) -> int:
        """Return the tokens of the first `steps` steps."""
        stages = self._recipe.stages
        ends = [bisect.bisect_left(range(steps), stage.first, key=self._batch_of) for stage in stages[1:]]
        counts = (end - begin for begin, end in itertools.pairwise([0, *ends, steps]))
        return sum(count * stage.tokens_per_step for count, stage in zip(counts, stages, strict=True))

    def stage(self, step: int) -> Row:
        """Return a row with the name of the stage of a step, empty in a run without `train.stages`."""
        return {"stage": self._recipe.at(self._batch_of(step - 1)).name} if self._has_stages else {}


class StepClock:
    """Step times over the window between two logged rows, and the time left.

    Args:
      work: what steps do.
      total_steps: the last step of the run.
      start_step: the step that the run resumed from; 0 for a new one.
      elapsed_before: seconds the run had taken before it was resumed.
      now: the monotonic clock, in seconds.
    """

    def __init__(
        self,
        work: RunWork,
        total_steps: int,
        start_step: int = 0,
        elapsed_before: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
    ):
        self._work, self._total_steps, self._start_step = work, total_steps, start_step
        self._elapsed_before, self._now = elapsed_before, now
        self._step = start_step
        self._steps_seconds: list[float] = []
        self._works: list[StepWork] = []
        self._window_data_wait = self._window_device_wait = 0.0
        self._pause = 0.0
        self.start()

    def start(self) -> None:
        """Start timing steps: call it after compilation, just before the first step."""
        self._started = self._last = self._now()

    @contextmanager
    def _counted(self, total: str) -> Iterator[None]:
        """Add the seconds of the block to one of the sums."""
        before = self._now()
        try:
            yield
        finally:
            setattr(self, total, getattr(self, total) + self._now() - before)

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """Count the block, which takes the next batch, as data wait, and as part of the step's time too."""
        return self._counted("_window_data_wait")

    def paused(self) -> AbstractContextManager[None]:
        """Leave the block (validation, checkpoints) out of step times and throughput, not out of elapsed time and ETA."""
        return self._counted("_pause")

    def timed_as_waiting(self, function: Callable[..., T]) -> Callable[..., T]:
        """Wrap a function that dispatches a step or waits for its results; the rest of a step's time is the host's own work."""

        def timed(*arguments: Any) -> T:
            with self._counted("_window_device_wait"):
                return function(*arguments)

        return timed

    def step_done(self, step: int, share: float = 1.0) -> None:
        """Record that one more step is done. Costs a microsecond.

        Args:
          share: of the work of a whole step that it did, fewer rows being needed where answers are packed.
        """
        now = self._now()
        self._steps_seconds.append(max(now - self._last - self._pause, 0.0))
        work = self._work.at(step)
        self._works.append(work if share == 1 else replace(work, tokens_per_step=share * work.tokens_per_step))
        self._last, self._pause, self._step = now, 0.0, step

    def window(self) -> Row:
        """Return the timings since the last call as a row, and start a new window.

        step_seconds is the median step, step_seconds_mean the mean; data_wait_seconds and device_wait_seconds are mean waits
        per step. Throughput (see `StepWork`) is over the whole window, waits included, pauses excluded. eta_seconds uses the
        mean over the whole run so far, pauses included. A window without a step has None throughout.
        """
        seconds, count = sum(self._steps_seconds), len(self._steps_seconds)
        row: Row = {
            "step_seconds": statistics.median(self._steps_seconds) if count else None,
            "step_seconds_mean": seconds / count if count else None,
            "data_wait_seconds": self._window_data_wait / count if count else None,
            "device_wait_seconds": self._window_device_wait / count if count else None,
        }
        work = _mean_work(self._works or [self._work.at(self._step)])
        rate = count * work.tokens_per_step / seconds if seconds > 0 else None
        row |= work.throughput(rate) if rate is not None else dict.fromkeys(work.throughput(1.0))
        row |= self._work.stage(self._step)
        row |= {
            "tokens": self._work.tokens(self._step),
            "elapsed_seconds": self.elapsed_seconds(),
            "eta_seconds": self.eta_seconds(),
        }
        self._steps_seconds, self._works, self._window_data_wait, self._window_device_wait = [], [], 0.0, 0.0
        return row

    def elapsed_seconds(self) -> float:
        """Return the seconds of training since `start`, plus those before the run was resumed."""
        return self._elapsed_before + self._now() - self._started

    def eta_seconds(self) -> float | None:
        """eta = tokens left * mean seconds per token of this process, pauses included; None before the first step."""
        done = self._work.tokens(self._step) - self._work.tokens(self._start_step)
        if done <= 0:
            return None
        left = self._work.tokens(self._total_steps) - self._work.tokens(self._step)
        return left * (self._last - self._started) / done


def _mean_work(works: Sequence[StepWork]) -> StepWork:
    """Return the mean work of some steps: tokens of a step, and FLOPs of a token."""
    if all(work == works[0] for work in works):
        return works[0]
    tokens = sum(work.tokens_per_step for work in works)
    full, causal = (
        sum(work.tokens_per_step * getattr(work, name) for work in works) / tokens
        for name in ("flops_per_token_full", "flops_per_token_causal")
    )
    return replace(works[0], tokens_per_step=tokens / len(works), flops_per_token_full=full, flops_per_token_causal=causal)


def memory_row(devices: Sequence[Any] | None = None) -> Row:
    """Return `device_memory_bytes`, the largest peak memory of the jax `devices` (by default all local ones).

    It is None where the device keeps no such record (CPU); `host_memory_bytes` is then this process's peak resident memory.
    """
    stats = [device.memory_stats() for device in (jax.local_devices() if devices is None else devices)]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return {"device_memory_bytes": max(peaks)}
    return {"device_memory_bytes": None, "host_memory_bytes": host_memory_peak()}


def host_memory_peak() -> int:
    """Return this process's peak resident memory in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
