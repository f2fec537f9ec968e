"""The state is sharded from birth and stays so, begins the same everywhere, and moves between meshes bit by bit."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.config import Config, MeshConfig, OptimizerConfig, PipelineConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.sharding import RULES, is_dims, named
from jaxtrain.train import state as state_module
from jaxtrain.train import step as step_module
from jaxtrain.train.gradients import batch_names, batch_sharding
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.schedule import seed_words
from jaxtrain.train.state import (
    Canonical,
    abstract_state,
    create_state,
    initial_params,
    initial_state,
    make_stacking,
    state_dims,
    state_shardings,
    to_canonical,
)
from jaxtrain.train.step import abstract_arguments, make_train_step, place_numbers
from tests.tiny import UNEVEN, tiny

OPTIMIZERS = ["adamw", "sgd", "adafactor", "lion", "muon"]
BASE = tiny(
    model=UNEVEN,
    data={"mask_documents": False},
    optimizer=OptimizerConfig(peak_lr=1e-2),
    train={"microbatches": 2, "remat": "full"},
)
LAYOUTS = {
    "one": (MeshConfig(fsdp=1), PipelineConfig()),
    "pipe": (MeshConfig(pipe=2, fsdp=2, tensor=2), PipelineConfig()),
    "chunks": (MeshConfig(pipe=2, data=2, fsdp=2), PipelineConfig(schedule="interleaved", chunks=2)),
    "folded": (MeshConfig(pipe=2, data=2, fsdp=2), PipelineConfig(schedule="v_shape", chunks=2)),
    "tensor": (MeshConfig(fsdp=4, tensor=2), PipelineConfig()),
}


@functools.cache
def setup(layout: str, name: str = "adamw", beta1: float = 0.9) -> tuple[Config, jax.sharding.Mesh, Any]:
    """(config, mesh, optimizer) of a layout."""
    mesh_config, pipeline = LAYOUTS[layout]
    config = replace(BASE, mesh=mesh_config, pipeline=pipeline, optimizer=replace(BASE.optimizer, name=name, beta1=beta1))
    devices = math.prod(config.mesh.shape)
    assert find_problems(config, devices)[1] == []
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    return config, mesh, make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))


@functools.cache
def born(layout: str) -> Any:
    """`create_state` of a layout, with AdamW."""
    return create_state(*setup(layout))


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def batch_of(config: Config, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Random tokens; positions count up."""
    shape = (config.train.global_batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    arrays = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions}
    return jax.device_put({name: arrays[name] for name in batch_names(config)}, batch_sharding(mesh))


# ---------------------------------------------------------------------------------------------------------------------
# Sharding


def assert_shardings(state: Any, config: Config, mesh: jax.sharding.Mesh) -> None:
    """Moments lie like their parameters, nothing that a parameter shards is whole anywhere, and what is said is what is."""
    dims = parameter_dims(config.model)
    wanted = jax.tree_util.tree_flatten_with_path(named(mesh, dims))[0]
    shardings = {jax.tree_util.keystr(path): sharding for path, sharding in wanted}
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(state["params"])[0]}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state["params"])[0]:
        assert leaf.sharding.is_equivalent_to(shardings[jax.tree_util.keystr(path)], leaf.ndim), path
    moments = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state["optimizer"])[0]:
        own = jax.tree_util.keystr(path)
        name = next((name for name in shardings if own.endswith(name)), None)
        if name and leaf.shape == shapes[name]:
            moments += 1
            assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), own
        elif name and "'layers'" in name:  # Adafactor's rows and columns: at least over the stages
            assert leaf.sharding.spec[:2] == (None, "pipe"), own
        else:
            assert leaf.size <= 200 or not name, f"{own} {leaf.shape} is on every device"
    assert state["step"].sharding.is_fully_replicated
    expected = {"adamw": 2, "lion": 1, "sgd": 1, "muon": None, "adafactor": None}[config.optimizer.name]
    if expected:
        assert moments == expected * len(shapes)


