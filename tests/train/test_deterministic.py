"""`train.deterministic`: two runs come out the same to the bit, and the program for GPUs adds up in one order."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import Config, MeshConfig
from jaxtrain.config.rules import find_problems, validate
from jaxtrain.errors import ExplainedError
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.planner import deviceless
from jaxtrain.train.gradients import batch_names, batch_sharding
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import create_state
from jaxtrain.train.step import compile_train_step, place_numbers
from jaxtrain.train.xla_options import DETERMINISTIC, compile_with_options, deterministic_options
from tests.tiny import tiny

CONFIG = tiny(
    model={"mlp_dim": 32, "dtype": "bfloat16"},
    mesh=MeshConfig(),
    data={"sequence_length": 16},
    train={"microbatches": 2, "deterministic": True},
)


def three_steps(config: Config, devices: int) -> list[bytes]:
    """The bits of all that three steps leave behind, compiled anew."""
    jax.clear_caches()
    config = validate(config, devices)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    step = compile_train_step(config, mesh, optimizer, "reference")
    state, metrics = create_state(config, mesh, optimizer), {}
    tokens = np.random.default_rng(0).integers(0, 100, (8, 16)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    arrays = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": positions, "segments": np.ones_like(tokens)}
    batch = jax.device_put({name: arrays[name] for name in batch_names(config)}, batch_sharding(mesh))
    for _ in range(3):
        state, metrics = step(state, batch, place_numbers(config, mesh))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state, metrics))]


@pytest.mark.parametrize(
    ("mesh", "devices"), [(MeshConfig(fsdp=1), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8)], ids=["one device", "mesh"]
)
def test_two_runs_are_the_same_to_the_bit(mesh, devices):
    config = replace(CONFIG, mesh=mesh)
    first = three_steps(config, devices)
    assert first == three_steps(config, devices)
    other = replace(config, train=replace(config.train, seed=1))
    assert first != three_steps(other, devices)  # the test of the test


def test_gpus_are_asked_and_others_are_not():
    assert deterministic_options(CONFIG, "cuda") == dict.fromkeys(DETERMINISTIC, True)
    assert deterministic_options(CONFIG, "cpu") == {}
    assert deterministic_options(Config(), "cuda") == {}


def test_an_option_against_it_is_refused():
    for option in ("xla_gpu_deterministic_ops=false", "xla_gpu_exclude_nondeterministic_ops=false", "xla_gpu_autotune_level=4"):
        config = replace(CONFIG, train=replace(CONFIG.train, xla_options=(option,)))
        (problem,) = find_problems(config, 1)[1]
        assert problem == f"train.xla_options: {option!r} does not go with train.deterministic, which sets that itself"
        assert find_problems(replace(config, train=replace(config.train, deterministic=False)), 1)[1] == []


def test_an_xla_that_cannot_is_refused():
    """Here the CPU's, which takes the options of GPUs, and not their misspelling."""
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    with pytest.raises(ExplainedError, match="train.deterministic: xla_gpu_deterministic_ops=perhaps: .*not a valid bool"):
        compile_with_options(lowered, {}, {DETERMINISTIC[0]: "perhaps"})


@pytest.mark.plan
@pytest.mark.slow
def test_the_program_for_gpus_adds_up_in_one_order():
    """The embedding's gradient is a scatter that adds with atomics; made deterministic it sorts first."""
    model = replace(CONFIG.model, embed_dim=128, head_dim=64, mlp_dim=256, vocab_size=512)
    config = validate(replace(CONFIG, model=model, mesh=MeshConfig(fsdp=1)), 1)
    free = replace(config, train=replace(config.train, deterministic=False))
    sorts = [deviceless.compile_for(each)[0].as_text().count(" sort(") for each in (config, free)]
    assert sorts[0] > 0 == sorts[1]
