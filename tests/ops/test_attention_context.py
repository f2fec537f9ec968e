"""Attention over a shared-out sequence against `reference_attention` of the whole sequence on one device, float32."""

import collections
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax._src.interpreters import partial_eval as pe
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MESH_AXES
from jaxtrain.errors import ExplainedError
from jaxtrain.hardware import find_chip
from jaxtrain.jax_private import fused_attention
from jaxtrain.ops.attention import reference_attention
from jaxtrain.ops.attention_context import AttentionPlan, choose_context_attention, context_attention, needed_steps
from jaxtrain.ops.attention_mask import Mask, Rule
from jaxtrain.ops.attention_order import find_place, share_out, zigzag_order, zigzag_pieces
from jaxtrain.ops.attention_pieces import piece_attention, piece_gradients
from jaxtrain.planner import deviceless
from jaxtrain.program.collectives import read_collectives
from jaxtrain.program.groups import layout_of
from jaxtrain.sharding import vary
from tests.ops.test_attention import ragged_segments, relative
from tests.ops.test_attention_blockwise import dot_flops


class Case(NamedTuple):
    """One thing to compute."""

    context: int = 2
    kind: str = "ring"
    backend: str = "blockwise"
    length: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    window: int = 0
    documents: bool = True


def mesh_of(context, tensor=1):
    devices = np.array(jax.devices()[: context * tensor]).reshape(1, 1, 1, 1, 1, context, tensor)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def draw(case, seed=0, batch=2):
    rng = np.random.default_rng(seed)
    widths = ((case.heads, case.head_dim), (case.kv_heads, case.head_dim), (case.kv_heads, case.value_dim))
    shapes = [(batch, case.length, *w) for w in (*widths, (case.heads, case.value_dim))]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    return arrays, ragged_segments(rng, batch, case.length)


def in_order(x, case, inverse=False):
    """A whole sequence (dim 1) in the order in which devices hold it, or back."""
    if case.kind == "ulysses":
        return x
    pieces = x.reshape(x.shape[0], 2 * case.context, -1, *x.shape[2:])
    order = zigzag_order(case.context)
    return pieces[:, np.argsort(order) if inverse else order].reshape(x.shape)


def region(case, remat=lambda f: f, mesh=None):
    """(q, k, v, do, segments) -> (o, dq, dk, dv), all whole in the devices' order, under shard_map over all axes."""
    length = P(None, "context", "tensor")

    def local(q, k, v, do, segments):
        attend = functools.partial(
            context_attention,
            plan=AttentionPlan(case.backend, case.kind, Rule(window=case.window)),
            segments_BL=segments if case.documents else None,
            residual_name="attention",
        )
        q, k, v, do = vary((q, k, v, do))
        o, pull = jax.vjp(remat(attend), q, k, v)
        unused = tuple(axis for axis in MESH_AXES if axis not in ("context", "tensor"))
        return jax.tree.map(lambda x: jax.lax.psum(x, unused), (o, *pull(do)))

    specs = {"in_specs": (*(length,) * 4, P()), "out_specs": (length,) * 4}
    return jax.shard_map(local, mesh=mesh or mesh_of(case.context), **specs, check_vma=True)


@functools.cache
def compiled(function, *shapes):
    """Compiled quickly rather than well."""
    return jax.jit(function).lower(*shapes).compile()


def shapes_of(*arrays):
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)


@functools.cache
def truth_of(window, documents):
    def truth(q, k, v, do, segments):
        segments = segments if documents else None
        o, pull = jax.vjp(lambda q, k, v: reference_attention(q, k, v, segments, rule=Rule(window=window)), q, k, v)
        return o, *pull(do)

    return truth


def expected(case, arrays, segments):
    return compiled(truth_of(case.window, case.documents), *shapes_of(*arrays, segments))(*arrays, segments)


