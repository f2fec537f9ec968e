"""Encoded chat samples on disk: made once, and mapped into memory by each run.

A folder of the cache holds for each side: `SIDE.tokens`, int32, all sequences one after the other, where ~id stands for an id
that carries loss; `SIDE.ends`, int64, where each ends; `SIDE.targets`, int32, how many of its ids carry loss; and for prompts
`SIDE.rows`, the rows themselves as JSON, with `SIDE.row_ends`. A pair is two sequences: chosen, rejected. `samples.json` says
what is there, with the checksums.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.data.chat_rows import ChatSample, Sort
from jaxtrain.data.conversations import Encoded
from jaxtrain.data.file_hashes import file_hashes, unreadable
from jaxtrain.data.mapped import map_array
from jaxtrain.errors import DataError

FORMAT = "jaxtrain-chat-2"
SEARCHED = 1000
"""Samples of a side that are searched for a short question."""
SIDES = ("train", "validation")
_FILES = {"tokens": np.int32, "ends": np.int64, "targets": np.int32, "rows": np.uint8, "row_ends": np.int64}


@dataclass
class Told:
    """Counts that one line at the start of a run tells of the samples."""

    rows: int = 0
    bad_rows: int = 0
    first_bad_row: str = ""
    counts: dict[str, int] = field(default_factory=Counter)
    """How often something happened that a person should know of, by its words."""
    note: str = ""
    """A further fact; empty for none."""

    @property
    def words(self) -> str:
        """The line; empty where there is nothing to tell."""
        words = [f"{what}: {count:,}" for what, count in self.counts.items() if count]
        words += [self.note] if self.note else []
        if self.bad_rows:
            words.append(f"{self.bad_rows:,} bad rows left out, the first: {self.first_bad_row}")
        return "; ".join(words)


@dataclass(frozen=True)
class StoredSide:
    """The samples of one side. `sequences` are [start, end) in `tokens`; a pair has two of them."""

    tokens: np.ndarray
    ends: np.ndarray
    targets: np.ndarray
    rows: np.ndarray
    row_ends: np.ndarray
    sha256: str

    def sequence(self, index: int) -> np.ndarray:
        """Return a sequence as it is stored: its ids, int32, ~id for one that carries loss."""
        return self.tokens[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]

    def row(self, index: int) -> dict[str, Any]:
        """Return the row that prompt `index` comes from."""
        start = int(self.row_ends[index - 1]) if index else 0
        return json.loads(self.rows[start : int(self.row_ends[index])].tobytes())


@dataclass(frozen=True)
class StoredSamples:
    """The samples of a source."""

    sort: Sort
    told: Told
    sides: dict[str, StoredSide]


class ChatPrompt(NamedTuple):
    """A prompt's ids, [length] int32, and the row of data that it comes from."""

    ids: np.ndarray
    row: dict[str, Any]


