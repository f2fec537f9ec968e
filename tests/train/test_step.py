"""The steps: training, evaluation and logits agree with one another, with a plain forward in numpy, and on every layout."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxtrain.config import Config, MeshConfig, MoEConfig, OptimizerConfig, PipelineConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.inference.whole import make_logits
from jaxtrain.mesh import make_mesh
from jaxtrain.models.building import make_decoder
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.models.parameters import held_dtype
from jaxtrain.ops.losses import MASKED_LOGIT
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.sharding import is_dims, named
from jaxtrain.train.gradients import abstract_batch, batch_names, batch_sharding, make_evaluation_step, make_loss_and_gradients
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import initial_params, state_shardings, to_canonical
from jaxtrain.train.step import abstract_arguments, make_train_step, place_numbers
from tests.tiny import UNEVEN, tiny

ROWS, LENGTH, VOCAB, Z_LOSS = 8, 8, 100, 0.01
BASE = tiny(
    model={**UNEVEN, "qk_norm": "head"},
    data={"sequence_length": LENGTH},
    optimizer=OptimizerConfig(name="sgd", beta1=0.0, weight_decay=0.0, clip_norm=0.0, peak_lr=0.1, schedule="constant"),
    train={"global_batch_size": ROWS, "microbatches": 2, "remat": "full", "loss_chunk": 4, "z_loss": Z_LOSS},
)
LAYOUTS = {
    "one": (MeshConfig(fsdp=1), PipelineConfig()),
    "pipe": (MeshConfig(pipe=2, fsdp=2, tensor=2), PipelineConfig()),
    "chunks": (MeshConfig(pipe=2, data=2, fsdp=1), PipelineConfig(schedule="interleaved", chunks=2)),
    "data": (MeshConfig(data=2, fsdp=2), PipelineConfig()),
}


def in_layout(layout: str, base: Config = BASE) -> tuple[Config, jax.sharding.Mesh]:
    mesh, pipeline = LAYOUTS[layout]
    config = replace(base, mesh=mesh, pipeline=pipeline)
    devices = math.prod(mesh.shape)
    assert find_problems(config, devices)[1] == []
    return config, make_mesh(mesh, jax.devices()[:devices])


@functools.cache
def canonical_weights() -> Any:
    """Random parameters in canonical form but for the vocabulary, whose padding holds rubbish that must not matter."""
    rng = np.random.default_rng(0)
    dims = parameter_dims(BASE.model)
    shapes = jax.eval_shape(lambda: initial_params(BASE))

    def leaf(dims: tuple[str, ...], shape: Any) -> np.ndarray:
        value = rng.normal(size=shape.shape).astype(np.float32)
        value = 1 + 0.1 * value if dims[-1] == "norm" else 0.3 * value
        return value.reshape(BASE.model.num_layers, *value.shape[3:]) if "layer" in dims else value

    return jax.tree.map(leaf, dims, shapes, is_leaf=is_dims)


def weights_in(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """The same parameters, stacked and sharded for a layout."""
    weights = canonical_weights()
    stacked = weights | {"layers": jax.tree.map(make_stacking(config).stack, weights["layers"])}
    dims = parameter_dims(config.model)
    stacked = jax.tree.map(lambda d, w: w.astype(held_dtype(d, config.model.param_dtype)), dims, stacked, is_leaf=is_dims)
    return jax.device_put(stacked, named(mesh, parameter_dims(config.model)))


@functools.cache
def numpy_batch() -> dict[str, np.ndarray]:
    """Two documents a row, cut at different places; some positions without a target, and more of them in later rows."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    cut = rng.integers(1, LENGTH, (ROWS, 1))
    index = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH))
    segments = np.where(index < cut, 1, 2).astype(np.int32)
    positions = np.where(index < cut, index, index - cut).astype(np.int32)
    ignored = rng.random((ROWS, LENGTH)) < np.linspace(0, 0.8, ROWS)[:, None]
    targets = np.where(ignored, -1, tokens[:, 1:]).astype(np.int32)
    return {"tokens": tokens[:, :-1], "targets": targets, "positions": positions, "segments": segments}


