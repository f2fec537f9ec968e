"""What the router chooses, where that is not plain; its losses are held to their formulas in tests/models/test_moe_block.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import MoEConfig
from jaxtrain.ops.router import route


def routed(logits, bias=None, **fields):
    config = MoEConfig(**({"num_experts": len(logits), "experts_per_token": 2} | fields))
    routing = route(jnp.array(logits, jnp.float32)[None, None], None if bias is None else jnp.array(bias, jnp.float32), config)
    return [np.asarray(leaf)[0, 0] for leaf in routing]


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_equal_scores_go_to_the_lower_number(router):
    experts, weights, _ = routed([0.0, 1.0, 1.0, 1.0, 0.0], router=router)
    np.testing.assert_array_equal(experts, [1, 2])
    np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-6)


def test_the_bias_chooses_and_does_not_weigh():
    experts, weights, _ = routed([2.0, 1.0, 0.0, -1.0], bias=[0, 0, 0, 1.0], router="sigmoid", weight_scale=2.5)
    np.testing.assert_array_equal(experts, [3, 0])
    scores = 1 / (1 + np.exp([1.0, -2.0]))
    np.testing.assert_allclose(weights, 2.5 * scores / scores.sum(), rtol=1e-6)


def test_only_the_best_groups_are_open_even_where_scores_are_below_zero():
    """The best expert of all stands in the worse group; a bias makes every biased score negative."""
    logits, bias = [3.0, -3.0, 1.0, 1.0], [-2.0] * 4
    assert routed(logits, bias, router="sigmoid")[0][0] == 0
    experts, _, affinities = routed(logits, bias, router="sigmoid", groups=2, groups_per_token=1)
    np.testing.assert_array_equal(experts, [2, 3])
    np.testing.assert_allclose(affinities.sum(), 1, rtol=1e-6)


def test_mixtral_takes_the_softmax_of_the_chosen_logits():
    experts, weights, _ = routed([0.3, 2.0, -1.0, 1.5])
    np.testing.assert_array_equal(experts, [1, 3])
    np.testing.assert_allclose(weights, np.exp([2.0, 1.5]) / np.exp([2.0, 1.5]).sum(), rtol=1e-6)


def test_unnormalised_weights_are_the_scores():
    _, weights, affinities = routed([0.3, 2.0, -1.0, 1.5], normalize_weights=False)
    np.testing.assert_allclose(weights, affinities[[1, 3]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "softmax", "renormalised"])
def test_routing_by_a_loop(kind: str):
    """Every token by hand, in float64: DeepSeek-V3's best groups by the sum of two biased scores, V2's by the largest score."""
    random = np.random.default_rng(0)
    logits, bias = random.normal(size=(30, 12)), random.normal(size=12) * 0.2
    groups = {"groups": 4, "groups_per_token": 2, "weight_scale": 2.5}
    fields = {
        "deepseek_v3": {"router": "sigmoid", **groups},
        "deepseek_v2": {"normalize_weights": False, "group_score": "max", **groups},
        "softmax": {"normalize_weights": False},
        "renormalised": {},
    }[kind]
    for row in logits:
        exps = [np.exp(x) for x in row]
        scores = [1 / (1 + np.exp(-x)) for x in row] if kind == "deepseek_v3" else [e / sum(exps) for e in exps]
        chosen_by = [s + b for s, b in zip(scores, bias, strict=True)] if kind == "deepseek_v3" else scores
        closed = set()
        if "groups" in fields:
            parts = [sorted(chosen_by[3 * g : 3 * g + 3]) for g in range(4)]
            rank = [part[-1] + part[-2] if kind == "deepseek_v3" else part[-1] for part in parts]
            closed = {e for g in np.argsort(rank)[:2] for e in range(3 * g, 3 * g + 3)}
        best = sorted((e for e in range(12) if e not in closed), key=lambda e: -chosen_by[e])[:3]  # noqa: B023
        weights = np.array([scores[e] for e in best])
        if kind in ("deepseek_v3", "renormalised"):
            weights = weights / weights.sum()
        experts, got, _ = routed(row, bias if kind == "deepseek_v3" else None, experts_per_token=3, **fields)
        assert experts.tolist() == best
        np.testing.assert_allclose(got, weights * fields.get("weight_scale", 1.0), rtol=1e-5)
