"""Stochastic rounding: small updates add up as in float32, and no mesh changes a bit of it."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxtrain.config import (
    LatentAttentionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    SyncConfig,
)
from jaxtrain.config.rules import find_problems
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.models.parameters import held_dtype
from jaxtrain.parallel.stacking import Stacking
from jaxtrain.sharding import is_dims, spec
from jaxtrain.train.gradients import batch_sharding
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.rounding import apply_updates, random_bits, round_stochastically
from jaxtrain.train.schedule import seed_words
from jaxtrain.train.state import Canonical, create_state, initial_params
from jaxtrain.train.step import make_train_step, place_numbers
from tests.tiny import tiny

SEED = jnp.asarray(seed_words(2**40 + 1))
UNIT = 2.0**-8  # bfloat16's step below 1
CONFIG = tiny(
    model={"num_layers": 3, "vocab_size": 120, "qk_norm": "head", "param_dtype": "bfloat16"},
    data={"mask_documents": False},
    mesh=MeshConfig(),
    optimizer=OptimizerConfig(peak_lr=1e-3, schedule="constant"),
    train={"steps": 20, "global_batch_size": 4},
)


def test_updates_that_bfloat16_would_lose_add_up():
    """200 updates of 1e-4 from 1, where half a unit is 2e-3: the mean is float32's to its standard error, none is without."""
    count, steps, size = 4096, 200, 1e-4
    dims, none = {"w": ("embed", "mlp")}, np.zeros(0, np.int32)

    def step(number: jax.Array, params: Any) -> Any:
        return apply_updates(params, {"w": jnp.full((64, 64), -size)}, dims, none, SEED, number)

    start = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    end = np.asarray(jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, p))(start)["w"], np.float64)
    deviation = np.sqrt(steps * size * UNIT)
    assert abs(end.mean() - (1 - steps * size)) < 5 * deviation / np.sqrt(count)
    assert 0.7 < end.std() / deviation < 1.3
    assert np.all(np.float32(jnp.bfloat16(1 - size)) == 1)


def test_a_number_is_rounded_to_a_neighbour_as_often_as_it_is_near():
    bits = random_bits(jax.random.key(3), (4, 2**16), ("embed", "mlp"), np.zeros(0, np.int32))
    for share in (0.0, 0.1, 0.5, 0.9):
        x = jnp.full(bits.shape, -(1 + share * 2 * UNIT), jnp.float32)
        found = -np.asarray(round_stochastically(x, bits), np.float64)
        assert set(np.unique(found)) <= {1.0, 1 + 2 * UNIT}
        assert abs((found > 1).mean() - share) < 5 * np.sqrt(0.25 / bits.size)
    kept = jnp.asarray([0.0, -0.0, 1.5, jnp.inf, -jnp.inf, jnp.nan, 2.0**-133], jnp.float32)
    for words in (0, 2**32 - 1):
        found = round_stochastically(kept, jnp.full(kept.shape, words, jnp.uint32))
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(kept))


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (2, 2), (4, 1), (5, 1)])
def test_the_stacking_changes_no_bit(stages: int, chunks: int):
    """Layers rounded in any stack are those of one stage, and steps, leaves, layers and seeds have bits of their own."""
    random, one, other = np.random.default_rng(0), Stacking(5, 1, 1), Stacking(5, stages, chunks)
    dims = {name: ("chunk", "stage", "layer", "embed", "mlp") for name in ("up", "down")}
    weights = {name: random.normal(size=(5, 6, 4)).astype(np.float32) for name in dims}
    updates = {name: np.full((5, 6, 4), 1e-3, np.float32) for name in dims}

    def moved(stacking: Stacking, seed: Any = SEED, step: int = 7) -> dict[str, np.ndarray]:
        stacked = {name: stacking.stack(jnp.asarray(w, jnp.bfloat16)) for name, w in weights.items()}
        due = {name: stacking.stack(jnp.asarray(u)) for name, u in updates.items()}
        found = apply_updates(stacked, due, dims, stacking.layer_numbers(), seed, jnp.int32(step))
        assert all(not np.asarray(leaf, np.float32)[stacking.layer_numbers() < 0].any() for leaf in found.values())
        return {name: np.asarray(stacking.unstack(leaf), np.float32) for name, leaf in found.items()}

    expected = moved(one)
    jax.tree.map(np.testing.assert_array_equal, moved(other), expected)
    for changed in (moved(one, step=8), moved(one, jnp.asarray(seed_words(2**40 + 2)))):
        assert (changed["up"] != expected["up"]).mean() > 0.1
    bits = np.asarray(random_bits(jax.random.key(0), (1, 1, 5, 64), (*dims["up"][:3], "embed"), one.layer_numbers()))
    assert len(np.unique(bits)) == bits.size


