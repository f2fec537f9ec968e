"""`python -m jaxtrain.launch --processes=2 --devices_per_process=2 -- --config=configs/quickstart.py`: one run, many processes.

Starts them on this machine, and keeps the run going: a process that dies or hangs is named, and all start again from the newest
checkpoint. What stands behind `--` is the command line of `python -m jaxtrain.main`; with --preflight that of
`python -m jaxtrain.preflight`, which those processes then run, once.

`python -m jaxtrain.launch slurm|mpi|kubernetes|ray [flags] -- --config=...` submits the run to a cluster instead, or with
--dry_run prints the script or manifest; `... slurm --help` lists its flags.
"""

from __future__ import annotations

if __name__ == "__main__":
    import jaxtrain.early  # noqa: F401, before all else: Ctrl-C ends the program from here on
    from jaxtrain import cli

    cli.run("jaxtrain.launch.__main__", "launch", answers_on_stdout=False)

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.command_line import parse_command_line, parse_with_flags
from jaxtrain.config import Config, MeshConfig
from jaxtrain.config_rules import find_problems
from jaxtrain.errors import EXIT_DONE, ConfigError, UsageError, nearest
from jaxtrain.launch.elastic import mesh_flags, mesh_for
from jaxtrain.launch.submit import STARTERS, render, submit
from jaxtrain.launch.supervisor import Policy, Supervisor, train_command
from jaxtrain.paths import user_path
from jaxtrain.preflight.checks import PreflightFlags

PROG = "python -m jaxtrain.launch"


@dataclass(frozen=True)
class LaunchFlags:
    """Flags of the launcher, before `--`."""

    processes: int = 1
    """Processes to start."""
    devices_per_process: int = 0
    """Fake CPU devices of each process; 0 to share out the GPUs of this machine."""
    processes_file: str = ""
    """A file with the number of processes that can run now. Where it changes, the run saves and goes on with that many."""
    fallback_mesh: tuple[str, ...] = ()
    """Meshes to try first when there are fewer devices, e.g. "data=2,fsdp=2"."""
    restarts: int = 10
    """Failures in a row without a further step, after which the launcher gives up."""
    stop_seconds: float = 120.0
    """After a signal the run has so long to save."""
    preflight: bool = False
    """Do not train: let the processes check whether the run would work here."""


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the launcher's arguments, those of the run)

    Raises:
      ConfigError: there is no `--` between them.
    """
    arguments = list(arguments)
    if "--" not in arguments:
        if {"-h", "--help"} & set(arguments):
            return arguments, []
        raise ConfigError([f"put -- before the run's own arguments: {PROG} --processes=4 -- --config=configs/quickstart.py"])
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def parse_mesh(text: str) -> MeshConfig:
    """A mesh of "data=2,fsdp=2"; axes left out are 1.

    Raises:
      ConfigError: it is not of that form.
    """
    try:
        sizes = {axis.strip(): int(size) for axis, size in (part.split("=") for part in text.split(","))}
        return MeshConfig(**({"fsdp": 1} | sizes))
    except (ValueError, TypeError) as error:
        raise ConfigError([f"--fallback_mesh={text!r}: give axes and sizes, e.g. data=2,fsdp=2"]) from error


class Size:
    """How many processes the next generation has."""

    def __init__(self, flags: LaunchFlags):
        self._flags, self._last = flags, flags.processes

    def __call__(self) -> int:
        """The number in processes_file, as far as it can be read and is one; else --processes."""
        if self._flags.processes_file:
            try:
                number = int(user_path(self._flags.processes_file).read_text(encoding="utf-8"))
                self._last = number if number >= 1 else self._last
            except (OSError, ValueError):
                pass  # it is being written
        return self._last


def launch(arguments: Sequence[str]) -> int:
    """Parses both command lines, and supervises the run to its end."""
    import tyro

    if arguments and not arguments[0].startswith("-"):
        return submit_to(arguments[0], arguments[1:])
    own, of_run = split(arguments)
    flags = tyro.cli(LaunchFlags, args=own, prog=PROG, description=__doc__, use_underscores=True)
    if flags.processes < 1 or flags.devices_per_process < 0:
        raise ConfigError(
            [f"--processes={flags.processes} must be at least 1, --devices_per_process={flags.devices_per_process} 0 or more"]
        )
    about = "The run's own flags.", f"{PROG} --"
    config = parse_with_flags(of_run, PreflightFlags, *about)[1] if flags.preflight else parse_command_line(of_run, *about)
    fallbacks = [parse_mesh(text) for text in flags.fallback_mesh]
    per_process = flags.devices_per_process or _gpus_per_process(flags.processes)
    full = _check(config, flags.processes * per_process)

    def extra(processes: int) -> list[str]:
        if processes == flags.processes:
            return []
        return mesh_flags(full, mesh_for(full, processes * per_process, fallbacks))

    def environment(index: int, processes: int) -> dict[str, str]:
        return (
            {"JAXTRAIN_CPU_DEVICES": str(flags.devices_per_process), "JAX_PLATFORMS": "cpu"}
            if flags.devices_per_process
            else {}
        )

    if flags.preflight:
        return preflight(of_run, flags.processes, environment)
    policy = Policy(flags.restarts, stop_seconds=flags.stop_seconds)
    command = train_command(of_run)
    return Supervisor(command, Size(flags), environment, config.directory / "launch", policy, extra).run()


def preflight(of_run: Sequence[str], processes: int, environment: Callable[[int, int], dict[str, str]]) -> int:
    """Runs the checks as `processes` processes, once. Their logs are kept where something went wrong."""

    def say(line: str) -> None:
        print(line, file=sys.stderr if line[20:].startswith("supervisor") else sys.stdout, flush=True)

    folder = Path(tempfile.mkdtemp(prefix="jaxtrain-preflight-"))
    command = [sys.executable, "-m", "jaxtrain.preflight", *of_run]
    code = Supervisor(command, lambda: processes, environment, folder, Policy(restarts=0), say=say).run()
    if code == EXIT_DONE:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"logs of all processes: {folder}", file=sys.stderr)
    return code


def submit_to(name: str, arguments: Sequence[str]) -> int:
    """Submits the run to a cluster, or prints what it would submit.

    Raises:
      UsageError: there is no such starter.
    """
    import tyro

    if name not in STARTERS:
        raise UsageError(f"{PROG} {name}: {nearest(name, STARTERS)}; without any, the run is started on this machine")
    own, of_run = split(arguments)
    style = (tyro.conf.FlagCreatePairsOff,)
    prog, about = f"{PROG} {name}", f"Submit a run to {name}, or print what would be submitted."
    flags = tyro.cli(STARTERS[name].flags, args=own, prog=prog, description=about, use_underscores=True, config=style)
    script = render(name, flags, parse_command_line(of_run, "The run's own flags.", f"{prog} --"), own, of_run)
    if flags.dry_run:
        print(script, end="")
        return EXIT_DONE
    return submit(name, script)


def _check(config: Config, devices: int) -> Config:
    resolved, problems = find_problems(config, devices)
    if problems:
        raise ConfigError(problems)
    return resolved


def _gpus_per_process(processes: int) -> int:
    import os

    from jaxtrain.launch.distributed import count_gpus

    gpus = count_gpus(os.environ)
    if not gpus or gpus % processes:
        raise ConfigError(
            [
                f"{gpus} GPUs cannot be shared by --processes={processes}; use a number that divides them, "
                "or --devices_per_process=2 for fake CPU devices"
            ]
        )
    return gpus // processes
