"""Fit how the loss falls with parameters and tokens, and which learning rate a size wants, to the final losses of small runs.

The law is that of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3), fitted as there by the Huber loss of the error in
log(loss), so that one run that went wrong does not bend it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtrain.errors import ExplainedError

HUBER = 5e-3
"""Errors in log(loss) above this count in proportion, those below quadratically: about what two seeds differ by."""
LEAST_RUNS = 6
"""Fewer losses than one more than the law's five numbers say nothing of how well it fits."""
EXPONENTS = (0.05, 1.5)
"""Bounds of alpha and beta: beyond them a term is a constant, or gone, within the small runs."""
REFITS = 200
SHARE = 0.9
"""Probability of the intervals."""


@dataclass(frozen=True)
class ScalingLaw:
    """loss(N, D) = E + A / N^alpha + B / D^beta, in nats a token, N parameters, D tokens."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """E + A / N^alpha + B / D^beta."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


@dataclass(frozen=True)
class Interval:
    """An estimate, and the bounds within which the truth lies with probability SHARE; None where too little is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class FittedLaw:
    """A law, and those of the refits to losses with the same scatter around it."""

    law: ScalingLaw
    refits: tuple[ScalingLaw, ...]
    scatter: tuple[float, ...]
    """Errors of log(loss) of the runs, scaled by sqrt(n / (n - 5)) for the five numbers that were fitted to them."""

    def predict(self, parameters: float, tokens: float) -> Interval:
        """Return the loss of one run of that size and length, with the scatter of a single run in the interval."""
        draws = np.random.default_rng(0).choice(self.scatter, len(self.refits))
        losses = [law.loss(parameters, tokens) * math.exp(error) for law, error in zip(self.refits, draws, strict=True)]
        low, high = np.quantile(losses, [(1 - SHARE) / 2, (1 + SHARE) / 2])
        return Interval(self.law.loss(parameters, tokens), float(low), float(high))

    @property
    def exponents(self) -> tuple[Interval, Interval]:
        """alpha and beta with their intervals over the refits."""
        return tuple(_over(self.law, self.refits, name) for name in ("alpha", "beta"))  # type: ignore[return-value]


def _over(law: ScalingLaw, refits: Sequence[ScalingLaw], name: str) -> Interval:
    low, high = np.quantile([getattr(refit, name) for refit in refits], [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Interval(getattr(law, name), float(low), float(high))


def fit_law(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], refits: int = REFITS) -> FittedLaw:
    """Return the law that minimises the Huber loss of log(loss), with refits to resampled errors (seed 0).

    Args:
      parameters, tokens, losses: of each run, in nats a token.
      refits: number of resamples: losses of the law times errors drawn from the runs' own.

    Raises:
      ExplainedError: fewer than LEAST_RUNS losses, or all of one size or one length.
    """
    n, d, y = (np.log(np.asarray(values, np.float64)) for values in (parameters, tokens, losses))
    if len(y) < LEAST_RUNS or np.ptp(n) == 0 or np.ptp(d) == 0:
        raise ExplainedError(
            f"{len(y)} losses of {len(set(n))} sizes and {len(set(d))} lengths do not tell the five numbers of the law; give "
            f"at least {LEAST_RUNS} runs, of two sizes and two lengths or more"
        )
    middle = n.mean(), d.mean()
    n, d = n - middle[0], d - middle[1]
    best = min((_minimise(start, n, d, y) for start in _starts(y)), key=lambda found: found[1])[0]
    errors = y - _log_loss(best, n, d)[0]
    scatter = (errors - errors.mean()) * math.sqrt(len(y) / max(len(y) - 5, 1))
    generator = np.random.default_rng(0)
    resampled = [_log_loss(best, n, d)[0] + generator.choice(scatter, len(y)) for _ in range(refits)]
    again = [_minimise(best, n, d, sample)[0] for sample in resampled]
    return FittedLaw(_law(best, *middle), tuple(_law(x, *middle) for x in again), tuple(map(float, scatter)))


def _law(x: np.ndarray, n: float, d: float) -> ScalingLaw:
    """Return the law of the fitted numbers, whose N and D are in units of e^n and e^d."""
    e, a, alpha, b, beta = map(float, x)
    return ScalingLaw(math.exp(e), math.exp(a + alpha * n), alpha, math.exp(b + beta * d), beta)


def _starts(y: np.ndarray) -> list[np.ndarray]:
    """Return points (log E, log A, alpha, log B, beta) to begin the search at; the least is taken of what they lead to."""
    low = y.min()
    return [
        np.array([low + math.log(share), low + math.log((1 - share) / 2), alpha, low + math.log((1 - share) / 2), beta])
        for share in (0.2, 0.5, 0.8)
        for alpha in (0.2, 0.6)
        for beta in (0.2, 0.6)
    ]


def _log_loss(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log loss [runs], its gradient [runs, 5]): log(e^(e) + e^(a - alpha n) + e^(b - beta d))."""
    e, a, alpha, b, beta = x
    terms = np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])
    top = terms.max(axis=0)
    total = top + np.log(np.exp(terms - top).sum(axis=0))
    shares = np.exp(terms - total)
    return total, np.stack([shares[0], shares[1], -n * shares[1], shares[2], -d * shares[2]], axis=1)


