"""Translate a folder's config.json to a `ModelConfig` and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ConfigError, ExplainedError, nearest
from jaxtrain.huggingface.fields import Family, Fields
from jaxtrain.huggingface.known import FAMILIES
from jaxtrain.huggingface.table import Table

OF_TRAINING = ("dtype", "param_dtype", "attention", "init_std", "parts", "adapters")
"""Fields of `ModelConfig` that a config.json says nothing about."""


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """Return the family of a config.json.

    Raises:
      ExplainedError: it is not one of ours.
    """
    kind = config.get("model_type")
    if kind in FAMILIES:
        return FAMILIES[kind]
    raise ExplainedError(f"{where}: model_type={kind!r} is not a family that jaxtrain knows; {nearest(str(kind), FAMILIES)}")


def read_config(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Return the `ModelConfig` of a config.json, with the training's own fields at their defaults.

    Raises:
      ExplainedError: its family, a field or a value is not known, or a value is of the wrong type.
    """
    family, fields = family_of(config, where), Fields(config, where)
    if family.model_type != "gpt_oss" and config.get("quantization_config"):
        raise ExplainedError(f"{where}: the weights are quantised (quantization_config); save them dequantised first")
    try:
        model = ModelConfig(**family.read(fields))
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError, StopIteration) as error:
        raise ExplainedError(f"{where} cannot be translated: {type(error).__name__}: {error}") from error
    fields.refuse_rest()
    return _checked(model, where)


def _checked(model: ModelConfig, where: str) -> ModelConfig:
    """Return the model with its sizes checked: those that give shapes must be whole and positive."""
    sizes = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size")
    given = {name: getattr(model, name) for name in sizes}
    problems = [f"{n}={v!r} must be a whole number above 0" for n, v in given.items() if type(v) is not int or v < 1]
    if not problems and model.num_heads % model.num_kv_heads:
        problems = [f"num_key_value_heads={model.num_kv_heads} must divide num_attention_heads={model.num_heads}"]
    if problems:
        raise ConfigError(problems, f"in {where}")
    return model


def same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Return whether two configs are the same computation on the same weights."""
    return differing(one, other) == []


def differing(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Return the names of the fields in which two models differ in what they compute."""
    names = [field.name for field in dataclass_fields(ModelConfig) if field.name not in OF_TRAINING]
    return [name for name in names if getattr(_plain(one), name) != getattr(_plain(other), name)]


def _plain(model: ModelConfig) -> ModelConfig:
    """Return the model without what only training uses, and without settings that have no effect."""
    if model.moe is None:
        return model
    neutral = {"balance_loss": 0.0, "router_z_loss": 0.0, "bias_update_rate": 0.0, "dispatch": "dropless"}
    neutral |= {"capacity_factor": 1.0, "capacity_group": 0, "exchange_factor": 0.0}
    neutral |= {"selection_bias": model.moe.has_selection_bias}
    if model.moe.groups == model.moe.groups_per_token:
        neutral |= {"group_score": "top2"}
    moe = replace(model.moe, **neutral)
    return replace(model, moe=moe, mlp_dim=model.mlp_dim if moe.first_dense_layers else moe.mlp_dim)


def write_config(model: ModelConfig, length: int) -> dict[str, Any]:
    """Return a config.json for a model of ours: of the first family that can express it.

    Args:
      length: longest sequence it was trained on.

    Raises:
      ExplainedError: no family has all its settings.
    """
    nearest_family, fewest = "", list[str]()
    for family in FAMILIES.values():
        try:
            config = {"model_type": family.model_type, "architectures": [family.architecture], **family.write(model)}
            config |= {"max_position_embeddings": max(length, original_length(model))} if family.model_type != "gpt2" else {}
            back = read_config(config)
        except (ExplainedError, AssertionError, KeyError, ZeroDivisionError):
            continue
        found = differing(back, model)
        if not found:
            return config
        if not nearest_family or len(found) < len(fewest):
            nearest_family, fewest = family.model_type, found
    raise ExplainedError(
        f"no family of HuggingFace models has this model's settings; {nearest_family} comes nearest, and differs in "
        + ", ".join(f"model.{name}" for name in fewest)
    )


def original_length(model: ModelConfig) -> int:
    """Return the stretched context of the model, in tokens; 0 without scaling."""
    scaling = model.rope_scaling
    return int(scaling.original_length * (scaling.factor if scaling.kind != "longrope" else 1)) if scaling else 0


def table_of(family: Family, model: ModelConfig) -> Table:
    """Return the table of a model's weights."""
    return Table(family.rows(model), model)
