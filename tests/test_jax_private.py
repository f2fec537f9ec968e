"""What jaxtrain relies on of `jax._src`: another jax that has changed it fails here first."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxtrain import jax_private
from tests.launch.processes import free_port


def test_importing_it_does_not_import_jax():
    program = "import sys, jaxtrain.jax_private; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_lone_process_has_joined_no_service():
    state = jax_private.distributed_state()
    assert state.client is None
    assert not state.process_id
    assert (state.num_processes or 1) == 1


@pytest.fixture(scope="module")
def client():
    """The client of a service of one process, beside the global one, which is not touched."""
    state = type(jax_private.distributed_state())()
    state.initialize(f"127.0.0.1:{free_port()}", num_processes=1, process_id=0, local_device_ids=[])
    assert (state.num_processes, state.process_id) == (1, 0)
    yield state.client
    state.shutdown()


def test_the_store_keeps_words(client):
    client.key_value_set("folder/a", "1")
    client.key_value_set("folder/a", "2", allow_overwrite=True)
    client.key_value_set("folder/b", "3")
    assert client.key_value_try_get("folder/a") == "2"
    assert client.blocking_key_value_get("folder/b", 1000) == "3"
    assert sorted(client.key_value_dir_get("folder/")) == [("folder/a", "2"), ("folder/b", "3")]


@pytest.mark.parametrize(
    ("word", "call"),
    [
        ("NOT_FOUND", lambda client: client.key_value_try_get("never said")),
        ("DEADLINE_EXCEEDED", lambda client: client.blocking_key_value_get("never said", 1)),
        ("ALREADY_EXISTS", lambda client: [client.key_value_set("twice", "1") for _ in range(2)]),
    ],
)
def test_what_the_store_refuses_is_known_by_a_word(client, word, call):
    with pytest.raises(Exception, match=word):
        call(client)


def test_backends_are_initialized_once_devices_are_asked_for():
    jax.devices()
    assert jax_private.backends_are_initialized()


def test_an_equation_knows_the_line_that_it_comes_from():
    def double(x):
        return x + x

    equation = jax.make_jaxpr(double)(1.0).eqns[0]
    frame = jax_private.user_frame(equation.source_info.traceback)
    assert frame.file_name == __file__
    assert frame.start_line == double.__code__.co_firstlineno + 1
    assert str(equation.source_info.name_stack) == ""


def test_jax_asks_for_the_gpu_by_the_names_that_are_replaced():
    """planner.deviceless answers these three in jax's place: they must be global names that jax's own functions call."""
    library = jax_private.fused_attention()
    source = inspect.getsource(library)
    for name, parameters in (
        ("check_cudnn_version", 0),
        ("check_compute_capability", 1),
        ("is_cuda_compute_capability_equal", 1),
    ):
        assert len(inspect.signature(getattr(library, name)).parameters) == parameters
        assert source.count(f"{name}(") > 1, f"{name} is defined, or imported, and not called"


def test_cudnn_primitives_take_and_return_what_attention_in_pieces_gives_and_wants(monkeypatch):
    """Traced with every parameter by name; `tests/ops/test_attention_context.py` has the cases."""
    from jaxtrain.ops.attention_cudnn import CUDNN_FORWARD_PRIMITIVE, cudnn_piece, cudnn_piece_gradients
    from jaxtrain.ops.attention_mask import Mask, Rule

    library = jax_private.fused_attention()
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    assert {"CAUSAL", "NO_MASK"} <= {mask.name for mask in library.MaskType}
    assert isinstance(library.AttentionLayout.BTNH.value, int)
    assert library._dot_product_attention_fwd_p_wrapper.name == CUDNN_FORWARD_PRIMITIVE
    q = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)
    logsumexp = jax.ShapeDtypeStruct((2, 64, 4), jnp.float32)
    made = jax.eval_shape(lambda q, k, v: cudnn_piece(q, k, v, Mask(), Rule()), q, q, q)
    assert made == (q, logsumexp)
    gradients = jax.eval_shape(lambda *x: cudnn_piece_gradients(*x, Mask(), Rule()), q, q, q, q, logsumexp, q)
    assert gradients == (q, q, q)


def test_the_primitives_below_jaxs_wrapper_take_lengths_and_offsets_of_documents(monkeypatch):
    """Four documents a row; the names and the parameters are those of `ops.attention_packed`, for jax 0.10.2 and 0.12."""
    from jaxtrain.ops.attention_mask import Rule
    from jaxtrain.ops.attention_packed import packed_self, packed_self_gradients

    library = jax_private.fused_attention()
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    assert library._dot_product_attention_fwd_p.name == "dot_product_attention_fwd"
    assert library._dot_product_attention_bwd_p.name == "dot_product_attention_bwd"
    q, k = (jax.ShapeDtypeStruct((2, 64, heads, 32), jnp.bfloat16) for heads in (4, 2))
    logsumexp, segments = jax.ShapeDtypeStruct((2, 64, 4), jnp.float32), jax.ShapeDtypeStruct((2, 64), jnp.int32)
    made = jax.eval_shape(lambda q, k, s: packed_self(q, k, k, s, Rule()), q, k, segments)
    assert made == (q, logsumexp)
    gradients = jax.eval_shape(lambda q, k, x, s: packed_self_gradients(q, k, k, q, x, q, s, Rule()), q, k, logsumexp, segments)
    assert gradients == (q, k, k)


def test_the_carries_of_a_scan():
    def sums(constant, start, xs):
        return jax.lax.scan(lambda carry, x: ((carry[0] + x * constant, carry[1] + 1), x), (start, 0), xs)

    (eqn,) = [e for e in jax.make_jaxpr(sums)(2.0, 0.0, jnp.ones(3)).eqns if e.primitive.name == "scan"]
    assert jax_private.scan_carries(eqn.params) == slice(1, 3)
