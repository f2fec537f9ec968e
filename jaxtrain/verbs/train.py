"""`jaxtrain train --config=configs/quickstart.py`: one training run, from the command line to the last checkpoint.

On several hosts the same command runs once a host, started by SLURM, Open MPI, Kubernetes, Ray or `jaxtrain launch`.

Exit codes: 0 done, 1 an error explained in one message, 2 wrong usage, 75 another process of the run was lost, 76 stopped by a
signal after saving.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtrain.cli import memory_explained
from jaxtrain.command import CommandLine, Usage, parse
from jaxtrain.command.help import shown
from jaxtrain.config import Config, Recipe
from jaxtrain.config.names import field_values
from jaxtrain.config.notes import idle_fields
from jaxtrain.config.rules import validate
from jaxtrain.errors import EXIT_DONE
from jaxtrain.text import show

COLUMN = 60
"""Where the origins of the fields stand."""


@dataclass(frozen=True)
class TrainFlags:
    """Flags of `jaxtrain train` beside those of the config."""

    dry_run: bool = False
    """Do not train: print every field of the config with where its value comes from, the mesh, the memory and the programs that
    a run would compile. Writes nothing."""
    show_data: int = 0
    """Do not train: print this many rows of the first batches, with the tokens that carry loss marked: by colour on a terminal,
    else by [brackets]."""


USAGE = Usage("train", "Train a transformer, from the newest checkpoint on where there is one.", TrainFlags)


def main(arguments: Sequence[str]) -> int:
    """Parse, validate, train; return the exit code."""
    line = parse(USAGE, arguments)

    import jax  # after parsing, so that a typo is answered at once

    from jaxtrain.agreement import check_start
    from jaxtrain.launch import distributed
    from jaxtrain.launch.watchdog import Watchdog
    from jaxtrain.mesh import count_devices
    from jaxtrain.numerics import settle
    from jaxtrain.planner.memory_check import ask_for_memory
    from jaxtrain.telemetry.heartbeat import Heartbeat
    from jaxtrain.telemetry.progress import open_progress
    from jaxtrain.train.stop import StopOnSignal
    from jaxtrain.train.trainer import Trainer

    set_aside = settle()
    place = distributed.start(line.config.distributed)
    with Watchdog(line.config, Heartbeat.from_environment()) as watchdog:
        check_start(line.config)
        config = validate(line.config, count_devices())
        notes = []
        if set_aside:
            notes.append(f"numbers    jax's {', '.join(set_aside)} set aside: they would change this run's results")
        if place is not None:
            notes.append(f"launch     {distributed.describe(place)}")
        notes += [f"config     {line}" for line in idle_fields(config)]
        if line.own.show_data:
            _show_data(config, line.own.show_data)
            return EXIT_DONE
        if line.own.dry_run:
            tell = show if jax.process_index() == 0 else lambda words: None
            for words in (*origins(line, config), *notes, *programs(config)):
                tell(words)
            ask_for_memory(config, place.local_processes if place else 1, tell)
            return EXIT_DONE
        progress = open_progress(config.train.steps, process_index=jax.process_index())
        with StopOnSignal(progress) as stop, progress:  # the signals for longer, since closing a live bar takes a while
            progress.heartbeat, watchdog.before_exit = watchdog.heartbeat, progress.close
            for note in notes:
                progress.say(note)
            ask_for_memory(config, place.local_processes if place else 1, progress.say)
            trainer = Trainer(config)
            with memory_explained(config, trainer.prepared.backend):
                return trainer.train(progress, stop).exit_code


def _show_data(config: Config, count: int) -> None:
    """Print the first rows of the data, in process 0."""
    import jax

    from jaxtrain.data.pipeline import open_data
    from jaxtrain.data.show import shown_rows

    if jax.process_index() == 0:
        marks = ("\x1b[1;32m", "\x1b[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("[", "]")
        for words in shown_rows(open_data(config), config.train.global_batch_size, count, marks):
            print(words)


def origins(line: CommandLine[TrainFlags], resolved: Config) -> list[str]:
    """Return a line for each field: its value, and whether the default, the file, a flag or the devices gave it.

    A value that the file sets to the default counts as the default.
    """
    default, file, asked, values = map(field_values, (Config(), line.file, line.config, resolved))
    lines = []
    for name, value in values.items():
        source = "file" if name in file and (name not in default or file[name] != default[name]) else "default"
        source = "flag" if name in line.given else source
        lines.append(f"{f'{name}={shown(value)}':<{COLUMN}} {source if asked[name] == value else 'devices'}")
    return lines


def programs(config: Config) -> list[str]:
    """Return lines on the mesh, the layout of a step, and the programs that a run compiles."""
    from jaxtrain.mesh import describe_mesh, make_mesh
    from jaxtrain.models.building import choose_attention
    from jaxtrain.parallel import sync
    from jaxtrain.planner.wording import how_words
    from jaxtrain.telemetry.flops import describe_parameters
    from jaxtrain.train.schedule import plan_words

    mesh, train, steps = make_mesh(config.mesh), config.train, range(1, config.train.steps + 1)
    kinds = len({sync.exchange_at(config.sync, step) for step in steps})
    shapes = len({stage.program for stage in Recipe(config).stages})
    names = ["initial state", "train step" if kinds == 1 else f"{kinds} train steps, which differ in what replicas exchange"]
    names[1] += f", for each of {shapes} shapes of the stages" if shapes > 1 else ""
    names += ["validation step"] * (train.validate_every > 0) + ["next token"] * (train.sample_tokens > 0)
    return [
        f"model      {describe_parameters(config)}",
        f"mesh       {describe_mesh(mesh)}",
        *plan_words(config),
        f"step       {how_words(config)}; {train.global_batch_size} sequences of {config.data.sequence_length} tokens",
        "attention  {} ({})".format(*choose_attention(config, mesh)),
        f"programs   {', '.join(names)}",
    ]
