"""Start a run in a Ray cluster: one actor per host, which runs the same `jaxtrain train` process as every other starter.

Ray places the hosts and reports a lost one; each process learns its place from JAXTRAIN_* as under our own supervisor, and
JAX's runtime does the rest. `launch ray` submits this module as a Ray job. Ray is imported only here, and only when it runs.

Why not Ray Train: its JAX backend passes no timeouts on, so that a lost host is noticed only after 30 s, and does not tell the
process which exit codes mean "start again".
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, EXIT_PEER, EXIT_STOPPED, EXIT_USAGE, ConfigError
from jaxtrain.launch.job import Job, JobFlags
from jaxtrain.launch.shell import comment


@dataclass(frozen=True)
class RayFlags(JobFlags):
    """Flags of `launch ray`."""

    address: str = ""
    """The cluster's job server, e.g. http://head:8265; empty: RAY_ADDRESS."""


class HostLost(Exception):
    """A host, or Ray's process on it, is gone."""


def render(job: Job, flags: RayFlags) -> str:
    """Return the shell script that submits this module as a Ray job.

    Raises:
      ConfigError: --env names a variable without its value.
    """
    if job.passed_on:
        hidden = "Ray shows a job's environment to everybody; set it where Ray is started on the hosts"
        raise ConfigError([f"--env {name}: {hidden}" for name in job.passed_on])
    words = [f"--address={flags.address}"] if flags.address else []
    gpus = 0 if flags.cpu else job.devices_per_host
    variables = [f"{name}={value}" for name, value in job.environment.items()]
    process = ["env", *variables, *job.command] if variables else list(job.command)
    driver = [flags.python, "-m", "jaxtrain.launch.on_ray", str(job.hosts), str(gpus), str(flags.restarts)]
    move = f"cd {shlex.quote(flags.directory)} || exit 1\n" if flags.directory else ""
    return f"""#!/usr/bin/env bash
{comment(job)}
# Every host of the cluster has this repository in the same folder; the job starts there.
set -euo pipefail
{move}
exec ray job submit {shlex.join(words)}{" " * bool(words)}-- \\
  bash -c {shlex.quote('cd "$0" && exec "$@"')} "$PWD" \\
  {shlex.join(driver)} \\
  {shlex.join(process)}
"""


def environment_of(index: int, count: int, address: str) -> dict[str, str]:
    """Return the environment of the process on host `index`: its place, and the `address` (host:port) of process 0."""
    return {
        "JAXTRAIN_COORDINATOR": address,
        "JAXTRAIN_PROCESSES": str(count),
        "JAXTRAIN_PROCESS_ID": str(index),
        "JAXTRAIN_STARTER": "Ray",
        "PYTHONUNBUFFERED": "1",
    }


class Host:
    """The actor of one host: starts the process there, passes a signal on, and returns its exit code."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def address(self) -> str:
        """Return host:port for process 0: this host as Ray reaches it, and a port that is free now."""
        import socket

        import ray  # type: ignore[import-not-found]

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def train(self, command: Sequence[str], directory: str, environment: Mapping[str, str]) -> int:
        """Run the process to its end; return its exit code."""
        self._process = subprocess.Popen(list(command), cwd=directory, env=os.environ | dict(environment))
        return self._process.wait()

    def stop(self) -> None:
        """Ask the process to save and end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


def run_once(ray: Any, hosts: Sequence[Any], command: Sequence[str], directory: str) -> list[int]:
    """Run all processes until they end, which they do by themselves when one is lost; return their exit codes.

    Raises:
      HostLost: an actor did not survive its process.
    """
    try:
        address = ray.get(hosts[0].address.remote())
        endings = [
            host.train.remote(command, directory, environment_of(index, len(hosts), address))
            for index, host in enumerate(hosts)
        ]
        return ray.get(endings)
    except ray.exceptions.RayActorError as error:
        raise HostLost(str(error).splitlines()[0]) from error


def summarise(codes: Sequence[int]) -> int:
    """Return one exit code for all: first an error that no restart mends, then done or stopped if all are, else a loss."""
    for code in (EXIT_USAGE, EXIT_ERROR):
        if code in codes:
            return code
    if set(codes) == {EXIT_DONE}:
        return EXIT_DONE
    return EXIT_STOPPED if set(codes) <= {EXIT_DONE, EXIT_STOPPED} else EXIT_PEER


def run(ray: Any, hosts: int, gpus: int, restarts: int, command: Sequence[str], pause: float = 10.0) -> int:
    """Keep the run going on that many hosts of the cluster; return its exit code."""
    group = ray.util.placement_group([{"CPU": 1, **({"GPU": gpus} if gpus else {})}] * hosts, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    actors: list[Any] = []
    stopping: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopping.append(number)
        for actor in actors:
            actor.stop.remote()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)  # never restored: this process does nothing else
    for turn in range(restarts + 1):
        actors[:] = [_place(ray, group, index, gpus) for index in range(hosts)]
        try:
            code = summarise(run_once(ray, actors, command, os.getcwd()))
        except HostLost as lost:
            print(f"a host was lost: {lost}", file=sys.stderr)
            code = EXIT_PEER
        for actor in actors:
            ray.kill(actor)
        if code != EXIT_PEER or stopping:
            return code
        if turn < restarts:
            print(f"the run was lost; restart {turn + 1} of at most {restarts} in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
    return EXIT_PEER


def _place(ray: Any, group: Any, index: int, gpus: int) -> Any:
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    options = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": 2, "scheduling_strategy": strategy}
    return ray.remote(Host).options(**options).remote()


def main(arguments: Sequence[str]) -> int:
    """Parse HOSTS GPUS RESTARTS COMMAND..., as written by `render`, and run inside the cluster."""
    import ray  # type: ignore[import-not-found]
    import ray.util.scheduling_strategies  # type: ignore[import-not-found]  # noqa: F401

    hosts, gpus, restarts = (int(word) for word in arguments[:3])
    ray.init()
    return run(ray, hosts, gpus, restarts, arguments[3:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
