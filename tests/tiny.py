"""Tiny configs for tests: what a test varies it says itself, as `tiny(model={"num_layers": 3}, mesh={"pipe": 2})`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig

MODEL = ModelConfig(
    num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16, vocab_size=100, dtype="float32"
)
UNEVEN = {"num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "mlp_dim": 24}
"""Fields of a model whose layers divide into neither 2 nor 4 parts; its 100 ids are padded to 128, as all of them."""
CONFIG = Config(
    model=MODEL,
    mesh=MeshConfig(fsdp=1),
    data=DataConfig(sequence_length=8),
    train=TrainConfig(global_batch_size=8, loss_chunk=8),
)
"""One device, and one step that compiles in a second."""


def tiny(**sections: Any) -> Config:
    """Return CONFIG with fields replaced, section by section; what is no dict (a section, a name) replaces the whole."""
    new = {
        name: replace(getattr(CONFIG, name), **value) if isinstance(value, dict) else value for name, value in sections.items()
    }
    return replace(CONFIG, **new)
