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
from jaxtrain.program.hlo import matmul_flops
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.step import abstract_arguments, make_train_step

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
    less = "%less (l: (s32[], f32[8,16])) -> pred[] {\n  %l = (s32[], f32[8,16]{1,0}) parameter(0)\n"
    less += "  %i = s32[] get-tuple-element(%l), index=0\n  ROOT %lt = pred[] compare(%i, %i), direction=LT\n}\n"
    with pytest.raises(ValueError, match=r"a loop without a known trip count \(start is no tuple here\): %loop"):
        matmul_flops(program(LOOP.partition(", backend_config")[0], computations=DOT + less))


COUNTED = """
%below (c: (s32[], s32[], f32[8,4])) -> pred[] {
  %c = (s32[], s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  ROOT %lt = pred[] fusion(%i, %n), kind=kLoop, calls=%compare_them
}
%compare_them (p: s32[], q: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %compare = pred[] compare(%p, %q), direction=LT
}
%step (b: (s32[], s32[], f32[8,4])) -> (s32[], s32[], f32[8,4]) {
  %b = (s32[], s32[], f32[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %m = s32[] get-tuple-element(%b), index=1
  %x = f32[8,4]{1,0} get-tuple-element(%b), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%j, %two)
  %y = f32[8,16]{1,0} fusion(%x, %x), kind=kOutput, calls=%multiply
  ROOT %out = (s32[], s32[], /*index=2*/f32[8,4]{1,0}) tuple(%next, %m, /*index=2*/%x)
}
"""


def counted(limit: str) -> str:
    """A loop whose count is nowhere written down: from -1 by 2 to the limit."""
    begin = [
        "%first = s32[] constant(-1)",
        f"%limit = s32[] {limit}",
        "%start = (s32[], s32[], f32[8,4]) tuple(%first, %limit, %x)",
    ]
    loop = "%loop = (s32[], s32[], f32[8,4]) while(%start), condition=%below, body=%step"
    return program(*begin, loop, computations=DOT + COUNTED)


@pytest.mark.parametrize(("limit", "trips"), [("constant(8)", 5), ("constant(9)", 5), ("constant(-1)", 0)])
def test_a_loop_that_xla_forgot_to_count_is_counted(limit: str, trips: int):
    """As XLA leaves a pipelined loop of microbatches, of which it took one iteration out."""
    assert matmul_flops(counted(limit)) == trips * ONE


@pytest.mark.parametrize(("keeps", "message"), [("%held", ""), ("%next", "element 0 of an outer loop, which changes it")])
def test_a_loop_counts_to_what_an_outer_one_keeps(keeps: str, message: str):
    """As XLA leaves a loop of hidden length in another: the limit waits in the outer loop's tuple, and a call is between."""
    outer = """
%small (s: (s32[], s32[], f32[8,4])) -> (s32[], s32[], f32[8,4]) {
  %s = (s32[], s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %loop = (s32[], s32[], f32[8,4]) while(%s), condition=%below, body=%step
}
%outer (o: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %o = (s32[], f32[8,4]{1,0}) parameter(0)
  %held = s32[] get-tuple-element(%o), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%held, %one)
  %first = s32[] constant(-1)
  %start = (s32[], s32[], f32[8,4]) tuple(%first, %held, %x)
  %called = (s32[], s32[], f32[8,4]) call(%start), to_apply=%small
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(KEEPS, %x)
}
""".replace("KEEPS", keeps)
    begin = ["%limit = s32[] constant(8)", "%all = (s32[], f32[8,4]) tuple(%limit, %x)"]
    thrice = 'backend_config={"known_trip_count":{"n":"3"}}'
    loop = f"%loops = (s32[], f32[8,4]) while(%all), condition=%below, body=%outer, {thrice}"
    text = program(*begin, loop, computations=DOT + COUNTED + outer)
    if not message:
        assert matmul_flops(text) == 3 * 5 * ONE
        return
    with pytest.raises(ValueError, match=message):
        matmul_flops(text)


def test_a_loop_that_data_decides_is_an_error():
    with pytest.raises(ValueError, match=r"parameter limit is not computed from constants|it begins with element"):
        matmul_flops(counted("parameter(2)"))


