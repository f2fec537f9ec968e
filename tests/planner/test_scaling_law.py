"""Laws of losses: what is fitted to losses of a known law is that law, and its intervals hold what they should."""

import math

import numpy as np
import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.planner.scaling_law import BestRate, ScalingLaw, best_rate, fit_law, predict_rate

CHINCHILLA = ScalingLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)  # Hoffmann et al. 2022, equation 10
SIZES = np.array([1e7, 2e7, 4e7, 8e7])
HELD_OUT = (3.2e8, 6.4e9)
"""Four times the largest size, at as many tokens per parameter."""


def losses(noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = np.repeat(SIZES, 3)
    d = n * np.tile([10, 20, 40], 4)
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(12))
    return n, d, (CHINCHILLA.E + CHINCHILLA.A / n**CHINCHILLA.alpha + CHINCHILLA.B / d**CHINCHILLA.beta) * scatter


def test_exact_losses_give_the_law_back():
    found = fit_law(*losses(0, 0), refits=3)
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(found.law, name) == pytest.approx(getattr(CHINCHILLA, name), rel=1e-4)
    assert found.predict(*HELD_OUT).value == pytest.approx(CHINCHILLA.loss(*HELD_OUT), rel=1e-6)


def test_noisy_losses_give_a_near_prediction_in_an_interval_that_holds():
    """With 0.2% of scatter: nine tenths of held-out runs are meant to fall into the intervals, of 16 at least 11 do."""
    truth, inside, off = CHINCHILLA.loss(*HELD_OUT), 0, []
    for seed in range(16):
        predicted = fit_law(*losses(0.002, seed), refits=30).predict(*HELD_OUT)
        run = truth * math.exp(0.002 * np.random.default_rng(100 + seed).standard_normal())
        assert predicted.low is not None
        assert predicted.high is not None
        inside += predicted.low <= run <= predicted.high
        off.append(abs(predicted.value / truth - 1))
    assert inside >= 11
    assert np.median(off) < 0.01


def test_one_run_that_went_wrong_does_not_bend_the_law():
    n, d, y = losses(0, 0)
    y[5] *= 1.3
    assert fit_law(n, d, y, refits=2).law.loss(*HELD_OUT) == pytest.approx(CHINCHILLA.loss(*HELD_OUT), rel=0.01)


@pytest.mark.parametrize("few", [slice(0, 5), slice(0, 3)])
def test_too_few_losses_are_refused(few: slice):
    n, d, y = losses(0, 0)
    with pytest.raises(ExplainedError, match="do not tell the five numbers of the law; give at least 6 runs"):
        fit_law(n[few], d[few], y[few])


def test_losses_of_one_length_are_refused():
    with pytest.raises(ExplainedError, match="of 4 sizes and 1 lengths"):
        fit_law([*SIZES, *SIZES], [1e8] * 8, [3.0] * 8)


def test_the_best_rate_is_the_vertex_of_a_parabola():
    tried = {rate: 2.0 + 0.1 * math.log(rate / 3e-3) ** 2 for rate in (1e-3, 2e-3, 4e-3, 8e-3)}
    found = best_rate(tried)
    assert found.inside
    assert (found.rate, found.loss) == pytest.approx((3e-3, tried[4e-3]))
    assert best_rate({1e-3: 3.0, 2e-3: 2.5, 4e-3: 2.1}) == BestRate(4e-3, 2.1, inside=False)
    assert best_rate({1e-3: 3.0, 2e-3: 2.5, 4e-3: math.inf}) == BestRate(2e-3, 2.5)
    with pytest.raises(ExplainedError, match="all runs diverged, at learning rates 1 to 2"):
        best_rate({1.0: math.inf, 2.0: math.inf})


def test_the_rate_of_a_larger_size_is_on_the_line_of_the_smaller_ones():
    rates = 0.5 * SIZES**-0.3
    found = predict_rate(SIZES, rates, 3.2e8)
    assert found.value == pytest.approx(0.5 * 3.2e8**-0.3)
    assert found.low == pytest.approx(found.high)
    noisy = predict_rate(SIZES, rates * np.array([1.1, 0.9, 1.2, 1.0]), 3.2e8)
    assert noisy.low is not None
    assert noisy.high is not None
    assert noisy.low < found.value < noisy.high
    assert predict_rate(SIZES[:2], rates[:2], 4e7).low is None
