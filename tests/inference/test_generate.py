"""Generation with a cache: the tokens that whole sequences give, on every mesh, beside any other rows."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import LatentAttentionConfig, MeshConfig, MoEConfig, PipelineConfig
from jaxtrain.config.rules import validate
from jaxtrain.errors import ExplainedError
from jaxtrain.inference import forward
from jaxtrain.inference.cache import CachedAttention, Entries
from jaxtrain.inference.model import Model
from jaxtrain.measure.layouts import BASE
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.ops.attention import CAUSAL
from jaxtrain.sharding import named
from jaxtrain.train.state import initial_params

PLAIN = replace(BASE.model, init_std=0.3)
MODELS = {
    "windows": replace(
        PLAIN,
        num_layers=5,
        pattern=("local", "local", "global"),
        sliding_window=4,
        num_kv_heads=2,
        attention_sinks=True,
        attention_softcap=2.0,
        qk_norm="width",
        tie_embeddings=True,
    ),
    "latents": replace(
        PLAIN,
        latent_attention=LatentAttentionConfig(query_rank=12, kv_rank=8, rope_dim=4, value_dim=6),
        moe=MoEConfig(num_experts=8, mlp_dim=16, first_dense_layers=1, shared_experts=1, bias_update_rate=0.01),
        num_layers=3,
    ),
    "table": replace(
        PLAIN,
        learned_positions=64,
        norm="layer",
        norm_bias=True,
        residual="parallel_one_norm",
        gated_mlp=False,
        mlp_bias=True,
        attention_bias="all",
        activation="gelu_tanh",
    ),
}
PROMPTS = [[7, 3, 9, 1, 4, 12, 2, 8], [11], [2, 2, 6, 1, 9]]
COUNT = 9


@functools.cache
def model(name: str, zero: int = 3, chunks: int = 1, **mesh: int) -> Model:
    config = replace(BASE, model=MODELS[name], mesh=MeshConfig(**{"fsdp": 1, **mesh}))
    config = replace(config, sharding=replace(config.sharding, zero=zero))
    if chunks > 1:
        config = replace(config, pipeline=PipelineConfig(schedule="v_shape", chunks=chunks))
    config = validate(config, math.prod(mesh.values() or [1]))
    devices = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.shape)])
    born = jax.jit(lambda: initial_params(config), out_shardings=named(devices, parameter_dims(config.model)))
    return Model(config, devices, born())


@functools.cache
def answers(name: str):
    return model(name).generate(PROMPTS, COUNT, slots=2, details=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_gives_what_whole_sequences_give(name: str):
    """With two places for three prompts, of which one is refilled, and a ring that wraps."""
    one = model(name)
    for prompt, answer in zip(PROMPTS, answers(name), strict=True):
        ids = prompt + answer.ids
        logits = one.logits([ids])[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer.ids
        likelihoods = one.score([ids])[0]
        log_ps = jax.nn.log_softmax(logits[:-1])[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(likelihoods, log_ps, atol=1e-5)
        np.testing.assert_allclose(likelihoods[len(prompt) - 1 :], answer.log_probabilities, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("windows", {"pipe": 2, "fsdp": 2, "tensor": 2, "zero": 1}),
        ("latents", {"expert": 2, "context": 2, "tensor": 2}),
        ("table", {"data": 2, "context": 2, "tensor": 2}),
        ("table", {"pipe": 2, "context": 2, "chunks": 2}),
    ],
)
def test_every_mesh_makes_the_same_tokens_and_logits(name: str, mesh: dict[str, int]):
    on_mesh = model(name, **mesh)
    assert [answer.ids for answer in on_mesh.generate(PROMPTS, COUNT, details=True)] == [a.ids for a in answers(name)]
    tokens = np.random.default_rng(0).integers(0, BASE.model.vocab_size, (3, 21))
    np.testing.assert_allclose(on_mesh.logits(tokens), model(name).logits(tokens), atol=2e-5)


@pytest.mark.parametrize("heads", [2, 4])
def test_attention_to_the_cache_runs_in_bfloat16(heads: int):
    """Of heads that share keys and of heads that do not; XLA's CPU backend lacks some products in bfloat16."""
    rng, positions = np.random.default_rng(0), np.tile(np.arange(8, dtype=np.int32), (4, 1))
    q, k, v = (rng.normal(size=(4, 8, count, 8)).astype(np.float32) for count in (heads, 2, 2))

    def attend(dtype: str) -> np.ndarray:
        empty = jnp.zeros((1, 4, 2, 64, 8), dtype)
        attention = CachedAttention(Entries(empty, empty), 0, positions, CAUSAL)
        return np.asarray(jax.jit(attention.attend)(*(array.astype(dtype) for array in (q, k, v))), np.float32)

    np.testing.assert_allclose(attend("bfloat16"), attend("float32"), atol=0.05)


