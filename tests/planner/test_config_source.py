"""A config that the planner writes is the config that it meant, and reads like one that a person wrote."""

import dataclasses
from pathlib import Path

import pytest

from jaxtrain.config import Config, DataConfig, DataSource, MeshConfig
from jaxtrain.config.loading import load_config
from jaxtrain.errors import ExplainedError
from jaxtrain.planner.config_source import config_source, write_config

CONFIGS = sorted(Path("configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_comes_back_equal(path: Path, tmp_path: Path):
    config = load_config(path)
    moved = dataclasses.replace(config, mesh=MeshConfig(pipe=2, fsdp=4, tensor=8))
    write_config(moved, str(tmp_path / "x.py"), 'A "quoted" \\ line.')
    assert load_config(tmp_path / "x.py") == moved


def test_strings_that_need_care(tmp_path: Path):
    sources = (DataSource(kind="text", path='it\'s "a" \\ path\n'), DataSource(kind="jsonl", path='"'))
    config = Config(data=DataConfig(sources=sources))
    write_config(config, str(tmp_path / "x.py"), '"""')
    assert load_config(tmp_path / "x.py") == config


def test_only_what_differs_is_written():
    text = config_source(Config(name="x", mesh=MeshConfig(fsdp=8, tensor=4)), "A plan.")
    assert text == (
        '"""A plan."""\n\nfrom jaxtrain.config import Config, MeshConfig\n\n\n'
        'def get_config() -> Config:\n    return Config(name="x", mesh=MeshConfig(fsdp=8, tensor=4))\n'
    )


def test_a_plan_of_70b_reads_like_the_config_it_came_from():
    text = config_source(load_config("configs/70b.py"), "x")
    assert (
        Path("configs/70b.py").read_text().replace("1.5e-4", "0.00015").partition("def get_config")[2]
        == text.partition("def get_config")[2]
    )


@pytest.mark.parametrize(("path", "message"), [("x.yaml", "ends in .py"), ("no/such/folder/x.py", "No such file")])
def test_what_cannot_be_written(path: str, message: str, tmp_path: Path):
    with pytest.raises(ExplainedError, match=message):
        write_config(Config(), str(tmp_path / path), "x")