@pytest.fixture
def quick_start(monkeypatch):
    """Parameters that begin as tenths: drawing random numbers takes seconds to compile, and where leaves lie is the same."""

    def tenths(config: Config, seed: Any = None) -> Any:
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), shapes_of(config))

    monkeypatch.setattr(state_module, "initial_params", tenths)


@functools.cache
def shapes_of(config: Config, initial_params: Any = state_module.initial_params) -> Any:
    return jax.eval_shape(lambda: initial_params(config))


@pytest.mark.parametrize("layout", ["pipe", "chunks"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_state_is_born_and_stays_like_the_parameters(name: str, layout: str, quick_start, monkeypatch):
    """Through two steps of the optimizer on gradients that stand in for the model's."""

    def stand_in(*_: Any) -> Any:
        return lambda params, batch: ({}, {}, jax.tree.map(lambda p: 0.5 * p, params))

    monkeypatch.setattr(step_module, "make_loss_and_gradients", stand_in)
    config, mesh, optimizer = setup(layout, name)
    state, batch = create_state(config, mesh, optimizer), batch_of(config, mesh)
    assert_shardings(state, config, mesh)
    numbers = place_numbers(config, mesh)
    step = make_train_step(config, mesh, optimizer, "reference").lower(state, batch, numbers).compile()
    for _ in range(2):
        state, _ = step(state, batch, numbers)
        assert_shardings(state, config, mesh)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_leaf_is_where_it_was_promised(name: str, quick_start):
    config, mesh, optimizer = setup("tensor", name)
    same = jax.tree.map(
        lambda leaf, promise: (
            leaf.shape == promise.shape
            and leaf.dtype == promise.dtype
            and leaf.sharding.is_equivalent_to(promise.sharding, leaf.ndim)
        ),
        create_state(config, mesh, optimizer),
        abstract_state(config, mesh, optimizer),
    )
    assert all(jax.tree.leaves(same))


def test_a_sweep_over_rates_lengths_and_seeds_compiles_once():
    """The lowered program does not depend on them; on a beta it does."""

    def lowered(seed: int, steps: int, **changes: Any) -> tuple[str, str]:
        config, mesh, _ = setup("one")
        config = replace(
            config, train=replace(config.train, seed=seed, steps=steps), optimizer=replace(config.optimizer, **changes)
        )
        optimizer = make_optimizer(config.optimizer, steps, parameter_dims(config.model))
        step = make_train_step(config, mesh, optimizer, "reference").lower(*abstract_arguments(config, mesh, optimizer))
        born = jax.jit(functools.partial(initial_state, config, optimizer)).lower(seed_words(seed))
        return step.as_text(), born.as_text()

    first = lowered(0, 10)
    assert lowered(2**40 + 3, 2000, peak_lr=0.5, warmup_steps=3, final_lr_fraction=0.0, weight_decay=0.3) == first
    assert lowered(0, 10, beta1=0.8)[0] != first[0]


def test_the_numbers_of_a_step_are_its_inputs():
    """One program, two rates: what it does with each is what the rate says."""
    config, mesh, optimizer = setup("one", "sgd", 0.0)
    batch = batch_of(config, mesh)
    step = make_train_step(config, mesh, optimizer, "reference")
    moves = {}
    for rate in (1e-2, 3e-2):
        changed = replace(config, optimizer=replace(config.optimizer, peak_lr=rate, weight_decay=0.0))
        state = create_state(config, mesh, optimizer)
        before = on_host(state["params"])
        after = step(state, batch, place_numbers(changed, mesh))[0]["params"]
        moves[rate] = jax.tree.map(lambda a, b: np.asarray(a) - b, after, before)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-2, atol=1e-6), moves[1e-2], moves[3e-2])
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moves[1e-2])) > 1e-4


