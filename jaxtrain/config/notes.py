"""Note fields that are set but have no effect, because another field would have to be set too."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from jaxtrain.config import Config, ModelConfig, MoEConfig
from jaxtrain.config.names import field_values

_DEFAULTS = field_values(replace(Config(), model=ModelConfig(moe=MoEConfig())))
_NEEDS = {
    "sync.outer_lr sync.outer_momentum": "sync.mode=diloco",
    "sync.every sync.fragments sync.overlap": "sync.mode=local or diloco",
    "sync.delay": "sync.mode=delayed",
    "sync.compression sync.mode": "mesh.replica above 1",
    "sync.compression_block": "sync.compression=int8 or float8",
    "sync.error_feedback": "sync.compression",
    "pipeline.schedule": "mesh.pipe above 1",
    "sharding.context_attention": "mesh.context above 1",
    "train.remat_save": "train.remat=named",
    "train.layer_inputs_memory": "train.remat=full or named",
    "train.validate_batches": "train.validate_every",
    "train.tasks_every": "train.tasks",
    "optimizer.beta2": "optimizer.name=adamw, lion or muon",
    "optimizer.epsilon": "optimizer.name=adamw or muon",
    "optimizer.decay_fraction": "optimizer.schedule=warmup_stable_decay",
    "optimizer.final_lr_fraction": "optimizer.schedule=cosine or warmup_stable_decay",
    "guard.spike_deviations guard.spike_window": "guard.spike",
    "model.moe.capacity_factor model.moe.capacity_group": "model.moe.dispatch=capacity",
    "model.moe.exchange_factor": "mesh.expert above 1",
    "model.moe.groups_per_token model.moe.group_score": "model.moe.groups above 1",
    "model.activation_limit": "model.activation=clipped_silu",
    "checkpoint.keep checkpoint.asynchronous checkpoint.on_failure": "checkpoint.every",
    "checkpoint.fast_dir": "checkpoint.fast_every",
}
_NEEDS |= {
    " ".join(f"objective.{kind}.{field.name}" for field in fields(getattr(Config().objective, kind))): f"objective.kind={kind}"
    for kind in ("dpo", "distill", "grpo")
}
"""{fields: what they need to have an effect: "NAME=VALUE or VALUE", "NAME above NUMBER", or a NAME that is on}."""
_NEEDS_ELSE: Mapping[str, tuple[str, Callable[[Config], bool]]] = {
    "sync.mixing": ("sync.overlap", lambda c: c.sync.replicas_differ and c.sync.overlap > 0),
    "optimizer.beta1": ("another optimizer.name than adafactor", lambda c: c.optimizer.name != "adafactor"),
    "guard.rollback_batches": (
        "guard.non_finite or guard.spike=rollback",
        lambda c: "rollback" in (c.guard.non_finite, c.guard.spike),
    ),
    "model.local_rope_theta": ("model.pattern with local", lambda c: "local" in c.model.pattern),
    "data.chat_template data.too_long": ("a source of kind=chat", lambda c: any(s.kind == "chat" for s in c.data.sources)),
    "data.store_cache_gib": (
        "a source with a URL",
        lambda c: any("://" in s.path for s in (*c.data.sources, *c.data.validation)),
    ),
}
"""{fields: (what they need, whether a config has it)}, of other forms."""


def idle_fields(config: Config) -> list[str]:
    """Return a line for each non-default field without effect in this config, whose mesh is resolved."""
    values = _DEFAULTS | field_values(config)
    needs = {names: (words, holds(config)) for names, (words, holds) in _NEEDS_ELSE.items()}
    needs |= {names: (words, _holds(words, values)) for names, words in _NEEDS.items()}
    idle = {name: words for names, (words, is_met) in needs.items() if not is_met for name in names.split()}
    shown = {name: ",".join(value) if isinstance(value := values[name], tuple) else value for name in idle}
    return [f"{n}={shown[n]} does nothing without {words}" for n, words in idle.items() if values[n] != _DEFAULTS[n]]


def _holds(words: str, values: Mapping[str, Any]) -> bool:
    """Return whether fields have the values that an entry of `_NEEDS` asks for."""
    name, equals, wanted = words.partition("=")
    if equals:
        return values[name] in re.split(", | or ", wanted)
    name, above, least = words.partition(" above ")
    return values[name] > int(least) if above else values[name] not in (0, "off", "none", ())
