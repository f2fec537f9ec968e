"""Train a ladder: small runs one after the other, each a run folder like any other, until the law of their losses is known.

The learning rates of a size are compared first, at one length, until one is near the vertex of a parabola through the best
three; the other lengths run at that vertex. What comes next is a
function of the results so far, so a ladder that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtrain.config import Config, MeshConfig, PipelineConfig, ShardingConfig, to_plain
from jaxtrain.config.loading import for_another_process
from jaxtrain.config.names import field_values, set_field
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, EXIT_USAGE, ExplainedError, Stopped
from jaxtrain.files import make_file
from jaxtrain.launch.supervisor import Policy, Supervisor, command_of
from jaxtrain.planner.ladder import (
    FILE,
    MOST_RATES,
    NEAR,
    Forecast,
    Ladder,
    SmallRun,
    parameters_of,
    read_ladder,
    sizes_of,
    small_run,
    tokens_of,
)
from jaxtrain.planner.ladder_flags import LadderFlags
from jaxtrain.planner.scaling_law import best_rate
from jaxtrain.planner.wording import duration
from jaxtrain.telemetry.metrics import read_rows

RESTARTS = 3
LEARNING = ("model", "data", "optimizer", "train", "objective")
"""Sections of a config that losses depend on."""
Train = Callable[[Config], int]
"""Trains a config in its run_dir to its end, or as far as it gets; returns the exit code of `jaxtrain train`."""


class Climb:
    """A ladder under way.

    Args:
      config: the large run's, without its mesh: a small run takes this machine's devices.
      folder: the ladder's.
      tell: called with a line for each run.
      train: trains one run.

    Raises:
      ExplainedError: the folder holds the ladder of another config; or a size cannot be made.
    """

    def __init__(
        self, config: Config, flags: LadderFlags, folder: Path, tell: Callable[[str], None], train: Train | None = None
    ):
        self.config, self.flags, self.folder, self._tell = config, flags, folder, tell
        self._train = train or train_apart
        self.sizes = sizes_of(config, flags)
        self.ladder = self._go_on()

    def planned(self) -> list[Config]:
        """Return the runs that are sure to come, at rates as far as they are known before."""
        first, *others = self.flags.tokens
        multiples = [first] * self.flags.rates + others
        return [small_run(size, self.config, m, self.config.optimizer.peak_lr) for size in self.sizes for m in multiples]

    def run(self) -> Forecast:
        """Train what is left; return the forecast of the large run.

        Raises:
          ExplainedError: a run failed, or the runs are too few for a forecast.
          Stopped: a signal ended it; finished runs are kept.
        """
        total, started, before = len(self.planned()), time.monotonic(), len(self.ladder.runs)
        if before:
            self._tell(f"{before} runs are done already in {self.folder}")
        for size, multiple, rate in self._left():
            run = self._one(size, multiple, rate)
            self.ladder = replace(self.ladder, runs=(*self.ladder.runs, run))
            self._save()
            done, passed = len(self.ladder.runs), time.monotonic() - started
            loss = f"loss {run.loss:.4f}" if math.isfinite(run.loss) else "diverged"
            self._tell(
                f"{done} of {max(total, done)}: {run.parameters:,} parameters, {run.tokens:,} tokens, rate {run.rate:.3g}: "
                f"{loss}; {duration(passed)} so far"
            )
        forecast = self.ladder.forecast(parameters_of(self.config.model), tokens_of(self.config))
        self._save(forecast)
        return forecast

    def _left(self) -> Iterator[tuple[int, float, float]]:
        """Yield (size, multiple, learning rate) of what is to run next, until nothing is."""
        first, *others = self.flags.tokens
        exponent = 0
        for size in range(len(self.sizes)):
            while (rate := self._next_rate(size, exponent)) is not None:
                yield size, first, rate
            best = best_rate(self.ladder.rates(size))
            exponent = round(math.log(best.rate / self.config.optimizer.peak_lr) / math.log(self.flags.rate_step))
            done = {run.multiple for run in self.ladder.runs if run.size == size}
            for multiple in others:
                if multiple not in done:
                    yield size, multiple, float(f"{best.rate:.4g}")

    def _next_rate(self, size: int, exponent: int) -> float | None:
        """Return the next learning rate of a size: of a grid around its start, beyond its ends, near the best; or None."""
        flags, done = self.flags, self.ladder.rates(size) if self.ladder.runs else {}
        rate_of = lambda i: float(f"{self.config.optimizer.peak_lr * flags.rate_step**i:.4g}")  # noqa: E731
        low = exponent - (flags.rates - 1) // 2
        for i in range(low, low + flags.rates):
            if rate_of(i) not in done:
                return rate_of(i)
        lowest, all_diverged = min(done), not any(map(math.isfinite, done.values()))
        if len(done) >= MOST_RATES:
            return None
        if all_diverged or best_rate(done).rate == lowest:
            return float(f"{lowest / flags.rate_step:.4g}")
        best = best_rate(done)
        if not best.inside:
            return float(f"{max(done) * flags.rate_step:.4g}")
        is_near = any(1 / NEAR < rate / best.rate < NEAR for rate in done)
        return None if is_near else float(f"{best.rate:.4g}")

    def _one(self, size: int, multiple: float, rate: float) -> SmallRun:
        name = f"size-{size + 1}/tokens-{multiple:g}-rate-{rate:g}"
        config = small_run(self.sizes[size], self.config, multiple, rate)
        config = replace(config, name=f"{self.config.name}-{name.replace('/', '-')}", run_dir=str(self.folder / name))
        if (loss := result_of(config)) is None:
            code = self._train(config)
            loss = result_of(config)
            if loss is None:
                _refuse(config, code)
        assert loss is not None
        return SmallRun(name, size, multiple, parameters_of(config.model), tokens_of(config), rate, loss)

    def _go_on(self) -> Ladder:
        """Return the ladder that the folder holds, or a new one."""
        asked = json.loads(json.dumps(to_plain(replace(self.config, run_dir=""))))
        try:
            found = read_ladder((self.folder / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Ladder(asked, ())
        except (OSError, ValueError) as error:
            raise ExplainedError(f"{self.folder / FILE} cannot be read: {error}; give another --folder") from error
        if names := differing_names(found.config, asked):
            raise ExplainedError(
                f"{self.folder} holds the ladder of another config, which differs in {', '.join(names)}; give another --folder"
            )
        return found

    def _save(self, forecast: Forecast | None = None) -> None:
        make_file(self.folder / FILE, self.ladder.to_json(forecast), "give another --folder")


def of_one_machine(config: Config, given: Sequence[str]) -> Config:
    """Return the config without its file's layout, which is that of the large run; layout flags on the command line stay."""
    train, values = replace(config.train, microbatches=1), field_values(config)
    config = replace(config, mesh=MeshConfig(), pipeline=PipelineConfig(), sharding=ShardingConfig(), train=train)
    for name in given:
        if name.startswith(("mesh.", "pipeline.", "sharding.")) or name == "train.microbatches":
            config = set_field(config, name, values[name])
    return config


