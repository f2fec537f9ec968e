"""The moving average of the weights: its closed form, what is in it, and what it goes through."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import GuardConfig, MeshConfig
from jaxtrain.planner.state_memory import average_state, cut_model
from jaxtrain.sharding import named
from jaxtrain.train.prepared import Prepared
from jaxtrain.train.state import Canonical, state_dims
from jaxtrain.train.step import TrainSteps
from tests.tiny import MODEL, tiny
from tests.train.poison import NAN, poisonable

DECAY, BAD = 0.75, 2
CONFIG = tiny(
    model=replace(MODEL, num_layers=3, vocab_size=257),
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    train={"ema_decay": DECAY, "frozen": ("layers/mlp/*",), "steps": 5, "remat": "none"},
    optimizer={"peak_lr": 1e-2},
    guard=GuardConfig(non_finite="skip"),
)


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def same(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


@pytest.fixture(scope="module")
def trained():
    """(the run made ready, its states on the host at steps 0 to 5, the last state); the update of step 3 is skipped."""
    with pytest.MonkeyPatch.context() as patch:
        poisonable(patch)
        prepared = Prepared(CONFIG)
        steps = TrainSteps(prepared, 0, 5)
    random, state = np.random.default_rng(0), prepared.create_state()
    states = [on_host(state)]
    for step in range(5):
        tokens = random.integers(0, 200, (8, 8)).astype(np.int32)
        tokens[0, 0] = NAN if step == BAD else tokens[0, 0]
        positions, segments = np.broadcast_to(np.arange(8, dtype=np.int32), (8, 8)), np.ones((8, 8), np.int32)
        batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions, "segments": segments}
        state, metrics = steps(state, prepared.place(batch))
        states.append(on_host(jax.block_until_ready(state)))
    assert int(metrics["skipped_steps"]) == 1
    return prepared, states, state


def test_it_is_the_sum_over_the_trajectory(trained):
    """e_n = d^n theta_0 + (1 - d) sum_k d^(n - k) theta_k over the steps that were taken; frozen weights are not in it."""
    _, states, _ = trained
    taken = [state["params"] for number, state in enumerate(states) if number != BAD + 1]
    weights = [DECAY ** (len(taken) - 1), *((1 - DECAY) * DECAY**k for k in reversed(range(len(taken) - 1)))]
    expected = jax.tree.map(lambda *each: sum(w * leaf for w, leaf in zip(weights, each, strict=True)), *taken)
    average = states[-1]["ema"]
    assert average["layers"]["mlp"] == dict.fromkeys(average["layers"]["mlp"])
    jax.tree.map(
        lambda leaf, value: None if leaf is None else np.testing.assert_allclose(leaf, value, rtol=2e-6, atol=1e-8),
        average, expected, is_leaf=lambda leaf: leaf is None,
    )  # fmt: skip
    before, after = states[BAD]["ema"], states[BAD + 1]["ema"]
    assert same(before, after)  # a skipped step leaves it
    table = states[-1]["params"]["outer"]
    assert any(np.abs(average["outer"][name] - table[name]).max() > 1e-4 for name in table)


def test_it_is_sharded_like_the_weights_and_counted(trained):
    prepared, _, state = trained
    shardings = named(prepared.mesh, state_dims(CONFIG, prepared.optimizer))
    for leaf, sharding in zip(jax.tree.leaves(state["ema"]), jax.tree.leaves(shardings["ema"]), strict=True):
        assert leaf.dtype == np.float32
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state["ema"]))
    assert average_state(CONFIG, cut_model(CONFIG)) == held
    assert average_state(replace(CONFIG, train=replace(CONFIG.train, ema_decay=0.0)), cut_model(CONFIG)) == 0


def test_on_another_mesh_it_has_the_same_bits_and_a_run_may_begin_one(trained):
    prepared, _, state = trained
    canonical = prepared.canonical().from_state(state)
    held = on_host(canonical)
    piped = replace(CONFIG, mesh=MeshConfig(pipe=2, data=2, fsdp=2), train=replace(CONFIG.train, microbatches=2))
    other = Prepared(piped)
    conversion = Canonical(piped, other.mesh, other.optimizer)
    moved = jax.tree.map(lambda leaf, like: jax.device_put(np.asarray(leaf), like.sharding), canonical, conversion.abstract)
    back = on_host(conversion.from_state(conversion.to_state(moved)))
    assert same(back, held)
    without = {name: jax.tree.map(np.copy, tree) for name, tree in held.items() if name != "ema"}
    placed = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding), without, {n: conversion.abstract[n] for n in without}
    )
    begun = conversion.to_state(placed)
    assert same(on_host(begun["ema"]["outer"]), on_host(begun["params"]["outer"]))
