"""`jaxtrain launch --processes=2 --devices_per_process=2 -- --config=configs/quickstart.py`: one run, many processes.

Starts them on this machine, and keeps the run going: a process that dies or hangs is named, and all restart from the newest
checkpoint. After `--` comes the command line of `jaxtrain train`; with --preflight that of `jaxtrain preflight`,
which those processes then run once.

`jaxtrain launch slurm|mpi|kubernetes|ray [flags] -- --config=...` submits the run to a cluster instead, or with --dry_run
prints the script or manifest; `jaxtrain launch slurm --help` lists its flags.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtrain.command import NoFlags, Usage, parse, wanted_help
from jaxtrain.errors import EXIT_DONE, UsageError, nearest
from jaxtrain.launch.elastic import parse_mesh
from jaxtrain.launch.local import LaunchFlags, preflight, train
from jaxtrain.launch.submit import STARTERS, render, submit
from jaxtrain.verbs.preflight import USAGE as PREFLIGHT

USAGE = Usage(
    "launch",
    "Run on several processes of this machine, and keep the run going. What stands behind -- is the command line of "
    "`jaxtrain train`. `jaxtrain launch slurm|mpi|kubernetes|ray [flags] -- ...` submits the run to a cluster instead.",
    LaunchFlags,
    config="none",
)
RUN = Usage("launch --", "The run's own flags.", NoFlags)


def main(arguments: Sequence[str]) -> int:
    """Parse both command lines, and supervise or submit the run; return the exit code."""
    if arguments and not arguments[0].startswith("-"):
        return submit_to(arguments[0], arguments[1:])
    own, of_run = split(arguments)
    flags = parse(USAGE, own).own
    if flags.processes < 1 or flags.devices_per_process < 0:
        raise UsageError(
            f"--processes={flags.processes} must be at least 1, --devices_per_process={flags.devices_per_process} 0 or more"
        )
    if flags.preflight:
        return preflight(parse(PREFLIGHT, of_run).config, flags, of_run)
    fallbacks = [parse_mesh(text) for text in flags.fallback_mesh]
    return train(parse(RUN, of_run).config, flags, fallbacks, of_run)


def submit_to(name: str, arguments: Sequence[str]) -> int:
    """Submit the run to a cluster, or print its script or manifest.

    Raises:
      UsageError: there is no such starter.
    """
    if name not in STARTERS:
        raise UsageError(f"jaxtrain launch {name}: {nearest(name, STARTERS)}; without any, the run is started on this machine")
    own, of_run = split(arguments)
    about = f"Submit a run to {name}, or print what would be submitted. What stands behind -- is the run's own command line."
    flags = parse(Usage(f"launch {name}", about, STARTERS[name].flags, config="none"), own).own
    script = render(name, flags, parse(RUN, of_run).config, own, of_run)
    if flags.dry_run:
        print(script, end="")
        return EXIT_DONE
    return submit(name, script)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the launcher's arguments, the run's arguments).

    Raises:
      UsageError: there is no `--` between them.
    """
    arguments = list(arguments)
    if "--" not in arguments:
        if wanted_help(arguments) is not None:
            return arguments, []
        raise UsageError("put -- before the run's own arguments: jaxtrain launch --processes=4 -- --config=quickstart")
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]