def batch_in(config: Config, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    return jax.device_put({name: numpy_batch()[name] for name in batch_names(config)}, batch_sharding(mesh))


# ---------------------------------------------------------------------------------------------------------------------
# The plain forward


def normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + BASE.model.norm_epsilon) * scale


def turned(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """RoPE on [B, L, heads, N]: the pair (i, i + N/2) turns by position * theta^(-2i/N)."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * BASE.model.rope_theta ** (-np.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    return np.concatenate([left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles)], -1)


@functools.cache
def plain_logits() -> np.ndarray:
    """Logits [B, L, V] in float64 numpy, straight from the formulas."""
    weights = jax.tree.map(lambda w: w.astype(np.float64), canonical_weights())
    batch, m = numpy_batch(), BASE.model
    visible = np.tril(np.ones((LENGTH, LENGTH), bool)) & (batch["segments"][:, :, None] == batch["segments"][:, None, :])
    x = weights["outer"]["table"][batch["tokens"]]
    for i in range(m.num_layers):
        w = jax.tree.map(lambda leaf, i=i: leaf[i], weights["layers"])
        a, h = w["attention"], normed(x, w["attention"]["norm"])
        query, key, value = (np.einsum("bld,dhn->blhn", h, a[name]) for name in ("query", "key", "value"))
        query, key = normed(query, a["query_norm"]), normed(key, a["key_norm"])
        query, key = turned(query, batch["positions"]), turned(key, batch["positions"])
        key, value = (np.repeat(each, m.num_heads // m.num_kv_heads, axis=2) for each in (key, value))
        scores = np.where(visible[:, None], np.einsum("bqhn,bkhn->bhqk", query, key) / math.sqrt(m.head_dim), -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhqk,bkhn->bqhn", scores / scores.sum(-1, keepdims=True), value)
        x = x + np.einsum("blhn,hnd->bld", mixed, a["out"])
        h = normed(x, w["mlp"]["norm"])
        gate = h @ w["mlp"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp"]["up"])) @ w["mlp"]["down"]
    return (normed(x, weights["outer"]["norm"]) @ weights["outer"]["head"])[..., :VOCAB]


@functools.cache
def plain_losses() -> tuple[float, float, int]:
    """(mean negative log likelihood, mean of (log Z)^2, targets)."""
    logits, targets = plain_logits(), numpy_batch()["targets"]
    log_z = np.log(np.exp(logits).sum(-1))
    counted = targets >= 0
    taken = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    count = int(counted.sum())
    return float(((log_z - taken) * counted).sum() / count), float((log_z**2 * counted).sum() / count), count


# ---------------------------------------------------------------------------------------------------------------------
# Training


@functools.cache
def loss_and_gradients(layout: str, base: Config = BASE) -> tuple[dict[str, float], Any]:
    """What the region computes, gradients in canonical form on the host."""
    config, mesh = in_layout(layout, base)
    region = jax.jit(make_loss_and_gradients(config, mesh, "reference"))
    metrics, _, gradients = region(weights_in(config, mesh), batch_in(config, mesh))
    canonical = to_canonical(config, jax.tree.map(np.asarray, gradients), parameter_dims(config.model))
    return {name: float(value) for name, value in metrics.items()}, canonical


@functools.cache
def train_step(layout: str, base: Config = BASE) -> tuple[Any, dict[str, float]]:
    """(state after one step from the weights, metrics)"""
    config, mesh = in_layout(layout, base)
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    params = weights_in(config, mesh)
    state = {"params": params, "optimizer": jax.jit(optimizer.init)(params), "sync": {}, "step": np.int32(0)}
    state = jax.device_put(state, state_shardings(config, mesh, optimizer))
    step = make_train_step(config, mesh, optimizer, "reference")
    compiled = step.lower(*abstract_arguments(config, mesh, optimizer)).compile()
    state, metrics = compiled(state, batch_in(config, mesh), place_numbers(config, mesh))
    return state, {name: float(value) for name, value in metrics.items()}


def test_the_training_loss_is_the_plain_one():
    """Sum over sum across ragged microbatches; the z term is in total_loss only."""
    likelihood, squares, count = plain_losses()
    metrics, _ = loss_and_gradients("one")
    assert metrics["targets"] == count
    assert metrics["loss"] == pytest.approx(likelihood, rel=1e-5)
    assert metrics["total_loss"] == pytest.approx(likelihood + Z_LOSS * squares, rel=1e-5)
    assert Z_LOSS * squares > 0.01


def test_the_train_step_takes_the_gradients_of_the_region():
    """Plain SGD: the new parameters are theta - alpha * gradient of the total loss, and the metrics are the region's."""
    metrics, gradients = loss_and_gradients("one")
    state, told = train_step("one")
    for name in ("loss", "total_loss", "targets"):
        assert told[name] == pytest.approx(metrics[name], rel=1e-6)
    assert told["grad_norm"] == pytest.approx(float(optax.global_norm(gradients)), rel=1e-5)
    assert set(told) == {"loss", "total_loss", "targets", "grad_norm"}
    config, mesh = in_layout("one")
    dims = parameter_dims(config.model)
    before = to_canonical(config, jax.tree.map(np.asarray, weights_in(config, mesh)), dims)
    after = to_canonical(config, jax.tree.map(np.asarray, state["params"]), dims)
    jax.tree.map(lambda b, a, g: np.testing.assert_allclose(a, b - 0.1 * g, rtol=1e-5, atol=1e-6), before, after, gradients)
    assert int(state["step"]) == 1


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b))


