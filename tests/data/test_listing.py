"""A path that exists is meant literally; nothing that a glob matches goes missing without a word."""

import json
import os

import numpy as np
import pytest

from jaxtrain.config import Config, DataSource
from jaxtrain.config.loading import load_config
from jaxtrain.data.json_tokenizer import train_bpe
from jaxtrain.data.listing import list_files, split_patterns
from jaxtrain.data.pipeline import open_data
from jaxtrain.data.tokenizers import load_tokenizer
from jaxtrain.errors import DataError
from jaxtrain.files import user_path
from jaxtrain.verbs.tokenize import main

ODD_NAMES = ["part[1]", "a,b", "x*", "y?", "~", "~z", "50%", "with space", " lead", "{}", "{a,b}", "[!x]", "$HOME", "a\nb"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def listed(patterns):
    return [os.fspath(file.path) for file in list_files(patterns, "data.sources.0.path")]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_file_or_folder_that_exists_is_literal(here, name):
    """Beside what its name matches as a pattern; as a file, in a folder, in a list, and absolute."""
    for other in ("part1", "a", "xx", "yy", "b"):
        (here / other).write_text("other")
    (here / name).write_text("x")
    assert listed(name) == [name]
    assert listed(f"{name},part1") == [name, "part1"]
    assert listed(f"part1,{name}") == ["part1", name]
    assert listed(str(here / name)) == [str(here / name)]
    (here / name).unlink()
    (here / name).mkdir()
    for folder in (name, "part1 folder"):
        (here / folder).mkdir(exist_ok=True)
        (here / folder / "1.txt").write_text("x")
    assert listed(f"{name}/*.txt") == [f"{name}/1.txt"]
    assert listed(f"{name}/1.txt") == [f"{name}/1.txt"]


def test_what_does_not_exist_is_a_pattern(here, monkeypatch):
    for name in ("part1.txt", "part2.txt"):
        (here / name).write_text("x")
    assert listed("part[1].txt") == ["part1.txt"]
    assert listed("part?.txt") == ["part1.txt", "part2.txt"]
    assert split_patterns("a*, b*,,c,d.txt") == ["a*", "b*", "c", "d.txt"]
    monkeypatch.setenv("HOME", str(here))
    assert listed("~/part1.txt") == [str(here / "part1.txt")]
    assert user_path("~no-such-user/x").name == "x"


def test_links_that_lead_nowhere_are_named(here):
    (here / "1.txt").write_text("x")
    (here / "2.txt").symlink_to("gone.txt")
    for patterns in ("*.txt", "2.txt", "**/*", "1.txt,[2].txt"):
        with pytest.raises(DataError, match=r"2\.txt: is a link to gone\.txt, which cannot be opened \(No such file"):
            listed(patterns)
    (here / "2.txt").unlink()
    (here / "2.txt").symlink_to("2.txt")
    with pytest.raises(DataError, match=r"2\.txt: is a link to 2\.txt, .*symbolic links"):
        listed("*.txt")
    (here / "2.txt").unlink()
    (here / "2.txt").symlink_to("1.txt")
    assert listed("*.txt") == ["1.txt"]


def test_sources_tokenizers_and_configs_are_literal_too(here, make_config, texts, monkeypatch):
    for name, text in (("part[1].jsonl", texts[0] * 9), ("part1.jsonl", "another" * 99)):
        (here / name).write_text(json.dumps({"text": text}) + "\n")
    (here / "bpe[1].json").write_text(train_bpe(texts, 280))
    data = open_data(make_config(DataSource("jsonl", "part[1].jsonl"), tokenizer="bpe[1].json", validation_fraction=0.0))
    assert "another" not in data.tokenizer.decode(data.train_batch(0, slice(None))["tokens"].ravel())
    assert load_tokenizer("bpe[1].json").fingerprint == data.tokenizer.fingerprint
    (here / "~c[1].py").write_text("from jaxtrain.config import Config\ndef get_config():\n    return Config(run_dir='~')\n")
    config = load_config("~c[1].py")
    assert config.directory == here.home()
    monkeypatch.setenv("HOME", str(here))
    assert load_config("~/~c[1].py") == config
    (here / "~").mkdir()
    assert str(config.directory) == "~"


def test_tokenize_reads_and_prints_names_literally(here, make_config, capsys, texts):
    for name, text in (("in[1].txt", "a" * 99), ("in1.txt", "b" * 99)):
        (here / name).write_text(text)
    assert main(["--input=in[1].txt", "--output=to[k]", "--validation_fraction=0", f"--cache_dir={here}/cache"]) == 0
    assert "'to[k]'" in capsys.readouterr().out
    data = open_data(make_config(DataSource("tokens", "to[k]"), validation_fraction=0.0))
    assert set(np.unique(data.train_batch(0, slice(None))["tokens"])) <= {ord("a"), 256}


def test_the_default_directory_is_that_of_the_run():
    assert str(Config(name="x").directory) == "runs/x"