@pytest.mark.parametrize("seed", [5, 2**32 + 5, 2**62 + 5])
def test_every_bit_of_a_seed_counts(seed: int):
    """Seeds below 2^32 are those of `jax.random.key`; no two seeds begin alike."""

    def start(seed: int) -> np.ndarray:
        config = replace(BASE, mesh=MeshConfig(fsdp=1), train=replace(BASE.train, seed=seed))
        return np.asarray(initial_params(config)["outer"]["table"])

    assert all(not np.array_equal(start(seed), start(seed ^ 1 << bit)) for bit in (0, 31, 32, 61))
    if seed < 2**32:
        assert np.array_equal(seed_words(seed), jax.random.key_data(jax.random.key(seed)))


def test_a_real_step_leaves_the_shardings_as_they_were():
    """Over pipe, fsdp and tensor at once; the new state can go straight into the next step."""
    config, mesh, optimizer = setup("pipe")
    state, batch = jax.tree.map(jnp.copy, born("pipe")), batch_of(config, mesh)
    numbers = place_numbers(config, mesh)
    step = make_train_step(config, mesh, optimizer, "reference").lower(state, batch, numbers).compile()
    before = on_host(state["params"])
    for expected_step in (1, 2):
        state, metrics = step(state, batch, numbers)
        assert_shardings(state, config, mesh)
        assert int(state["step"]) == expected_step
        assert np.isfinite(metrics["loss"])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, on_host(state["params"]))
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("layout", ["pipe", "chunks"])
def test_no_device_holds_more_than_its_share(layout: str):
    """The parameters and both moments on one device are the whole over how often each leaf is cut."""
    config, mesh, optimizer = setup(layout)
    state, dims = born(layout), state_dims(config, optimizer)

    def share(dims: tuple[str, ...], leaf: jax.Array) -> int:
        axes = [axis for name in dims for axis in np.atleast_1d(RULES[name] or [])]
        return leaf.nbytes // math.prod(mesh.shape[axis] for axis in axes)

    expected = sum(jax.tree.leaves(jax.tree.map(share, dims, state, is_leaf=is_dims)))
    for device in mesh.devices.flat:
        held = sum(s.data.nbytes for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == device)
        assert held == expected
    assert expected < 0.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_matrices_are_cut_over_every_axis_that_their_dims_name():
    config, mesh, _ = setup("pipe")
    leaf = born("pipe")["params"]["layers"]["mlp"]["gate"]
    assert leaf.shape == (1, 2, 3, 16, 24)
    assert {shard.data.shape for shard in leaf.addressable_shards} == {(1, 1, 3, 8, 12)}
    table = born("pipe")["params"]["outer"]["table"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(64, 8)}
    assert config.model.padded_vocab_size == table.shape[0] == 128


# ---------------------------------------------------------------------------------------------------------------------
# The beginning


@pytest.mark.parametrize("layout", ["pipe", "chunks"])
def test_the_beginning_is_the_same_on_every_mesh(layout: str):
    def canonical(name: str) -> Any:
        config = setup(name)[0]
        return to_canonical(config, on_host(born(name)["params"]), parameter_dims(config.model))

    same = jax.tree.map(np.array_equal, canonical("one"), canonical(layout))
    assert all(jax.tree.leaves(same))


def test_empty_slots_and_padding_begin_as_zero():
    config, _, _ = setup("chunks")
    params, held = on_host(born("chunks")["params"]), make_stacking(config).layer_numbers() >= 0
    assert not held.all()
    for leaf in jax.tree.leaves(params["layers"]):
        assert not leaf[~held].any()
        assert leaf[held].any()
    assert not params["outer"]["table"][100:].any()
    assert not params["outer"]["head"][:, 100:].any()
    assert params["outer"]["table"][:100].all()


def test_the_seed_decides_and_layers_differ():
    config, _, _ = setup("one")
    ours = np.asarray(born("one")["params"]["layers"]["mlp"]["gate"])[0, 0]
    other = jax.jit(lambda: state_module.initial_params(replace(config, train=replace(config.train, seed=1)))["outer"]["head"])
    assert not np.array_equal(other(), born("one")["params"]["outer"]["head"])
    assert len({layer.tobytes() for layer in ours}) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Canonical form


