"""Numbers kept in a folder: written whole or not at all, and never taken for those of something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.train.kept_numbers import KeptNumbers, _written

SHAPES = {"train": (3, 4), "validation": (2, 4)}


def kept_in(folder: Path, field: str = "", **of: str) -> KeptNumbers:
    return KeptNumbers(folder, field, {"data": "a", "weights": "w"} | of, {"one": (), "more": (2,)})


def work(seed: int = 0):
    """Batches of two rows; the last of each side is padded."""
    rng = np.random.default_rng(seed)
    for side, first in (("train", 0), ("train", 2), ("validation", 0)):
        yield side, first, {"one": rng.random((2, 4), np.float32), "more": rng.random((2, 4, 2), np.float32)}


def test_files_hold_the_rows_and_belong_to_what_they_are_of(tmp_path: Path):
    kept = kept_in(tmp_path / "numbers")
    assert kept.held(SHAPES) is None
    assert kept.unwritable() == ""
    assert _written(kept, SHAPES, work()) == ""
    held, parts = kept.held(SHAPES), list(work())
    assert held is not None
    for name in ("one", "more"):
        np.testing.assert_array_equal(held["train"][name], np.concatenate([parts[0][2][name], parts[1][2][name][:1]]))
        np.testing.assert_array_equal(held["validation"][name], parts[2][2][name])
    assert kept_in(kept.folder, weights="v").held(SHAPES) is None
    assert kept_in(kept.folder, weights="").held(SHAPES) is not None
    assert kept.held({**SHAPES, "train": (4, 4)}) is None
    kept_in(kept.folder, weights="v").check_replaceable()  # the run's own
    with pytest.raises(ExplainedError, match="kept=.* holds numbers of something else .weights: w there, v here"):
        kept_in(kept.folder, "kept", weights="v").check_replaceable()


def test_damaged_files_are_none_and_a_full_disk_is_told(tmp_path: Path):
    kept = kept_in(tmp_path / "numbers", "kept")
    kept.folder.mkdir()
    assert _written(kept, SHAPES, work()) == ""
    file = kept.file("more", "train")
    for content in (b"", file.read_bytes()[:-3], b"rubbish"):
        file.write_bytes(content)
        assert kept.held(SHAPES) is None
    assert _written(kept, SHAPES, work()) == ""
    for note in ("[]", "{}", "{", '"data"'):
        kept.note.write_text(note)
        assert kept.held(SHAPES) is None
        kept.check_replaceable()

    def failing():
        yield next(work())
        raise OSError(28, "No space left on device")

    assert "No space" in _written(kept, SHAPES, failing())
    assert kept.held(SHAPES) is None
    assert sorted(path.name for path in kept.folder.iterdir()) == sorted(
        f"{name}.{side}.npy" for name in ("one", "more") for side in SHAPES
    )
    (tmp_path / "file").touch()
    assert "Not a directory" in kept_in(tmp_path / "file" / "numbers").unwritable()
    assert kept_in(tmp_path / "new").unwritable() == ""
