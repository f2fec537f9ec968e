"""Mixtures of experts end to end: layouts equal one device, whole train steps, biases."""

import functools
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import LatentAttentionConfig, MeshConfig, MoEConfig, OptimizerConfig, PipelineConfig, SyncConfig
from jaxtrain.measure.layouts import BASE, batch_of, compare
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.train.gradients import batch_names, batch_sharding
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import create_state, params_dims, to_canonical
from jaxtrain.train.step import TrainSteps
from tests.train.runs import prepared_of

RATE = 0.01
MOE = MoEConfig(
    num_experts=8,
    experts_per_token=2,
    mlp_dim=16,
    shared_experts=1,
    first_dense_layers=1,
    router="sigmoid",
    groups=4,
    groups_per_token=2,
    balance_loss=0.02,
    router_z_loss=0.01,
    bias_update_rate=RATE,
)
DEEPSEEK = replace(
    BASE,
    model=replace(
        BASE.model,
        num_layers=4,
        moe=MOE,
        latent_attention=LatentAttentionConfig(query_rank=12, kv_rank=8, rope_dim=4, value_dim=6),
    ),
)
CAPACITY = replace(
    BASE,
    model=replace(
        BASE.model,
        num_layers=2,
        moe=MoEConfig(num_experts=8, mlp_dim=16, dispatch="capacity", capacity_factor=1.0, capacity_group=8, balance_loss=0.1),
    ),
)


def laid_out(base, microbatches, remat, schedule="1f1b", **axes):
    return replace(
        base,
        mesh=MeshConfig(**({"fsdp": 1} | axes)),
        pipeline=PipelineConfig(schedule=schedule),
        train=replace(base.train, microbatches=microbatches, remat=remat),
    )


@pytest.mark.parametrize(
    "config",
    [
        # Three layers in the stack: uneven parts. The layout law draws pipe x expert, expert x fsdp and capacity in every run.
        pytest.param(laid_out(DEEPSEEK, 2, "dots", pipe=2, expert=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(laid_out(DEEPSEEK, 1, "full", expert=4, fsdp=2), marks=pytest.mark.slow),
        pytest.param(laid_out(CAPACITY, 4, "none", expert=2, data=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=["pipe_expert_tensor", "expert_fsdp", "capacity"],
)
def test_layouts_equal_one_device(config):
    assert compare(config).problem is None


@functools.cache
def trained(config, steps=2):
    """(canonical parameters, metrics of each step) of whole train steps, as their programs take them."""
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.shape)])
    optimizer = make_optimizer(config.optimizer, 10, parameter_dims(config.model))
    state = create_state(config, mesh, optimizer)
    rows = batch_of(config.train.global_batch_size, config.data.sequence_length)
    batch = jax.device_put({name: rows[name] for name in batch_names(config)}, batch_sharding(mesh))
    train, metrics = TrainSteps(prepared_of(config, mesh, optimizer), 0, steps), []
    for _ in range(steps):
        state, one = train(state, batch)
        metrics.append(jax.tree.map(np.asarray, one))
    return jax.tree.map(np.asarray, to_canonical(config, state["params"], params_dims(config))), metrics


SGD = replace(
    BASE,
    model=replace(BASE.model, num_layers=3, moe=MOE),
    optimizer=OptimizerConfig(name="sgd", peak_lr=0.1, schedule="constant", weight_decay=0.5),
)


def test_biases_step_towards_balance_and_nothing_else_moves_them():
    params, metrics = trained(laid_out(SGD, 1, "none"))
    load = np.stack([step["expert_load"] for step in metrics])
    targets = (batch_of(BASE.train.global_batch_size, BASE.data.sequence_length)["targets"] != -1).sum()
    assert load.shape == (2, 2, 8)
    np.testing.assert_array_equal(load.sum(-1), targets * MOE.experts_per_token)
    steps = RATE * np.sign(load.mean(-1, keepdims=True) - load)
    np.testing.assert_allclose(params["layers"]["moe"]["bias"], steps.sum(0), atol=1e-7)
    assert np.abs(steps).max() == RATE


def test_metrics_of_the_experts():
    _, metrics = trained(laid_out(SGD, 1, "none"))
    load = metrics[0]["expert_load"]
    assert metrics[0]["expert_load_max"] == pytest.approx((load.max(-1) / load.mean(-1)).max())
    assert 1 <= metrics[0]["balance_loss"] < MOE.num_experts / MOE.experts_per_token
    auxiliary = 2 * (MOE.balance_loss * metrics[0]["balance_loss"] + MOE.router_z_loss * metrics[0]["router_z_loss"])
    z_term = metrics[0]["total_loss"] - metrics[0]["loss"] - auxiliary
    assert 0 < z_term < 2 * BASE.train.z_loss * np.log(BASE.model.padded_vocab_size) ** 2
    assert "dropped_share" not in metrics[0]


@pytest.mark.slow  # the layouts of every run have experts with pipe and fsdp
def test_train_steps_on_a_mesh_equal_one_device():
    one, on_one = trained(laid_out(SGD, 1, "none"))
    mesh, on_mesh = trained(laid_out(SGD, 2, "full", pipe=2, expert=4))
    for a, b in zip(on_one, on_mesh, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), one, mesh)


@pytest.mark.slow
def test_replicas_with_spread_experts_equal_replicas_of_one_device():
    """DiLoCo: experts move tokens within their replica alone, whose routers' biases follow its own loads till the exchange."""
    model = replace(SGD.model, num_layers=1, embed_dim=16, moe=replace(MOE, first_dense_layers=0))
    config = replace(SGD, model=model, sync=SyncConfig(mode="diloco", every=1))
    one, on_one = trained(laid_out(config, 1, "none", replica=2))
    mesh, on_mesh = trained(laid_out(config, 1, "none", replica=2, expert=2))
    for a, b in zip(on_one, on_mesh, strict=True):
        assert b["exchanged_bytes"] < a["exchanged_bytes"]
        assert b["replica_divergence"].min() > 0
        assert (b["expert_load"][0] != b["expert_load"][1]).any(), "both replicas had the same tokens"
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a | {"exchanged_bytes": b["exchanged_bytes"]}, b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), one, mesh)


@pytest.mark.slow
def test_adafactor_on_a_mesh_equals_one_device():
    """Adafactor's factors are means over rows and columns of whole matrices, of which a device holds parts of some experts."""
    model = replace(BASE.model, num_layers=2, embed_dim=16, moe=replace(MOE, first_dense_layers=0))
    optimizer = OptimizerConfig(name="adafactor", peak_lr=1e-3, schedule="constant")
    config = replace(BASE, model=model, optimizer=optimizer)
    one, on_one = trained(laid_out(config, 1, "none"))
    mesh, on_mesh = trained(laid_out(config, 1, "none", expert=2, fsdp=2))
    for a, b in zip(on_one, on_mesh, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), one, mesh)


def test_the_share_of_dropped_tokens():
    config = replace(CAPACITY, optimizer=SGD.optimizer)
    metrics = trained(laid_out(config, 1, "none"), steps=1)[1][0]
    assert 0.02 < metrics["dropped_share"] < 0.5
    roomy = replace(config, model=replace(config.model, moe=replace(config.model.moe, capacity_factor=4.0)))
    assert trained(laid_out(roomy, 1, "none"), steps=1)[1][0]["dropped_share"] == 0
