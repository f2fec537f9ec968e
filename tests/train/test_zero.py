"""ZeRO levels with weights in few bits: what is gathered once or for each layer, and what is summed when, changes no result."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import LoraConfig, OptimizerConfig, ShardingConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.measure.layouts import batch_of, with_second_factors
from jaxtrain.mesh import make_mesh
from jaxtrain.models.trained import trained
from jaxtrain.train.gradients import batch_names, batch_sharding
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.state import create_state
from jaxtrain.train.step import compile_train_step, place_numbers
from jaxtrain.train.xla_options import options_of_rare_programs
from tests.tiny import tiny

FIELDS = {
    "float8": {"model": {"matmul_dtype": "float8"}},
    "int8 base": {"model": {"init_std": 0.3}, "lora": LoraConfig(rank=2, base="int8", targets=("attention/query", "down"))},
}
SGD = OptimizerConfig(name="sgd", beta1=0.0, weight_decay=0.0, clip_norm=0.0, peak_lr=0.5, schedule="constant")


@pytest.mark.parametrize("name", FIELDS)
def test_levels_train_equally(name: str):
    """Three steps of two microbatches on fsdp=4: equal losses, and parameters apart by the order of float32 sums alone."""
    config = tiny(**FIELDS[name], optimizer=SGD, mesh={"fsdp": 4}, train={"microbatches": 2, "remat": "none"})
    mesh, optimizer = make_mesh(config.mesh, jax.devices()[:4]), optimizer_of(config)
    rows = batch_of(8, 8)
    rows = jax.device_put({key: rows[key] for key in batch_names(config)}, batch_sharding(mesh))
    start = create_state(config, mesh, optimizer)
    start |= {"params": with_second_factors(config, start["params"])}
    before, losses, moved = jax.tree.map(np.asarray, trained(config, start["params"])), [], []
    for zero in (3, 2, 1):
        level = replace(config, sharding=ShardingConfig(zero=zero))
        assert find_problems(level, 4)[1] == []
        step = compile_train_step(level, mesh, optimizer, "reference", options_of_rare_programs("cpu"))
        state, seen = jax.tree.map(jnp.copy, start), []
        for _ in range(3):
            state, metrics = step(state, rows, place_numbers(level, mesh))
            seen.append(float(metrics["loss"]))
        losses.append(seen)
        moved.append(jax.tree.leaves(jax.tree.map(lambda a, b: np.asarray(a) - b, trained(config, state["params"]), before)))
    assert losses[0][0] - losses[0][2] > 1e-3  # it trains
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-6)
    for exact, *others in zip(*moved, strict=True):
        assert np.linalg.norm(exact) > 0
        assert all(np.linalg.norm(got - exact) <= 1e-5 * np.linalg.norm(exact) for got in others)
