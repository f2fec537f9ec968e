"""The two kinds of objectives: of single tokens, and of whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
from jax import lax

from jaxtrain.ops.losses import Average, Inputs, TokenLoss, TokenTerms, negative_log_likelihood

Batch = Mapping[str, jax.Array]
SequenceLoss = Callable[[jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]
"""(log p [B, L] of every target of the global batch, 0 where there is none; the batch) -> (loss, metrics), scalars."""
COEFFICIENTS = "coefficients"


@dataclass(frozen=True)
class Objective:
    """The loss of a token, of which training minimises the mean over all tokens that carry one in the global batch."""

    loss: TokenLoss
    """(log p of the target, {name: value}), all float32 [B, L], -> float32 [B, L]: elementwise, since it sees the sequence in
    chunks; differentiable in log p. A token without a target does not count, whatever its loss."""
    inputs: tuple[str, ...] = ()
    """Names of float32 arrays [B, L] that a batch must hold beside its tokens (weights, advantages, reference
    log-probabilities), for `Trainer.step(batch)`: data.sources give none."""
    average: Average = "targets"
    """targets: the mean over all targets. sum: their sum, where `inputs` hold the denominators."""
    measures: Mapping[str, TokenLoss] = field(default_factory=dict, hash=False)
    """Further numbers of a token, as the loss: their means over all targets are metrics of the step."""
    temperature: float = 1.0
    """Divides the logits under which log p is taken."""
    keeps_log_probs: bool = False
    """Whether a step's metrics hold `log_probs`, float32 [B, L], of the parameters before its update."""

    candidates: str = ""
    """Name of an input [B, L, K] of token ids: `loss` and `measures` then get log p of the target and these."""
    widths: Mapping[str, int] = field(default_factory=dict, hash=False)
    """K of each input that is [B, L, K]."""
    top_k: int = 0
    """Forward only: report so many of the most likely next tokens."""

    @property
    def terms(self) -> TokenTerms:
        """The terms that the kernel computes."""
        return TokenTerms(
            self.loss, self.average, tuple(self.measures.items()), self.keeps_log_probs, self.candidates, self.top_k
        )

    @property
    def keeps_tokens(self) -> bool:
        """True where reports have a number for each token."""
        return self.keeps_log_probs or self.top_k > 0


@dataclass(frozen=True)
class SequenceObjective:
    """A loss of whole sequences, or of the batch: a function of all its log-probabilities.

    A step scores, then weighs: it computes log p of every target (forward only), c = -d loss / d log p on global arrays, and
    then the gradients of sum_t -c_t log p_t at the same parameters, which are those of the loss, exactly. This costs one more
    forward pass.
    """

    loss: SequenceLoss
    """Differentiable in its first argument; its denominators are sums over the global batch."""
    inputs: tuple[str, ...] = ()
    """As those of `Objective`; the loss sees the batch's tokens too."""

    def weigh(self, log_probs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Return (coefficients [B, L], loss, metrics)."""
        (loss, metrics), gradient = jax.value_and_grad(self.loss, has_aux=True)(log_probs, batch)
        return -gradient, loss, metrics


def _minus_weighted(log_probs: jax.Array, inputs: Inputs) -> jax.Array:
    """Return zero, with the gradient -coefficient in log p."""
    return -inputs[COEFFICIENTS] * (log_probs - lax.stop_gradient(log_probs))


PRETRAIN = Objective(negative_log_likelihood)
SCORE = Objective(negative_log_likelihood, keeps_log_probs=True)
"""Reports every target's log-probability."""
WEIGHTED = Objective(_minus_weighted, (COEFFICIENTS,), "sum")
"""Has the gradients of a sequence objective, given its coefficients; its value is zero."""


def sums_of_segments(values: jax.Array, segments: jax.Array) -> jax.Array:
    """Return the sums of [B, L] over the documents of each row, [B, L + 2]; column s is document s, column 0 is padding."""
    count = segments.shape[1] + 2 + segments.shape[1] % 2
    return jax.vmap(lambda row, of: jax.ops.segment_sum(row, of, num_segments=count))(values, segments)
