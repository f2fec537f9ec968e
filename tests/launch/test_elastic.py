"""With fewer devices a run goes on: the same batch, a valid mesh, no more on a device at a time than can be helped."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

from jaxtrain.command import parse, parse_config
from jaxtrain.config import Config, MeshConfig, ModelConfig, SyncConfig, TrainConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.errors import ConfigError, UsageError
from jaxtrain.launch.elastic import mesh_flags, mesh_for, parse_mesh
from jaxtrain.verbs.launch import USAGE, split
from tests.layouts import configs

BASE = Config(
    model=ModelConfig(num_layers=8, num_heads=8, num_kv_heads=8),
    mesh=MeshConfig(data=4, fsdp=2, tensor=4),
    train=TrainConfig(global_batch_size=64, microbatches=2),
)


def test_data_goes_first_and_microbatches_take_its_place():
    half = mesh_for(BASE, 16)
    assert half.mesh == MeshConfig(data=2, fsdp=2, tensor=4)
    assert half.train == replace(BASE.train, microbatches=4)
    assert mesh_flags(BASE, half)[-1] == "--train.microbatches=4"


def test_the_mesh_stays_where_it_fits():
    assert mesh_for(BASE, 32) == BASE


def test_a_fallback_is_taken_if_it_fits():
    listed = [MeshConfig(data=4, fsdp=4, tensor=2), MeshConfig(data=2, fsdp=4, tensor=2)]
    assert mesh_for(BASE, 16, listed).mesh == listed[1]


def test_replicas_of_their_own_stay():
    config = replace(BASE, mesh=MeshConfig(replica=2, fsdp=4, tensor=2), sync=SyncConfig(mode="diloco"))
    assert mesh_for(config, 8).mesh.replica == 2
    with pytest.raises(ConfigError, match="no mesh over 3 devices"):
        mesh_for(config, 3)


@given(configs())
@settings(max_examples=60, deadline=None)
def test_half_of_any_layout_is_valid_or_refused(layouts):
    config = layouts[0]
    try:
        half = mesh_for(config, 4)
    except ConfigError:
        return
    assert not find_problems(half, 4)[1]
    assert half.train.global_batch_size == config.train.global_batch_size
    rows = config.train.global_batch_size // (config.mesh.batch_shards * config.train.microbatches)
    assert half.train.global_batch_size // (half.mesh.batch_shards * half.train.microbatches) <= max(rows, 1)


def test_the_launchers_own_words():
    assert split(["--processes=2", "--", "--config=x.py"]) == (["--processes=2"], ["--config=x.py"])
    with pytest.raises(UsageError, match="put -- before"):
        split(["--config=x.py"])
    assert parse_mesh("data=2, tensor=4") == MeshConfig(data=2, fsdp=1, tensor=4)
    with pytest.raises(ConfigError, match="give axes and sizes"):
        parse_mesh("data:2")


ROOT = Path(__file__).parents[2]
PAGES = "".join((ROOT / page).read_text() for page in ("README.md", "jaxtrain/launch/README.md"))
README = re.sub(r"```.*?```", "", PAGES, flags=re.DOTALL)
COMMANDS = re.findall(r"`([^`]+)`", README) + re.findall(r"^    ([^#\n]+)", README, re.MULTILINE)
LAUNCHED = [command.split()[2:] for command in COMMANDS if command.startswith("jaxtrain launch --processes")]


@pytest.mark.parametrize("words", LAUNCHED, ids=" ".join)
def test_what_the_readme_launches_is_a_valid_run(words):
    own, run = split(words)
    flags = parse(USAGE, own).own
    config = parse_config(run)
    assert find_problems(config, flags.processes * flags.devices_per_process)[1] == []


def test_the_readme_launches_something():
    assert len(LAUNCHED) >= 3
