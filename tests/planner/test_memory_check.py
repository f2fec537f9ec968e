"""A run that cannot fit is refused with numbers before anything is allocated; one that might is not."""

from dataclasses import replace

import pytest

from jaxtrain.config import Config, LatentAttentionConfig, MeshConfig, MoEConfig, RopeScaling
from jaxtrain.config.loading import load_config
from jaxtrain.config.names import field_hint, field_names, set_field
from jaxtrain.config.rules import find_problems, validate
from jaxtrain.errors import ExplainedError
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.memory_check import Room, batch_bytes, check_memory, largest_that_fit

GIB = 2**30
QUICKSTART = load_config("quickstart")


def room(available: float, devices: int = 1) -> Room:
    return Room(available, devices, available, 1.0, "available on this host")


def check(config: Config, available: float = 24 * GIB, devices: int = 1) -> str:
    return check_memory(validate(config, devices), room(available, devices), "blockwise")


@pytest.mark.parametrize(
    ("name", "devices", "least"),
    [("quickstart", 1, 1), ("quickstart", 4, 1), ("replicas", 2, 1), ("tiny_moe", 8, 2), ("ten_parts_on_five_nodes", 5, 10)],
)
def test_what_works_is_not_refused(name: str, devices: int, least: float):
    """`least`: GiB with which the run is known to work."""
    assert check(load_config(name), least * GIB, devices).startswith("memory     about ")


def test_what_may_not_fit_is_a_warning():
    """Parameters and moments fit; what a step needs, by estimate, does not."""
    config = validate(load_config("ten_parts_on_five_nodes"), 5)
    needs = 5 * estimate_memory(config, "blockwise").total
    assert check(config, 0.9 * needs, 5).startswith("warning    the run takes about ")
    assert check(config, 1.1 * needs, 5).startswith("memory     about ")


@pytest.mark.parametrize(
    ("field", "value", "offer"),
    [
        ("model.num_layers", 100_000, "model.num_layers="),
        ("model.embed_dim", 1_000_000, "model.embed_dim="),
        ("model.vocab_size", 10**9, "model.vocab_size="),
        ("model.mlp_dim", 10**9, "model.mlp_dim="),
        ("model.moe.num_experts", 10**6, "model.moe.num_experts="),
    ],
)
def test_a_model_that_cannot_fit_is_refused_with_one_that_does(field: str, value: int, offer: str):
    config = set_field(QUICKSTART, field, value)
    with pytest.raises(ExplainedError, match="out of memory: quickstart has .* parameters, which take .* 24.0 GiB") as raised:
        check(config)
    (found,) = [
        words for words in str(raised.value).replace(".\n", "; ").replace("one of: ", "; ").split("; ") if offer in words
    ]
    most = int(found.partition("=")[2])
    assert 0 < most < value
    state = estimate_memory(validate(set_field(config, field, most), 1), "blockwise")
    assert state.parameters + state.optimizer <= 24 * GIB


def test_no_more_than_what_fits_is_offered():
    most = largest_that_fit(QUICKSTART, lambda config: config.model.num_layers * config.model.embed_dim <= 200)
    assert most == {"model.num_layers": 1, "model.embed_dim": 64}


@pytest.mark.parametrize(("field", "value"), [("train.global_batch_size", 10**9), ("data.prefetch", 10**9)])
def test_a_batch_that_cannot_fit_is_refused(field: str, value: int):
    config = set_field(QUICKSTART, field, value)
    with pytest.raises(ExplainedError, match="out of host memory") as raised:
        check(config)
    offers = dict(words.split("=") for words in str(raised.value).partition("one of: ")[2].rstrip(".").split("; "))
    changed = set_field(config, field, int(offers[f"--{field}"]))
    held = [config.data.prefetch * batch_bytes(config) for config in (changed, config)]
    assert held[0] <= 24 * GIB < held[1]


def test_a_step_that_is_far_too_large_is_refused_with_what_fits():
    config = replace(QUICKSTART, train=replace(QUICKSTART.train, global_batch_size=2**16))
    with pytest.raises(ExplainedError, match="out of memory: quickstart takes about .* by estimate") as raised:
        check(config)
    assert "activations kept for the backward pass" in str(raised.value)
    assert "--train.microbatches=" in str(raised.value)


def test_devices_that_share_a_host_need_the_sum():
    config = replace(QUICKSTART, mesh=MeshConfig(fsdp=4), train=replace(QUICKSTART.train, global_batch_size=4))
    resolved = validate(config, 4)
    memory = estimate_memory(resolved, "blockwise")
    state = memory.parameters + memory.optimizer
    with pytest.raises(ExplainedError, match="out of memory"):
        check_memory(resolved, room(3.9 * state, 4), "blockwise")
    assert check_memory(resolved, room(3.9 * state, 1), "blockwise")


WHOLE = [name for name in field_names() if field_hint(name) is int]
PARTS = {
    "model.moe": MoEConfig(),
    "model.latent_attention": LatentAttentionConfig(),
    "model.rope_scaling": RopeScaling(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_absurd_size_is_explained_or_fits(name: str):
    """Alone, from 10^5 to 10^12: never another error, and never a table of its length."""
    for value in (10**power + more for power in range(5, 13) for more in (0, 3)):
        config = QUICKSTART
        for part, default in PARTS.items():
            config = set_field(config, part, default) if name.startswith(part) else config
        config, problems = find_problems(set_field(config, name, value), 1)
        assert all(problem and "\n" not in problem for problem in problems)
        if not problems:
            outcome = outcome_of(config)
            assert outcome.startswith(("memory ", "warning ")) or "Nothing was allocated" in outcome


def outcome_of(config: Config) -> str:
    """What the check says, or why it refuses."""
    try:
        return check_memory(config, room(24 * GIB), "blockwise")
    except ExplainedError as error:
        return str(error)


def test_there_are_whole_numbers():
    assert len(WHOLE) > 50
