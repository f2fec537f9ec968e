"""Rules for the settings that make the decoder one of a family: which of them do not go together."""

from __future__ import annotations

from jaxtrain.config.model_fields import ModelConfig, RopeScaling


def setting_problems(model: ModelConfig, sequence_length: int) -> list[str]:
    """Return the problems of the pattern, positions, norms, attention and activation."""
    return [
        *_pattern_problems(model),
        *_position_problems(model, sequence_length),
        *_block_problems(model),
    ]


def _pattern_problems(model: ModelConfig) -> list[str]:
    problems = []
    if "local" in model.pattern and not model.sliding_window:
        problems.append("model.pattern has local layers, but model.sliding_window=0; give the tokens that they see")
    if model.pattern and "local" not in model.pattern and model.sliding_window:
        problems.append(
            f"model.sliding_window={model.sliding_window} is for local layers, but model.pattern={','.join(model.pattern)} has "
            "none"
        )
    if len(model.kinds) > 1 and model.first_dense_layers:
        problems.append(
            "model.moe.first_dense_layers stand before the stack, whose layers repeat; use a model.pattern of one kind"
        )
    return problems


def _position_problems(model: ModelConfig, sequence_length: int) -> list[str]:
    problems, latent = [], model.latent_attention
    rotated = int(model.head_dim * model.rope_fraction)
    if not 0 < model.rope_fraction <= 1 or (model.rope_fraction != 1 and (rotated < 2 or rotated % 2)):
        problems.append(
            f"model.rope_fraction={model.rope_fraction} rotates {rotated} of head_dim={model.head_dim} numbers; give a share "
            "above 0 and up to 1 that makes an even number"
        )
    if latent and model.rope_fraction != 1:
        problems.append(f"model.rope_fraction={model.rope_fraction}: latent attention has rope_dim for that; use 1")
    if 0 < model.learned_positions < sequence_length:
        problems.append(
            f"model.learned_positions={model.learned_positions} rows are too few for data.sequence_length={sequence_length}"
        )
    if model.rope_scaling:
        problems += _scaling_problems(model.rope_scaling, (latent.rope_dim if latent else rotated) // 2)
    return problems


def _scaling_problems(scaling: RopeScaling, frequencies: int) -> list[str]:
    problems = []
    if not (scaling.factor > 0 and 0 < scaling.low_frequency_factor <= scaling.high_frequency_factor):
        problems.append(
            f"model.rope_scaling: factor={scaling.factor} must be above 0, and low_frequency_factor="
            f"{scaling.low_frequency_factor} between 0 and high_frequency_factor={scaling.high_frequency_factor}"
        )
    if scaling.original_length < 1:
        problems.append(f"model.rope_scaling.original_length={scaling.original_length} must be at least 1")
    if scaling.kind == "yarn" and not 0 < scaling.beta_slow < scaling.beta_fast:
        problems.append(
            f"model.rope_scaling.beta_slow={scaling.beta_slow} must be above 0 and below beta_fast={scaling.beta_fast}"
        )
    counts = (len(scaling.short_factors), len(scaling.long_factors))
    if counts != ((frequencies,) * 2 if scaling.kind == "longrope" else (0, 0)):
        problems.append(
            f"model.rope_scaling has {counts[0]} short_factors, {counts[1]} long_factors; longrope needs {frequencies} of "
            "each, the others none"
        )
    return problems


def _block_problems(model: ModelConfig) -> list[str]:
    problems = []
    if model.norm_bias and model.norm == "rms":
        problems.append("model.norm_bias=True: RMSNorm has no bias; use model.norm=layer")
    if model.norm_offset not in (0, 1):
        problems.append(f"model.norm_offset={model.norm_offset}: use 0 or 1")
    if model.residual != "sequential":
        if model.norm_placement != "pre":
            problems.append(f"model.residual={model.residual} needs model.norm_placement=pre, not {model.norm_placement}")
        if model.parts.attention or model.parts.mlp:
            problems.append(f"model.residual={model.residual} does not go with a plugged-in attention or mlp; use sequential")
    if model.latent_attention and (model.attention_bias != "none" or model.attention_sinks):
        problems.append("model.latent_attention has neither biases nor sinks; use attention_bias=none, attention_sinks=False")
    if not model.gated_mlp and (model.moe or model.activation == "clipped_silu"):
        problems.append("model.gated_mlp=False: experts and activation=clipped_silu have a gate; use True")
    return problems