def distinct(config: Config, mesh: jax.sharding.Mesh, optimizer: Any) -> Any:
    """A state with other values in every leaf, as after some steps."""
    rng = np.random.default_rng(0)

    def leaf(like: jax.ShapeDtypeStruct) -> jax.Array:
        value = rng.normal(size=like.shape) if jnp.issubdtype(like.dtype, jnp.floating) else np.full(like.shape, 7)
        return jax.device_put(value.astype(like.dtype), like.sharding)

    return jax.tree.map(leaf, abstract_state(config, mesh, optimizer))


@pytest.mark.parametrize(("name", "there"), [("sgd", "pipe"), ("adafactor", "chunks")])
def test_a_state_moves_between_meshes_bit_by_bit(name: str, there: str):
    """From one device to an uneven cut over eight, and back: canonical forms are equal, and so is the first state."""
    here, away = Canonical(*setup("one", name)), Canonical(*setup(there, name))
    state = distinct(*setup("one", name))
    first = on_host(here.from_state(state))
    told = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), here.abstract)
    assert told == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), away.abstract)
    moved = away.to_state(jax.tree.map(lambda value, to: jax.device_put(value, to.sharding), first, away.abstract))
    wanted = state_shardings(*setup(there, name))
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, to: leaf.sharding.is_equivalent_to(to, leaf.ndim), moved, wanted)))
    canonical = away.from_state(moved)
    lies = jax.tree.map(lambda leaf, to: leaf.sharding.is_equivalent_to(to.sharding, leaf.ndim), canonical, away.abstract)
    assert all(jax.tree.leaves(lies))
    second = on_host(canonical)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))
    back = here.to_state(jax.tree.map(lambda value, to: jax.device_put(value, to.sharding), second, here.abstract))
    dims = state_dims(*[setup("one", name)[i] for i in (0, 2)])
    unpadded = to_canonical(setup("one", name)[0], on_host(state), dims)
    again = to_canonical(setup("one", name)[0], on_host(back), dims)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, unpadded, again)))


def test_canonical_layers_and_vocabulary():
    config, mesh, optimizer = setup("chunks")
    canonical = Canonical(config, mesh, optimizer).abstract["params"]
    assert canonical["layers"]["mlp"]["gate"].shape == (5, 16, 24)
    assert canonical["outer"]["table"].shape == (100, 16)
    assert canonical["outer"]["head"].shape == (16, 100)


def test_to_state_frees_the_canonical_form():
    conversions = Canonical(*setup("one", "sgd", 0.0))
    canonical = conversions.from_state(distinct(*setup("one", "sgd", 0.0)))
    conversions.to_state(canonical)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(canonical))


def test_plain_sgd_has_no_moments():
    config, _, optimizer = setup("one", "sgd", 0.0)
    state = jax.eval_shape(lambda: initial_state(config, optimizer))
    assert all(leaf.ndim == 0 for leaf in jax.tree.leaves(state["optimizer"]))
    assert isinstance(state["optimizer"]["sgd"], optax.EmptyState)


def test_on_cpus_one_leaf_is_converted_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Two programs that move layers between stages make XLA:CPU hang: 400 saves of two chunks on two stages never ended."""
    config, mesh, optimizer = setup("folded")
    events: list[str] = []

    def converts(value: Any) -> Any:
        events.append("begun")
        return value

    canonical = Canonical(config, mesh, optimizer)
    monkeypatch.setattr(canonical, "_to", jax.tree.map(lambda _: converts, canonical.abstract))
    monkeypatch.setattr(jax, "block_until_ready", lambda value: events.append("ended") or value)
    canonical.from_state(canonical.abstract)
    assert events == ["ended", *["begun", "ended"] * len(jax.tree.leaves(canonical.abstract))]
