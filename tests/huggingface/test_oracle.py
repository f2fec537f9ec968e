"""The computation of every family against `transformers`: logits within 2e-5, gradients within 1e-4, on any mesh.

The goldens hold the truth (`goldens.py`), so no torch is needed. Row 1 of the batch packs documents and ends in padding.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from tests.huggingface import goldens, tiny
from tests.huggingface.test_families import described, theirs

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from jaxtrain.huggingface.placing import place
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.train.state import make_stacking, to_canonical
from jaxtrain.train.step import batch_names, batch_sharding, make_logits_step, make_loss_and_gradients

MESHES = {
    "one device": {},
    "pipe x fsdp x tensor": {"pipe": 2, "fsdp": 2, "tensor": 2},
    "fsdp x context x tensor": {"fsdp": 2, "context": 2, "tensor": 2},
    "pipe x expert x tensor": {"pipe": 2, "expert": 2, "tensor": 2},
}


def config_of(model: ModelConfig, **mesh: int) -> Config:
    """A config for the batch of `tiny`, in float32."""
    moe = model.moe and replace(model.moe, balance_loss=0.0)
    model = replace(model, dtype="float32", attention="reference", moe=moe)
    data = DataConfig(sequence_length=tiny.LENGTH, mask_documents=True)
    return Config(
        model=model, mesh=MeshConfig(**{"fsdp": 1, **mesh}), data=data, train=TrainConfig(global_batch_size=2, remat="none")
    )


def compute(family: str, config: Config, golden: dict[str, Any], table: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(logits [2, L, V], gradients by the names of the folder's tensors)."""
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.shape)])
    tensors = {name: tiny.weight(name, shape, family) for name, shape in golden["shapes"].items()}
    params = place(config.model, make_stacking(config), mesh, table, lambda name, index: tensors[name][index])
    batch = {name: value for name, value in tiny.batch().items() if name in batch_names(config)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    step = make_logits_step(config, mesh, "reference")
    logits = np.stack([np.asarray(step(params, batch, np.int32(i))) for i in range(tiny.LENGTH)], 1)
    _, _, gradients = jax.jit(make_loss_and_gradients(config, mesh, "reference"))(params, batch)
    gradients = jax.tree.map(np.asarray, to_canonical(config, gradients, parameter_dims(config.model)))
    flat = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]}
    flat = {path: leaf if path.startswith(("layers/", "outer/first")) else leaf[None] for path, leaf in flat.items()}
    return logits[..., : config.model.vocab_size], theirs(table, flat)


def errors(family: str, **mesh: int) -> tuple[float, float, str]:
    """(largest error of a logit, largest relative error of a gradient's norm and products, of which weight)."""
    golden, model, table = described(family)
    logits, gradients = compute(family, config_of(model, **mesh), golden, table)
    counted = tiny.batch()["segments"] > 0
    worst, where = 0.0, ""
    for name, (norm, products) in golden["gradients"].items():
        directions = tiny.direction(name, golden["shapes"][name])
        got = np.array([np.linalg.norm(gradients[name]), *(gradients[name] * directions).reshape(4, -1).sum(1)])
        error = np.abs(got - [norm, *products]).max() / max(norm, 1e-6)
        worst, where = max((worst, where), (error, name))
    return float(np.abs(logits - golden["logits"])[counted].max()), worst, where


def fits(family: str, mesh: dict[str, int]) -> bool:
    """Whether the mesh is for this family: experts for a mixture, and heads that tensor divides."""
    _, model, _ = described(family)
    if "expert" in mesh and model.moe is None:
        return False
    return model.num_kv_heads % mesh.get("tensor", 1) == 0 or model.latent_attention is not None


CASES = [(family, mesh) for mesh in MESHES for family in tiny.FAMILIES if fits(family, MESHES[mesh])]


@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_as_transformers(family: str, mesh: str):
    logit, gradient, name = errors(family, **MESHES[mesh])
    assert logit < 2e-5
    assert gradient < 1e-4, name
