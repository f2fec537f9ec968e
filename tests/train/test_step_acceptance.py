"""The verdict on a step, by itself and inside the compiled step: held to numpy, and to steps that never saw the bad batch."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    GuardConfig,
    MeshConfig,
    OptimizerConfig,
    ShardingConfig,
    SyncConfig,
)
from jaxtrain.config.rules import find_problems
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.train.gradients import batch_names, batch_sharding
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import abstract_state, create_state, state_dims
from jaxtrain.train.step import compile_train_step, place_numbers, read_metrics
from jaxtrain.train.step_acceptance import (
    GOOD,
    LOSS_SPIKE,
    NORM_SPIKE,
    NOT_FINITE,
    classify,
    deviations,
    initial_record,
    record_from_plain,
    record_to_plain,
)
from tests.tiny import tiny
from tests.train.poison import NAN, poisonable

WINDOW = 16
GUARD = GuardConfig(non_finite="skip", spike="skip", spike_window=WINDOW, spike_deviations=5.0)
BASE = tiny(
    model={"num_layers": 3, "vocab_size": 259},
    optimizer=OptimizerConfig(peak_lr=1e-2),
    train={"steps": 20, "microbatches": 2, "loss_chunk": 4},
    guard=GuardConfig(non_finite="skip"),
)
LAYOUTS = {
    "one": BASE,
    "pipe": replace(BASE, mesh=MeshConfig(pipe=2, fsdp=2, tensor=2)),
    "replicas": replace(
        BASE,
        mesh=MeshConfig(replica=2, fsdp=2),
        sharding=ShardingConfig(zero=1),
        sync=SyncConfig(compression="int8", compression_block=32, error_feedback=True),
    ),
}
QUICK = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}


# ---------------------------------------------------------------------------------------------------------------------
# The rule


def robust(values: list[float], x: float) -> float:
    """The rule in numpy, in float64."""
    if 2 * len(values) < WINDOW:
        return 0.0
    middle = np.median(values)
    return (x - middle) / max(1.4826 * np.median(np.abs(np.array(values) - middle)), 1e-3 * abs(middle))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 45])
def test_deviations_are_those_of_numpy(count: int):
    values = np.random.default_rng(count).normal(3, 0.2, count).astype(np.float32)
    window = np.full(WINDOW, 1e9, np.float32)  # rubbish where nothing is filled in yet
    for i, value in enumerate(values):
        window[i % WINDOW] = value
    for x in (2.0, 3.0, 9.0):
        found = jax.jit(deviations)(window, np.int32(count), np.float32(x))
        assert found == pytest.approx(robust(values[-WINDOW:].tolist(), x), rel=1e-4, abs=1e-4)


def test_equal_numbers_leave_room_for_rounding():
    window = jnp.full(WINDOW, 2.0)
    assert deviations(window, jnp.int32(WINDOW), jnp.float32(2.002)) == pytest.approx(1, rel=1e-3)


def test_only_good_steps_enter_the_window_and_only_upward_spikes_are_bad():
    step = jax.jit(functools.partial(classify, GUARD))
    record, good = initial_record(GUARD), []
    random = np.random.default_rng(0)
    odd = {4: (50.0, 1.0), 20: (50.0, 1.0), 21: (2.0, 90.0), 22: (math.nan, 1.0), 23: (2.0, math.inf), 24: (0.01, 1.0)}
    verdicts = {}
    for n in range(40):
        loss, norm = odd.get(n, (random.normal(2, 0.1), random.normal(1, 0.05)))
        verdict, record, metrics = step(record, jnp.float32(loss), jnp.float32(norm))
        far = robust([x for x, _ in good][-WINDOW:], loss)
        assert math.isnan(loss) or metrics["loss_deviations"] == pytest.approx(far, rel=1e-3, abs=1e-3)
        verdicts[n] = int(verdict)
        if verdict == GOOD:
            good.append((np.float32(loss), np.float32(norm)))
    bad = {n: verdict for n, verdict in verdicts.items() if verdict != GOOD}
    assert bad == {20: LOSS_SPIKE, 21: NORM_SPIKE, 22: NOT_FINITE, 23: NOT_FINITE}  # 4 comes before the window is half full
    assert int(record["skipped"]) == 4
    plain = record_to_plain(record)
    assert plain["good"] == len(good)
    assert plain["loss"] == [float(x) for x, _ in good][-WINDOW:]


@pytest.mark.parametrize("steps", [5, 16, 37])
def test_a_record_comes_back_from_plain_numbers(steps: int):
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    record = initial_record(GUARD)
    for n in range(steps):
        _, record, _ = classify(GUARD, record, jnp.float32(2 + 0.01 * (n % 7)), jnp.float32(1.0))
    plain = record_to_plain(record)
    same = record_from_plain(GUARD, plain, mesh)
    assert all((np.asarray(same[name]) == np.asarray(value)).all() for name, value in record.items())
    shorter = record_from_plain(replace(GUARD, spike_window=8), plain, mesh)
    assert record_to_plain(shorter)["loss"] == plain["loss"][-8:]
    assert record_to_plain(record_from_plain(replace(GUARD, spike="off"), plain, mesh)) == {"skipped": 0}
    assert record_to_plain(record_from_plain(GUARD, {}, mesh))["loss"] == []


# ---------------------------------------------------------------------------------------------------------------------
# In the compiled step


def batch(config: Config, mesh: jax.sharding.Mesh, number: int, poisoned: bool = False) -> dict[str, jax.Array]:
    """Random tokens, one of which makes a NaN of the step."""
    shape = (config.train.global_batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(number).integers(0, 200, shape).astype(np.int32)
    tokens[5, 3] = NAN if poisoned else 7
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    arrays = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions, "segments": np.ones_like(tokens)}
    return jax.device_put({name: arrays[name] for name in batch_names(config)}, batch_sharding(mesh))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_step_leaves_the_state_bit_for_bit(layout: str, monkeypatch):
    poisonable(monkeypatch)
    config = LAYOUTS[layout]
    devices = math.prod(config.mesh.shape)
    assert find_problems(config, devices)[1] == []
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    state = create_state(config, mesh, optimizer)
    step, rates = compile_train_step(config, mesh, optimizer, "reference", QUICK), place_numbers(config, mesh)

    def after(numbers: list[int]) -> tuple[Any, list[dict[str, float]]]:
        here, seen = jax.tree.map(jnp.copy, state), []
        for number in numbers:
            here, metrics = step(here, batch(config, mesh, abs(number), poisoned=number < 0), rates)
            seen.append(read_metrics(metrics))
        return jax.tree.map(np.asarray, here), seen

    hit, seen = after([1, 2, -3, 4])
    spared, clean = after([1, 2, 4])
    assert [row["bad_step"] for row in seen] == [GOOD, GOOD, NOT_FINITE, GOOD]
    assert [row["skipped_steps"] for row in seen] == [0, 0, 1, 1]
    assert not math.isfinite(seen[2]["grad_norm"])
    assert seen[3]["loss"] == clean[2]["loss"]
    for name in ("params", "optimizer", "sync"):
        jax.tree.map(np.testing.assert_array_equal, hit[name], spared[name])
    assert (hit["step"], spared["step"]) == (4, 3)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), spared["params"], jax.tree.map(np.asarray, state["params"]))
    assert all(jax.tree.leaves(moved))


def test_a_state_that_is_not_classified_holds_nothing_more():
    config = replace(BASE, guard=GuardConfig())
    assert initial_record(config.guard) == {}
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    assert set(abstract_state(config, mesh, optimizer)) == set(state_dims(config, optimizer)) == {
        "params", "optimizer", "sync", "step"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"mesh": MeshConfig(replica=2), "sync": SyncConfig(mode="diloco"), "guard": GuardConfig(non_finite="skip")},
            "each replica has parameters",
        ),
        ({"sync": SyncConfig(mode="delayed"), "guard": GuardConfig(spike="stop")}, "1 steps after its loss is known"),
        ({"guard": GuardConfig(non_finite="off", spike="skip")}, "leaves NaNs to guard.spike"),
        ({"guard": GuardConfig(spike="skip", spike_window=7)}, "too short for a median"),
        ({"guard": GuardConfig(copies="rollback"), "checkpoint": CheckpointConfig(every=0)}, "checkpoint.every=0 makes none"),
    ],
)
def test_guards_that_have_no_meaning_are_refused(changes: dict[str, Any], words: str):
    config = replace(BASE, **changes)
    (problem,) = find_problems(config, config.mesh.replica)[1]
    assert words in problem
