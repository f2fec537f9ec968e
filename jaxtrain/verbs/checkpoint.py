"""`jaxtrain checkpoint list|verify|inspect|diff|prune|rewind FOLDER`: look after the checkpoints of a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.command import Usage, parse, wanted_help
from jaxtrain.errors import EXIT_DONE, CheckpointError, UsageError, nearest
from jaxtrain.text import show

ABOUT = (
    "FOLDER is a run's folder or its `checkpoints`; FOLDER:STEP or FOLDER:best names one step of it (without it, the newest)."
)


@dataclass(frozen=True)
class Folder:
    """One checkpoint, or all of a run."""

    folder: str
    """FOLDER or FOLDER:STEP."""


@dataclass(frozen=True)
class VerifyFlags(Folder):
    """Flags of `verify`."""

    all: bool = False
    """Verify every step, not only one."""


@dataclass(frozen=True)
class Two(Folder):
    """Two checkpoints."""

    other: str
    """FOLDER or FOLDER:STEP."""


@dataclass(frozen=True)
class PruneFlags(Folder):
    """Flags of `prune`."""

    keep: int
    """Number of newest steps to keep."""
    keep_every: int = 0
    """Also keep multiples of this; 0: none."""
    set_aside: bool = False
    """Also delete folders set aside as damaged or rolled back."""
    dry_run: bool = False
    """Print what would be deleted."""


def _usage(name: str, about: str, own: type, *words: str) -> Usage:
    return Usage(f"checkpoint {name}", f"{about}. {ABOUT}", own, ("folder", *words), config="none")


USAGES = {
    "list": _usage("list", "List every step, whole or not", Folder),
    "verify": _usage("verify", "Read every array and compare its checksum; exit code 1 if one differs", VerifyFlags),
    "inspect": _usage("inspect", "Print what a step holds and belongs to", Folder),
    "diff": _usage("diff", "Compare two steps: config, data, versions, and how far each array is from the other", Two, "other"),
    "prune": _usage("prune", "Delete all but the newest steps, and the best one where the run keeps that", PruneFlags),
    "rewind": _usage("rewind", "Go back to FOLDER:STEP: later steps become a branch of the run, never deleted", Folder),
}


def main(arguments: Sequence[str]) -> int:
    """Parse, act; return the exit code."""
    name = arguments[0] if arguments else "--help"
    if name not in USAGES and wanted_help([name]) is not None:
        from jaxtrain.command.help import print_list

        verbs = {verb: usage.about.split(". ")[0] for verb, usage in USAGES.items()}
        print_list("jaxtrain checkpoint VERB FOLDER [flags]", f"Look after the checkpoints of a run. {ABOUT}", verbs)
        return EXIT_DONE
    if name not in USAGES:
        raise UsageError(f"jaxtrain checkpoint {name}: {nearest(name, USAGES)}")
    flags = parse(USAGES[name], arguments[1:]).own

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # must not take a GPU away from a run
    from jaxtrain.checkpoint import inspection

    acts = {
        "list": inspection.list_steps,
        "verify": inspection.verify,
        "inspect": inspection.inspect,
        "diff": inspection.diff,
        "prune": inspection.prune,
        "rewind": _rewind,
    }
    return acts[name](*(getattr(flags, field.name) for field in dataclasses.fields(flags)))


def _rewind(address: str) -> int:
    """Make a branch of what a run has after a step."""
    from jaxtrain.checkpoint.addresses import find
    from jaxtrain.train.resume import leave_later_steps
    from jaxtrain.train.rollbacks import Rollbacks
    from jaxtrain.train.run_dir import make_run_dir, only_run_in

    folder, step = find(address)
    run_dir = Path(folder).parent
    make_run_dir(run_dir)
    try:
        with only_run_in(run_dir):
            branch = leave_later_steps(run_dir, step, Rollbacks.load(run_dir))
    except OSError as error:
        raise CheckpointError(f"{run_dir} cannot be written: {error}") from error
    show(f"{run_dir} is back at step {step}; what came after it is kept in {branch}")
    return EXIT_DONE