def _minimise(start: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """(the numbers that minimise the Huber loss from `start` on, that loss)."""
    from scipy import optimize

    least_squares: Any = optimize.least_squares  # its stubs know of no jacobian that is a function
    # E stays below every loss that was seen; its lower bound, and that of A and B, mean that the term is gone.
    low = np.array([y.min() - 7, y.min() - 9, EXPONENTS[0], y.min() - 9, EXPONENTS[0]])
    high = np.array([y.min(), np.inf, EXPONENTS[1], np.inf, EXPONENTS[1]])
    found = least_squares(
        lambda x: _log_loss(x, n, d)[0] - y,
        np.clip(start, low + 1e-6, high - 1e-6),
        lambda x: _log_loss(x, n, d)[1],
        (low, high),
        loss="huber",
        f_scale=HUBER,
        max_nfev=200,
    )
    return found.x, found.cost


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate


@dataclass(frozen=True)
class BestRate:
    """The learning rate at which a size's loss is least."""

    rate: float
    loss: float
    """Least loss of a run."""
    inside: bool = True
    """Whether runs on both sides were worse; else it is the best rate that was tried."""


def best_rate(losses: dict[float, float]) -> BestRate:
    """Return the vertex of the parabola, in log(rate), through the best run and its two neighbours.

    Args:
      losses: {learning rate: final loss}; infinite where a run diverged.

    Raises:
      ExplainedError: all runs diverged.
    """
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda i: losses[rates[i]])
    best = BestRate(rates[place], losses[rates[place]], inside=False)
    if not math.isfinite(best.loss):
        raise ExplainedError(f"all runs diverged, at learning rates {rates[0]:.3g} to {rates[-1]:.3g}; give a lower one")
    if place in (0, len(rates) - 1):
        return best
    near = rates[place - 1 : place + 2]
    if not all(math.isfinite(losses[rate]) for rate in near):  # no parabola goes through a run that diverged
        return dataclasses.replace(best, inside=True)
    x, y = np.log(near) - math.log(best.rate), np.array([losses[rate] for rate in near])
    curve, slope, _ = np.polyfit(x, y, 2)
    if curve <= 0:  # all three alike
        return dataclasses.replace(best, inside=True)
    return BestRate(best.rate * math.exp(-slope / (2 * curve)), best.loss)


def predict_rate(parameters: Sequence[float], rates: Sequence[float], wanted: float) -> Interval:
    """Return the best rate of a size by the line log(rate) = c + s log(N), least squares over the sizes.

    The interval is Student's for a single new value; None below three sizes. Sizes are of the same tokens per parameter.
    """
    if len(set(parameters)) < 2:
        return Interval(rates[0])
    from scipy.stats import t

    x, y = np.log(np.asarray(parameters, np.float64)), np.log(np.asarray(rates, np.float64))
    slope, level = np.polyfit(x - x.mean(), y, 1)
    away = math.log(wanted) - x.mean()
    value = level + slope * away
    free = len(x) - 2
    if free < 1:
        return Interval(math.exp(value))
    error = math.sqrt(((y - level - slope * (x - x.mean())) ** 2).sum() / free)
    width = t.ppf((1 + SHARE) / 2, free) * error * math.sqrt(1 + 1 / len(x) + away**2 / ((x - x.mean()) ** 2).sum())
    return Interval(*(math.exp(value + sign * width) for sign in (0, -1, 1)))