def test_a_prompt_is_answered_alike_alone_and_beside_others():
    one, settings = model("windows"), {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}
    together = one.generate(PROMPTS, COUNT, slots=2, **settings)
    assert together[2] == one.generate(PROMPTS[2], COUNT, **settings | {"seed": 7})
    assert together != one.generate(PROMPTS, COUNT, slots=2, **settings | {"seed": 6})


def test_a_long_prompt_goes_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxtrain.inference.engine.LARGEST_CHUNK", 4)
    one = model("windows")
    fresh = Model(one.config, one.mesh, one.params)
    assert fresh.generate(PROMPTS[0], COUNT) == answers("windows")[0].ids


class Letters:
    """A tokenizer whose ids are letters."""

    def encode(self, text):
        return [ord(letter) - 97 for letter in text]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def test_texts_end_at_stop_strings_and_end_tokens_and_stream():
    one = model("windows")
    whole = answers("windows")[0].ids
    texts = Model(one.config, one.mesh, one.params, Letters())
    prompt, text = Letters().decode(PROMPTS[0]), Letters().decode(whole)
    assert texts.generate(prompt, COUNT) == text
    stop, told = text[4:6], []
    assert texts.generate(prompt, COUNT, stop=stop, on_text=lambda i, new: told.append(new)) == text[: text.index(stop)]
    assert "".join(told) == text[: text.index(stop)]
    for empty in ("", [stop, ""]):
        with pytest.raises(ExplainedError, match="a text that ends an answer is not empty"):
            texts.generate(prompt, COUNT, stop=empty)
    ended = Model(one.config, one.mesh, one.params, Letters(), (whole[3],))
    answer = ended.generate([prompt], COUNT, details=True)[0]
    cut = whole.index(whole[3])
    assert (answer.ids, answer.text) == (whole[: cut + 1], text[:cut])


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([[]], {}, "a prompt is empty"),
        ([[1000]], {}, "token ids are 0 to"),
        ("text", {}, "no tokenizer"),
        ([[1], "a"], {}, "not both at once"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"top_p": 0.0, "max_new_tokens": 0}, "max_new_tokens=0, top_p=0.0"),
    ],
)
def test_what_cannot_be_used_is_said(prompts, settings, words: str):
    with pytest.raises(ExplainedError, match=words):
        model("windows").generate(prompts, **settings)


def test_a_table_of_positions_is_not_left():
    with pytest.raises(ExplainedError, match="table of 64 positions"):
        model("table").generate([1, 2], 63)


@pytest.mark.parametrize("name", ["windows", "latents"])
def test_layers_one_by_one_make_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch):
    """As large ones lie on one CPU; here a stack with empty slots, and one of experts."""
    monkeypatch.setattr(forward, "APART_BYTES", 0)
    one = model(name)
    held = forward.apart(one.params, one.mesh)["layers"]
    assert len(held) == jax.tree.leaves(one.params["layers"])[0].shape[2]
    assert forward.apart(one.params, one.mesh, in_few_bits=True) is one.params
    fresh = Model(one.config, one.mesh, one.params)
    found = fresh.generate(PROMPTS, COUNT, slots=2, details=True)
    assert [answer.ids for answer in found] == [answer.ids for answer in answers(name)]
    for mine, other in zip(found, answers(name), strict=True):
        np.testing.assert_allclose(mine.log_probabilities, other.log_probabilities, atol=1e-5)