def test_rounding_moves_nothing_between_devices():
    mesh = make_mesh(MeshConfig(pipe=2, fsdp=2, tensor=2), jax.devices()[:8])
    dims = {"up": ("chunk", "stage", "layer", "embed", "mlp"), "table": ("vocab", "embed")}
    params = {"up": jnp.zeros((1, 2, 3, 16, 32), jnp.bfloat16), "table": jnp.zeros((128, 16), jnp.bfloat16)}
    updates = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    places = jax.tree.map(lambda d: NamedSharding(mesh, spec(d)), dims, is_leaf=is_dims)
    numbers = Stacking(5, 2, 1).layer_numbers()
    step = jax.jit(
        lambda p, u: apply_updates(p, u, dims, numbers, SEED, jnp.int32(1)), in_shardings=(places, places), out_shardings=places
    )
    text = step.lower(params, updates).compile().as_text()
    assert not re.search(r"\b(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(-start)?\(", text)
    assert "bf16[128,16]" not in text  # nor is a leaf whole anywhere


@pytest.mark.parametrize(
    "model",
    [
        CONFIG.model,
        replace(CONFIG.model, moe=MoEConfig(num_experts=4, mlp_dim=16, bias_update_rate=0.01, first_dense_layers=1)),
        replace(
            CONFIG.model,
            qk_norm="none",
            latent_attention=LatentAttentionConfig(query_rank=8, kv_rank=8, rope_dim=4, value_dim=8),
        ),
    ],
    ids=["dense", "experts", "latent"],
)
def test_norms_routers_and_biases_are_float32(model: ModelConfig):
    shapes = jax.eval_shape(lambda: initial_params(replace(CONFIG, model=model, mesh=MeshConfig(fsdp=1))))
    found = {jax.tree_util.keystr(path): str(leaf.dtype) for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]}
    small = {name for name in found if re.search(r"norm|router|bias", name)}
    assert {name for name, dtype in found.items() if dtype == "float32"} == small
    dims = parameter_dims(model)
    assert jax.tree.map(lambda leaf: str(leaf.dtype), shapes) == jax.tree.map(
        lambda d: held_dtype(d, "bfloat16"), dims, is_leaf=is_dims
    )


def test_a_run_in_bfloat16_moves_everything_and_goes_on_from_its_canonical_form_bit_for_bit():
    config = replace(CONFIG, mesh=MeshConfig(fsdp=1))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    ids = np.random.default_rng(0).integers(0, 120, (4, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8))
    batch = jax.device_put({"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": positions}, batch_sharding(mesh))
    step, numbers = make_train_step(config, mesh, optimizer, "reference"), place_numbers(config, mesh)
    canonical = Canonical(config, mesh, optimizer)
    state = create_state(config, mesh, optimizer)
    before = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), state["params"])
    for _ in range(2):
        state = step(state, batch, numbers)[0]
    kept = canonical.from_state(state)
    for _ in range(2):
        state = step(state, batch, numbers)[0]
    again = canonical.to_state(kept)
    for _ in range(2):
        again = step(again, batch, numbers)[0]
    jax.tree.map(np.testing.assert_array_equal, again, state)
    after = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), state["params"])
    moved = jax.tree.map(lambda a, b: (a != b).mean(), after, before)
    assert moved["layers"]["attention"]["norm"] == moved["outer"]["norm"] == 1
    assert moved["layers"]["mlp"]["up"] > 0.9


def test_replicas_with_parameters_of_their_own_are_refused_bfloat16():
    config = replace(CONFIG, mesh=MeshConfig(replica=2, fsdp=1), sync=SyncConfig(mode="diloco"))
    assert any("param_dtype=bfloat16" in problem for problem in find_problems(config, 2)[1])
    assert find_problems(replace(config, sync=SyncConfig()), 2)[1] == []
