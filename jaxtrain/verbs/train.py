"""`jaxtrain train --config=configs/quickstart.py`: one training run, from the command line to the last checkpoint.

On several hosts the same command runs once a host, started by SLURM, Open MPI, Kubernetes, Ray or `jaxtrain launch`.

Exit codes: 0 done, 1 an error explained in one message, 2 wrong usage, 75 another process of the run was lost, 76 stopped by a
signal after saving.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtrain.cli import memory_explained
from jaxtrain.command_line import NoFlags, Usage, parse
from jaxtrain.config_notes import idle_fields
from jaxtrain.config_rules import validate

USAGE = Usage("train", "Train a transformer, from the newest checkpoint on where there is one.", NoFlags)


def main(arguments: Sequence[str]) -> int:
    """Parse, validate, train; return the exit code."""
    config = parse(USAGE, arguments).config

    import jax  # after parsing, so that a typo is answered at once

    from jaxtrain.agreement import check_start
    from jaxtrain.launch import distributed
    from jaxtrain.launch.watchdog import Watchdog
    from jaxtrain.mesh import count_devices
    from jaxtrain.numerics import settle
    from jaxtrain.planner.memory_check import ask_for_memory
    from jaxtrain.telemetry.heartbeat import Heartbeat
    from jaxtrain.telemetry.progress import open_progress
    from jaxtrain.train.hooks import StopOnSignal
    from jaxtrain.train.run import Run

    set_aside = settle()
    place = distributed.start(config.distributed)
    with Watchdog(config, Heartbeat.from_environment()) as watchdog:
        check_start(config)
        config = validate(config, count_devices())
        progress = open_progress(config.train.steps, process_index=jax.process_index())
        with StopOnSignal(progress) as stop, progress:  # the signals for longer, since closing a live bar takes a while
            progress.heartbeat, watchdog.before_exit = watchdog.heartbeat, progress.close
            if set_aside:
                progress.say(f"numbers    jax's {', '.join(set_aside)} set aside: they would change this run's results")
            if place is not None:
                progress.say(f"launch     {distributed.describe(place)}")
            for line in idle_fields(config):
                progress.say(f"config     {line}")
            ask_for_memory(config, place.local_processes if place else 1, progress.say)
            run = Run(config, progress, stop)
            with memory_explained(config, run.backend):
                return run.train()
