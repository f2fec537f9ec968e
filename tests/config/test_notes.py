"""A field that does nothing is told, once, with what it would need; one that does something is not."""

import pytest

from jaxtrain.config import Config
from jaxtrain.config.loading import SHIPPED, load_config
from jaxtrain.config.names import field_hint, read_value, set_field
from jaxtrain.config.notes import _NEEDS, _NEEDS_ELSE, idle_fields

# field: (a value, what makes it do something)
USED = {
    "sync.outer_lr": ("0.5", {"sync.mode": "diloco"}),
    "sync.outer_momentum": ("0.5", {"sync.mode": "diloco"}),
    "sync.every": ("7", {"sync.mode": "local"}),
    "sync.fragments": ("2", {"sync.mode": "local"}),
    "sync.overlap": ("2", {"sync.mode": "diloco"}),
    "sync.mixing": ("0.3", {"sync.mode": "diloco", "sync.overlap": 1}),
    "sync.delay": ("2", {"sync.mode": "delayed"}),
    "sync.compression": ("int8", {}),
    "sync.mode": ("delayed", {}),
    "sync.compression_block": ("64", {"sync.compression": "int8"}),
    "sync.error_feedback": ("True", {"sync.compression": "bfloat16"}),
    "sharding.context_attention": ("ring", {"mesh.context": 2}),
    "train.remat_save": ("attention,mlp_up", {"train.remat": "named"}),
    "train.layer_inputs_memory": ("host", {"train.remat": "full"}),
    "train.validate_batches": ("3", {"train.validate_every": 10}),
    "optimizer.decay_fraction": ("0.5", {"optimizer.schedule": "warmup_stable_decay"}),
    "optimizer.final_lr_fraction": ("0.5", {"optimizer.schedule": "cosine"}),
    "guard.spike_deviations": ("5", {"guard.spike": "skip"}),
    "guard.spike_window": ("64", {"guard.spike": "skip"}),
    "guard.rollback_batches": ("3", {"guard.spike": "rollback"}),
    "model.moe.capacity_factor": ("2", {"model.moe.dispatch": "capacity"}),
    "model.moe.capacity_group": ("64", {"model.moe.dispatch": "capacity"}),
    "model.moe.exchange_factor": ("2", {"mesh.expert": 2}),
    "data.chat_template": ("t.jinja", {"data.sources.0.kind": "chat"}),
    "data.too_long": ("refuse", {"data.sources.0.kind": "chat"}),
    "checkpoint.keep": ("5", {"checkpoint.every": 10}),
    "checkpoint.fast_dir": ("/tmp", {"checkpoint.fast_every": 10}),
    "checkpoint.asynchronous": ("False", {"checkpoint.every": 10}),
    "checkpoint.on_failure": ("stop", {"checkpoint.every": 10}),
    "pipeline.schedule": ("gpipe", {"mesh.pipe": 2}),
    "train.tasks_every": ("5", {"train.tasks": ("t.jsonl",)}),
    "data.store_cache_gib": ("3", {"data.sources.0.path": "s3://b/x.bin"}),
    "optimizer.beta1": ("0.5", {"optimizer.name": "sgd"}),
    "optimizer.beta2": ("0.5", {"optimizer.name": "lion"}),
    "optimizer.epsilon": ("0.5", {"optimizer.name": "muon"}),
    "model.moe.groups_per_token": ("2", {"model.moe.groups": 4}),
    "model.moe.group_score": ("max", {"model.moe.groups": 4}),
    "model.local_rope_theta": ("1e4", {"model.pattern": ("local", "global")}),
    "model.activation_limit": ("5", {"model.activation": "clipped_silu"}),
    "objective.dpo.beta": ("0.5", {"objective.kind": "dpo"}),
    "objective.distill.top_k": ("5", {"objective.kind": "distill"}),
    "objective.grpo.updates": ("2", {"objective.kind": "grpo"}),
}
IDLE = Config()
for idle, nothing in {
    "optimizer.schedule": "constant",
    "optimizer.name": "adafactor",
    "train.remat": "dots",
    "train.validate_every": 0,
    "checkpoint.every": 0,
}.items():
    IDLE = set_field(IDLE, idle, nothing)


def test_every_condition_is_tried():
    conditions = {name for names in (*_NEEDS, *_NEEDS_ELSE) for name in names.split()}
    objectives = {name for name in conditions if name.startswith("objective.")}
    assert set(USED) - objectives == conditions - objectives


@pytest.mark.parametrize("name", USED)
def test_a_field_that_does_nothing_is_told(name: str):
    text, needed = USED[name]
    config = set_field(IDLE, name, read_value(text, field_hint(name)))
    assert [line.partition("=")[0] for line in idle_fields(config) if " does nothing without " in line] == [name]
    for field, value in {"mesh.replica": 2, **needed}.items():
        config = set_field(config, field, value)
    assert [line for line in idle_fields(config) if line.startswith(f"{name}=")] == []


def test_defaults_and_shipped_configs_have_none():
    assert idle_fields(Config()) == []
    assert {path.stem: idle_fields(load_config(path)) for path in SHIPPED.glob("*.py")} == {
        path.stem: [] for path in SHIPPED.glob("*.py")
    }