class Prompts:
    """The prompts of one side of several sources, one source after the other."""

    def __init__(self, sides: Sequence[tuple[StoredSide, np.ndarray]]):
        """Take each source's side, and the indices of the prompts in it that are used."""
        self._sides = sides
        self._ends = list(accumulate(len(used) for _, used in sides))

    @property
    def count(self) -> int:
        """Number of prompts."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> ChatPrompt:
        """Return prompt `index`, 0 to count - 1. Raises IndexError beyond."""
        if not 0 <= index < self.count:
            raise IndexError(f"prompt {index} of {self.count}")
        source = bisect_right(self._ends, index)
        side, used = self._sides[source]
        own = int(used[index - (self._ends[source - 1] if source else 0)])
        return ChatPrompt(side.sequence(own).copy(), side.row(own))


def first_question(stored: StoredSamples, num_tokens: int) -> np.ndarray:
    """Return the ids before an answer, [up to num_tokens] int32, of the first held-out sample with few enough of them.

    If there is none: of a training sample, or the end of a longer one.
    """
    longer = np.zeros(0, np.int32)
    for side in (stored.sides["validation"], stored.sides["train"]):
        for index in range(min(len(side.ends), SEARCHED)):
            sequence = side.sequence(index)
            learned = np.flatnonzero(sequence < 0)
            question = sequence[: int(learned[0]) if learned.size else None]
            if 0 < len(question) <= num_tokens:
                return question
            longer = longer if longer.size else question[-num_tokens:]
    return longer


def ids_of(marked: np.ndarray) -> np.ndarray:
    """Return the ids of a stored sequence: ~id where the number is negative."""
    return marked ^ (marked >> 31)


def marked(encoded: Encoded) -> np.ndarray:
    """Return ids with ~id for those that carry loss, up to the last of these: what follows it teaches nothing.

    The first id of a sequence is predicted by none, and carries no loss.
    """
    learned = encoded.learned.copy()
    learned[:1] = False
    last = int(np.flatnonzero(learned)[-1]) + 1 if learned.any() else len(learned)
    return np.where(learned, ~encoded.ids, encoded.ids)[:last].astype(np.int32)


class SideWriter:
    """Writes the samples of one side."""

    def __init__(self, folder: Path, side: str):
        self._files = {name: (folder / f"{side}.{name}").open("wb") for name in _FILES}
        self._digests = {name: hashlib.sha256() for name in _FILES}
        self._counts = dict.fromkeys(_FILES, 0)

    def append(self, sequences: Iterable[np.ndarray], sample: ChatSample) -> None:
        """Add a sample; of a prompt its row too. Raises OSError."""
        for sequence in sequences:
            self._write("tokens", sequence)
            self._write("ends", np.array([self._counts["tokens"]]))
            self._write("targets", np.array([(sequence < 0).sum()]))
        if sample.sort == "prompts":
            row = json.dumps(dict(sample.row), default=str).encode()
            self._write("rows", np.frombuffer(row, np.uint8))
            self._write("row_ends", np.array([self._counts["rows"]]))

    def _write(self, name: str, numbers: np.ndarray) -> None:
        content = np.ascontiguousarray(numbers, _FILES[name]).astype(np.dtype(_FILES[name]).newbyteorder("<")).tobytes()
        self._files[name].write(content)
        self._digests[name].update(content)
        self._counts[name] += len(numbers)

    def close(self) -> dict[str, Any]:
        """Close the files; return their counts and checksums."""
        for file in self._files.values():
            file.close()
        return {name: [self._counts[name], self._digests[name].hexdigest()] for name in _FILES}


def write_note(folder: Path, sort: Sort, told: Told, sides: dict[str, SideWriter]) -> None:
    """Close the sides, and write samples.json. Raises OSError."""
    files = {side: writer.close() for side, writer in sides.items()}
    note = {"format": FORMAT, "sort": sort, "told": dataclasses.asdict(told), "files": files}
    (folder / "samples.json").write_text(json.dumps(note, indent=2), encoding="utf-8")


def open_samples(folder: Path, cache_dir: Path) -> StoredSamples:
    """Map the files of a folder into memory. Raises DataError where one is missing, cut short or altered."""
    try:
        note = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(folder / "samples.json", error) from error
    except ValueError as error:
        raise DataError(f"{folder / 'samples.json'}: not JSON ({error})") from error
    listed = [(side, name, *note["files"][side][name]) for side in SIDES for name in _FILES]
    paths = [folder / f"{side}.{name}" for side, name, _, _ in listed]
    for path, sha256, (*_, wanted) in zip(paths, file_hashes(paths, cache_dir, "checking chat samples"), listed, strict=True):
        if sha256 != wanted:
            raise DataError(f"{path}: its contents do not have the checksum in samples.json")
    arrays = {
        (side, name): map_array(path, np.dtype(_FILES[name]).newbyteorder("<"), count)
        for path, (side, name, count, _) in zip(paths, listed, strict=True)
    }
    sides = {
        side: StoredSide(*(arrays[side, name] for name in _FILES), sha256=note["files"][side]["tokens"][1]) for side in SIDES
    }
    return StoredSamples(note["sort"], Told(**note["told"]), sides)


def lengths_of(side: StoredSide) -> np.ndarray:
    """Return the number of ids of each sequence."""
    return np.diff(side.ends, prepend=0)
