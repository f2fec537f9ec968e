"""Choosing a token, against the filters written in numpy, and against frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.inference.sampling import Choice, choose

LOGITS = np.array([0.3, 2.0, -1.0, 1.2, 0.9, -3.0, 1.9, 0.0], np.float32)


def choice(rows: int, **settings) -> Choice:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0, "policy_temperature": 1.0} | settings
    dtypes = {"top_k": np.int32}
    arrays = {name: jnp.full(rows, value, dtypes.get(name, np.float32)) for name, value in values.items()}
    return Choice(**arrays, seed=jnp.arange(rows, dtype=jnp.uint32))


def expected(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, seen=()):
    """Probabilities by the filters in turn, one token at a time."""
    logits = LOGITS.astype(np.float64).copy()
    for token in seen:
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    order = np.argsort(-logits / temperature)
    kept = list(order[: top_k or len(order)])
    p = np.exp(logits[kept] / temperature)
    p /= p.sum()
    before = np.cumsum(p) - p
    kept = [token for token, share, reached in zip(kept, p, before, strict=True) if reached < top_p and share >= min_p * p[0]]
    chances = np.zeros(len(logits))
    chances[kept] = np.exp(logits[kept] / temperature)
    return chances / chances.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5, "top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3, "temperature": 1.5},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.2},
        {"penalty": 1.8, "seen": (1, 2)},
    ],
)
def test_tokens_come_with_the_probabilities_of_the_filters(settings):
    rows, seen = 20_000, np.zeros(len(LOGITS), bool)
    chances = expected(**settings)
    settings = dict(settings)
    seen[list(settings.pop("seen", ()))] = True
    tile = lambda row: jnp.broadcast_to(jnp.asarray(row), (rows, len(LOGITS)))  # noqa: E731
    tokens, log_ps = jax.jit(choose)(tile(LOGITS), tile(seen), choice(rows, **settings), jnp.zeros(rows, jnp.int32))
    counts = np.bincount(np.asarray(tokens), minlength=len(LOGITS)) / rows
    assert (counts[chances == 0] == 0).all()
    np.testing.assert_allclose(counts, chances, atol=5 * np.sqrt(0.25 / rows))
    np.testing.assert_allclose(log_ps, np.asarray(jax.nn.log_softmax(LOGITS))[np.asarray(tokens)], rtol=1e-5)


def test_temperature_zero_takes_the_likeliest_and_numbers_differ():
    logits, seen = jnp.asarray(LOGITS)[None].repeat(40, 0), jnp.zeros((40, len(LOGITS)), bool)
    greedy, _ = choose(logits, seen, choice(40, temperature=0.0), jnp.arange(40))
    assert set(np.asarray(greedy).tolist()) == {1}
    same = choice(40)._replace(seed=jnp.zeros(40, jnp.uint32))
    drawn, _ = choose(logits, seen, same, jnp.arange(40))
    again, _ = choose(logits, seen, same, jnp.arange(40))
    assert len(set(np.asarray(drawn).tolist())) > 2
    assert drawn.tolist() == again.tolist()


def test_log_probabilities_are_those_of_the_policy_temperature():
    logits = jnp.asarray(LOGITS)[None]
    token, log_p = choose(logits, jnp.zeros((1, 8), bool), choice(1, policy_temperature=0.5), jnp.zeros(1, jnp.int32))
    np.testing.assert_allclose(log_p[0], np.log(expected(temperature=0.5)[token[0]]), rtol=1e-5)
