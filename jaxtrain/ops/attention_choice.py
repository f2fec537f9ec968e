"""Which attention a config runs on a kind of device: the backend, and how keys are reached along `context`."""

from __future__ import annotations

from typing import Any

from jaxtrain.config import Config
from jaxtrain.ops.attention import choose_backend
from jaxtrain.ops.attention_context import choose_context_attention
from jaxtrain.ops.attention_order import IN_PIECES


def _facts(config: Config, platform: str, compute_capability: float) -> dict[str, Any]:
    """Return what the choices of attention depend on, but for the length."""
    model, latent = config.model, config.model.latent_attention
    return {
        "platform": platform,
        "dtype": model.dtype,
        "head_dim": model.head_dim + (latent.rope_dim if latent else 0),
        "value_dim": latent.value_dim if latent else None,
        "window": model.sliding_window if "local" in model.kinds else 0,
        "softcap": model.attention_softcap > 0,
        "sinks": model.attention_sinks,
        "masks_documents": config.data.mask_documents,
        "compute_capability": compute_capability,
    }


def context_kind(config: Config, platform: str = "gpu", compute_capability: float = 9.0) -> tuple[str, str]:
    """Return how attention reaches the keys of other devices along `context` (ring, gather, ulysses), and why.

    Args:
      platform, compute_capability: of the devices; H100s by default.

    Raises:
      ExplainedError: the config asks for a kind that its heads do not allow.
    """
    return choose_context_attention(
        config.sharding.context_attention,
        context=config.mesh.context,
        heads=config.model.num_heads // config.mesh.tensor,
        kv_heads=config.model.num_kv_heads // config.mesh.tensor,
        sequence_length=config.data.sequence_length,
        backend=config.model.attention,
        **_facts(config, platform, compute_capability),
    )


def choose_attention_for(config: Config, platform: str, compute_capability: float) -> tuple[str, str]:
    """Return the attention backend, and why; with a context axis also what goes on along it, and why.

    Raises:
      ExplainedError: the config asks for one that cannot work here.
    """
    context, (kind, why_kind) = config.mesh.context, context_kind(config, platform, compute_capability)
    in_pieces = context > 1 and kind in IN_PIECES
    length = config.data.sequence_length // (context if in_pieces else 1)
    facts = _facts(config, platform, compute_capability)
    backend, why = choose_backend(config.model.attention, sequence_length=length, in_pieces=in_pieces, **facts)
    return backend, why if context == 1 else f"{why}; along context: {kind}, {why_kind}"
