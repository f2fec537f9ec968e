"""RoPE in config.json: `rope_parameters` of `transformers` 5, and the older `rope_theta`, `rope_scaling` and their kin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtrain.config import ModelConfig, RopeScaling
from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface.fields import Fields, Part

KINDS = {"default": None, "linear": "linear", "llama3": "llama3", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}
NAMES = {
    "linear": {"factor": "factor"},
    "llama3": {"factor": "factor", "low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor"},
    "yarn": {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate"},
    "longrope": {"short_factor": "short_factors", "long_factor": "long_factors"},
}
"""Field in config.json -> field of `RopeScaling`, by kind."""


def read_rope(fields: Fields, theta: float = 10_000.0, old_theta: str = "rope_theta", old_fraction: str = "") -> dict[str, Any]:
    """Translate RoPE's base, fraction and scaling; `theta` is the base where the file has none.

    Args:
      old_theta, old_fraction: names of older files.
    """
    new, old = fields.take("rope_parameters", {}), fields.take("rope_scaling", {})
    parameters = {**old, **new}
    base = parameters.pop("rope_theta", fields.take(old_theta, theta))
    fraction = fields.take("partial_rotary_factor", fields.take(old_fraction, 1.0) if old_fraction else 1.0)
    fraction = parameters.pop("partial_rotary_factor", fraction)
    fields.take("rope_theta", None)
    length = fields.take("original_max_position_embeddings", None), fields.peek("max_position_embeddings")
    return {"rope_theta": float(base), "rope_fraction": fraction, "rope_scaling": read_scaling(parameters, *length)}


def rope(theta: float = 10_000.0, old_theta: str = "rope_theta", old_fraction: str = "") -> Part:
    """Return the part of RoPE; see `read_rope`."""
    return Part(lambda fields: read_rope(fields, theta, old_theta, old_fraction), write_rope)


def read_scaling(parameters: Mapping[str, Any], original: int | None, length: int | None) -> RopeScaling | None:
    """Translate a scaling.

    Args:
      original, length: context of the unstretched model where it stands outside, and of the model.

    Raises:
      ExplainedError: its kind, or one of its fields, is not known.
    """
    left = {name: value for name, value in parameters.items() if value is not None}
    kind = left.pop("rope_type", left.pop("type", "default"))
    left.pop("type", None)
    if kind not in KINDS:
        raise ExplainedError(f"config.json: RoPE of type {kind} is not supported, only {', '.join(KINDS)}")
    ours = KINDS[kind]
    if ours is None:
        return None
    values: dict[str, Any] = {"kind": ours}
    stretched: Any = left.get("factor")
    mscale, all_dims = left.pop("mscale", None), left.pop("mscale_all_dim", None)
    for theirs, own in NAMES[ours].items():
        if theirs in left:
            value = left.pop(theirs)
            values[own] = tuple(value) if isinstance(value, list) else value
    given = left.pop("original_max_position_embeddings", None)
    before: Any = original or given or length
    if ours != "linear":
        if not before:
            raise ExplainedError(f"config.json: RoPE of type {kind} needs original_max_position_embeddings")
        values["original_length"] = before
        stretched = stretched or (length or before) / before
    attention = left.pop("attention_factor", None)
    if ours == "longrope":
        left.pop("factor", None)
        values["attention_factor"] = attention or (
            math.sqrt(1 + math.log(stretched) / math.log(before)) if stretched > 1 else 1.0
        )
    if ours == "yarn":
        values["factor"] = stretched
        plain = mscale_of(stretched, mscale) / mscale_of(stretched, all_dims) if mscale and all_dims else mscale_of(stretched)
        values["attention_factor"] = attention or plain
    left.pop("finetuned", None)
    if left:
        raise ExplainedError(f"config.json: RoPE of type {kind} has unknown fields: {', '.join(sorted(left))}")
    return RopeScaling(**values)


def mscale_of(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's 0.1 weight ln(factor) + 1 (arXiv:2309.00071, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """Return `rope_parameters`."""
    parameters: dict[str, Any] = {"rope_theta": model.rope_theta, **write_scaling(model.rope_scaling)}
    if model.rope_fraction != 1:
        parameters["partial_rotary_factor"] = model.rope_fraction
    return {"rope_parameters": parameters}


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the fields of a scaling."""
    if scaling is None:
        return {"rope_type": "default"}
    values = {theirs: getattr(scaling, ours) for theirs, ours in NAMES[scaling.kind].items()}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    values["rope_type"] = scaling.kind
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind in ("yarn", "longrope"):
        values["attention_factor"] = scaling.attention_factor
    return values
