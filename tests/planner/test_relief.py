"""Out of memory: the message has every category, and each change in it is valid, fits, and is as small as can be."""

import math
import re
from dataclasses import replace

import pytest

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from jaxtrain.config.names import with_fields
from jaxtrain.config.rules import find_problems
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.relief import categories, explain_out_of_memory, smallest_changes, turns

GIB = 2**30
BASE = Config(
    model=ModelConfig(
        num_layers=16, embed_dim=2048, num_heads=16, num_kv_heads=16, head_dim=128, mlp_dim=8192, vocab_size=32_000
    ),
    mesh=MeshConfig(data=8, fsdp=1),
    data=DataConfig(sequence_length=4096),
    train=TrainConfig(global_batch_size=64, remat="none"),
)


@pytest.mark.parametrize("gib", [60, 40, 24, 16])
def test_every_change_fits_and_a_smaller_turn_does_not(gib):
    budget = gib * GIB
    changes = smallest_changes(BASE, 8, budget, "cudnn")
    assert changes
    assert len({len([f for f in flags if f != "mesh.data"]) for flags, _ in changes}) == 1  # as few knobs as will do
    for flags, held in changes:
        changed = with_fields(BASE, flags)
        assert find_problems(changed, 8)[1] == []
        assert held == estimate_memory(changed).total <= budget
        assert changed.train.global_batch_size == BASE.train.global_batch_size
        if len(flags) == 1:
            ((name, value),) = flags.items()
            (options,) = [o for o in turns(BASE).values() if {name: value} in o]
            smaller = options[: options.index({name: value})]
            assert all(estimate_memory(with_fields(BASE, option)).total > budget for option in smaller)


def test_fewer_knobs_do_for_more_memory():
    held = estimate_memory(BASE).total
    assert len(smallest_changes(BASE, 8, 0.9 * held, "cudnn")[0][0]) <= len(
        smallest_changes(BASE, 8, 0.1 * held, "cudnn")[0][0]
    )
    assert smallest_changes(BASE, 8, 1e6, "cudnn") == []


def test_the_message_has_the_bytes_and_flags_that_can_be_pasted():
    error = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 10737418240 bytes.\nmore"
    message = explain_out_of_memory(BASE, 8, error, 40 * GIB, held=38 * GIB)
    memory = estimate_memory(BASE)
    assert message.startswith(
        "out of device memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 10737418240 bytes.\n"
    )
    assert "38.0 GiB were in use" in message
    assert "of 40.0 GiB on the device" in message
    assert math.isclose(sum(size for _, size in categories(memory)), memory.total)
    for words, _ in categories(memory):
        assert words in message
    sizes = [float(size) for size in re.findall(r"^ +([\d.]+) GiB  \w", message, re.MULTILINE)]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == pytest.approx(memory.total / GIB, rel=0.02)
    pasted = re.findall(r"^  (--.*)  \(", message, re.MULTILINE)
    assert pasted
    for line in pasted:
        flags = {n: int(v) if v.isdigit() else v for n, v in (flag[2:].split("=") for flag in line.split())}
        assert estimate_memory(with_fields(BASE, flags)).total <= 40 * GIB


def test_an_estimate_that_fits_asks_for_clearly_less():
    message = explain_out_of_memory(BASE, 8, "RESOURCE_EXHAUSTED", 10_000 * GIB)
    assert "That would fit" in message
    assert "--train.microbatches=2" in message  # where weights are whole, the second's buffers wait for the first


def test_nothing_fits():
    hopeless = replace(BASE, mesh=MeshConfig(fsdp=1))
    message = explain_out_of_memory(hopeless, 1, "RESOURCE_EXHAUSTED", 1 * GIB)
    assert "No change of microbatches, remat, ZeRO level or mesh on these devices fits." in message
    assert "jaxtrain plan" in message
