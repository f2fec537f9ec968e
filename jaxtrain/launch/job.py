"""What every starter of a run needs: number of hosts, devices of each, command, environment.

Imports no jax. A `Job` is made from the run's own config and checked for that many devices, so that an impossible layout is
refused here and not after an hour in a queue.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtrain.config import Config
from jaxtrain.config.rules import validate
from jaxtrain.errors import ConfigError

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class JobFlags:
    """Flags of every starter, before `--`."""

    hosts: int = 0
    """Number of hosts, each with one process; 0: as many as the config's mesh needs."""
    devices_per_host: int = 8
    """GPUs of each host, all driven by its one process."""
    cpu: bool = False
    """Use fake CPU devices instead of GPUs, to try a launch without GPUs."""
    env: tuple[str, ...] = ()
    """Environment variables of every process: NAME=value, or NAME alone to keep the value out of the script."""
    python: str = ".venv/bin/python"
    """Python interpreter on every host, relative to `directory`."""
    directory: str = ""
    """Folder of this repository on every host; empty: the folder that the job starts in."""
    restarts: int = 20
    """Number of restarts after a failure."""
    dry_run: bool = False
    """Print the script or manifest instead of submitting it."""


@dataclass(frozen=True)
class Job:
    """A run, ready to start on its hosts."""

    config: Config
    hosts: int
    devices_per_host: int
    command: tuple[str, ...]
    """Command of one process, the same on every host."""
    environment: dict[str, str]
    """Environment variables to set."""
    passed_on: tuple[str, ...]
    """Variables whose values come from the submitter's environment or a secret store."""
    made_by: str
    """The command line that made this, for a comment in the script."""

    @property
    def folder(self) -> str:
        """Folder of the launchers' files, beside the run's checkpoints."""
        return str(self.config.directory / "launch")

    @property
    def label(self) -> str:
        """The run's name in characters that are safe in scripts and queues."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", self.config.name) or "run"

    @property
    def headline(self) -> str:
        """One line for the head of the script."""
        hosts = f"{self.hosts} host{'s' * (self.hosts > 1)} of {self.devices_per_host}"
        kind = "fake CPU devices" if "JAXTRAIN_CPU_DEVICES" in self.environment else "GPUs"
        return f"{self.label} on {hosts} {kind}, one process a host."


def make_job(config: Config, flags: JobFlags, of_run: Sequence[str], made_by: str) -> Job:
    """Return the job of a config and its run's command line `of_run`.

    Raises:
      ConfigError: the flags contradict the mesh or one another, or the config is not valid on that many devices.
    """
    least = {"hosts": 0, "devices_per_host": 1, "restarts": 0}
    problems = [
        f"--{name}={getattr(flags, name)} must be at least {n}" for name, n in least.items() if getattr(flags, name) < n
    ]
    environment, passed_on, wrong = _split_environment(flags.env)
    if problems or wrong:
        raise ConfigError(problems + wrong)
    hosts = flags.hosts or _hosts_of_mesh(config, flags.devices_per_host)
    validate(config, hosts * flags.devices_per_host)
    if flags.cpu:
        environment = {"JAXTRAIN_CPU_DEVICES": str(flags.devices_per_host), "JAX_PLATFORMS": "cpu"} | environment
    command = (flags.python, "-m", "jaxtrain", "train", *of_run)
    return Job(config, hosts, flags.devices_per_host, command, environment, passed_on, made_by)


def _hosts_of_mesh(config: Config, per_host: int) -> int:
    """Return the number of hosts that the mesh fills.

    Raises:
      ConfigError: it has an axis of -1, or does not fill whole hosts.
    """
    mesh = config.mesh
    if -1 in mesh.shape:
        raise ConfigError(["a mesh axis of -1 takes whatever there is: say how much that is with --hosts=2, or give it a size"])
    devices = math.prod(mesh.shape)
    if devices % per_host:
        fitting = max(n for n in range(1, per_host + 1) if devices % n == 0)
        raise ConfigError(
            [
                f"the mesh has {devices} devices, which do not fill hosts of --devices_per_host={per_host}; "
                f"use --devices_per_host={fitting} or another mesh"
            ]
        )
    return devices // per_host


def _split_environment(variables: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...], list[str]]:
    """(values to set, names to pass on, problems)."""
    values: dict[str, str] = {}
    names: list[str] = []
    problems: list[str] = []
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(f"--env={variable!r}: {name!r} is not a variable name; write NAME=value or NAME")
        elif equals and _SECRET.search(name):
            problems.append(f"--env={name}=...: the script would contain a secret; give the name alone, --env {name}")
        elif equals:
            values[name] = value
        else:
            names.append(name)
    return values, tuple(names), problems


def check_shared(job: Job, mount: str, where: str) -> None:
    """Refuse a run directory that would be lost with a host.

    Raises:
      ConfigError: it is not inside `mount`.
    """
    if not job.config.directory.is_relative_to(mount):
        raise ConfigError(
            [f"run_dir={str(job.config.directory)!r} is lost with its host {where}; use --run_dir={mount}/{job.label}"]
        )
