"""Numbers that another model gives for every row of the data, computed once and kept in a folder.

They belong to rows, which are the same in every epoch: so that model is not held while training goes on, and a resumed run, or
another one, reads the same numbers.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxtrain import processes
from jaxtrain.data.file_hashes import short_hash
from jaxtrain.data.pipeline import Data
from jaxtrain.errors import ExplainedError
from jaxtrain.files import replace_file, replacing
from jaxtrain.telemetry.progress import Progress
from jaxtrain.train.feed import on_every_host
from jaxtrain.train.prepared import Prepared

PyTree = Any
Numbers = Callable[[PyTree], Mapping[str, jax.Array]]
"""A placed batch -> float32 arrays [B, L, ...] by name."""
TRAINING, HELD_OUT = "train", "validation"


@dataclass(frozen=True)
class KeptNumbers:
    """A folder of float32 arrays [rows, L, ...] of each side, with a note of what they belong to."""

    folder: Path
    field: str
    """The field of the config that names the folder; empty for the run's own, whose numbers of other data are replaced."""
    of: Mapping[str, str]
    """What the numbers depend on, by name; an empty value stands for any."""
    widths: Mapping[str, tuple[int, ...]]
    """Dims after [rows, L] of each array."""
    sides: tuple[str, ...] = (TRAINING, HELD_OUT)

    def file(self, name: str, side: str) -> Path:
        return self.folder / f"{name}.{side}.npy"

    @property
    def note(self) -> Path:
        return self.folder / "numbers.json"

    def held(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, np.ndarray]] | None:
        """Return {side: {name: array}}, mapped into memory; None where files are missing, damaged or of something else.

        Args:
          shapes: (rows, L) of each side.
        """
        try:
            if self._differing():
                return None
            found = {side: {name: np.load(self.file(name, side), mmap_mode="r") for name in self.widths} for side in self.sides}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
            return None
        for side, arrays in found.items():
            if any(array.shape != (*shapes[side], *self.widths[name]) for name, array in arrays.items()):
                return None
        return found

    def _differing(self) -> list[str]:
        """Return in words what the numbers in the folder are of otherwise. Raises an error where there is no whole note."""
        note = json.loads(self.note.read_text(encoding="utf-8"))
        return [f"{name}: {note[name]} there, {here} here" for name, here in self.of.items() if here and note[name] != here]

    def check_replaceable(self) -> None:
        """Raise ExplainedError where the folder is a user's, and holds numbers of something else."""
        if not self.field:
            return
        try:
            differing = self._differing()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # nothing whole is lost
        if differing:
            raise ExplainedError(f"{self.field}={self.folder} holds numbers of something else ({'; '.join(differing)}); "
                                 "give another folder")  # fmt: skip

    def unwritable(self) -> str:
        """Return what prevents files in the folder, or nothing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                return ""
        except OSError as error:
            return str(error)

    @contextmanager
    def writing(self, shapes: Mapping[str, tuple[int, int]]) -> Iterator[Mapping[tuple[str, str], BinaryIO]]:
        """Give {(side, name): file}, each to be filled with its rows' bytes; the files appear when all are. Raises OSError."""
        self.note.unlink(missing_ok=True)  # it goes with all arrays, or there is none
        with ExitStack() as opened:
            files: dict[tuple[str, str], BinaryIO] = {}
            for side, (name, width) in itertools.product(self.sides, self.widths.items()):
                # Written, not mapped: a write to a map of a full disk ends the process.
                file = opened.enter_context(opened.enter_context(replacing(self.file(name, side))).open("wb"))
                header = {"shape": (*shapes[side], *width), "fortran_order": False, "descr": "<f4"}
                np.lib.format.write_array_header_1_0(file, header)
                files[side, name] = file
            yield files
        replace_file(self.note, json.dumps(dict(self.of)) + "\n")


def identity_of(data: Data) -> str:
    """Return the hash of the rows that the data has."""
    return short_hash([data.fingerprint, data.row_counts])


