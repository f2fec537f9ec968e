"""Attention within documents by cuDNN's packed layout, its kernels in the place of which stand those of packed_kernel.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.jax_private import fused_attention
from jaxtrain.ops import attention_documents
from jaxtrain.ops.attention import attention
from jaxtrain.ops.attention_documents import SLOTS, Call, Documents, calls_of, meeting_runs
from jaxtrain.ops.attention_mask import CAUSAL, Rule
from tests.ops.packed_kernel import instead_of_cudnn
from tests.ops.test_attention import draw, oracle, ragged_segments, relative
from tests.ops.test_attention_context import Case, assert_equals_the_whole, primitives


def documents(kind, batch=2, length=64):
    """Segments [B, L] of a kind."""
    rng = np.random.default_rng(len(kind))
    index = np.broadcast_to(np.arange(length), (batch, length))
    return {
        "one document": np.ones((batch, length)),
        "of one token": 1 + index,
        "all padding": np.zeros((batch, length)),
        "of any length": ragged_segments(rng, batch, length),
        "short ones": 1 + np.cumsum(rng.integers(0, 3, (batch, length)) == 0, axis=1),
        "long, then short": np.where(index < length // 2 + 1, 1, 2 + index // 3),
        "numbers again": 1 + index // 5 % 2,
    }[kind].astype(np.int32)


KINDS = ("one document", "of one token", "all padding", "of any length", "short ones", "long, then short", "numbers again")


def runs_of(segments):
    """[(first token of the batch, length)], by a loop."""
    found = []
    for b, row in enumerate(segments):
        cuts = [0, *(i for i in range(1, len(row)) if row[i] != row[i - 1]), len(row)]
        found += [(b * len(row) + start, end - start) for start, end in zip(cuts, cuts[1:], strict=False)]
    return found


def test_calls_have_equal_working_memory_and_no_call_but_the_last_can_be_short_of_slots():
    assert calls_of(8192) == (Call(2048, 8192), Call(512, 2048), Call(0, 512))
    assert calls_of(32768)[-1] == Call(0, 512)
    assert calls_of(100) == (Call(0, 100),)
    assert calls_of(1022) == (Call(0, 1022),)  # 1022 tokens in four rows do not lie as 1022 / 4 in sixteen
    for length in (512, 2048, 4096, 8192, 24576):
        calls = calls_of(length)
        assert {call.slots(length) * call.length for call in calls} == {SLOTS * length}
        assert all(call.slots(3 * length) >= 3 * (length // (call.over + 1)) for call in calls[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_is_in_one_slot_of_one_call(kind, monkeypatch):
    monkeypatch.setattr(attention_documents, "SHORTEST_CALL", 8)
    segments = documents(kind)
    found, tokens = Documents.of(jnp.asarray(segments)), segments.size
    held, taken_runs = np.zeros(tokens, int), []
    for call in calls_of(segments.shape[1]):
        slots, count = call.slots(tokens), int(found.number(call))
        assert count <= slots or call.over == 0
        for after in range(0, max(count, 1), slots):
            taken = jax.tree.map(np.asarray, found.take(call, after))
            starts, lengths = taken.runs
            assert starts.shape == (slots + 1,)
            used = lengths > 0
            assert (starts[:-1][~used] == tokens).all()
            assert starts[-1] == tokens
            assert (np.diff(starts) >= lengths).all()
            assert (lengths[used] > call.over).all()
            assert (lengths <= call.length).all()
            taken_runs += zip(starts[:-1][used].tolist(), lengths[used].tolist(), strict=True)
            held += taken.holds
            for token in np.flatnonzero(taken.holds):
                assert starts[taken.slot[token]] + taken.place[token] == token
                assert taken.place[token] < lengths[taken.slot[token]]
    assert sorted(taken_runs) == runs_of(segments)
    assert (held == 1).all()


@functools.partial(jax.jit, static_argnames=("rule", "name"))
def with_gradients(q, k, v, do, segments, rule=CAUSAL, name=None):
    def compute(q, k, v):
        return attention(q, k, v, backend="cudnn", rule=rule, segments_BL=segments, residual_name=name)

    o, pull = jax.vjp(compute, q, k, v)
    return o, *pull(do)


@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_formula_with_gradients(kind, monkeypatch):
    """Grouped queries; rows of 64 tokens by calls for documents up to 64, 16 and 4, the last in several rounds if need be."""
    monkeypatch.setattr(attention_documents, "SHORTEST_CALL", 8)
    calls = instead_of_cudnn(monkeypatch)
    arrays, _ = draw(1, 2, 64, 4, 2, 8)
    segments = documents(kind)
    if kind == "numbers again":  # equal numbers that lie apart are two documents
        expected = oracle(*arrays, 1 + np.cumsum(np.diff(segments, prepend=0) != 0, axis=1))
    else:
        expected = oracle(*arrays, segments)
    with_gradients.clear_cache()
    for name, a, e in zip(("o", "dq", "dk", "dv"), with_gradients(*arrays, segments), expected, strict=True):
        assert relative(a, e) < 1e-5 or np.abs(a - e).max() < 1e-6, name
    assert [length for name, _, length in calls if name == "forward"] == [64, 16, 4, 4]
    assert {settings["mask_type"].name for _, settings, _ in calls} == {"CAUSAL"}


@pytest.mark.parametrize(("window", "value_dim", "scale"), [(5, 8, 0.0), (20, 4, 0.0), (0, 12, 0.3)])
def test_a_window_and_values_of_their_own_width(window, value_dim, scale, monkeypatch):
    monkeypatch.setattr(attention_documents, "SHORTEST_CALL", 8)
    calls = instead_of_cudnn(monkeypatch)
    (q, k, _, _), segments = draw(2, 2, 64, 4, 4, 8)
    rng = np.random.default_rng(3)
    v, do = (rng.normal(size=(2, 64, 4, value_dim)).astype(np.float32) for _ in range(2))
    rule = Rule(window=window, scale=scale)
    with_gradients.clear_cache()
    expected = oracle(q, k, v, do, segments, rule)
    for name, a, e in zip(("o", "dq", "dk", "dv"), with_gradients(q, k, v, do, segments, rule), expected, strict=True):
        assert relative(a, e) < 1e-5, name
    windows = {length: settings["sliding_window_length"] for _, settings, length in calls}
    assert windows == {length: window if window and window < length else None for length in (64, 16, 4)}


@pytest.mark.parametrize(("kept", "forwards"), [("attention", 1), ("other", 2)])
def test_a_policy_that_keeps_the_name_spares_the_second_forward(kept, forwards, monkeypatch):
    monkeypatch.setattr(fused_attention(), "check_cudnn_version", lambda: 91000)
    arrays, segments = draw(4, 1, 16, 2, 1, 8)
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in arrays)

    def loss(q, k, v):
        o = attention(q, k, v, backend="cudnn", segments_BL=jnp.asarray(segments), residual_name="attention")
        return o.astype(jnp.float32).sum()

    policy = jax.checkpoint_policies.save_only_these_names(kept)
    ran = primitives(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy), (0, 1, 2)))(q, k, v).jaxpr)
    calls = 2  # of each kernel: the one call of this length, and its repetition
    assert ran["dot_product_attention_fwd"] == calls * forwards
    assert ran["dot_product_attention_bwd"] == calls


def test_bfloat16_stays_bfloat16_and_the_logsumexp_float32(monkeypatch):
    instead_of_cudnn(monkeypatch)
    arrays, segments = draw(5, 2, 32, 4, 2, 8)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    with_gradients.clear_cache()
    expected = oracle(*(np.asarray(x, np.float32) for x in rounded), segments)
    for a, e in zip(with_gradients(*rounded, segments), expected, strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative(np.asarray(a, np.float32), e) < 2e-2


def test_more_elements_than_offsets_count_are_refused(monkeypatch):
    instead_of_cudnn(monkeypatch)
    q = jax.ShapeDtypeStruct((2**9, 8192, 8, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2**9, 8192), jnp.int32)
    with pytest.raises(ValueError, match="512 x 8192 tokens of 8 heads of 64 .* more train.microbatches"):
        jax.eval_shape(lambda q, s: attention(q, q, q, backend="cudnn", segments_BL=s), q, segments)


def test_a_piece_of_keys_meets_a_later_piece_of_queries_in_one_document():
    q_segments = np.array([[3, 3, 4, 4], [5, 5, 5, 5], [7, 8, 8, 0], [0, 0, 0, 0]], np.int32)
    k_segments = np.array([[1, 2, 2, 3], [5, 5, 5, 5], [6, 6, 6, 6], [2, 0, 0, 0]], np.int32)
    queries, keys = meeting_runs(jnp.asarray(q_segments), jnp.asarray(k_segments))
    assert queries.lengths.tolist() == [2, 0, 4, 0, 0, 0, 4, 0]
    assert keys.lengths.tolist() == [1, 0, 4, 0, 0, 0, 3, 0]
    assert queries.starts[::2].tolist() == [0, 4, 8, 12, 16]
    assert keys.starts[:-1:2].tolist() == [3, 4, 8, 13]


def test_the_primitives_below_jaxs_wrapper_are_called_as_they_want(monkeypatch):
    """Traced only. The kernels of packed_kernel.py return what these do."""
    monkeypatch.setattr(fused_attention(), "check_cudnn_version", lambda: 91000)
    (q, k, v, do), segments = draw(6, 2, 32, 4, 2, 8)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, do)]
    with_gradients.clear_cache()
    real = jax.eval_shape(with_gradients, *rounded, segments)
    with_gradients.clear_cache()
    instead_of_cudnn(monkeypatch)
    assert jax.eval_shape(with_gradients, *rounded, segments) == real


@pytest.mark.parametrize(
    "case",
    [
        Case(context=4, kind="ring", backend="cudnn", length=32),
        Case(context=2, kind="gather", backend="cudnn", length=48, value_dim=4),
        Case(context=2, kind="ulysses", backend="cudnn", length=32, window=7),
    ],
    ids=lambda case: case.kind,
)
def test_a_sequence_over_devices_equals_the_whole_on_one(case, monkeypatch):
    monkeypatch.setattr(attention_documents, "SHORTEST_CALL", 4)
    calls = instead_of_cudnn(monkeypatch)
    assert_equals_the_whole(case, seeds=(1, 2))
    in_pieces = {settings["mask_type"].name for _, settings, _ in calls}
    assert in_pieces == ({"CAUSAL"} if case.kind == "ulysses" else {"CAUSAL", "NO_MASK"})
