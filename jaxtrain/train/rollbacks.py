"""What a run went back for, and which batches it leaves out since: a list that only grows, in run_dir and in every checkpoint.

The position in the data is a function of the step number, so a run that leaves batches out needs one thing more: the map from
steps to batches, which is the natural numbers without those left out. It is read by all processes, on any mesh, whenever
the run goes on.
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
    """The step whose state the run went on from."""
    reason: str
    """For a person."""
    first_batch: int = 0
    last_batch: int = -1
    """Batches left out from then on, numbered from 0; none where last is before first."""


def rollbacks_digest(run_dir: Path) -> str:
    """Return a hash of the file as this process reads it, or "none"."""
    path = run_dir / FILE
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "none"


class Rollbacks:
    """All returns of a run so far, oldest first."""

    def __init__(self, rollbacks: Sequence[Rollback] = ()):
        self.all = list(rollbacks)

    def __len__(self) -> int:
        return len(self.all)

    def left_out(self) -> list[tuple[int, int]]:
        """Ranges (first, last) of batches left out, ascending and apart."""
        ranges: list[tuple[int, int]] = []
        for first, last in sorted((r.first_batch, r.last_batch) for r in self.all if r.last_batch >= r.first_batch):
            if ranges and first <= ranges[-1][1] + 1:
                ranges[-1] = (ranges[-1][0], max(last, ranges[-1][1]))
            else:
                ranges.append((first, last))
        return ranges

    def batch(self, steps_before: int) -> int:
        """Return the number of the batch that the step with so many steps before it trains on."""
        number = steps_before
        for first, last in self.left_out():
            if number >= first:
                number += last - first + 1
        return number

    def add(self, bad_step: int, back_to: int, reason: str, batches: int) -> Rollback:
        """Notes a return, and leaves out the last `batches` of those between the two steps."""
        last = self.batch(bad_step - 1)
        first = self.batch(max(bad_step - batches, back_to)) if batches else last + 1
        self.all.append(Rollback(bad_step, back_to, reason, first, last))
        return self.all[-1]

    def to_plain(self) -> list[dict[str, Any]]:
        """As JSON holds it."""
        return [dataclasses.asdict(rollback) for rollback in self.all]

    @classmethod
    def from_plain(cls, plain: Sequence[dict[str, Any]]) -> Rollbacks:
        """Return what `to_plain` gave."""
        return cls([Rollback(**entry) for entry in plain])

    def to_json(self) -> str:
        """Return what run_dir/rollbacks.json holds."""
        return json.dumps(self.to_plain(), indent=1) + "\n"

    @classmethod
    def load(cls, run_dir: Path) -> Rollbacks:
        """Return what run_dir holds, as process 0 sees it: file systems show changes to hosts at different times.

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
