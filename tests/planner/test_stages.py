"""The stage that a plan is made for, and its layout on the whole run."""

from dataclasses import replace

from jaxtrain.config import MeshConfig, Recipe, Stage
from jaxtrain.config.rules import validate
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.memory_check import Room, check_memory
from jaxtrain.planner.stages import longest_stage, of_whole_run, worst_stage
from tests.tiny import tiny

STAGES = (Stage(name="long", from_step=5, sequence_length=64), Stage(name="wide", from_step=9, sequence_length=8))
CONFIG = tiny(mesh=MeshConfig(fsdp=2), train={"stages": STAGES, "steps": 20, "global_batch_size": 16})


def test_the_stage_with_the_longest_sequences_is_the_worst():
    """On two devices a microbatch of it has one row a device, which keeps more than the many short ones."""
    config = validate(CONFIG, 2)
    assert longest_stage(config).name == worst_stage(config, "reference").name == "long"
    worst = worst_stage(config, "reference").config
    assert worst.train.microbatches == 8
    room = Room(2**30, 2, None, 1.0, "available on this host")
    assert ", most in stage long, of 1.00 GiB" in check_memory(config, room, "reference")
    totals = [estimate_memory(stage.config, "reference").total for stage in Recipe(config).stages]
    assert max(totals) == estimate_memory(worst, "reference").total > min(totals)


def test_a_planned_layout_becomes_that_of_all_stages():
    planned = replace(longest_stage(CONFIG).config, mesh=MeshConfig(data=2, fsdp=1))
    made = of_whole_run(CONFIG, replace(planned, train=replace(planned.train, microbatches=8)))
    assert made is not None
    assert made.mesh == planned.mesh
    assert made.train.stages == STAGES
    assert [stage.config.train.microbatches for stage in Recipe(made).all] == [1, 8, 1]


def test_a_layout_that_a_stage_cannot_have_is_none():
    config = tiny(train={"stages": (Stage(from_step=5, sequence_length=64, global_batch_size=4),), "global_batch_size": 2})
    planned = replace(longest_stage(config).config, mesh=MeshConfig(data=4, fsdp=1))
    assert of_whole_run(config, planned) is None
