"""A run's rollbacks, and the batches left out since: a list that only grows, in run_dir and in every checkpoint.

The position in the data is a function of the step number, so a run that leaves batches out also needs the map from steps to
batches: the natural numbers without those left out. All processes read it, on any mesh, whenever the run resumes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxtrain.errors import ExplainedError
from jaxtrain.processes import from_first

FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """One return to an older checkpoint."""

    bad_step: int
    """The step that was bad, from 1."""
    back_to: int
    """The step whose state the run resumed from."""
    reason: str
    """Explanation for the reader."""
    first_batch: int = 0
    last_batch: int = -1
    """Last of the batches left out from then on, numbered from 0; none if last is before first."""


def rollbacks_digest(run_dir: Path) -> str:
    """Return a hash of the file as this process reads it, or "none"."""
    path = run_dir / FILE
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "none"


class Rollbacks:
    """All rollbacks of a run, oldest first."""

    def __init__(self, rollbacks: Sequence[Rollback] = ()):
        self.all = list(rollbacks)

    def __len__(self) -> int:
        return len(self.all)

    def left_out(self) -> list[tuple[int, int]]:
        """Return the disjoint ranges (first, last) of batches left out, ascending."""
        ranges: list[tuple[int, int]] = []
        for first, last in sorted((r.first_batch, r.last_batch) for r in self.all if r.last_batch >= r.first_batch):
            if ranges and first <= ranges[-1][1] + 1:
                ranges[-1] = (ranges[-1][0], max(last, ranges[-1][1]))
            else:
                ranges.append((first, last))
        return ranges

    def batch(self, steps_before: int) -> int:
        """Return the batch number of the step that has `steps_before` steps before it."""
        number = steps_before
        for first, last in self.left_out():
            if number >= first:
                number += last - first + 1
        return number

    def add(self, bad_step: int, back_to: int, reason: str, batches: int) -> Rollback:
        """Record a rollback, and leave out the last `batches` of the batches between the two steps."""
        last = self.batch(bad_step - 1)
        first = self.batch(max(bad_step - batches, back_to)) if batches else last + 1
        self.all.append(Rollback(bad_step, back_to, reason, first, last))
        return self.all[-1]

    def until(self, step: int) -> Rollbacks:
        """Return those that the run at `step` had behind it."""
        return Rollbacks([rollback for rollback in self.all if rollback.back_to <= step])

    def to_plain(self) -> list[dict[str, Any]]:
        """Return JSON values."""
        return [dataclasses.asdict(rollback) for rollback in self.all]

    @classmethod
    def from_plain(cls, plain: Sequence[dict[str, Any]]) -> Rollbacks:
        """Return the inverse of `to_plain`."""
        return cls([Rollback(**entry) for entry in plain])

    def to_json(self) -> str:
        """Return the text of run_dir/rollbacks.json."""
        return json.dumps(self.to_plain(), indent=1) + "\n"

    @classmethod
    def load(cls, run_dir: Path) -> Rollbacks:
        """Load the list of run_dir as process 0 sees it, since hosts see changes of a shared file system at different times.

        Raises:
          ExplainedError: the file holds something else.
        """
        path = run_dir / FILE
        text = path.read_text(encoding="utf-8") if jax.process_index() == 0 and path.exists() else "[]"
        try:
            return cls.from_plain(json.loads(from_first(text)))
        except (ValueError, TypeError) as error:
            raise ExplainedError(
                f"{path} does not hold the list of rollbacks that this run writes there ({error}); bring back a copy, or take "
                "the list from the newest checkpoint's metadata (`jaxtrain checkpoint inspect`)"
            ) from error
