"""`python -m jaxtrain.main --config=configs/quickstart.py`: one training run, from the command line to the last checkpoint.

On several hosts the same command runs once a host, started by SLURM, Open MPI, Kubernetes, Ray or `python -m jaxtrain.launch`.

Exit codes: 0 done, 1 an error explained in one message, 2 wrong usage, 75 another process of the run was lost, 76 stopped by a
signal after saving.
"""

from __future__ import annotations

if __name__ == "__main__":
    import jaxtrain.early  # noqa: F401, before all else: Ctrl-C ends the program from here on
    from jaxtrain import cli

    cli.run("jaxtrain.main", "train", answers_on_stdout=False, unwinds=False, joins=True)

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from jaxtrain.cli import is_out_of_memory
from jaxtrain.command_line import parse_command_line
from jaxtrain.config import Config
from jaxtrain.config_notes import idle_fields
from jaxtrain.config_rules import validate
from jaxtrain.errors import ExplainedError
from jaxtrain.launch import distributed

DESCRIPTION = "Train a transformer. Every field of the config is a flag; the file named by --config sets their defaults."
MEMORY_FRACTION = "0.93"


@contextlib.contextmanager
def memory_explained(config: Config, backend: str) -> Iterator[None]:
    """Makes of a lack of device memory an error that says what holds how much, and what would fit (`planner/relief.py`).

    Args:
      config: valid, its mesh resolved.
      backend: of attention.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        import jax

        from jaxtrain.hardware import resolve_chip
        from jaxtrain.planner.relief import explain_out_of_memory

        device = jax.local_devices()[0]
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit") or resolve_chip(config.telemetry.hardware, device.device_kind).memory_bytes
        held = stats.get("bytes_in_use")
        raise ExplainedError(explain_out_of_memory(config, jax.device_count(), str(error), limit, held, backend)) from error


def ask_for_memory(config: Config, local_processes: int, say: Callable[[str], None]) -> None:
    """Says how much memory the run takes, before anything is allocated.

    Args:
      config: valid, its mesh resolved.
      local_processes: processes of the run on this host.

    Raises:
      ExplainedError: it cannot fit.
    """
    from jaxtrain.mesh import make_mesh
    from jaxtrain.planner.memory_check import check_memory, find_room
    from jaxtrain.train.step import choose_attention

    if room := find_room(local_processes):
        say(check_memory(config, room, choose_attention(config, make_mesh(config.mesh))[0]))


def count_devices() -> int:
    """How many devices jax finds, over all processes. The first call wakes them.

    Raises:
      ExplainedError: none, or not of the kind that JAX_PLATFORMS asks for.
    """
    import jax

    # jax would keep to 0.75 of a GPU. What is left is for CUDA, NCCL and cuBLAS: `planner.estimates.Cluster.reserved_bytes`.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)

    try:
        return jax.device_count()
    except (RuntimeError, AssertionError) as error:  # the assertion: JAX_PLATFORMS=cuda without jax's CUDA plugin
        wanted = os.environ.get("JAX_PLATFORMS", "")
        why = (str(error).splitlines() or ["jax has no backend of that name"])[0]
        raise ExplainedError(
            f"no device can be used with JAX_PLATFORMS={wanted!r}: {why}; unset it to take what there is, "
            "or for NVIDIA GPUs install jaxtrain[cuda12] or jaxtrain[cuda13]"
        ) from error


def train(arguments: Sequence[str]) -> int:
    """Parses, validates, trains; returns the exit code."""
    config = parse_command_line(arguments, DESCRIPTION, "python -m jaxtrain.main")

    import jax  # after parsing, so that a typo is answered at once

    from jaxtrain.numerics import settle

    set_aside = settle()
    place = distributed.start(config.distributed)

    from jaxtrain.agreement import check_start
    from jaxtrain.launch.watchdog import Watchdog
    from jaxtrain.telemetry.heartbeat import Heartbeat
    from jaxtrain.telemetry.progress import open_progress
    from jaxtrain.train.hooks import StopOnSignal
    from jaxtrain.train.run import Run

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
