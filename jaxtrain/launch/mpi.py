"""Start a run under Open MPI 4 or 5: one mpirun with one rank per host, in a loop, because mpirun restarts nothing.

Both versions take the options used here. SIGTERM to mpirun would end the ranks within a second; it forwards SIGUSR1, on which a
run saves and stops. A signal to the script is therefore turned into SIGUSR1. The ranks' own exit codes are read from
JAXTRAIN_EXIT_CODES: mpirun's is 1 or that of a rank that it killed.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from jaxtrain.errors import EXIT_STOPPED, ConfigError
from jaxtrain.launch.job import Job, JobFlags
from jaxtrain.launch.shell import command_lines, comment, exit_code_lines, exports


@dataclass(frozen=True)
class MpiFlags(JobFlags):
    """Flags of `launch mpi`."""

    host_names: tuple[str, ...] = ("localhost",)
    """Host names, in the order of their ranks."""
    port: int = 61440
    """First TCP port on the first host, at which the processes join; every restart uses the next one."""
    options: tuple[str, ...] = ()
    """Further mpirun options, passed unchanged, e.g. "--mca oob_tcp_if_include eth0"."""


def render(job: Job, flags: MpiFlags) -> str:
    """Return the shell script.

    Raises:
      ConfigError: there are not as many host names as hosts, or the ports are outside 1024 to 65535.
    """
    _check(job, flags)
    names = list(flags.host_names)
    variables = ["JAXTRAIN_EXIT_CODES", *job.environment, *job.passed_on]
    passed = "".join(f" \\\n    -x {name}" for name in variables)
    further = "".join(f" \\\n    {option}" for option in flags.options)
    move = f"cd {shlex.quote(flags.directory)} || exit 1\n" if flags.directory else ""
    coordinator = "127.0.0.1" if names == ["localhost"] else names[0]
    return f"""#!/usr/bin/env bash
{comment(job)}
# To change it, run that again; to start it as it is, run this file in the repository's folder, which all hosts share.
set -uo pipefail
{move}
restarts={flags.restarts}
{exports(job)}
stopping=""
running=""
stop() {"{"}
  stopping=yes
  [[ -z $running ]] || kill -USR1 "$running"
{"}"}
trap stop TERM INT USR1

for ((turn = 0; turn <= restarts; turn++)); do
  export JAXTRAIN_EXIT_CODES={shlex.quote(job.folder)}/mpi-$$-$turn # each process leaves its own here
  mkdir -p "$JAXTRAIN_EXIT_CODES"
  # A session of its own, so that Ctrl-C reaches the script alone; a fresh port, because the last one may still be held.
  setsid mpirun -np {job.hosts} --host {",".join(f"{name}:1" for name in names)} --map-by ppr:1:node --bind-to none{further} \\
    -x JAXTRAIN_COORDINATOR={coordinator}:$(({flags.port} + turn)){passed} \\
{command_lines(job, 4, " &")}
  running=$!
  wait "$running"
  code=$?
  while kill -0 "$running" 2>/dev/null; do # a signal ends the wait, not mpirun
    wait "$running"
    code=$?
  done
  running=""

{exit_code_lines(2)}
  if [[ -n $stopping ]] || ((code == {EXIT_STOPPED})); then
    echo "stopped; the same command goes on from the newest checkpoint" >&2
    exit {EXIT_STOPPED}
  fi
  ((turn < restarts)) || break
  echo "exit code $code: restart $((turn + 1)) of at most $restarts in 10 s" >&2
  sleep 10
done
echo "error: lost after $restarts restarts; look at the log" >&2
exit "$code"
"""


def _check(job: Job, flags: MpiFlags) -> None:
    wrong = [name for name in flags.host_names if not re.fullmatch(r"[A-Za-z0-9._-]+", name)]
    problems = [f"--host_names={name!r} is no name of a host" for name in wrong]
    if len(flags.host_names) != job.hosts or len(set(flags.host_names)) != job.hosts:
        problems.append(
            f"the run needs {job.hosts} different hosts, but --host_names has {len(set(flags.host_names))}; "
            "e.g. --host_names node1 node2"
        )
    if not 1024 <= flags.port <= 65535 - flags.restarts:
        problems.append(f"--port={flags.port} and --restarts={flags.restarts} ports after it must lie in 1024 to 65535")
    if problems:
        raise ConfigError(problems)
