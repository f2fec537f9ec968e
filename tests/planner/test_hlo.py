"""Matmul FLOPs of programs: of small texts by hand, and of compiled train steps against the closed form."""

import functools
import math
from dataclasses import replace

import jax
import pytest

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, PipelineConfig, TrainConfig
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.parallel.pipeline_schedule import cut_into_runs, make_schedule
from jaxtrain.planner.hlo import matmul_flops
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import abstract_state
from jaxtrain.train.step import abstract_batch, make_train_step

# ---------------------------------------------------------------------------------------------------------------------
# Texts by hand

# 2 * 8 * 16 * 4 FLOPs.
DOT = """
%multiply (a: f32[8,4], b: f32[4,16]) -> f32[8,16] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
# 2 * 5 * (3 * 7) * 2 FLOPs: batch dim 5, two contracted dims.
BATCHED_DOT = """
%batched (a: f32[5,3,7,2], b: f32[5,3,7]) -> f32[5,2] {
  %a = f32[5,3,7,2]{3,2,1,0} parameter(0)
  %b = f32[5,3,7]{2,1,0} parameter(1)
  ROOT %dot.2 = f32[5,2]{1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={1,2}, rhs_batch_dims={0}
}
"""
ONE, BATCHED = 2 * 8 * 16 * 4, 2 * 5 * 2 * 21


def program(*instructions: str, computations: str = DOT + BATCHED_DOT) -> str:
    """A module whose entry holds these instructions, the last its root."""
    body = "\n".join(f"  {line}" for line in (*instructions[:-1], f"ROOT {instructions[-1]}"))
    return f"HloModule test\n{computations}\nENTRY %main (x: f32[8,4], y: f32[4,16]) -> f32[8,16] {{\n{body}\n}}\n"


FUSION = "%fusion = f32[8,16]{1,0} fusion(%x, %y), kind=kOutput, calls=%multiply"
LOOP = (
    "%loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%less, body=%multiply, "
    'backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0","step":"1"}}'
)


@pytest.mark.parametrize(
    ("instructions", "flops"),
    [
        (["%c = f32[] constant(0)"], 0),
        (["%fusion = f32[8,16]{1,0} fusion(%x, %y), kind=kOutput, calls=%multiply"], ONE),
        (["%called = f32[5,2]{1,0} call(%x, %y), to_apply=%batched"], BATCHED),
        ([FUSION, "%called = f32[5,2]{1,0} call(%x, %y), to_apply=%batched"], ONE + BATCHED),
        ([FUSION, FUSION.replace("%fusion ", "%fusion.2 ")], 2 * ONE),
        ([LOOP], 7 * ONE),
        (["%if = f32[5,2] conditional(%i, %x, %y), branch_computations={%multiply, %batched}"], max(ONE, BATCHED)),
        (["%if = f32[5,2] conditional(%p, %x, %y), true_computation=%batched, false_computation=%batched"], BATCHED),
        (["%s = ((f32[8,4]), f32[8,16]) async-start(%x, %y), calls=%multiply"], ONE),
        # A dot in the entry itself, its operand named after its type, as other printers of HLO do.
        (
            [
                "%x = f32[8,4]{1,0} parameter(0)",
                "%dot = f32[8,16]{1,0} dot(f32[8,4]{1,0} %x, f32[4,16]{1,0} %y), lhs_contracting_dims={1}",
            ],
            ONE,
        ),
        # Neither the reduction's own sum nor an elementwise product is a matmul.
        (["%sum = f32[8]{0} reduce(%x, %c), dimensions={1}, to_apply=%add", "%m = f32[8,4]{1,0} multiply(%x, %x)"], 0),
    ],
)
def test_instructions(instructions: list[str], flops: int):
    assert matmul_flops(program(*instructions)) == flops


def test_loops_multiply_inside_loops():
    inner = f"%inner (s: f32[8,4]) -> f32[8,16] {{\n  ROOT {LOOP}\n}}\n"
    outer = LOOP.replace("%multiply", "%inner").replace('"7"', '"3"')
    assert matmul_flops(program(outer, computations=DOT + inner)) == 21 * ONE


def test_a_loop_without_a_trip_count_is_an_error():
    with pytest.raises(ValueError, match="a loop without a known trip count: ROOT %loop"):
        matmul_flops(program(LOOP.partition(", backend_config")[0]))


def test_the_busiest_branch_counts_with_all_that_it_calls():
    """A branch is as dear as the loop inside it."""
    branch = f"%long (s: f32[8,4]) -> f32[8,16] {{\n  ROOT {LOOP}\n}}\n"
    text = program("%if = f32[5,2] conditional(%i, %x, %y), branch_computations={%multiply, %long}", computations=DOT + branch)
    assert matmul_flops(text) == 7 * ONE


# ---------------------------------------------------------------------------------------------------------------------
# Compiled train steps

LENGTH, BATCH = 32, 8
MODEL = ModelConfig(
    num_layers=8, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, vocab_size=120, dtype="float32"
)
# The time of these tests is LLVM's, and nothing is run: FLOPs are decided by XLA's passes before it.
FAST = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}


@functools.cache
def compiled_text(remat: str, microbatches: int, pipe: int = 1, layers: int = MODEL.num_layers) -> str:
    """The compiled train step of one layout, as text."""
    config = Config(
        model=replace(MODEL, num_layers=layers),
        mesh=MeshConfig(pipe=pipe, fsdp=1),
        pipeline=PipelineConfig(schedule="1f1b"),
        data=DataConfig(sequence_length=LENGTH),
        optimizer=OptimizerConfig(name="sgd", beta1=0.0, weight_decay=0.0, clip_norm=0.0),
        train=TrainConfig(global_batch_size=BATCH, microbatches=microbatches, remat=remat, loss_chunk=LENGTH),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:pipe])
    optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
    step = make_train_step(config, mesh, optimizer, "reference")
    return step.lower(abstract_state(config, mesh, optimizer), abstract_batch(config, mesh)).compile(FAST).as_text()


def layer_flops() -> tuple[float, dict[str, float]]:
    """FLOPs per token of one layer's forward, and of what each remat policy computes again."""
    m = MODEL
    weights = 2 * m.embed_dim * m.num_heads * m.head_dim + 2 * m.embed_dim * m.num_kv_heads * m.head_dim
    weights += 3 * m.embed_dim * m.mlp_dim
    scores = LENGTH * m.num_heads * m.head_dim  # multiply-adds of Q K^T, and as many of the product with V
    forward = 2 * (weights + 2 * scores)
    full = forward - 2 * m.embed_dim * m.mlp_dim  # nothing needs the layer's last matmul again
    return forward, {"none": 0, "dots": 2 * scores, "full": full, "named": full - 2 * scores}


HEAD = 6 * MODEL.embed_dim * MODEL.padded_vocab_size  # forward and both gradients at once


@pytest.mark.parametrize(("remat", "microbatches"), [("none", 4), ("dots", 4), ("named", 4), ("full", 1), ("full", 4)])
def test_a_step_executes_the_closed_form(remat: str, microbatches: int):
    """Forward, twice that for the backward, what the policy recomputes, and the head: however the batch is cut."""
    forward, again = layer_flops()
    expected = BATCH * LENGTH * (MODEL.num_layers * (3 * forward + again[remat]) + HEAD)
    assert matmul_flops(compiled_text(remat, microbatches)) == pytest.approx(expected, rel=0.02)


def test_the_policies_differ_by_more_than_the_tolerance():
    forward, again = layer_flops()
    totals = sorted(MODEL.num_layers * (3 * forward + extra) + HEAD for extra in again.values())
    assert all(b > 1.025 * a for a, b in zip(totals, totals[1:], strict=False))


def test_a_pipeline_that_keeps_everything_runs_the_forward_once():
    """F (with the loss) in the ticks of runs that have any, B in those of runs that have any: a conditional is counted dear."""
    pipe, microbatches = 2, 4
    forward, _ = layer_flops()
    runs = cut_into_runs(make_schedule("1f1b", pipe, 1, microbatches))
    forward_ticks = sum(run.stop - run.start for run in runs if run.forward != "no")
    backward_ticks = sum(run.stop - run.start for run in runs if run.backward != "no")
    tokens, layers = BATCH * LENGTH / microbatches, MODEL.num_layers / pipe
    expected = tokens * (forward_ticks * (layers * forward + HEAD) + backward_ticks * layers * 2 * forward)
    assert matmul_flops(compiled_text("none", microbatches, pipe)) == pytest.approx(expected, rel=0.02)
    # One forward more in every backward would not pass for rounding.
    assert backward_ticks * layers * forward * tokens > 0.2 * expected


def test_the_program_does_not_grow_with_the_layers():
    few, many = compiled_text("full", 1), compiled_text("full", 1, layers=64)
    assert len(many) == pytest.approx(len(few), rel=0.15)
    assert many.count(" = ") == pytest.approx(few.count(" = "), rel=0.15)
    assert matmul_flops(many) > 5 * matmul_flops(few)
    assert math.isfinite(matmul_flops(many))
