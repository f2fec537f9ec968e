"""Note fields that are set but have no effect, because another field would have to be set too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

from jaxtrain.config import Config, MoEConfig


class Condition(NamedTuple):
    """A requirement without which a field has no effect."""

    words: str
    holds: Callable[[Config], bool]


def _trains_on(kind: str, config: Config) -> bool:
    return config.objective.kind == kind


_DILOCO = Condition("sync.mode=diloco", lambda c: c.sync.mode == "diloco")
_APART = Condition("sync.mode=local or diloco", lambda c: c.sync.replicas_differ)
_REPLICAS = Condition("mesh.replica above 1", lambda c: c.mesh.replica > 1)
_SPIKE = Condition("guard.spike", lambda c: c.guard.spike != "off")
_CAPACITY = Condition("model.moe.dispatch=capacity", lambda c: c.model.moe is None or c.model.moe.dispatch == "capacity")
_CHAT = Condition("a source of kind=chat", lambda c: any(source.kind == "chat" for source in c.data.sources))
_GROUPS = Condition("model.moe.groups above 1", lambda c: c.model.moe is None or c.model.moe.groups > 1)
_PIPE = Condition("mesh.pipe above 1", lambda c: c.mesh.pipe > 1)
_SAVING = Condition("checkpoint.every", lambda c: c.checkpoint.every > 0)
_DEFAULTS = Config()
_FALLING = ("cosine", "warmup_stable_decay")
_CONDITIONS = {
    "sync.outer_lr": _DILOCO,
    "sync.outer_momentum": _DILOCO,
    "sync.every": _APART,
    "sync.fragments": _APART,
    "sync.overlap": _APART,
    "sync.mixing": Condition("sync.overlap", lambda c: c.sync.replicas_differ and c.sync.overlap > 0),
    "sync.delay": Condition("sync.mode=delayed", lambda c: c.sync.mode == "delayed"),
    "sync.compression": _REPLICAS,
    "sync.mode": _REPLICAS,
    "sync.compression_block": Condition("sync.compression=int8 or float8", lambda c: c.sync.compression in ("int8", "float8")),
    "sync.error_feedback": Condition("sync.compression", lambda c: c.sync.compression != "none"),
    "pipeline.schedule": _PIPE,
    "sharding.context_attention": Condition("mesh.context above 1", lambda c: c.mesh.context > 1),
    "train.remat_save": Condition("train.remat=named", lambda c: c.train.remat == "named"),
    "train.validate_batches": Condition("train.validate_every", lambda c: c.train.validate_every > 0),
    "train.tasks_every": Condition("train.tasks", lambda c: bool(c.train.tasks)),
    "data.store_cache_gib": Condition(
        "a source with a URL", lambda c: any("://" in source.path for source in (*c.data.sources, *c.data.validation))
    ),
    "optimizer.beta1": Condition("another optimizer.name than adafactor", lambda c: c.optimizer.name != "adafactor"),
    "optimizer.beta2": Condition("optimizer.name=adamw, lion or muon", lambda c: c.optimizer.name in ("adamw", "lion", "muon")),
    "optimizer.epsilon": Condition("optimizer.name=adamw or muon", lambda c: c.optimizer.name in ("adamw", "muon")),
    "optimizer.decay_fraction": Condition(
        "optimizer.schedule=warmup_stable_decay", lambda c: c.optimizer.schedule == "warmup_stable_decay"
    ),
    "optimizer.final_lr_fraction": Condition(
        "optimizer.schedule=cosine or warmup_stable_decay", lambda c: c.optimizer.schedule in _FALLING
    ),
    "guard.spike_deviations": _SPIKE,
    "guard.spike_window": _SPIKE,
    "guard.rollback_batches": Condition(
        "guard.non_finite or guard.spike=rollback", lambda c: "rollback" in (c.guard.non_finite, c.guard.spike)
    ),
    "model.moe.capacity_factor": _CAPACITY,
    "model.moe.capacity_group": _CAPACITY,
    "model.moe.exchange_factor": Condition("mesh.expert above 1", lambda c: c.mesh.expert > 1),
    "model.moe.groups_per_token": _GROUPS,
    "model.moe.group_score": _GROUPS,
    "model.local_rope_theta": Condition("model.pattern with local", lambda c: "local" in c.model.pattern),
    "model.activation_limit": Condition("model.activation=clipped_silu", lambda c: c.model.activation == "clipped_silu"),
    "data.chat_template": _CHAT,
    "data.too_long": _CHAT,
    "checkpoint.keep": _SAVING,
    "checkpoint.asynchronous": _SAVING,
    "checkpoint.on_failure": _SAVING,
    "checkpoint.fast_dir": Condition("checkpoint.fast_every", lambda c: c.checkpoint.fast_every > 0),
} | {
    f"objective.{section}.{field.name}": Condition(f"objective.kind={section}", partial(_trains_on, section))
    for section in ("dpo", "distill", "grpo")
    for field in fields(getattr(_DEFAULTS.objective, section))
}


def idle_fields(config: Config) -> list[str]:
    """Return a line for each non-default field without effect in this config, whose mesh is resolved."""
    lines = []
    for name, condition in _CONDITIONS.items():
        value, default = _value(config, name), _value(_DEFAULTS, name)
        if value != default and not condition.holds(config):
            shown = ",".join(value) if isinstance(value, tuple) else value
            lines.append(f"{name}={shown} does nothing without {condition.words}")
    return lines


def _value(config: Any, name: str) -> Any:
    """Return the value of a field; in a part that is None, the default."""
    for part in name.split("."):
        config = getattr(MoEConfig() if config is None else config, part)
    return config
