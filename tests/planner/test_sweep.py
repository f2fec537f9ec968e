"""Grids: read from text as the fields' types say, filled by estimates, and by runs that agree whatever the layout."""

import dataclasses
from typing import Any

import pytest

from jaxtrain.config import Config, DataConfig, DataSource, MeshConfig, ModelConfig, TrainConfig
from jaxtrain.errors import UsageError
from jaxtrain.hardware import find_chip
from jaxtrain.planner.estimates import Cluster
from jaxtrain.planner.sweep import grid, replace_field, sweep, sweep_json, sweep_table

QUICK = ("xla_llvm_disable_expensive_passes=True", "xla_backend_optimization_level=0")  # of compiling
TINY = Config(
    name="tiny",
    model=ModelConfig(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128, dtype="float32"),
    mesh=MeshConfig(),
    data=DataConfig(sources=(DataSource(kind="synthetic"),), tokenizer="none", sequence_length=64),
    train=TrainConfig(global_batch_size=4, compilation_cache="", xla_options=QUICK),
)
ONE_HOST = Cluster(find_chip("h100-sxm"), hosts=1, devices_per_host=4)


def test_a_grid_is_a_product_in_order():
    points = grid(TINY, ["mesh.tensor=1,2", "train.microbatches=1,2,2"])
    assert [tuple(values.values()) for values, _ in points] == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    assert [(config.mesh.tensor, config.train.microbatches) for _, config in points] == [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("train.remat", "none", "none"),
        ("sharding.zero", "2", 2),
        ("sharding.take_turns", "False", False),
        ("optimizer.peak_lr", "1e-3", 1e-3),
        ("name", "x", "x"),
        ("model.rope_scaling", "None", None),
        ("model.moe.num_experts", "16", 16),
        ("train.global_batch_size", "1e3", 1000),
        ("train.remat_save", "attention+mlp_up", ("attention", "mlp_up")),
    ],
)
def test_values_are_read_by_type(field: str, text: str, value: Any):
    config: Any = replace_field(TINY, field, text)
    for name in field.split("."):
        config = getattr(config, name)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mesh.tensor", "give FIELD=VALUE,VALUE"),
        ("mesh.tensor=1,,2", "give FIELD=VALUE,VALUE"),
        ("mesh.tensr=1", "mesh.tensr: no such field; did you mean mesh.tensor"),
        ("mesh.tensor=two", "mesh.tensor=two: give a whole number"),
        ("train.remat=ful", "did you mean 'full'"),
        ("model.moe=4", "is None, or is set by its fields"),
        ("train.seed=" + ",".join(map(str, range(600))), "600 combinations; give at most 512"),
    ],
)
def test_what_is_no_grid(text: str, message: str):
    with pytest.raises(UsageError, match=message):
        grid(TINY, [text])


def test_estimates_with_the_reason_where_there_is_none():
    rows = sweep(TINY, ONE_HOST, ["mesh.tensor=1,2,8", "train.microbatches=1,2"], "estimate", 1, print)
    assert [bool(row.estimate) for row in rows] == [True, False, True, True, False, False]
    assert "is not a multiple of" in rows[1].problem
    assert "uses 8 devices" in rows[4].problem
    assert rows[2].estimate is not None
    assert rows[2].estimate.config.mesh.shape == (1, 1, 1, 2, 1, 1, 2)
    table = sweep_table(rows, "estimate")
    assert (table.row_count, len(table.columns)) == (6, 2 + 7 + 1)
    assert sweep_json(rows)[0]["estimate"]["mesh"] == {"fsdp": 4}


@pytest.mark.slow
def test_runs_side_by_side():
    """Two processes of their own: the losses are the same on both layouts."""
    cluster = Cluster(find_chip("cpu"), hosts=1, devices_per_host=2)
    rows = sweep(TINY, cluster, ["mesh.tensor=1,2"], "run", 2, lambda _: None)
    one, other = (row.measured for row in rows)
    assert one is not None
    assert other is not None
    assert len(one.losses) == len(other.losses) == 2
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    assert one.step_seconds > 0


def test_a_run_that_fails_is_a_row_with_its_reason():
    cluster = Cluster(find_chip("cpu"), hosts=1, devices_per_host=2)
    broken = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, sources=(DataSource(kind="text", path="/none/*"),)))
    (row,) = sweep(broken, cluster, ["mesh.tensor=2"], "run", 1, lambda _: None)
    assert "the run ended with exit code 1: " in row.problem
    assert "/none/*" in row.problem
    assert "\n" not in row.problem
