"""The first law: the layout never changes the result."""

from dataclasses import replace

import pytest

from jaxtrain.config import MeshConfig, PipelineConfig
from jaxtrain.measure.layouts import BASE, compare
from tests.layouts import SURE, candidates, covering, features_of

TASKS, MORE = 5, 19  # of two layouts each: 10 in every run, 48 with -m "slow or not slow"


@pytest.mark.parametrize("task", [*range(TASKS), *(pytest.param(TASKS + i, marks=pytest.mark.slow) for i in range(MORE))])
def test_any_valid_config_is_equal_to_one_device(task: int):
    for config in covering(TASKS + MORE)[task]:
        assert compare(config).problem is None, config


def test_the_draws_of_every_run_have_most_of_what_can_be_drawn():
    """Of each value of a field with each axis above 1, of which some for certain."""
    seen, every = features_of(covering(TASKS)), features_of(candidates())
    assert seen >= SURE
    assert len(seen) > 0.8 * len(every), every - seen


VARIANTS = {
    "uneven_layers_and_three_microbatches": replace(
        BASE,
        model=replace(BASE.model, num_layers=7),
        mesh=MeshConfig(pipe=3, fsdp=1, tensor=2),
        pipeline=PipelineConfig(schedule="zero_bubble_v", chunks=2),
        train=replace(BASE.train, global_batch_size=48, microbatches=3, remat="dots"),
    ),
    "odd_axes": replace(
        BASE,
        model=replace(BASE.model, num_heads=6, num_kv_heads=3, mlp_dim=48, vocab_size=300),
        mesh=MeshConfig(fsdp=2, tensor=3),
        data=replace(BASE.data, sequence_length=18),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_odd_sizes(name: str):
    assert compare(VARIANTS[name]).problem is None


def test_gradient_accumulation_is_exact():
    """Ragged document masks: microbatches hold unequal numbers of targets, and the mean is over the global batch."""
    errors = compare(replace(BASE, train=replace(BASE.train, microbatches=4)))
    assert errors.gradient <= 1e-6
    assert errors.loss <= 1e-6
