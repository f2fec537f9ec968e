"""The first law: the layout never changes the result."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, seed, settings

from jaxtrain.config import Config, MeshConfig
from jaxtrain.measure.layouts import BASE, compare
from tests.layouts import check, configs


@pytest.mark.parametrize("hand", range(4))  # several tests, so that the workers share them
def test_any_valid_config_is_equal_to_one_device(hand: int):
    """24 configs in all: each hand draws two layouts of each of three tasks."""

    @seed(hand)
    @settings(max_examples=3, deadline=None, database=None, print_blob=False, suppress_health_check=list(HealthCheck))
    @given(configs())
    def draw(layouts: list[Config]) -> None:
        for config in layouts:
            check(config)

    draw()


VARIANTS = {
    "uneven_layers_and_three_microbatches": replace(
        BASE,
        model=replace(BASE.model, num_layers=5),
        mesh=MeshConfig(pipe=3, fsdp=1, tensor=2),
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
    check(VARIANTS[name])


def test_gradient_accumulation_is_exact():
    """Ragged document masks: microbatches hold unequal numbers of targets, and the mean is over the global batch."""
    errors = compare(replace(BASE, train=replace(BASE.train, microbatches=4)))
    assert errors.gradient <= 1e-6
    assert errors.loss <= 1e-6