CASES = [
    Case(context=4, kind="ring"),
    Case(context=4, kind="gather"),
    Case(context=4, kind="ulysses", heads=8, kv_heads=4),
    Case(context=2, kind="ulysses", window=7, value_dim=4),
    Case(context=8, kind="ring", length=48, kv_heads=1),
    Case(context=8, kind="gather", length=32, window=5),
    Case(context=4, kind="ring", backend="reference", heads=6, kv_heads=3, head_dim=6, value_dim=4, documents=False),
    Case(context=4, kind="ring", length=40, window=5, value_dim=12),  # the window reaches one piece on: a step is left out
    Case(context=8, kind="ring", length=32, window=1),  # every token sees itself only
    Case(context=2, kind="ring", length=4, backend="reference", window=100),  # pieces of one token
    Case(context=2, kind="ring", length=1200, heads=1, kv_heads=1),  # several blocks to a piece, the last not full
    Case(context=2, kind="gather", length=1200, heads=1, kv_heads=1, window=170, documents=False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_equals_the_whole_sequence_on_one_device(case):
    assert_equals_the_whole(case, seeds=(1, 2) if case.length < 100 else (1,))


def assert_equals_the_whole(case, seeds):
    for seed in seeds:
        arrays, segments = draw(case, seed)
        ordered = [in_order(x, case) for x in (*arrays, segments)]
        step = step_of(case)
        truth = expected(case, arrays, segments)
        for name, actual, e in zip(("o", "dq", "dk", "dv"), step(*ordered), truth, strict=True):
            actual = in_order(np.asarray(actual), case, inverse=True)
            assert np.isfinite(actual).all()
            assert relative(actual, e) < 1e-5 or np.abs(actual - e).max() < 1e-6, (name, seed)


@functools.cache
def step_of(case):
    return compiled(region(case), *shapes_of(*draw(case)[0], draw(case)[1]))


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


def primitives(jaxpr, times=1):
    """Counts of the primitives that a program runs, those in a scan times its length."""
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += times
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            counts += primitives(inner, times * length)
    return counts


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def program_of(case, forward_only=False, remat=lambda f: f, dtype=jnp.float32):
    arrays, segments = draw(case)
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    whole = region(case, remat)
    function = (lambda *x: whole(*x)[0]) if forward_only else whole
    # Without what the backward pass alone needs, as XLA would drop it.
    return pe.dce_jaxpr(jax.make_jaxpr(function)(*arrays, segments).jaxpr, [True] * (1 if forward_only else 4))[0]


@pytest.mark.parametrize("context", [2, 4, 8])
@pytest.mark.parametrize("window", [0, 3])
def test_collectives_are_those_of_the_design(context, window):
    case = Case(context=context, length=8 * context, kv_heads=8, heads=8, window=window)
    steps = context - 1 if window == 0 else min(context - 1, 2)  # the window reaches one piece of 4 tokens on
    found = needed_steps(context, 4, window)
    assert len(found) == steps

    def collectives(kind, forward_only):
        counts = primitives(program_of(case._replace(kind=kind), forward_only))
        return {n: c for n, c in counts.items() if n in ("ppermute", "all_gather", "reduce_scatter", "all_to_all")}

    # Keys and values in one; backward they come again, and their gradients go as far, from the first visit home: where both
    # travel by the same way they share a transfer, in all steps but the first, and but the one that the window jumps to.
    assert collectives("ring", True) == {"ppermute": steps}
    shared = sum(a - b == b - c for c, b, a in zip(found, found[1:], found[2:], strict=False)) if steps > 2 else 0
    assert collectives("ring", False) == {"ppermute": 3 * steps - shared}
    assert collectives("gather", True) == {"all_gather": 2}
    assert collectives("gather", False) == {"all_gather": 4, "reduce_scatter": 2}
    assert collectives("ulysses", True) == {"all_to_all": 4}
    assert collectives("ulysses", False) == {"all_to_all": 8}


@pytest.mark.parametrize("kind", ["ring", "gather"])
def test_every_device_does_the_same_work_and_none_too_much(kind):
    """One program without a conditional does on each device 1/C of the causal triangle, but for its diagonal blocks."""
    case = Case(context=4, kind=kind, backend="reference", length=256, documents=False)
    program = program_of(case)
    assert not {"cond", "switch"} & set(primitives(program))
    assert "while" not in primitives(program)
    batch, share = 2, case.length // case.context
    scores = share**2 + (case.context - 1) * 2 * (share // 2) ** 2  # its own square, and two pieces of each other device
    matmul = 2 * batch * case.heads * case.head_dim
    assert dot_flops(program) == (2 + 5) * matmul * scores
    # Blockwise, its own square becomes a triangle, and the whole is L^2 / 2C and half a share's diagonal blocks.
    assert scores - share**2 / 2 == case.length**2 / (2 * case.context)


@pytest.mark.parametrize("kind", ["ring", "gather"])
def test_the_next_transfer_is_issued_before_the_work(kind):
    """In every scan body of the ring, and before the device's own block."""
    program = program_of(Case(context=4, kind=kind), forward_only=True)

    def order(jaxpr):
        names = []
        for equation in jaxpr.eqns:
            inner = [n for j in jaxprs_in_params(equation.params) for n in order(j)]
            if equation.primitive.name in ("ppermute", "dot_general", "all_gather"):
                names.append(equation.primitive.name)
            elif inner:
                names += inner
        return names

    names = [name for name, _ in itertools.groupby(order(program))]
    transfer = {"ring": "ppermute", "gather": "all_gather"}[kind]
    assert names[0] == transfer
    assert names == ([transfer, "dot_general"] * 2 if kind == "ring" else [transfer, "dot_general"])


@pytest.mark.parametrize("kind", ["ring", "gather", "ulysses"])
def test_remat_keeps_what_is_named_and_nothing_that_came_from_another_device(kind):
    case = Case(context=4, kind=kind, heads=4, kv_heads=4, head_dim=8, value_dim=4)
    policies = jax.checkpoint_policies
    plain = dot_flops(program_of(case))

    def flops(policy):
        return dot_flops(program_of(case, remat=lambda f: jax.checkpoint(f, policy=policy)))

    assert flops(policies.save_only_these_names("attention")) == plain  # nothing of the forward pass again
    assert flops(policies.nothing_saveable) > 1.2 * plain

    def kept(policy):
        attend = functools.partial(context_attention, plan=AttentionPlan("blockwise", kind), residual_name="attention")
        arrays, _ = draw(case)
        shares = [x[:, : case.length // case.context] for x in arrays[:3]]

        def local(*shares):
            found.extend(saved_residuals(jax.checkpoint(attend, policy=policy), *vary(shares)))
            return shares[0]

        found = []
        specs = {"in_specs": (P(),) * 3, "out_specs": P()}
        jax.make_jaxpr(jax.shard_map(local, mesh=mesh_of(case.context), **specs))(*shares)
        return sum(math.prod(aval.shape) for aval, source in found if "argument" not in source)

    share = 2 * case.length // case.context * case.heads
    if kind != "ulysses":  # output and logsumexp and no more, whatever the policy: neither scores nor keys of others
        assert kept(policies.everything_saveable) == share * (case.value_dim + 1)
        assert kept(policies.save_only_these_names("attention")) == share * (case.value_dim + 1)
        assert kept(policies.dots_saveable) < 10  # numbers, not arrays


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16, and cuDNN


def test_bfloat16_travels_as_it_is_with_float32_sums():
    """Keys and values beside the float32 sums of their gradients travel as bits, with nothing lost."""
    case = Case(context=4, kind="ring")
    arrays, segments = draw(case)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    ordered = [in_order(x, case) for x in (*rounded, jnp.asarray(segments))]
    step = compiled(region(case), *shapes_of(*ordered))
    truth = expected(case, [x.astype(jnp.float32) for x in rounded], segments)
    for actual, e in zip(step(*ordered), truth, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert relative(in_order(np.asarray(actual, np.float32), case, inverse=True), e) < 1e-2
    types = {
        e.outvars[0].aval.dtype.name for e in equations(program_of(case, dtype=jnp.bfloat16)) if e.primitive.name == "ppermute"
    }
    assert types == {"bfloat16", "uint32", "float32"}


PIECES = [
    (Rule(causal=True), Mask()),
    (Rule(causal=False), Mask()),
    (Rule(causal=True), "segments"),
    (Rule(causal=True, window=40), "places"),
    (Rule(causal=False, window=90), "places"),
]


def piece(rule, mask, length=64):
    """(q, k, v, do) in bfloat16, values narrower, and the mask of two pieces of which the keys come before where it says so."""
    rng = np.random.default_rng(3)
    shapes = [(2, length, *w) for w in ((4, 64), (2, 64), (2, 32), (4, 32))]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    if isinstance(mask, Mask):
        return arrays, mask
    q_index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    segments = jnp.asarray(ragged_segments(rng, 2, length))
    if mask == "segments":
        return arrays, Mask(q_segments=segments, k_segments=segments)
    if mask == "segments of later queries":
        return arrays, Mask(q_segments=jnp.broadcast_to(segments[:, -1:], segments.shape), k_segments=segments)
    return arrays, Mask(q_index + (0 if rule.causal else length), q_index, segments * 0 + 1, segments * 0 + 1)


@pytest.mark.parametrize(("rule", "mask"), PIECES)
def test_pieces_trace_with_cudnn(monkeypatch, rule, mask):
    """Traced only: there is no GPU to run it on. Shapes, dtypes and the kernels' own parameters are checked by JAX."""
    monkeypatch.setattr(fused_attention(), "check_cudnn_version", lambda: 91000)
    (q, k, v, do), mask = piece(rule, mask)

    def both(q, k, v, do):
        o, logsumexp = piece_attention(q, k, v, mask, rule, "cudnn_dense")
        return o, logsumexp, *piece_gradients(q, k, v, o, logsumexp, do, mask, rule, "cudnn_dense")

    shapes = jax.eval_shape(both, q, k, v, do)
    assert [x.shape for x in shapes] == [do.shape, do.shape[:3], q.shape, k.shape, v.shape]
    assert {x.dtype.name for x in shapes} == {"float32"}
    kernels = [e.params for e in jax.make_jaxpr(both)(q, k, v, do).eqns if "attention" in e.primitive.name]
    needs_dense = mask.q_segments is not None
    for parameters in kernels:
        assert parameters["variadic_args"] == (needs_dense, False)
        assert parameters["scale"] == 1 / math.sqrt(q.shape[-1])
        assert parameters["mask_type"].name == ("CAUSAL" if rule.causal else "NO_MASK")
        assert parameters["sliding_window_length"] is None  # in the dense mask: places may lie apart
    assert len(kernels) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("rule", "mask"), [*PIECES, (Rule(causal=False), "segments of later queries")])
def test_pieces_by_cudnn_match_the_reference_on_a_gpu(rule, mask, dense):
    """Also that cuDNN's logsumexp is the natural one, and that its backward takes that of all keys, here larger by log 2."""
    (q, k, v, do), mask = piece(rule, mask)
    found, backend = {}, "cudnn_dense" if dense or mask.q_index is not None else "cudnn"
    for name in (backend, "reference"):
        o, logsumexp = piece_attention(q, k, v, mask, rule, name)
        gradients = piece_gradients(q, k, v, o / 2, logsumexp + math.log(2), do, mask, rule, name)
        found[name] = (o, logsumexp, *gradients)
    for actual, e in zip(found[backend], found["reference"], strict=True):
        assert relative(np.asarray(actual), np.asarray(e)) < 2e-2


@pytest.mark.plan
def test_on_h100s_every_transfer_of_the_ring_hides_behind_attention_kernels():
    """In the scheduled program: each permute starts before a fused kernel and is waited for after it, and moves these bytes."""
    case = Case(context=4, kind="ring", backend="cudnn", length=32768, heads=32, kv_heads=8, head_dim=128, value_dim=128)
    devices = np.array(deviceless.make_devices("h100-sxm", case.context)).reshape(1, 1, 1, 1, 1, case.context, 1)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def struct(heads, dtype=jnp.bfloat16):
        sharding = NamedSharding(mesh, P(None, "context", "tensor") if heads else P())
        dims = (heads, case.head_dim) if heads else ()
        return jax.ShapeDtypeStruct((1, case.length, *dims), dtype, sharding=sharding)

    shapes = [struct(heads) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)] + [struct(0, jnp.int32)]
    with deviceless.cudnn_without_a_gpu((9, 0)):
        lowered = jax.jit(region(case._replace(documents=False), mesh=mesh)).lower(*shapes)
    compiled = lowered.compile({"xla_gpu_enable_latency_hiding_scheduler": True})
    transfers = read_collectives(compiled.as_text(), layout_of(mesh), find_chip("h100-sxm"))
    assert {t.kind for t in transfers} == {"collective-permute"}
    assert all(t.overlapped_calls == t.calls and t.hidden_seconds == pytest.approx(t.seconds) for t in transfers)
    share = case.length // case.context * case.kv_heads * (case.head_dim + case.value_dim)
    steps = case.context - 1
    # Keys and values in bf16, forward and back, and the sums of their gradients in float32. In this program, with nothing
    # between forward and backward pass, XLA keeps the first block that came and sends it once.
    assert sum(t.wire for t in transfers) == share * (steps * (2 + 2 + 4) - 2)


# ---------------------------------------------------------------------------------------------------------------------
# The order of the tokens


@pytest.mark.parametrize("context", [1, 2, 4, 8])
def test_zigzag_gives_each_device_equal_causal_work(context):
    seen = [sum(2 * piece + 1 for piece in zigzag_pieces(device, context)) for device in range(context)]
    assert set(seen) == {4 * context}  # in half pieces
    assert sorted(zigzag_order(context)) == list(range(2 * context))


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_a_batch_is_shared_out_by_one_gather_and_places_are_found_again(kind):
    context, length = 4, 24
    tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length)
    batch = {"tokens": tokens, "positions": tokens % 5, "segments": tokens % 7}

    def local(batch):
        shared = share_out(batch, kind)
        whole = jax.lax.dynamic_index_in_dim(jax.lax.all_gather(shared["segments"], "context"), 0, keepdims=False)
        return {**shared, "segments": whole}

    rows = P(None, "context")
    split = {"in_specs": ({name: rows for name in batch},), "out_specs": {"tokens": rows, "positions": rows, "segments": P()}}
    step = jax.shard_map(local, mesh=mesh_of(context), **split, check_vma=False)
    shared = step(batch)
    case = Case(context=context, kind=kind)
    for name, array in batch.items():
        np.testing.assert_array_equal(shared[name], in_order(array, case), name)
    assert primitives(jax.make_jaxpr(step)(batch).jaxpr)["all_gather"] == 1 + 1  # and one above, by the test
    for place in range(length):
        device, index = find_place(jnp.int32(place), kind, length // context, context)
        assert shared["tokens"][0, device * (length // context) + index] == place


# ---------------------------------------------------------------------------------------------------------------------
# The choice

GPU = {"platform": "gpu", "dtype": "bfloat16", "head_dim": 128, "masks_documents": False, "compute_capability": 9.0}
AMPERE = {"compute_capability": 8.0}
CHOICE = GPU | {"context": 4, "heads": 32, "kv_heads": 8, "sequence_length": 131072}


@pytest.mark.parametrize(
    ("change", "expected", "reason"),
    [
        ({}, "ring", "pieces of 16384 tokens do 65536 FLOP a received byte"),
        ({"sequence_length": 2048}, "ulysses", "pieces of 256 tokens do 1024 FLOP"),
        ({"sequence_length": 2048, "kv_heads": 2}, "ring", "context=4 does not divide the 2 kv heads"),
        ({"window": 4096}, "ulysses", "sliding windows over pieces are a dense 2048 MiB"),
        ({"window": 4096, "kv_heads": 2}, "ring", "does not divide"),
        ({"window": 4096, "backend": "blockwise"}, "ring", "65536 FLOP"),
        ({"masks_documents": True}, "ring", "65536 FLOP"),  # cuDNN can do both, in its packed layout
        ({"masks_documents": True, "window": 4096}, "ulysses", "over pieces are a dense 2048 MiB"),
        ({"masks_documents": True, "sequence_length": 16384} | AMPERE, "ring", "document masks are a dense 512 MiB"),
        ({"masks_documents": True} | AMPERE, "ring", "65536 FLOP"),  # cuDNN can do neither
        ({"context": 1}, "ring", "nothing to exchange"),
    ],
)
def test_auto_chooses_a_kind_and_says_why(change, expected, reason):
    kind, said = choose_context_attention("auto", **(CHOICE | change))
    assert kind == expected
    assert reason in said
    assert "\n" not in said


def test_an_explicit_kind_is_granted_or_refused():
    for kind in ("ring", "gather", "ulysses"):
        assert choose_context_attention(kind, **CHOICE) == (kind, "asked for")
    with pytest.raises(ExplainedError, match=r"context=3 does not divide the 8 kv heads of a device; use ring or gather"):
        choose_context_attention("ulysses", **(CHOICE | {"context": 3}))
    with pytest.raises(ExplainedError, match="did you mean 'ring'"):
        choose_context_attention("rings", **CHOICE)