def test_gradients_summed_in_bfloat16_are_close_and_not_equal():
    """On data x fsdp, where both the all-reduce and the reduce-scatter move bfloat16."""
    _, exact = loss_and_gradients("one")
    metrics, rounded = loss_and_gradients("data", replace(BASE, train=replace(BASE.train, reduce_dtype="bfloat16")))
    errors = jax.tree.leaves(jax.tree.map(relative_error, rounded, exact))
    assert all(1e-4 < error < 2e-2 for error in errors), errors
    assert metrics["loss"] == pytest.approx(plain_losses()[0], rel=1e-5)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_compute(param_dtype: str):
    """Near the plain loss, and not at it; parameters and their dtype stay what they are told to be."""
    model = replace(BASE.model, dtype="bfloat16", param_dtype=param_dtype)
    state, metrics = train_step("one", replace(BASE, model=model))
    held = jax.tree.map(lambda dims: held_dtype(dims, param_dtype), parameter_dims(model), is_leaf=is_dims)
    assert jax.tree.map(lambda leaf: str(leaf.dtype), state["params"]) == held
    assert metrics["loss"] == pytest.approx(plain_losses()[0], rel=0.02)
    assert metrics["loss"] != pytest.approx(plain_losses()[0], rel=1e-6)
    exact = float(optax.global_norm(loss_and_gradients("one")[1]))
    assert metrics["grad_norm"] == pytest.approx(exact, rel=0.1)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(state["params"]))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and logits


