"""Go back to a step of a run: what came after it becomes a branch, a run folder of its own inside run_dir.

    branches/after-1000-1/checkpoints/1500/   moved there
    branches/after-1000-1/metrics.jsonl       a copy of all rows, as config.json and rollbacks.json are copies
    branches/after-1000-1/branch.json         the step, the checkpoints to move, the files to write; "done" when all is

The rename that gives the branch its name commits it: what a kill then leaves undone is done at the next start (`finish`), so no
start sees some of the later checkpoints. Snapshots of the fast tier lose their token first, since they would bring later steps
back.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrain.checkpoint.fast import TOKEN_FILE
from jaxtrain.checkpoint.stored import committed_steps
from jaxtrain.files import replace_file

FOLDER, NOTE = "branches", "branch.json"
_COPIED = ("metrics.jsonl", "config.json", "rollbacks.json")
_NAME = re.compile(r"after-(\d+)-(\d+)")


def branches(run_dir: Path) -> list[Path]:
    """Return the branches of a run, oldest first."""
    found = [path for path in (run_dir / FOLDER).glob("after-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def newest_return(run_dir: Path) -> int | None:
    """Return the step that the run last went back to."""
    known = branches(run_dir)
    return _read(known[-1])["step"] if known else None


def leave(run_dir: Path, step: int, files: Mapping[str, str]) -> Path:
    """Move the checkpoints after `step` into a new branch, and return it. Only one process calls it, with the run's lock.

    Args:
      files: contents of files of run_dir as they are from now on.

    Raises:
      OSError: the branch cannot be made.
    """
    number = 1 + max((int(path.name.rpartition("-")[2]) for path in branches(run_dir)), default=0)
    branch = run_dir / FOLDER / f"after-{step}-{number}"
    unfinished = branch.with_name(f"{branch.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "checkpoints").mkdir(parents=True)
    for name in _COPIED:
        if (run_dir / name).is_file():
            shutil.copyfile(run_dir / name, unfinished / name)
    later = [s for s in committed_steps(run_dir / "checkpoints") if s > step]
    note = {"step": step, "checkpoints": later, "files": dict(files), "done": False}
    replace_file(unfinished / NOTE, json.dumps(note), durable=True)
    unfinished.rename(branch)
    finish(run_dir)
    return branch


def finish(run_dir: Path) -> None:
    """Do what a process that went back had no time to do.

    Raises:
      OSError: it cannot be done.
    """
    for branch in branches(run_dir):
        note = _read(branch)
        if note["done"]:
            continue
        if (run_dir / TOKEN_FILE).exists():
            replace_file(run_dir / TOKEN_FILE, secrets.token_hex(8))
        for name, content in note["files"].items():
            replace_file(run_dir / name, content, durable=True)
        for step in reversed(note["checkpoints"]):
            if (run_dir / "checkpoints" / str(step)).exists():
                os.rename(run_dir / "checkpoints" / str(step), branch / "checkpoints" / str(step))
        replace_file(branch / NOTE, json.dumps(note | {"done": True}), durable=True)


def _read(branch: Path) -> dict[str, Any]:
    return json.loads((branch / NOTE).read_text(encoding="utf-8"))
