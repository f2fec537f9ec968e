"""Build the model of a config for a mesh's kind of device."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxtrain.config import Config
from jaxtrain.layout import most_layers_per_iteration
from jaxtrain.models.decoder import Decoder
from jaxtrain.ops.attention_choice import choose_attention_for, context_kind
from jaxtrain.ops.attention_context import AttentionPlan
from jaxtrain.ops.attention_mask import Rule
from jaxtrain.ops.expert_dispatch import choose_expert_backend
from jaxtrain.parallel.stacking import make_stacking


def make_decoder(config: Config, mesh: Mesh, backend: str) -> Decoder:
    """Return the model of a resolved config on this mesh's kind of device."""
    platform = mesh.devices.flat[0].platform
    experts = choose_expert_backend(platform)
    # The pipeline puts layers into branches, where XLA:CPU's permutes are wrong.
    permutes = platform != "cpu" or config.mesh.pipe == 1
    model = config.model
    rule = Rule(window=model.sliding_window, scale=model.attention_scale, softcap=model.attention_softcap)
    plan = AttentionPlan(backend, context_kind(config, *_kind_of_device(mesh))[0], rule, permutes)
    most = most_layers_per_iteration(config.mesh, platform)
    return Decoder(model, config.train, make_stacking(config), plan, experts, config.sharding, config.mesh, most)


def _kind_of_device(mesh: Mesh) -> tuple[str, float]:
    """(platform, compute capability)"""
    device = mesh.devices.flat[0]
    return device.platform, float(getattr(device, "compute_capability", None) or 8.0)


def choose_attention(config: Config, mesh: Mesh) -> tuple[str, str]:
    """Return the attention backend for this mesh's devices and the reason; with a context axis also its kind and the reason.

    Raises:
      ExplainedError: the config requests one that cannot work here.
    """
    return choose_attention_for(config, *_kind_of_device(mesh))
