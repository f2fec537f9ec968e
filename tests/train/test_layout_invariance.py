"""The first law: the layout never changes the result."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.layouts import BASE, Errors, Layout, all_layouts, base_for, compare


def check(errors: Errors) -> None:
    assert errors.same_start
    assert errors.loss <= 1e-6
    assert errors.gradient <= 1e-5
    assert errors.curve <= 1e-5


LAYOUTS = all_layouts()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_random_pipelined_layouts(schedule: str):
    pipelined = [layout for layout in LAYOUTS if layout.pipe > 1 and layout.schedule == schedule]

    @settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(pipelined))
    def draw(layout: Layout) -> None:
        check(compare(layout))

    draw()


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([layout for layout in LAYOUTS if layout.pipe == 1]))
def test_random_layouts_of_one_stage(layout: Layout):
    check(compare(layout))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout(layout: Layout):
    check(compare(layout))


VARIANTS = {
    "uneven_layers": (
        Layout(3, 1, 1, 2, "1f1b", 1, 4, "none"),
        replace(BASE, model=replace(BASE.model, num_layers=5)),
    ),
    "uneven_interleaved_named": (
        Layout(2, 2, 1, 1, "interleaved", 2, 2, "named"),
        replace(BASE, model=replace(BASE.model, num_layers=6)),
    ),
    "tied_grouped_qk_norm": (
        Layout(2, 1, 2, 2, "1f1b", 1, 2, "dots"),
        replace(BASE, model=replace(BASE.model, tie_embeddings=True, qk_norm=True, num_kv_heads=2)),
    ),
    "no_document_mask": (
        Layout(1, 2, 2, 2, "1f1b", 1, 2, "full"),
        replace(BASE, data=replace(BASE.data, mask_documents=False)),
    ),
    "odd_axes": (
        Layout(1, 1, 2, 3, "1f1b", 1, 1, "none"),
        replace(
            BASE,
            model=replace(BASE.model, num_heads=6, num_kv_heads=3, mlp_dim=48, vocab_size=300),
            data=replace(BASE.data, sequence_length=18),
        ),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_model_variants(name: str):
    layout, base = VARIANTS[name]
    check(compare(layout, base, steps=3))


def test_blockwise_attention_in_a_pipeline():
    layout = Layout(2, 1, 2, 2, "1f1b", 1, 2, "none")
    check(compare(layout, base_for(layout), steps=2, backend="blockwise"))


@pytest.mark.parametrize("microbatches", [2, 4])
def test_gradient_accumulation_is_exact(microbatches: int):
    """Ragged document masks: microbatches hold unequal numbers of targets, and the mean is over the global batch."""
    errors = compare(Layout(1, 1, 1, 1, "1f1b", 1, microbatches, "full"))
    assert errors.gradient <= 1e-6
    assert errors.loss <= 1e-6
