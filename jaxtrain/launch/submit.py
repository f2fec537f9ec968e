"""`jaxtrain launch slurm|mpi|kubernetes|ray [flags] -- --config=...`: submit or print the complete script of a run.

Each starter has its own file with its flags and its text. They share `job`: the number of hosts comes from the config's mesh,
and the config is checked for that many devices before anything is submitted.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtrain.config import Config
from jaxtrain.errors import EXIT_ERROR, ExplainedError
from jaxtrain.launch import kubernetes, mpi, on_ray, slurm
from jaxtrain.launch.job import Job, JobFlags, make_job


@dataclass(frozen=True)
class Starter:
    """A way to start runs."""

    flags: type[JobFlags]
    render: Callable[[Job, Any], str]
    """Returns the script or manifest."""
    needs: str
    """The program that must be installed."""
    takes: tuple[str, ...] = ()
    """The command that reads the text from standard input; empty: run it as a shell script."""


STARTERS = {
    "slurm": Starter(slurm.SlurmFlags, slurm.render, "sbatch", ("sbatch",)),
    "mpi": Starter(mpi.MpiFlags, mpi.render, "mpirun"),
    "kubernetes": Starter(kubernetes.KubernetesFlags, kubernetes.render, "kubectl", ("kubectl", "apply", "-f", "-")),
    "ray": Starter(on_ray.RayFlags, on_ray.render, "ray"),
}


def render(name: str, flags: JobFlags, config: Config, own: Sequence[str], of_run: Sequence[str]) -> str:
    """Return the script or manifest of a run, with the command line that made it at its head.

    Raises:
      ConfigError: the flags, or the config on that many devices, cannot work.
    """
    words = [word for word in own if word.replace("-", "_") != "__dry_run"]
    made_by = shlex.join(["jaxtrain", "launch", name, *words, "--", *of_run]).replace("\n", " ")
    return STARTERS[name].render(make_job(config, flags, of_run, made_by), flags)


def submit(name: str, script: str) -> int:
    """Pass the script to its starter and return the starter's exit code; a shell script replaces this process.

    Raises:
      ExplainedError: the starter's program is not on this machine.
    """
    starter = STARTERS[name]
    if shutil.which(starter.needs) is None:
        raise ExplainedError(
            f"{starter.needs} is not on this machine: run this where it is installed, or print the script with --dry_run"
        )
    if not starter.takes:
        sys.stdout.flush()
        os.execvp("bash", ["bash", "-c", script])  # so that signals reach the script
    code = subprocess.run(starter.takes, input=script.encode(errors="surrogateescape")).returncode
    return code if code >= 0 else EXIT_ERROR
