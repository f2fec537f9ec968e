"""A small corpus on disk, and configs over it."""

import json
import random

import pytest

from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig, TrainConfig


def make_text(seed, words=60):
    """Text with accents and symbols, so that bytes and characters differ; the same for the same seed."""
    generator = random.Random(seed)
    vocabulary = ["alpha", "beta", "γάμμα", "delta", "été", "☃", "for", "in", "range", "\n", "return", "0", "1"]
    return " ".join(generator.choice(vocabulary) for _ in range(words)) + f" {seed}"


@pytest.fixture
def texts():
    """Twelve documents of different lengths."""
    return [make_text(i, words=20 + 7 * i) for i in range(12)]


@pytest.fixture
def text_folder(tmp_path, texts):
    """Twelve .txt files, named so that sorting keeps their order."""
    folder = tmp_path / "books"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def jsonl_file(tmp_path, texts):
    """The same documents, one a row, a blank line among them."""
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    path.write_text("\n".join([*rows[:3], "", *rows[3:]]) + "\n")
    return path


@pytest.fixture
def make_config(tmp_path):
    """make_config(source, ..., vocab_size=, batch_size=, seed=, **fields of DataConfig) -> Config with its own cache."""

    def make(*sources, vocab_size=300, batch_size=8, seed=0, **data):
        defaults = {"sequence_length": 16, "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.2}
        return Config(
            model=ModelConfig(vocab_size=vocab_size),
            data=DataConfig(sources=tuple(sources) or (DataSource(),), **{**defaults, **data}),
            train=TrainConfig(global_batch_size=batch_size, seed=seed),
        )

    return make


@pytest.fixture
def books(text_folder):
    """The .txt files as a source."""
    return DataSource(kind="text", path=f"{text_folder}/*.txt")
