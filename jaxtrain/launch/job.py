"""What every starter of a run needs to know: how many hosts, how many devices each, which command, which environment.

Imports no jax. A `Job` is made from the run's own config and checked for that many devices, so that a layout that cannot work
is refused here and not after an hour in a queue.
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
    """Hosts, one process on each; 0 for as many as the config's mesh needs."""
    devices_per_host: int = 8
    """GPUs of each host, all of them driven by its one process."""
    cpu: bool = False
    """Fake CPU devices instead of GPUs: to try all this where there is none."""
    env: tuple[str, ...] = ()
    """Environment of every process: NAME=value, or NAME alone for a value that is not to stand in the script."""
    python: str = ".venv/bin/python"
    """The Python of every host, from `directory`."""
    directory: str = ""
    """The folder of this repository on every host; empty for the one that the job starts in."""
    restarts: int = 20
    """How often a run that was lost is started again, before a person has to look."""
    dry_run: bool = False
    """Print the script or manifest instead of submitting it."""


@dataclass(frozen=True)
class Job:
    """A run, ready to be started on its hosts."""

    config: Config
    hosts: int
    devices_per_host: int
    command: tuple[str, ...]
    """One process of it, the same on every host."""
    environment: dict[str, str]
    """Variables to set."""
    passed_on: tuple[str, ...]
    """Variables whose value only the submitter's environment, or a secret store, knows."""
    made_by: str
    """The command line that made this, for a comment."""

    @property
    def folder(self) -> str:
        """Where launchers keep their notes, beside the run's checkpoints."""
        return str(self.config.directory / "launch")

    @property
    def label(self) -> str:
        """The run's name in letters that no script or queue minds."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", self.config.name) or "run"

    @property
    def headline(self) -> str:
        """One line for the script's head."""
        hosts = f"{self.hosts} host{'s' * (self.hosts > 1)} of {self.devices_per_host}"
        kind = "fake CPU devices" if "JAXTRAIN_CPU_DEVICES" in self.environment else "GPUs"
        return f"{self.label} on {hosts} {kind}, one process a host."


def make_job(config: Config, flags: JobFlags, of_run: Sequence[str], made_by: str) -> Job:
    """Return the job of a config and its command line `of_run`.

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
    """Return the hosts that the mesh fills.

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
    """(values to set, names to pass on, problems)"""
    values: dict[str, str] = {}
    names: list[str] = []
    problems: list[str] = []
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(f"--env={variable!r}: {name!r} is no name of a variable; write NAME=value or NAME")
        elif equals and _SECRET.search(name):
            problems.append(f"--env={name}=...: a secret would stand in the script; give the name alone, --env {name}")
        elif equals:
            values[name] = value
        else:
            names.append(name)
    return values, tuple(names), problems


def check_shared(job: Job, mount: str, where: str) -> None:
    """Refuse a run directory that does not outlive a host.

    Raises:
      ConfigError: it is not inside `mount`.
    """
    if not job.config.directory.is_relative_to(mount):
        raise ConfigError(
            [f"run_dir={str(job.config.directory)!r} is lost with its host {where}; use --run_dir={mount}/{job.label}"]
        )
