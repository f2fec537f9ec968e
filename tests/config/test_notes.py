"""A field that does nothing is told, once, with what it would need; one that does something is not."""

import pytest

from jaxtrain.config import Config
from jaxtrain.config.loading import SHIPPED, load_config
from jaxtrain.config.names import field_hint, read_value, set_field
from jaxtrain.config.notes import _CONDITIONS, idle_fields

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
}
IDLE = set_field(
    set_field(set_field(Config(), "optimizer.schedule", "constant"), "train.validate_every", 0), "checkpoint.every", 0
)


def test_every_condition_is_tried():
    assert set(USED) == set(_CONDITIONS)


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
