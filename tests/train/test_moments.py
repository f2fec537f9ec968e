"""Moments in 8 bits: their error, that rounding loses nothing in the mean, their blocks, and the same bits on every mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.config import MeshConfig, OptimizerConfig, PipelineConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.errors import ConfigError
from jaxtrain.mesh import make_mesh
from jaxtrain.train.moments import HeldMoments, block_of, cut_block, decode, encode, in_8_bits
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.state import Canonical, create_state, state_dims
from tests.tiny import UNEVEN, tiny

EMBED_MLP = ("embed", "mlp")
MESHES = {
    "one": (MeshConfig(fsdp=1), PipelineConfig()),
    "stages": (MeshConfig(pipe=2, fsdp=2, tensor=2), PipelineConfig()),
}


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers over eight powers of ten."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape) * 10.0 ** rng.uniform(-8, 0, shape)).astype(np.float32)


@pytest.mark.parametrize("is_second", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_moment_is_within_a_step_of_its_code(axis: int, is_second: bool):
    m = numbers((128, 192))
    m = m * m if is_second else m
    bits = jax.random.bits(jax.random.key(0), m.shape, jnp.uint32)
    codes, scales = encode(jnp.asarray(m), bits, axis, 64, is_second)
    assert codes.dtype == (jnp.uint8 if is_second else jnp.int8)
    assert scales.shape == ((2, 192) if axis == 0 else (128, 3))
    largest = np.repeat(np.abs(m).reshape(2, 64, 192).max(1) if axis == 0 else np.abs(m).reshape(128, 3, 64).max(2), 64, axis)
    power, most = (4, 255) if is_second else (2, 127)
    y = most * (np.abs(m) / largest).astype(np.float64) ** (1 / power)
    low, high = (largest * (np.maximum(np.floor(y) + d, 0) / most) ** power for d in (-1e-3, 1 + 1e-3))
    found = np.asarray(decode(codes, scales, axis, 64), np.float64)
    assert (np.sign(found) * np.sign(m) >= 0).all()
    smallest = largest * (1 / most) ** power if is_second else 0
    assert (np.abs(found) >= low * (1 - 1e-5)).all()
    assert (np.abs(found) <= np.maximum(high, smallest) * (1 + 1e-5)).all()
    assert not is_second or (found > 0).all()


def test_small_changes_count_in_the_mean():
    """beta2 = 0.999: rounded to nearest, v would stay where it is for ever."""
    v = jnp.full((64, 64), 0.5).at[0].set(1.0)
    target, key = 0.25, jax.random.key(1)

    def step(held: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple:
        v = 0.999 * decode(*held, 0, 64) + 0.001 * jnp.where(jnp.arange(64)[:, None] == 0, 1.0, target)
        return encode(v, jax.random.bits(key, v.shape, jnp.uint32), 0, 64, True), None

    held, _ = jax.lax.scan(step, encode(v, jnp.zeros(v.shape, jnp.uint32), 0, 64, True), jax.random.split(key, 700))
    exact = target + (0.5 - target) * 0.999**700
    assert float(decode(*held, 0, 64)[1:].mean()) == pytest.approx(exact, rel=0.01)


def test_zeros_stay_zero_and_what_is_not_finite_shows():
    zeros, bits = jnp.zeros((8, 64)), jnp.full((8, 64), 2**32 - 1, jnp.uint32)
    for is_second in (False, True):
        assert not np.asarray(decode(*encode(zeros, bits, 1, 64, is_second), 1, 64)).any()
        bad = decode(*encode(zeros.at[0, 0].set(jnp.nan), bits, 1, 64, is_second), 1, 64)
        assert np.isnan(np.asarray(bad)).any()


def test_blocks_lie_along_the_last_dim_that_is_no_vocabulary():
    assert block_of(("embed", "mlp"), (4096, 14336)) == (1, 64)
    assert block_of(("embed", "vocab"), (4096, 128256)) == (0, 64)
    assert block_of(("chunk", "stage", "layer", "heads", "head_dim", "embed"), (1, 1, 2, 4, 8, 48)) == (5, 16)
    assert block_of(("embed", "mlp"), (64, 100))[1] == 0
    assert block_of(("norm",), (4096,))[1] == block_of(("heads", "bias"), (32, 128))[1] == 0
    assert cut_block(EMBED_MLP, (64, 512), MeshConfig(tensor=8, fsdp=64)) == ""
    assert "mesh.tensor=16" in cut_block(EMBED_MLP, (64, 512), MeshConfig(tensor=16))
    assert "use a divisor of 8" in cut_block(EMBED_MLP, (64, 512), MeshConfig(tensor=16))


def setup(layout: str, name: str = "adamw") -> tuple:
    mesh_config, pipeline = MESHES[layout]
    rule = OptimizerConfig(name=name, moments_dtype="int8")  # type: ignore[arg-type]
    config = replace(
        tiny(model=UNEVEN | {"embed_dim": 128, "mlp_dim": 128}, optimizer=rule), mesh=mesh_config, pipeline=pipeline
    )
    return config, make_mesh(config.mesh, jax.devices()[: np.prod(config.mesh.shape)]), optimizer_of(config)


def test_a_checkpoint_moves_to_another_mesh_bit_for_bit():
    """The moments of a step of random gradients go from one device to two stages of four, and back."""
    name = "muon"  # which keeps AdamW's for table and head
    config, mesh, optimizer = setup("one", name)
    state = create_state(config, mesh, optimizer)
    gradients = jax.tree.map(lambda p: jnp.asarray(numbers(p.shape)), state["params"])
    state["optimizer"] = jax.jit(optimizer.update)(gradients, state["optimizer"], state["params"])[1]
    held = state["optimizer"][name]
    assert isinstance(held, HeldMoments)
    codes = [leaf for leaf in jax.tree.leaves(held.codes) if leaf.dtype in (jnp.int8, jnp.uint8)]
    assert len(codes) >= 7
    assert all(np.asarray(code).any() for code in codes)
    first = jax.tree.map(np.asarray, Canonical(config, mesh, optimizer).from_state(state))
    moved = first
    for layout in ("stages", "one"):
        there = setup(layout, name)
        canonical = Canonical(*there)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), moved, canonical.abstract)
        moved = jax.tree.map(np.asarray, canonical.from_state(canonical.to_state(placed)))
    jax.tree.map(np.testing.assert_array_equal, first, moved)


def test_each_device_updates_its_own_blocks():
    """The update of a mesh is that of one device, and a mesh that cuts blocks is refused."""
    updates = []
    for layout in ("one", "stages"):
        config, mesh, optimizer = setup(layout)
        state = create_state(config, mesh, optimizer)
        step = jax.jit(lambda s, g, optimizer=optimizer: optimizer.update(g, s["optimizer"], s["params"]))
        for seed in range(2):
            gradients = jax.tree.map(lambda p, seed=seed: jnp.sin((1e3 + seed) * p), state["params"])
            change, held = step(state, gradients)
            state |= {"optimizer": jax.device_put(held, jax.tree.map(lambda x: x.sharding, state["optimizer"]))}
            state["params"] = optax.apply_updates(state["params"], change)
        updates.append(jax.tree.map(np.asarray, state["params"]["outer"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *updates)
    config, _, optimizer = setup("one")
    with pytest.raises(ConfigError, match="cuts through the blocks of 64"):
        state_dims(replace(config, mesh=MeshConfig(fsdp=4)), optimizer)


def test_layers_one_after_the_other_update_as_all_at_once():
    """Two chunks of three layers with five numbers: the same updates, codes and scales, but for sums in another order."""
    stacked = ("chunk", "stage", "layer")
    dims = {"table": ("vocab", "embed"), "up": (*stacked, "embed", "mlp"), "norm": (*stacked, "embed")}
    shapes = {"table": (16, 64), "up": (2, 1, 3, 64, 128), "norm": (2, 1, 3, 64)}
    params = {name: jnp.asarray(numbers(shape)) for name, shape in shapes.items()}
    layers = np.asarray([[[0, 1, 2]], [[3, 4, -1]]], np.int32)
    results = []
    for by_layer in (False, True):
        rule = in_8_bits(optax.scale_by_adam(), dims, layers, by_layer)
        state = rule.init(params)
        for seed in (1.0, 2.0):
            updates, state = rule.update(jax.tree.map(lambda p, seed=seed: jnp.sin(seed * 1e3 * p), params), state)
        results.append((updates, state))
    (updates, state), (others, held) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.scales, held.scales)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-6), updates, others)  # a code apart
    assert int(held.codes.count) == int(held.step) == 2
    for name in ("mu", "nu"):
        same = np.asarray(getattr(state.codes, name)["up"]) == np.asarray(getattr(held.codes, name)["up"])
        assert same.mean() > 0.999  # with another layer's bits one code in three would differ


def test_adafactor_is_refused():
    config = replace(tiny(), optimizer=OptimizerConfig(name="adafactor", moments_dtype="int8"))
    assert any("adafactor holds no moments" in problem for problem in find_problems(config, 1)[1])