FMHA = """
%q = bf16[2,512,8,64]{3,2,1,0} parameter(0)
%k = bf16[2,512,4,64]{3,2,1,0} parameter(1)
%attention = (bf16[2,8,512,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", \
operand_layout_constraints={bf16[2,512,8,64]{3,2,1,0}, bf16[2,512,4,64]{3,2,1,0}, bf16[2,512,4,64]{3,2,1,0}}, api_version=A, \
backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", \
"dimensions": ["2", "8", "512", "512"], "layout": {}}, "mask_type": "CAUSAL", "sliding_window_length": 0}}
""".replace("\\\n", "").strip()
SQUARE = 2 * 2 * 8 * 512 * 512 * 64


@pytest.mark.parametrize(
    ("change", "flops"),
    [
        (("", ""), 2 * SQUARE / 2),
        (("CAUSAL", "NO_MASK"), 2 * SQUARE),
        (("fmhaSoftmax", "fmhaSoftmaxBackward"), 5 * SQUARE / 2),
        (('length": 0', 'length": 128'), 2 * SQUARE * (1 / 4 - 1 / 32)),
    ],
)
def test_fused_attention(change: tuple[str, str], flops: float):
    """Two matmuls forward, five backward, over half of the square under a causal mask, over a band with a window."""
    assert matmul_flops(program(*FMHA.replace(*change).splitlines())) == pytest.approx(flops)


def test_further_calls_of_attention_within_documents_hold_tokens_of_the_first():
    lines = FMHA.splitlines()
    further = lines[-1].replace("%attention", "%further") + ', metadata={op_name="jit(f)/further_documents/fwd"}'
    assert matmul_flops(program(*lines, further)) == pytest.approx(2 * SQUARE / 2)


def test_cublas():
    """bf16[96,512] x [512,1536], as cuBLAS is called."""
    call = (
        '%gemm = (bf16[96,1536]{1,0}, s8[4]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config='
        '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
    )
    text = program("%a = bf16[96,512]{1,0} parameter(0)", "%b = bf16[512,1536]{1,0} parameter(1)", call)
    assert matmul_flops(text) == 2 * 96 * 512 * 1536


def test_grouped_matmul_kernels():
    """Rows are what data make them, expected are 300 of 4352: by two [64, 96] matrices, and the transposed."""
    call = (
        ' = bf16[{}] custom-call(%x, %w), custom_call_target="__gpu$xla.gpu.triton", '
        'frontend_attributes={{expected_rows="300"}}, metadata={{op_name="a/grouped_matmul/b"}}'
    )
    lines = ["%x = bf16[4352,64]{1,0} parameter(0)", "%w = bf16[2,64,96] parameter(1)"]
    text = program(*lines, "%y" + call.format("4352,96"), "%dw" + call.format("2,64,96"))
    assert matmul_flops(text) == 2 * (2 * 300 * 64 * 96)
    with pytest.raises(ValueError, match="a grouped matmul without operands or expected rows: y"):
        matmul_flops(text.replace("expected_rows", "rows"))


def test_ragged_dot_compiles_to_what_it_executes():
    """Rows meet one group each in the formula; XLA on CPU multiplies every row with every group and masks, and that counts."""
    lhs, rhs, sizes = (jax.ShapeDtypeStruct(s, d) for s, d in (((96, 16), "float32"), ((3, 16, 8), "float32"), ((3,), "int32")))
    flops = matmul_flops(jax.jit(jax.lax.ragged_dot).lower(lhs, rhs, sizes).compile().as_text())
    assert flops in (2 * 96 * 16 * 8, 3 * 2 * 96 * 16 * 8)
    once = "%r = f32[96,8]{1,0} ragged-dot(%l, %w, %g), lhs_contracting_dims={1}, rhs_contracting_dims={1}, lhs_ragged_dims={0}"
    assert matmul_flops(program("%l = f32[96,16]{1,0} parameter(0)", once)) == 2 * 96 * 16 * 8


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
    return step.lower(*abstract_arguments(config, mesh, optimizer)).compile().as_text()


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
