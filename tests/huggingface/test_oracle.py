"""The computation of every family against `transformers`: logits within 2e-5, gradients within 1e-4, on any mesh.

The goldens hold the truth (`goldens.py`), so no torch is needed. Row 1 of the batch packs documents and ends in padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, ObjectiveConfig, TrainConfig
from jaxtrain.config.rules import validate
from jaxtrain.errors import ConfigError
from jaxtrain.huggingface.placing import place
from jaxtrain.inference.whole import make_logits
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.train.gradients import batch_names, batch_sharding, make_loss_and_gradients
from jaxtrain.train.state import make_stacking, to_canonical
from tests.huggingface import tiny
from tests.huggingface.test_families import described, theirs

MESHES = {
    "one device": {},
    "pipe x fsdp x tensor": {"pipe": 2, "fsdp": 2, "tensor": 2},
    "fsdp x context x tensor": {"fsdp": 2, "context": 2, "tensor": 2},
    "pipe x expert x tensor": {"pipe": 2, "expert": 2, "tensor": 2},
    "expert x context x tensor": {"expert": 2, "context": 2, "tensor": 2},
    "pipe x fsdp x context": {"pipe": 2, "fsdp": 2, "context": 2},
}


def config_of(model: ModelConfig, objective: ObjectiveConfig, shape: tuple[int, int], **mesh: int) -> Config:
    """A config for a batch of this shape, in float32."""
    moe = model.moe and replace(model.moe, balance_loss=0.0)
    model = replace(model, dtype="float32", attention="reference", moe=moe)
    data, train = DataConfig(sequence_length=shape[1]), TrainConfig(global_batch_size=shape[0], remat="none")
    return Config(model=model, mesh=MeshConfig(**{"fsdp": 1, **mesh}), data=data, train=train, objective=objective)


class Ours:
    """Our model of a family's tiny weights on a mesh, with the batch of `tiny` or another one."""

    def __init__(
        self,
        family: str,
        batch: Mapping[str, np.ndarray] | None = None,
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008, it is frozen
        **mesh: int,
    ):
        golden, model, self.table = described(family)
        given = tiny.batch() if batch is None else batch
        config = config_of(model, objective, given["tokens"].shape, **mesh)
        self.golden, self.config = golden, validate(config, math.prod(mesh.values()))
        self.mesh = make_mesh(self.config.mesh, jax.devices()[: math.prod(self.config.mesh.shape)])
        tensors = {name: tiny.weight(name, shape, family) for name, shape in golden["shapes"].items()}
        fetch = lambda name, index: tensors[name][index]  # noqa: E731
        self.params = place(self.config.model, make_stacking(self.config), self.mesh, self.table, fetch)
        held = {name: value for name, value in given.items() if name in batch_names(self.config)}
        self.batch = jax.device_put(held, batch_sharding(self.mesh))

    def logits_errors(self) -> tuple[float, float]:
        """Largest error of a logit in the row of one document, and in the row of packed documents and padding."""
        logits = np.asarray(make_logits(self.config, self.mesh)(self.params, self.batch))[..., : self.config.model.vocab_size]
        errors = np.abs(logits - self.golden["logits"])
        whole, packed = (float(row[held].max()) for row, held in zip(errors, tiny.batch()["segments"] > 0, strict=True))
        return whole, packed

    def gradients(self) -> dict[str, np.ndarray]:
        """Gradients of the loss by the names of the folder's tensors."""
        step = jax.jit(make_loss_and_gradients(self.config, self.mesh, "reference"))
        self.metrics, _, gradients = step(self.params, self.batch)
        gradients = to_canonical(self.config, gradients, parameter_dims(self.config.model))
        flat = jax.tree_util.tree_flatten_with_path(jax.tree.map(np.asarray, gradients))[0]
        named = {"/".join(key.key for key in path): leaf for path, leaf in flat}
        stacked = lambda path: path.startswith(("layers/", "outer/first"))  # noqa: E731
        return theirs(self.table, {path: leaf if stacked(path) else leaf[None] for path, leaf in named.items()})

    def gradient_error(self) -> tuple[float, str]:
        """(largest error of a gradient's norm and products with `tiny.direction`, relative to the norm; of which weight)."""
        gradients, worst = self.gradients(), (0.0, "")
        for name, (norm, products) in self.golden["gradients"].items():
            along = (gradients[name] * tiny.direction(name, gradients[name].shape)).reshape(4, -1).sum(1)
            got = np.array([np.linalg.norm(gradients[name]), *along])
            worst = max(worst, (np.abs(got - [norm, *products]).max() / max(norm, 1e-6), name))
        return worst


def is_for(family: str, mesh: str) -> bool:
    """Whether the mesh says something of this family: one with an expert axis of a mixture of experts."""
    return "expert" not in MESHES[mesh] or described(family)[1].moe is not None


def is_refused(family: str, mesh: str) -> bool:
    """Whether the family cannot be cut so: `tensor` shards kv heads whole, and Gemma 1's tiny model has one."""
    return described(family)[1].num_kv_heads % MESHES[mesh].get("tensor", 1) > 0


EVERY = [(family, mesh) for mesh in MESHES for family in tiny.FAMILIES if is_for(family, mesh)]
CASES = [case for case in EVERY if not is_refused(*case)]
ONE_EACH = [
    (family, fitting[number % len(fitting)])
    for number, family in enumerate(tiny.FAMILIES)
    if (fitting := [mesh for (name, mesh) in CASES if name == family])
]
"""A mesh for each family, in turn: every mesh has its share of windows, scaled RoPE, mixtures, parallel blocks and biases."""
QUICK = ("gemma2", "gpt_neox", "deepseek_v3", "gpt_oss")
"""Families whose gradients are compared in every run: most settings are in one of them."""


@pytest.mark.parametrize(("family", "mesh"), ONE_EACH)
def test_logits(family: str, mesh: str):
    assert max(Ours(family, **MESHES[mesh]).logits_errors()) < 2e-5


@pytest.mark.parametrize("family", QUICK)
def test_gradients(family: str):
    error, name = Ours(family).gradient_error()
    assert error < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_on_every_mesh(family: str, mesh: str):
    ours = Ours(family, **MESHES[mesh])
    assert max(ours.logits_errors()) < 2e-5
    error, name = ours.gradient_error()
    assert error < 1e-4, name


@pytest.mark.parametrize(("family", "mesh"), [case for case in EVERY if is_refused(*case)])
def test_what_tensor_cannot_cut_is_said(family: str, mesh: str):
    with pytest.raises(ConfigError, match=r"mesh\.tensor=2 does not divide model\.num_kv_heads=1; use 1"):
        Ours(family, **MESHES[mesh])
