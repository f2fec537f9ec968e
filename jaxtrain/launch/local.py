"""Run several processes on this machine: train under the supervisor, or run preflight checks."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.config import Config, MeshConfig
from jaxtrain.config.rules import validate
from jaxtrain.errors import EXIT_DONE, ConfigError
from jaxtrain.files import user_path
from jaxtrain.launch.distributed import count_gpus
from jaxtrain.launch.elastic import mesh_flags, mesh_for
from jaxtrain.launch.supervisor import Policy, Supervisor, command_of


@dataclass(frozen=True)
class LaunchFlags:
    """Flags of the launcher, before `--`."""

    processes: int = 1
    """Number of processes."""
    devices_per_process: int = 0
    """Fake CPU devices of each process; 0: divide this machine's GPUs among the processes."""
    processes_file: str = ""
    """File with the number of processes that can run now. When it changes, the run saves and resumes with that many."""
    fallback_mesh: tuple[str, ...] = ()
    """Meshes to try first when there are fewer devices, e.g. "data=2,fsdp=2"."""
    restarts: int = 10
    """Failures in a row without a new step, after which the launcher gives up."""
    stop_seconds: float = 120.0
    """Seconds that the run has to save after a signal."""
    preflight: bool = False
    """Do not train: check in all processes whether the run would work here."""


def size_of(flags: LaunchFlags) -> Callable[[], int]:
    """Return a function: the number in processes_file, if it can be read, else the last one read, at first --processes."""
    last = flags.processes

    def size() -> int:
        nonlocal last
        with contextlib.suppress(OSError, ValueError):  # the file is just being written
            number = int(user_path(flags.processes_file).read_text(encoding="utf-8")) if flags.processes_file else 0
            last = number if number >= 1 else last
        return last

    return size


def train(config: Config, flags: LaunchFlags, fallbacks: Sequence[MeshConfig], of_run: Sequence[str]) -> int:
    """Keep a run going to its end; return its exit code.

    Args:
      of_run: the command line that gave `config`.

    Raises:
      ConfigError: the config does not fit the devices.
    """
    per_process = flags.devices_per_process or gpus_per_process(flags.processes)
    full = validate(config, flags.processes * per_process)

    def extra(processes: int) -> list[str]:
        if processes == flags.processes:
            return []
        return mesh_flags(full, mesh_for(full, processes * per_process, fallbacks))

    policy = Policy(flags.restarts, stop_seconds=flags.stop_seconds)
    folder = config.directory / "launch"
    return Supervisor(command_of("train", of_run), size_of(flags), _environment(flags), folder, policy, extra).run()


def preflight(config: Config, flags: LaunchFlags, of_run: Sequence[str]) -> int:
    """Run the checks once in that many processes. Their logs are kept if a check failed.

    Raises:
      ConfigError: the config does not fit the devices.
    """
    validate(config, flags.processes * (flags.devices_per_process or gpus_per_process(flags.processes)))

    def say(line: str) -> None:
        print(line, file=sys.stderr if line[20:].startswith("supervisor") else sys.stdout, flush=True)

    folder = Path(tempfile.mkdtemp(prefix="jaxtrain-preflight-"))
    command = command_of("preflight", of_run)
    code = Supervisor(command, lambda: flags.processes, _environment(flags), folder, Policy(restarts=0), say=say).run()
    if code == EXIT_DONE:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"logs of all processes: {folder}", file=sys.stderr)
    return code


def _environment(flags: LaunchFlags) -> Callable[[int, int], dict[str, str]]:
    fake = {"JAXTRAIN_CPU_DEVICES": str(flags.devices_per_process), "JAX_PLATFORMS": "cpu"}
    return lambda index, processes: fake if flags.devices_per_process else {}


def gpus_per_process(processes: int) -> int:
    """Return how many GPUs of this machine each process gets.

    Raises:
      ConfigError: they cannot be shared equally.
    """
    gpus = count_gpus(os.environ)
    if not gpus or gpus % processes:
        raise ConfigError(
            [
                f"{gpus} GPUs cannot be shared by --processes={processes}; use a number that divides them, "
                "or --devices_per_process=2 for fake CPU devices"
            ]
        )
    return gpus // processes