@pytest.mark.parametrize("layout", ["one", "pipe", "chunks"])
def test_evaluation_is_the_training_loss_unscaled(layout: str):
    """Summed, without the z term, on the same parameters, whatever the layout."""
    config, mesh = in_layout(layout)
    params, batch = weights_in(config, mesh), batch_in(config, mesh)
    result = make_evaluation_step(config, mesh, "reference").lower(params, batch).compile()(params, batch)
    likelihood, _, count = plain_losses()
    assert set(result) == {"loss", "targets"}
    assert float(result["targets"]) == count
    assert float(result["loss"]) / count == pytest.approx(likelihood, rel=1e-5)
    assert float(result["loss"]) / count == pytest.approx(loss_and_gradients("one")[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("layout", ["one", "pipe", "chunks"])
def test_logits_are_those_of_the_plain_forward(layout: str):
    config, mesh = in_layout(layout)
    logits = np.asarray(make_logits(config, mesh)(weights_in(config, mesh), batch_in(config, mesh)))
    assert logits.shape == (ROWS, LENGTH, config.model.padded_vocab_size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[..., :VOCAB], plain_logits(), rtol=1e-4, atol=1e-4)
    assert (logits[..., VOCAB:] == np.float32(MASKED_LOGIT)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize(
    ("remat", "mesh", "pattern"),
    [
        ("none", MeshConfig(fsdp=8), ()),
        ("dots", MeshConfig(fsdp=8), ()),
        ("none", MeshConfig(pipe=2, fsdp=4), ()),
        ("none", MeshConfig(pipe=2, fsdp=4), ("local", "global")),
    ],
    ids=["none", "dots", "none-pipe", "none-pipe-pattern"],
)
def test_no_remat_policy_keeps_gathered_weights(remat: str, mesh: MeshConfig, pattern: tuple):
    """Many wide layers and few tokens: kept weights would outweigh all else. One layer's at a time may be whole."""
    model = replace(BASE.model, num_layers=16, embed_dim=512, head_dim=32, mlp_dim=2048, qk_norm="none")
    model = replace(model, pattern=pattern, sliding_window=5 if pattern else 0)
    config = replace(BASE, model=model, mesh=mesh, train=replace(BASE.train, remat=remat, microbatches=1))
    if mesh.pipe > 1:
        config = replace(config, train=replace(config.train, microbatches=2))
    device_mesh = make_mesh(config.mesh, jax.devices())
    dims = parameter_dims(config.model)
    shapes = jax.eval_shape(lambda: initial_params(config))
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes["layers"])) / mesh.pipe
    abstract = jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, named(device_mesh, dims)
    )
    region = jax.jit(make_loss_and_gradients(config, device_mesh, "reference"))
    memory = region.lower(abstract, abstract_batch(config, device_mesh)).compile().memory_analysis()
    assert memory.argument_size_in_bytes < 1.3 * whole / mesh.fsdp
    allowed = whole  # kept, they would be whole once for each slot
    if pattern:  # one layer more at a time, and shards and gradients lie anew by their places
        allowed += whole / (model.num_layers / mesh.pipe) + 2 * whole / mesh.fsdp
    assert memory.temp_size_in_bytes < allowed


EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, balance_loss=0.1)


@pytest.mark.parametrize(
    ("model", "mesh"),
    [({"num_layers": 4}, MeshConfig(fsdp=1)), ({"num_layers": 4, "moe": EXPERTS}, MeshConfig(fsdp=2, expert=2, tensor=2))],
    ids=["dense", "experts"],
)
def test_layers_of_one_iteration_compute_the_same(model: dict[str, Any], mesh: MeshConfig):
    """As on GPUs: there each layer is computed again behind the next one, and its gradients are summed behind it too."""
    config = replace(BASE, model=replace(BASE.model, **model), mesh=mesh, train=replace(BASE.train, microbatches=1))
    devices, numbers, barriers = make_mesh(mesh, jax.devices()[: math.prod(mesh.shape)]), [], []
    params = jax.jit(lambda: initial_params(config), out_shardings=named(devices, parameter_dims(config.model)))()
    for at_once in (1, 2):
        decoder = replace(make_decoder(config, devices, "reference"), layers_at_once=at_once)
        region = jax.jit(make_loss_and_gradients(config, devices, "reference", decoder))
        batch = batch_in(config, devices)
        barriers.append(region.lower(params, batch).as_text().count("optimization_barrier"))
        metrics, _, gradients = region(params, batch)
        numbers.append((metrics["loss"], gradients))
    assert barriers[0] < barriers[1]
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7), *numbers)


# ---------------------------------------------------------------------------------------------------------------------
# The rest


def test_segments_are_in_the_batch_only_with_document_masks():
    assert batch_names(BASE) == ("tokens", "targets", "positions", "segments")
    assert batch_names(replace(BASE, data=replace(BASE.data, mask_documents=False))) == ("tokens", "targets", "positions")