def attach(
    kept: KeptNumbers,
    prepared: Prepared,
    data: Data,
    numbers: Callable[[], Numbers],
    progress: Progress | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Give the data's batches the numbers, of the folder if it holds them; else compute them, and keep them there.

    All processes call it; process 0 writes the files.

    Args:
      numbers: gives what computes the numbers of a batch.
      before_each: called before each batch; may raise to end it.

    Raises:
      ExplainedError: the folder holds numbers of something else, cannot be written, or another process cannot read it.
    """
    if all(data.has(name) for name in kept.widths):
        return
    shapes = _shapes(prepared, data)
    if not processes.from_first(kept.held(shapes) is not None, processes.LONG_SECONDS):
        kept.check_replaceable()
        _say_if(kept, kept.unwritable() if processes.own_index() == 0 else "")
        work = _batches(kept, prepared, data, numbers(), progress, before_each)
        _say_if(kept, _written(kept, shapes, work))
    held = kept.held(shapes)
    if held is None:
        raise ExplainedError(f"{kept.folder}: process 0 wrote numbers of the data's rows, which this host does not see; "
                             "give a folder that all hosts share")  # fmt: skip
    for name in kept.widths:
        data.attach(name, held[TRAINING][name], held.get(HELD_OUT, {}).get(name))


def _say_if(kept: KeptNumbers, problem: str) -> None:
    """Raise ExplainedError in all processes if process 0 has a problem with the files."""
    if problem := processes.from_first(problem, processes.LONG_SECONDS):
        way_out = f"; give another {kept.field}" if kept.field else ""
        raise ExplainedError(f"{kept.folder}: numbers of the data's rows cannot be written ({problem}){way_out}")


def _shapes(prepared: Prepared, data: Data) -> dict[str, tuple[int, int]]:
    """Return the shapes of the numbers of training rows and of held-out ones, the latter in whole batches."""
    size, length = prepared.config.train.global_batch_size, prepared.config.data.sequence_length
    return {TRAINING: (sum(data.row_counts), length), HELD_OUT: (data.num_validation_batches(size) * size, length)}


Work = Iterator[tuple[str, int, dict[str, np.ndarray]]]


def _written(kept: KeptNumbers, shapes: Mapping[str, tuple[int, int]], work: Work) -> str:
    """Take part in the work, and write what comes of it in process 0; return what prevented it there."""
    if processes.own_index():
        for _ in work:
            pass
        return ""
    try:
        with kept.writing(shapes) as files:
            for side, first, found in work:
                for name, rows in found.items():
                    files[side, name].write(rows[: shapes[side][0] - first].astype("<f4").tobytes())
    except OSError as error:
        for _ in work if jax.process_count() > 1 else ():  # the peers' programs wait for this process's part
            pass
        return str(error)
    return ""


def _batches(
    kept: KeptNumbers, prepared: Prepared, data: Data, numbers: Numbers, progress: Progress | None, before: Callable[[], None]
) -> Work:
    """Yield (side, its first row, the numbers) of all training rows, one source after the other, and of all held-out ones."""
    size, own = prepared.config.train.global_batch_size, prepared.rows()
    training = [(source, row) for source, count in enumerate(data.row_counts) for row in range(count)]

    def training_rows(first: int) -> dict[str, np.ndarray]:
        picks = [training[i] if i < len(training) else None for i in range(first + own.start, first + own.stop)]
        return data.rows(picks)

    readers = {TRAINING: training_rows, HELD_OUT: lambda first: data.validation_batch(first // size, own, size)}
    shapes = _shapes(prepared, data)
    work = [(side, first) for side in kept.sides for first in range(0, shapes[side][0], size)]
    for done, (side, first) in enumerate(work, 1):
        before()
        found = numbers(prepared.place(readers[side](first)))
        yield side, first, {name: on_every_host(array) for name, array in found.items()}
        if progress is not None:
            progress.now(f"scoring the data {done}/{len(work)}")
