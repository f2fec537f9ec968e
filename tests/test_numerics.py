"""The same seed begins the same whatever jax's flags say, from the environment or from code."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain.config import OptimizerConfig
from jaxtrain.errors import UsageError
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.numerics import NEEDED, set_aside, settle, settled
from jaxtrain.train.gradients import batch_sharding
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import create_state
from jaxtrain.train.step import TrainSteps
from tests.tiny import tiny
from tests.train.runs import prepared_of

OTHERWISE = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 3,
    "jax_default_matmul_precision": "bfloat16",
    "jax_softmax_custom_jvp": True,
    "jax_disable_jit": True,
}
CONFIG = tiny(
    model={"num_layers": 1, "embed_dim": 8, "num_heads": 1, "num_kv_heads": 1, "mlp_dim": 8, "vocab_size": 120},
    data={"mask_documents": False},
    optimizer=OptimizerConfig(peak_lr=1e-2),
    train={"steps": 2, "global_batch_size": 2},
)


@contextlib.contextmanager
def flags(**values: Any) -> Iterator[None]:
    """jax's flags, set by code, for a while."""
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def begin_and_train() -> list[Any]:
    """The initial parameters and two losses."""
    mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
    optimizer = make_optimizer(CONFIG.optimizer, 2, parameter_dims(CONFIG.model))
    state = create_state(CONFIG, mesh, optimizer)
    found = [np.array(leaf) for leaf in jax.tree.leaves(state["params"])]
    ids = np.arange(2 * 8, dtype=np.int32).reshape(2, 8)
    batch = jax.device_put({"tokens": ids, "targets": ids + 1, "positions": ids % 8}, batch_sharding(mesh))
    steps = TrainSteps(prepared_of(CONFIG, mesh, optimizer), 0, 2)
    for _ in range(2):
        with settled():  # jax itself refuses a compiled program under jax_disable_jit; a run is inside of this
            state, metrics = steps(state, batch)
        found.append(np.array(metrics["loss"]))
    return found


def test_no_flag_changes_a_bit_of_what_the_library_computes():
    """All of them at once, and they are as they were afterwards."""
    assert OTHERWISE.keys() == NEEDED.keys()
    expected = begin_and_train()
    with flags(**OTHERWISE):
        found = begin_and_train()
        assert {flag.partition("=")[0] for flag in set_aside()} == OTHERWISE.keys()
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype == np.float32
        np.testing.assert_array_equal(one, other)


def test_a_command_settles_what_the_environment_says():
    environment = {name.upper(): str(value) for name, value in OTHERWISE.items()}
    code = "import json; from jaxtrain.numerics import *; print(json.dumps([settle(), set_aside()]))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    changed, left = json.loads(done.stdout)
    assert {flag.partition("=")[0] for flag in changed} == OTHERWISE.keys()
    assert left == []


@pytest.mark.parametrize("flag", ["--xla_cpu_enable_fast_math=true", "--xla_cpu_enable_fast_math", "--xla_gpu_ftz=1"])
def test_arithmetic_that_is_not_ieee_is_refused(flag: str, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {flag}")
    with pytest.raises(UsageError, match=flag.partition("=")[0]):
        create_state(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]), make_optimizer(CONFIG.optimizer, 2, {}))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert set_aside() == []


def test_a_context_that_keeps_a_flag_is_named():
    with jax.enable_x64(True), pytest.raises(UsageError, match="jax_enable_x64=True"):
        settle()