def differing_names(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the fields of LEARNING in which two plain configs differ; one that a config lacks has its default there."""
    default = json.loads(json.dumps(to_plain(Config())))
    held, asked = ({section: default[section] | plain.get(section, {}) for section in LEARNING} for plain in (one, other))
    return [
        f"{section}.{name}"
        for section in LEARNING
        for name in asked[section]
        if held[section].get(name) != asked[section][name]
    ]


def result_of(config: Config) -> float | None:
    """Return the final held-out loss of a run that is done, infinity if it diverged, None if it is not done."""
    rows = read_rows(config.directory / "metrics.jsonl")
    final = [row["validation_loss"] for row in rows if row["step"] == config.train.steps and "validation_loss" in row]
    if final:
        return math.inf if final[-1] is None else final[-1]
    return math.inf if any(row.get("bad_step") for row in rows) else None


def _refuse(config: Config, code: int) -> None:
    """Raise why a run has no result."""
    if code == EXIT_DONE:
        raise ExplainedError(
            f"{config.directory} has no held-out loss at step {config.train.steps}: with few documents none may be held out; "
            "raise --data.validation_fraction"
        )
    if code == EXIT_STOPPED:
        raise Stopped(f"in {config.directory}")
    raise ExplainedError(
        f"{config.directory}: the run ended with exit code {code}; its output is in {config.directory / 'launch'}"
    )


def train_apart(config: Config) -> int:
    """Train a config in a process of its own, restarted if it dies; return the exit code.

    Raises:
      ExplainedError: its folder cannot be made.
    """
    folder = config.directory
    make_file(folder / "small.json", for_another_process(config), "give another --folder")
    command = command_of("train", [f"--config={folder / 'small.json'}"])
    said: list[str] = []
    code = Supervisor(
        command, lambda: 1, lambda index, processes: {}, folder / "launch", Policy(RESTARTS), say=said.append
    ).run()
    if code == EXIT_DONE or result_of(config) is not None:
        return code
    reasons = [line for line in said if "error:" in line]
    if code in (EXIT_ERROR, EXIT_USAGE) and reasons:
        raise ExplainedError(f"{folder}: {reasons[-1].partition('error: ')[2]}")
    return code
