"""Log-probabilities of texts after texts, in batches of like lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

MOST_LOGITS = 2**28
"""Logits of one batch, 1 GiB in float32: rows are as many as these allow."""
MOST_ROWS, LEAST_LENGTH = 64, 64
"""Of a batch."""


class Scorer(Protocol):
    """A model that gives log-probabilities, as `inference.model.Model`."""

    config: Any
    tokenizer: Any
    begins: tuple[int, ...]

    def score(self, tokens: Any, *, details: bool) -> Any:
        """Return (log p, whether each token is the likeliest), [B, L - 1] each."""
        ...


class Asked(NamedTuple):
    """Token ids: those before, and those whose log-probabilities are asked for."""

    before: list[int]
    ids: list[int]


class Likelihood(NamedTuple):
    """The log-probability of some tokens."""

    log_probability: float
    """Sum over the tokens, in nats."""
    is_greedy: bool
    """Whether each of them is the likeliest."""
    tokens: int


def asked(scorer: Scorer, context: str, continuation: str) -> Asked:
    """Return the ids of a text after another, encoded as one text, since a token may reach over their border.

    Spaces that end the context count as the continuation's, as tokens begin with them. With an empty context the tokens that
    begin a text stand before, or the one that separates documents.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = encode(scorer, context)
    whole = encode(scorer, context + continuation)
    return Asked([*scorer.begins, *before] if before else prefix_of(scorer), whole[len(before) :])


def encode(scorer: Scorer, text: str) -> list[int]:
    """Return the ids of a text."""
    return [int(i) for i in scorer.tokenizer.encode(text)] if text else []


def prefix_of(scorer: Scorer) -> list[int]:
    """Return the ids before a text without a context: those that begin a text, or the one that separates documents."""
    separator = getattr(scorer.tokenizer, "separator", -1)
    return [*scorer.begins] or [max(separator, 0)]


def windows(before: Sequence[int], ids: Sequence[int], length: int) -> list[Asked]:
    """Return a long text as parts of at most `length` tokens; each token is asked for once, after as many as fit.

    The first asks for all but the ids before it; the others for what is left, up to `length` - 1 tokens at a time.
    """
    parts, done = [], 0
    while done < len(ids):
        size = min(length - (len(before) if not done else 1), len(ids) - done)
        context = [*before, *ids][: len(before) + done]
        parts.append(Asked(list(context[-(length - size) :]), list(ids[done : done + size])))
        done += size
    return parts


def likelihoods(
    scorer: Scorer, requests: Sequence[Asked], length: int, advance: Callable[[int], None] = lambda count: None
) -> list[Likelihood]:
    """Return the log-probabilities of all requests; the mesh and the other requests of a batch do not change one.

    Args:
      length: most tokens of a sequence; longer ones lose their beginning.
      advance: called with the number of requests that are done.
    """
    fitting = [_cut(request, length) for request in requests]
    order = sorted(range(len(fitting)), key=lambda i: -len(fitting[i].before) - len(fitting[i].ids))
    found: list[Likelihood] = [Likelihood(0.0, True, 0)] * len(fitting)
    while order:
        longest = _power_of_two(len(fitting[order[0]].before) + len(fitting[order[0]].ids), LEAST_LENGTH)
        longest = min(longest, length)
        rows = max(1, MOST_LOGITS // (longest * scorer.config.model.padded_vocab_size))
        rows = min(_power_of_two(rows + 1) // 2, _power_of_two(len(order)), MOST_ROWS)
        rows = math.ceil(rows / scorer.config.mesh.batch_shards) * scorer.config.mesh.batch_shards
        batch, order = order[:rows], order[rows:]
        for i, one in zip(batch, _scored(scorer, [fitting[i] for i in batch], (rows, longest)), strict=True):
            found[i] = one
        advance(len(batch))
    return found


def _cut(request: Asked, length: int) -> Asked:
    whole = [*request.before, *request.ids][-length:]
    asked_for = min(len(request.ids), len(whole) - 1)
    return Asked(whole[: len(whole) - asked_for], whole[len(whole) - asked_for :])


def _power_of_two(count: int, least: int = 1) -> int:
    """Return the next power of two: so there are few shapes, of which each is compiled."""
    return max(least, 1 << (count - 1).bit_length())


def _scored(scorer: Scorer, requests: Sequence[Asked], shape: tuple[int, int]) -> list[Likelihood]:
    tokens = np.zeros(shape, np.int32)
    for row, request in enumerate(requests):
        whole = [*request.before, *request.ids]
        tokens[row, : len(whole)] = whole
    log_p, is_best = scorer.score(tokens, details=True)
    results = []
    for row, request in enumerate(requests):
        part = slice(len(request.before) - 1, len(request.before) + len(request.ids) - 1)
        total = float(log_p[row, part].sum(dtype=np.float64))
        results.append(Likelihood(total, bool(is_best[row, part].all()), len(request.ids)))
    return results
