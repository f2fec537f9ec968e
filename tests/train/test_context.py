"""Context parallelism: the sequence shared out over devices computes what one device does, with every other axis."""

import functools
import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import LatentAttentionConfig, MeshConfig, ShardingConfig
from jaxtrain.config.rules import validate
from jaxtrain.inference.whole import make_logits
from jaxtrain.measure.layouts import BASE, batch_of, on_one_device
from jaxtrain.mesh import make_mesh
from jaxtrain.models.building import choose_attention
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.train.gradients import batch_names, batch_sharding, make_evaluation_step, make_loss_and_gradients
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import create_state, to_canonical

LATENT = LatentAttentionConfig(query_rank=12, kv_rank=8, rope_dim=4, value_dim=6)


def layout(kind, backend="reference", window=0, masks=True, latent=None, remat="full", microbatches=1, kv_heads=8, **mesh):
    """A config of two layers on this mesh."""
    model = replace(BASE.model, num_layers=2, attention=backend, sliding_window=window, latent_attention=latent)
    config = replace(
        BASE,
        model=replace(model, num_kv_heads=kv_heads),
        mesh=MeshConfig(**{"fsdp": 1, **mesh}),
        sharding=ShardingConfig(context_attention=kind),
        data=replace(BASE.data, mask_documents=masks),
        train=replace(BASE.train, global_batch_size=8, microbatches=microbatches, remat=remat),
    )
    return validate(config, int(np.prod(config.mesh.shape)))


def prepare(config):
    """(mesh, initial parameters, batch)"""
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(config.mesh.shape))])
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    rows = batch_of(config.train.global_batch_size, config.data.sequence_length)
    batch = jax.device_put({name: rows[name] for name in batch_names(config)}, batch_sharding(mesh))
    return mesh, create_state(config, mesh, optimizer)["params"], batch


def gradients_of(config):
    """(loss, gradients in canonical form)"""
    mesh, params, batch = prepare(config)
    step = jax.jit(make_loss_and_gradients(config, mesh, config.model.attention)).lower(params, batch).compile()
    metrics, _, gradients = step(params, batch)
    return metrics["total_loss"], jax.tree.map(np.asarray, to_canonical(config, gradients, parameter_dims(config.model)))


truth_of = functools.cache(gradients_of)

LAYOUTS = [
    layout("ring", "blockwise", window=6, context=2, pipe=2, fsdp=2, microbatches=2, remat="named"),
    # The layout law draws each kind in every run (tests/layouts.py, SURE).
    pytest.param(layout("ring", context=4, tensor=2, remat="dots", kv_heads=2), marks=pytest.mark.slow),
    pytest.param(layout("gather", "blockwise", window=6, context=4, fsdp=2, remat="none"), marks=pytest.mark.slow),
    pytest.param(layout("ulysses", window=6, context=2, tensor=2, pipe=2, microbatches=2), marks=pytest.mark.slow),
    pytest.param(layout("ring", "blockwise", latent=LATENT, context=2, tensor=2, masks=False), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("config", LAYOUTS, ids=lambda c: f"{c.sharding.context_attention}-{c.mesh.context}-{c.train.remat}")
def test_a_shared_out_sequence_trains_as_on_one_device(config):
    (loss, gradients), (true_loss, truth) = gradients_of(config), truth_of(on_one_device(config))
    assert float(loss) == pytest.approx(float(true_loss), rel=1e-6)
    distances = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), gradients, truth)
    assert max(jax.tree.leaves(distances)) < 1e-5, distances


def outcome(config):
    """(evaluation sums, logits [row, place, vocabulary]) of the initial parameters."""
    mesh, params, batch = prepare(config)
    evaluate = make_evaluation_step(config, mesh, config.model.attention).lower(params, batch).compile()
    return jax.tree.map(float, evaluate(params, batch)), np.asarray(make_logits(config, mesh)(params, batch))


true_outcome = functools.cache(outcome)


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_validation_and_sampling_find_every_token(kind):
    config = layout(kind, context=4, tensor=2)
    (sums, logits), (true_sums, true_logits) = outcome(config), true_outcome(on_one_device(config))
    assert sums["targets"] == true_sums["targets"]
    assert sums["loss"] == pytest.approx(true_sums["loss"], rel=1e-6)
    np.testing.assert_allclose(logits, true_logits, rtol=1e-4, atol=1e-5)
    places = itertools.combinations(range(len(true_logits)), 2)
    assert all(not np.allclose(true_logits[a], true_logits[b], atol=1e-3) for a, b in places)  # or any place would do


def test_the_choice_names_the_kind_and_why():
    config = replace(layout("auto", "auto", context=2), data=replace(BASE.data, sequence_length=2048))
    backend, why = choose_attention(config, make_mesh(config.mesh, jax.devices()[:2]))
    assert backend == "blockwise"
    assert why.startswith("length 2048 is at least 512;")  # whole sequences
    assert "along context: ulysses, pieces of 512 tokens do 512 FLOP a received byte" in why
    backend, why = choose_attention(
        replace(config, sharding=ShardingConfig(context_attention="ring")), make_mesh(config.mesh, jax.devices()[:2])
    )
    assert why.startswith("length 1024")  # a device's share
    config = replace(config, mesh=MeshConfig(fsdp=1))
    assert "context" not in choose_attention(config, make_mesh(config.mesh, jax.devices()[:1]))[1]
