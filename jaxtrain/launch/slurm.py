"""Start a run under SLURM: one batch script that requeues itself until the run is done.

One task per node drives all its GPUs. SLURM signals the processes before the time limit, they save and end with 76, and the
script requeues itself; so it does after any loss (75, 70, a signal), at most --restarts times. Errors that a restart would not
mend (1, 2) end the job. The codes are read from JAXTRAIN_EXIT_CODES, because srun returns only the highest exit code, often
that of a process which srun itself ended because of another.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from jaxtrain.errors import ConfigError
from jaxtrain.launch.job import Job, JobFlags
from jaxtrain.launch.shell import command_lines, comment, exit_code_lines, exports


@dataclass(frozen=True)
class SlurmFlags(JobFlags):
    """Flags of `launch slurm`."""

    time: str = "1-00:00:00"
    """Time limit of one job in SLURM's form: minutes, hours:minutes:seconds or days-hours:minutes:seconds."""
    save_seconds: int = 300
    """Seconds before the time limit at which the processes are told to save; SLURM may be a minute early."""
    partition: str = ""
    """Partition; empty: the cluster's default."""
    account: str = ""
    """Account; empty: the user's default."""
    options: tuple[str, ...] = ()
    """Further sbatch options, without the dashes, e.g. "qos=high" "constraint=h200"."""


def render(job: Job, flags: SlurmFlags) -> str:
    """Return the batch script.

    Raises:
      ConfigError: the time limit is not in SLURM's form, or leaves no time to train before the signal.
    """
    _check(flags)
    whole = [] if flags.cpu else [f"gpus-per-node={job.devices_per_host}", "exclusive", "mem=0"]
    chosen = {"partition": flags.partition, "account": flags.account, "chdir": flags.directory}
    options = [
        f"job-name={job.label}",
        f"nodes={job.hosts}",
        "ntasks-per-node=1",
        *whole,
        f"time={flags.time}",
        f"signal=TERM@{flags.save_seconds}",
        "requeue",
        "open-mode=append",
        "output=%x-%j.log",
        *(f"{name}={value}" for name, value in chosen.items() if value),
        *flags.options,
    ]
    header = "\n".join(f"#SBATCH --{option}" for option in options)
    return f"""#!/usr/bin/env bash
{comment(job)}
# To change it, run that again; to submit it as it is, sbatch this file in the repository's folder, which all nodes share.
{header}
set -uo pipefail

restarts={flags.restarts} # turns after the first; SLURM counts them, also those that ended at the time limit
turn=${{SLURM_RESTART_COUNT:-0}}
{exports(job)}export JAXTRAIN_EXIT_CODES={shlex.quote(job.folder)}/slurm-$SLURM_JOB_ID-$turn # each process leaves its own here
mkdir -p "$JAXTRAIN_EXIT_CODES"

# The task gets all that the job has of its node: SLURM would give it one CPU.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \\
{command_lines(job, 2)}
code=$?

{exit_code_lines()}
if ((turn >= restarts)); then
  echo "error: exit code $code after $restarts restarts; look at the log, then sbatch again to go on" >&2
  exit "$code"
fi
echo "exit code $code: back into the queue, restart $((turn + 1)) of at most $restarts"
scontrol requeue "$SLURM_JOB_ID" && sleep 300 # which ends this script
exit "$code"
"""


def _check(flags: SlurmFlags) -> None:
    wrong = [text for text in flags.options if not re.fullmatch(r"[a-z][a-z-]*(=\S+)?", text)]
    problems = [f"--options={text!r}: write it without dashes and blanks, e.g. qos=high" for text in wrong]
    for name in ("partition", "account", "directory"):
        if re.search(r"\s", getattr(flags, name)):
            problems.append(f"--{name}={getattr(flags, name)!r} must not contain blanks")
    limit = seconds(flags.time)
    if limit is None:
        problems.append(f"--time={flags.time!r}: write minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    elif not 0 < flags.save_seconds <= 65535 or limit <= flags.save_seconds + 60:
        problems.append(
            f"--time={flags.time} is {limit} s, and --save_seconds={flags.save_seconds} of it (1 to 65535) are for saving: "
            "leave more than a minute to train"
        )
    if problems:
        raise ConfigError(problems)


def seconds(time: str) -> int | None:
    """Return the seconds of a time limit in one of SLURM's six forms, e.g. 90 (minutes), 1:30:00, 1-12; None in any other."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        return None
    days, *rest = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:  # minutes[:seconds], not hours:minutes:seconds or days-hours[:minutes[:seconds]]
        rest = [0, *rest[:2]]
    return ((days * 24 + rest[0]) * 60 + rest[1]) * 60 + rest[2]
