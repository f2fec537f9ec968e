"""Every problem of a config is found, all at once, with its numbers and what would work; and what is accepted builds."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxtrain.config import (
    MESH_AXES,
    Config,
    DataConfig,
    DataSource,
    LatentAttentionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PipelineConfig,
    RopeScaling,
    TelemetryConfig,
    TrainConfig,
    from_json,
    to_json,
)
from jaxtrain.config.loading import load_config
from jaxtrain.config.rules import divisors, find_problems, resolve_mesh, validate
from jaxtrain.errors import EXIT_USAGE, ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def with_fields(config: Config, **sections: dict) -> Config:
    """The config with fields replaced, section by section."""
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **changed)


def problems_of(devices: int = 1, **sections: dict) -> list[str]:
    """What is wrong with the default config once these fields are set."""
    return find_problems(with_fields(Config(), **sections), devices)[1]


# name: (devices, sections, words that the one problem must contain)
ONE_PROBLEM = {
    "too few devices": (
        8,
        {"mesh": {"fsdp": 2, "tensor": 2}},
        ["fsdp=2 x tensor=2 is 4 devices", "8 are present", "device_count=4"],
    ),
    "too many devices": (1, {"mesh": {"fsdp": 2}}, ["fsdp=2 is 2 devices", "1 is present", "device_count=2"]),
    "rest not whole": (6, {"mesh": {"tensor": 4}}, ["tensor=4 uses 4 devices", "the 6 present", "1, 2, 3 or 6"]),
    "two free axes": (8, {"mesh": {"data": -1}}, ["only one axis may be -1", "data and fsdp"]),
    "axis of zero": (1, {"mesh": {"pipe": 0}}, ["mesh.pipe=0", "at least 1"]),
    "axis below -1": (1, {"mesh": {"data": -2}}, ["mesh.data=-2", "at least 1"]),
    "context cuts": (4, {"mesh": {"context": 4}, "data": {"sequence_length": 36}}, ["=36", "multiple of 8", "use 32 or 40"]),
    "ulysses": (
        4,
        {"mesh": {"context": 4}, "model": {"num_kv_heads": 2}, "sharding": {"context_attention": "ulysses"}},
        ["mesh.context=4 does not divide the 2 kv heads", "use context=1 or 2"],
    ),
    "experts over expert": (
        4,
        {"mesh": {"expert": 4}, "model": {"moe": MoEConfig(num_experts=6)}},
        ["num_experts=6", "2, 3 or 6"],
    ),
    "expert mlp over tensor": (4, {"mesh": {"tensor": 4}, "model": {"moe": MoEConfig(mlp_dim=6)}}, ["model.moe.mlp_dim=6"]),
    "top-k": (1, {"model": {"moe": MoEConfig(experts_per_token=9)}}, ["experts_per_token=9", "8 experts"]),
    "top-k of groups": (
        1,
        {"model": {"moe": MoEConfig(experts_per_token=3, groups=4, groups_per_token=1)}},
        ["experts_per_token=3", "2 experts"],
    ),
    "groups": (1, {"model": {"moe": MoEConfig(groups=3)}}, ["groups=3 does not divide num_experts=8"]),
    "groups a token": (1, {"model": {"moe": MoEConfig(groups=2, groups_per_token=4)}}, ["groups_per_token=4", "groups=2"]),
    "weight scale": (1, {"model": {"moe": MoEConfig(weight_scale=0.0)}}, ["weight_scale=0.0", "above 0"]),
    "capacity factor": (1, {"model": {"moe": MoEConfig(capacity_factor=0.0)}}, ["capacity_factor=0.0 must be above 0"]),
    "all dense": (1, {"model": {"moe": MoEConfig(first_dense_layers=4)}}, ["first_dense_layers=4 leaves none of the 4"]),
    "exchange factor below 1": (1, {"model": {"moe": MoEConfig(exchange_factor=0.5)}}, ["exchange_factor=0.5", "at least 1"]),
    "exchange factor of capacity": (
        1,
        {"model": {"moe": MoEConfig(dispatch="capacity", exchange_factor=2.0)}},
        ["exchange_factor=2.0 with dispatch=capacity", "capacity_factor"],
    ),
    "capacity group": (
        2,
        {"mesh": {"context": 2}, "model": {"moe": MoEConfig(dispatch="capacity", capacity_group=24)}},
        ["capacity_group=24", "64 consecutive"],
    ),
    "no experts": (1, {"model": {"moe": MoEConfig(num_experts=0)}}, ["num_experts=0 must be at least 1"]),
    "latent heads": (
        1,
        {"model": {"num_kv_heads": 2, "latent_attention": LatentAttentionConfig()}},
        ["num_kv_heads=2", "use model.num_heads=4"],
    ),
    "latent fsdp": (
        64,
        {
            "model": {"embed_dim": 1024, "num_kv_heads": 4, "latent_attention": LatentAttentionConfig(kv_rank=80)},
            "train": {"global_batch_size": 64},
        },
        ["fsdp=64 does not divide model.latent_attention.kv_rank=80", "use fsdp=40 and data"],
    ),
    "latent norms": (
        1,
        {"model": {"qk_norm": "head", "latent_attention": LatentAttentionConfig()}},
        ["qk_norm=head", "use none"],
    ),
    "latent rank": (1, {"model": {"latent_attention": LatentAttentionConfig(kv_rank=0)}}, ["kv_rank=0 must be at least 1"]),
    "latent queries": (1, {"model": {"latent_attention": LatentAttentionConfig(query_rank=-1)}}, ["=-1 must be 0 or more"]),
    "latent odd": (1, {"model": {"latent_attention": LatentAttentionConfig(rope_dim=3)}}, ["rope_dim=3 is odd"]),
    "fragments": (
        2,
        {"mesh": {"replica": 2}, "sync": {"mode": "diloco", "fragments": 3}},
        ["sync.fragments=3", "4 layers", "use 1, 2 or 4"],
    ),
    "fragments of a part": (
        4,
        {"mesh": {"replica": 2, "pipe": 2}, "sync": {"mode": "local", "fragments": 4}},
        ["sync.fragments=4", "each of 2 parts", "use 1 or 2"],
    ),
    "fragments a step": (
        2,
        {"mesh": {"replica": 2}, "sync": {"mode": "diloco", "fragments": 2, "every": 1}},
        ["fragments=2", "sync.every=1"],
    ),
    "mixing": (1, {"sync": {"mixing": 1.5}}, ["sync.mixing=1.5", "0 to 1"]),
    "overlap": (2, {"mesh": {"replica": 2}, "sync": {"mode": "diloco", "overlap": 20}}, ["overlap=20", "sync.every=20"]),
    "batch": (
        8,
        {"mesh": {"data": 2}, "train": {"global_batch_size": 20, "microbatches": 2}},
        ["global_batch_size=20", "2 x 4 x 1 x 2 = 16", "use 16 or 32"],
    ),
    "batch below one unit": (8, {"train": {"global_batch_size": 3}}, ["global_batch_size=3", "= 8", "use 8"]),
    "length": (
        4,
        {"mesh": {"tensor": 4}, "data": {"sequence_length": 30}},
        ["sequence_length=30", "mesh.tensor=4", "use 28 or 32"],
    ),
    "kv heads do not divide heads": (1, {"model": {"num_kv_heads": 3}}, ["num_kv_heads=3", "num_heads=4", "use 1, 2 or 4"]),
    "kv heads over tensor": (
        4,
        {"mesh": {"tensor": 4}, "model": {"num_kv_heads": 2}},
        ["mesh.tensor=4 does not divide model.num_kv_heads=2", "use 1 or 2"],
    ),
    "mlp over tensor": (
        4,
        {"mesh": {"tensor": 4}, "model": {"mlp_dim": 1002}},
        ["mesh.tensor=4 does not divide model.mlp_dim=1002", "use 1 or 2"],
    ),
    "vocabulary over tensor": (
        3,
        {
            "mesh": {"tensor": 3},
            "model": {"num_heads": 3, "num_kv_heads": 3, "mlp_dim": 96, "vocab_size": 500},
            "data": {"sequence_length": 9},
        },
        ["mesh.tensor=3 does not divide the padded vocabulary of 512", "vocab_size=500", "use 1"],
    ),
    "embed over fsdp": (
        8,
        {"model": {"embed_dim": 100}},
        ["mesh.fsdp=8 does not divide model.embed_dim=100", "fsdp=5", "embed_dim=96 or 104"],
    ),
    "odd head": (1, {"model": {"head_dim": 7}}, ["head_dim=7 is odd", "use 8"]),
    "more parts than layers": (
        8,
        {"mesh": {"pipe": 8, "fsdp": 1}},
        ["mesh.pipe=8 x pipeline.chunks=1", "cuts 4 layers", "at most 4 parts"],
    ),
    "chunks make more parts than layers": (
        2,
        {"mesh": {"pipe": 2}, "pipeline": {"schedule": "interleaved", "chunks": 3}},
        ["into 6 parts", "at most 4 parts"],
    ),
    "chunks without interleaved": (
        2,
        {"mesh": {"pipe": 2}, "pipeline": {"chunks": 2}},
        ["chunks=2 needs", "interleaved or zero_bubble, not 1f1b"],
    ),
    "one chunk folded": (
        2,
        {"mesh": {"pipe": 2}, "pipeline": {"schedule": "v_shape"}},
        ["schedule=v_shape folds two chunks", "chunks=1 and mesh.pipe=2", "use chunks=2"],
    ),
    "one stage folded": (
        1,
        {"pipeline": {"schedule": "zero_bubble_v", "chunks": 2}},
        ["schedule=zero_bubble_v folds two chunks", "mesh.pipe=1", "pipe of 2 or more"],
    ),
    "chunks without stages": (1, {"pipeline": {"schedule": "interleaved", "chunks": 2}}, ["mesh.pipe above 1"]),
    "unknown choice": (1, {"optimizer": {"name": "adamv"}}, ["optimizer.name='adamv'", "did you mean 'adamw'", "muon"]),
    "unknown dtype": (1, {"model": {"dtype": "float16"}}, ["model.dtype='float16'", "'bfloat16'"]),
    "unknown source": (1, {"data": {"sources": (DataSource(kind="txt"),)}}, ["data.sources.0.kind='txt'", "'text'"]),
    "float for int": (1, {"train": {"steps": 10.5}}, ["train.steps=10.5 is not a whole number"]),
    "bool for int": (1, {"train": {"steps": True}}, ["train.steps=True is not a whole number"]),
    "text for float": (1, {"optimizer": {"peak_lr": "3e-4"}}, ["optimizer.peak_lr='3e-4' is not a finite number"]),
    "not a number": (1, {"optimizer": {"peak_lr": math.nan}}, ["peak_lr=nan is not a finite number"]),
    "infinite": (1, {"train": {"z_loss": math.inf}}, ["z_loss=inf is not a finite number"]),
    "number for bool": (1, {"model": {"norm_bias": 1}}, ["model.norm_bias=1 is not a bool"]),
    "number for text": (1, {"data": {"tokenizer": 257}}, ["data.tokenizer=257 is not a str"]),
    "text for tuple": (1, {"train": {"remat_save": "attention"}}, ["remat_save='attention' is not a tuple"]),
    "source for tuple": (1, {"data": {"sources": DataSource()}}, ["data.sources=DataSource", "is not a tuple"]),
    "text for source": (1, {"data": {"sources": ("stdlib",)}}, ["data.sources.0='stdlib' is not a DataSource"]),
    "type inside a source": (1, {"data": {"sources": (DataSource(weight="2"),)}}, ["data.sources.0.weight='2'"]),
    "number for scaling": (1, {"model": {"rope_scaling": 8.0}}, ["model.rope_scaling=8.0 is not a RopeScaling"]),
    "scaling upside down": (
        1,
        {"model": {"rope_scaling": RopeScaling(low_frequency_factor=4.0, high_frequency_factor=2.0)}},
        ["low_frequency_factor=4.0", "high_frequency_factor=2.0"],
    ),
    "zero size": (1, {"model": {"embed_dim": 0}}, ["model.embed_dim=0 must be at least 1"]),
    "zero microbatches": (1, {"train": {"microbatches": 0}}, ["train.microbatches=0 must be at least 1"]),
    "negative decay": (1, {"optimizer": {"weight_decay": -0.1}}, ["weight_decay=-0.1 must be 0 or more"]),
    "zero rate": (1, {"optimizer": {"peak_lr": 0.0}}, ["peak_lr=0.0 must be above 0"]),
    "share": (1, {"data": {"validation_fraction": 1.5}}, ["validation_fraction=1.5 is a share: 0 to 1"]),
    "momentum of one": (1, {"optimizer": {"beta1": 1.0}}, ["beta1=1.0 must be at least 0 and below 1"]),
    "unknown activation": (1, {"train": {"remat_save": ("mlp_gat",)}}, ["'mlp_gat'", "did you mean 'mlp_gate'"]),
    "no sources": (1, {"data": {"sources": ()}}, ["data.sources is empty"]),
    "a path that is not read": (
        1,
        {"data": {"sources": (DataSource(kind="stdlib", path="s3://b/part-*.jsonl.gz"),)}},
        ["data.sources.0.path=s3://b/part-*.jsonl.gz is not read by data.sources.0.kind=stdlib", "kind=jsonl or so"],
    ),
    "a path beside random tokens": (
        1,
        {"data": {"sources": (DataSource(kind="synthetic", path="books/"),)}},
        ["data.sources.0.path=books/ is not read", "kind=text or so"],
    ),
    "a text field that is not read": (
        1,
        {"data": {"sources": (DataSource(kind="text", path="a", text_field="body"),)}},
        ["data.sources.0.text_field=body has no meaning for kind=text"],
    ),
    "no path": (1, {"data": {"sources": (DataSource(kind="text"),)}}, ["data.sources.0.path is empty"]),
    "no weight": (1, {"data": {"sources": (DataSource(weight=0.0),)}}, ["data.sources.0.weight=0.0 must be above 0"]),
    "small tokenizer": (1, {"data": {"tokenizer": "bpe:200"}}, ["'bpe:200'", "at least 257"]),
    "tokenizer without a size": (1, {"data": {"tokenizer": "bpe:big"}}, ["'bpe:big'", "at least 257"]),
    "tokenizer beyond the vocabulary": (1, {"data": {"tokenizer": "bpe:5000"}}, ["'bpe:5000'", "vocab_size=257"]),
    "profile backwards": (1, {"telemetry": {"profile": "13:10"}}, ["profile='13:10'", "10:13"]),
    "option of XLA without a value": (
        1,
        {"train": {"xla_options": ("xla_gpu_x=1", "xla_gpu_y")}},
        ["train.xla_options: 'xla_gpu_y' is not name=value", "e.g. xla_gpu_"],
    ),
    "unknown chip": (1, {"telemetry": {"hardware": "h2000"}}, ["h2000"]),
    "snapshots without checkpoints": (1, {"checkpoint": {"every": 0, "fast_every": 5}}, ["fast_every needs checkpoints"]),
    "mirror without checkpoints": (1, {"checkpoint": {"every": 0, "mirror": "s3://b/r"}}, ["mirror needs checkpoints"]),
    "mirror that is no URL": (1, {"checkpoint": {"mirror": "/backup"}}, ["mirror='/backup'", "s3://bucket/run"]),
    "profile beyond the end": (
        1,
        {"telemetry": {"profile": "10:13"}, "train": {"steps": 12}},
        ["profile='10:13'", "1 to train.steps=12"],
    ),
    "profile before the start": (1, {"telemetry": {"profile": "0:3"}}, ["profile='0:3'", "1 to train.steps=1000"]),
    "one replica in diloco": (2, {"sync": {"mode": "diloco"}}, ["sync.mode=diloco", "mesh.replica=1", "every_step"]),
    "one replica on its own": (1, {"sync": {"mode": "local"}}, ["sync.mode=local", "mesh.replica=1"]),
    "a checkpoint that is never read": (
        1,
        {"checkpoint": {"every": 0, "resume": "required"}},
        ["checkpoint.resume=required", "checkpoint.every=0"],
    ),
    "nothing to keep": (1, {"checkpoint": {"every": 0, "keep_every": 5}}, ["keep_every=5", "checkpoint.every=0"]),
    "no validation to stop at": (
        1,
        {"train": {"stop_at_validation_loss": 2.5, "validate_every": 0}},
        ["stop_at_validation_loss=2.5", "validate_every=0"],
    ),
    "copies that are not compared": (1, {"guard": {"copies": "off", "copies_every": 5}}, ["copies_every=5", "copies=off"]),
    "absurd tokenizer": (
        1,
        {"data": {"tokenizer": "bpe:10000000"}, "model": {"vocab_size": 10_000_000}},
        ["'bpe:10000000'", "at most 1,048,576"],
    ),
    "snapshots in a store": (1, {"checkpoint": {"fast_dir": "gs://x"}}, ["fast_dir='gs://x'", "/dev/shm"]),
}


@pytest.mark.parametrize("name", ONE_PROBLEM)
def test_each_problem_is_found_alone_with_its_numbers(name: str):
    devices, sections, words = ONE_PROBLEM[name]
    problems = problems_of(devices, **sections)
    assert len(problems) == 1, problems
    assert [word for word in words if word not in problems[0]] == []


def test_a_run_folder_in_an_object_store_is_refused_and_not_made_into_a_local_one():
    (problem,) = find_problems(dataclasses.replace(Config(), run_dir="s3://bucket/run"), 1)[1]
    assert "run_dir='s3://bucket/run'" in problem
    assert "--checkpoint.mirror for copies" in problem


def test_the_default_config_has_no_problem_on_any_number_of_devices():
    for devices in (1, 2, 4, 8, 32):
        resolved, problems = find_problems(Config(), devices)
        assert problems == []
        assert resolved.mesh.fsdp == devices


def test_the_tensor_sizes_that_are_offered_are_all_that_work():
    model, data = {"num_heads": 12, "num_kv_heads": 12, "mlp_dim": 90}, {"sequence_length": 48}
    (problem,) = problems_of(4, mesh={"tensor": 4}, model=model, data=data)
    offered = [int(word) for word in problem.split("use ")[1].replace(" or ", ", ").split(", ")]
    assert offered == [n for n in range(1, 100) if problems_of(n, mesh={"tensor": n}, model=model, data=data) == []]


def test_every_problem_is_found_at_once():
    """Problems of the mesh, of ranges, of names and of paths do not hide one another."""
    problems = problems_of(
        8,
        mesh={"tensor": 8, "fsdp": 2},
        model={"num_kv_heads": 3, "mlp_dim": 1001, "head_dim": 5},
        train={"steps": 0, "remat_save": ("mpl_out",)},
        optimizer={"beta2": 2.0},
        data={"sources": (DataSource(kind="jsonl"), DataSource(weight=-1.0))},
        telemetry={"profile": "ten"},
    )
    for words in (
        "train.steps=0",
        "optimizer.beta2=2.0",
        "16 devices",
        "num_kv_heads=3 does not divide",
        "head_dim=5",
        "tensor=8 does not divide model.num_heads=4",
        "tensor=8 does not divide model.num_kv_heads=3",
        "tensor=8 does not divide model.mlp_dim=1001",
        "'mpl_out'",
        "sources.0.path",
        "sources.1.weight",
        "profile='ten'",
    ):
        assert sum(words in problem for problem in problems) == 1, words
    assert len(problems) == 12
    with pytest.raises(ConfigError) as raised:
        validate(with_fields(Config(), mesh={"tensor": 8, "pipe": 3}, train={"steps": 0}), 8)
    assert raised.value.exit_code == EXIT_USAGE
    assert str(raised.value).startswith(f"{len(raised.value.problems)} problems in the configuration:\n  - train.steps=0")


def test_every_wrong_type_is_found_at_once():
    config = dataclasses.replace(
        Config(name=3),
        model=ModelConfig(num_layers="4", rope_scaling=RopeScaling(factor="8")),
        mesh=None,
        data=DataConfig(sources=(DataSource(), DataSource(kind=1))),
        optimizer=OptimizerConfig(beta1=None, schedule="cosin"),
        pipeline=PipelineConfig(schedule=1),
        telemetry=TelemetryConfig(hardware=None),
        train=TrainConfig(remat_save=("query", 2)),
    )
    problems = find_problems(config, 1)[1]
    assert [problem.split("=")[0] for problem in problems] == [
        "name",
        "model.num_layers",
        "model.rope_scaling.factor",
        "mesh",
        "pipeline.schedule",
        "data.sources.1.kind",
        "optimizer.schedule",
        "optimizer.beta1",
        "train.remat_save.1",
        "telemetry.hardware",
    ]


def test_values_out_of_range_are_found_beside_wrong_types():
    problems = problems_of(optimizer={"peak_lr": "3e-4", "beta2": 2.0}, train={"steps": 10.5, "log_every": 0})
    assert problems == [
        "optimizer.peak_lr='3e-4' is not a finite number",
        "train.steps=10.5 is not a whole number",
        "train.log_every=0 must be at least 1",
        "optimizer.beta2=2.0 must be at least 0 and below 1",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is accepted

INTENDED_DEVICES = {
    "quickstart": [1, 2, 4],
    "125m": [1, 8],
    "1b": [1, 8],
    "7b": [8, 64],
    "8b": [8, 64],
    "70b": [8, 128, 1024],
    "405b": [128, 2048, 16384],
    "grpo_quickstart": [1, 8],
    "stages_quickstart": [1, 4],
    "grpo_warmup": [1, 8],
    "mixtral_8x7b": [8, 64],
    "qwen3_30b_a3b": [8, 64],
    "deepseek_v3": [128, 2048],
    "tiny_moe": [1, 8],
    "replicas": [2],
    "ten_parts_on_five_nodes": [5],
}


def test_every_shipped_config_is_listed_here():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(INTENDED_DEVICES)


@pytest.mark.parametrize("name", INTENDED_DEVICES)
def test_a_shipped_config_is_valid_on_its_devices(name: str):
    config = load_config(CONFIGS / f"{name}.py")
    assert config.name == name
    for devices in INTENDED_DEVICES[name]:
        resolved, problems = find_problems(config, devices)
        assert problems == []
        assert math.prod(resolved.mesh.shape) == devices
        assert json.loads(to_json(resolved))["mesh"] == dict(zip(MESH_AXES, resolved.mesh.shape, strict=True))
        assert from_json(to_json(resolved)) == resolved


def test_the_worked_example_does_not_run_on_four_devices():
    problems = find_problems(load_config(CONFIGS / "ten_parts_on_five_nodes.py"), 4)[1]
    assert ["pipe=5" in problem for problem in problems] == [True]


@given(st.integers(1, 64), st.lists(st.integers(1, 4), min_size=7, max_size=7), st.integers(0, 6))
def test_a_free_axis_takes_what_is_left(devices: int, sizes: list[int], free: int):
    given = dict(zip(MESH_AXES, sizes, strict=True))
    mesh, problems = resolve_mesh(MeshConfig(**{**given, MESH_AXES[free]: -1}), devices)
    others = math.prod(n for axis, n in given.items() if axis != MESH_AXES[free])
    assert bool(problems) == (devices % others > 0)
    if not problems:
        assert mesh == MeshConfig(**{**given, MESH_AXES[free]: devices // others})


@given(st.integers(1, 500))
def test_divisors(number: int):
    assert divisors(number) == [d for d in range(1, 501) if d <= number and number / d == number // d]


@given(st.integers(1, 300_000))
def test_the_vocabulary_is_padded_to_the_next_multiple_of_128(size: int):
    padded = ModelConfig(vocab_size=size).padded_vocab_size
    assert padded % 128 == 0
    assert 0 <= padded - size < 128


@st.composite
def layouts(draw) -> tuple[Config, int]:
    """Configs that are often valid: sizes are small, and many divide one another."""
    mesh = {axis: draw(st.sampled_from([1, 1, 2, 3, 4])) for axis in ("pipe", "data", "fsdp", "tensor")}
    kv_heads = mesh["tensor"] * draw(st.sampled_from([1, 2]))
    model = ModelConfig(
        num_layers=draw(st.integers(1, 13)),
        embed_dim=draw(st.sampled_from([12, 24, 30])),
        num_heads=kv_heads * draw(st.sampled_from([1, 3])),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        mlp_dim=draw(st.sampled_from([12, 16, 36])),
        vocab_size=draw(st.sampled_from([100, 257, 300])),
        qk_norm=draw(st.sampled_from(["none", "head", "width"])),
        tie_embeddings=draw(st.booleans()),
    )
    chunks = draw(st.sampled_from([1, 1, 2, 3]))
    schedules = (
        ["gpipe", "1f1b", "interleaved"]
        if chunks == 1
        else ["interleaved", *(["v_shape", "zero_bubble_v"] if chunks == 2 else [])]
    )
    schedule = draw(st.sampled_from(schedules))
    microbatches = draw(st.integers(1, 5))
    batch = mesh["data"] * mesh["fsdp"] * microbatches * draw(st.sampled_from([1, 2]))
    config = Config(
        model=model,
        mesh=MeshConfig(**mesh),
        pipeline=PipelineConfig(schedule=schedule, chunks=chunks),
        data=DataConfig(sequence_length=draw(st.sampled_from([12, 16, 20]))),
        train=TrainConfig(global_batch_size=batch, microbatches=microbatches),
    )
    return config, math.prod(mesh.values())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layouts())
def test_what_is_accepted_builds(drawn: tuple[Config, int]):
    """The schedule checks, every part holds a layer, and every mesh axis divides what it shards."""
    import jax

    from jaxtrain.models.decoder import parameter_dims
    from jaxtrain.parallel.pipeline_schedule import make_schedule
    from jaxtrain.parallel.stacking import make_stacking
    from jaxtrain.sharding import is_dims
    from jaxtrain.train.state import initial_params

    config, problems = find_problems(*drawn)
    assume(not problems)
    mesh = dict(zip(MESH_AXES, config.mesh.shape, strict=True))
    schedule = make_schedule(config.pipeline.schedule, mesh["pipe"], config.pipeline.chunks, config.train.microbatches)
    counts = make_stacking(config).counts()
    assert counts.shape == (schedule.chunks, schedule.stages)
    assert counts.min() >= 1
    assert counts.sum() == config.model.num_layers
    assert config.train.global_batch_size % (mesh["data"] * mesh["fsdp"] * config.train.microbatches) == 0
    assert config.data.sequence_length % mesh["tensor"] == 0
    sharded_by = {"stage": "pipe", "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    shapes = jax.eval_shape(lambda: initial_params(config))

    def divides(dims: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> bool:
        return all(n % mesh[sharded_by.get(name, "replica")] == 0 for name, n in zip(dims, leaf.shape, strict=True))

    assert all(jax.tree.leaves(jax.tree.map(divides, parameter_dims(config.model), shapes, is_leaf=is_dims)))


def test_importing_the_config_imports_nothing_slow():
    slow = ("jax", "numpy", "flax", "optax", "rich", "orbax", "grain")
    program = f"import sys, jaxtrain.config, jaxtrain.hardware; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
