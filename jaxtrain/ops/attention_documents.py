"""Where the documents of packed sequences lie, as cuDNN's packed layout wants it: a start and a length of each.

A document is a run of tokens of one number. Tokens are counted over the whole batch: token l of row b is b L + l. One call of
the kernel has a fixed number of slots, and its working memory grows with slots times the longest document a slot may hold
(attention_packed.py). So documents go by length into a few calls of equal working memory: `SLOTS` slots a row of documents
up to the whole length L, then for each shorter call a quarter of that length and four times as many slots. Since no more than
L / l documents of at least l tokens fit into a row, no call but the last can have too few slots; the last is repeated.

Shape letters: B batch, L length, T = B L tokens, R slots of a call.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SLOTS = 4
SHORTEST_CALL = 512  # below it a call's fixed cost outweighs the working memory that a further call saves


class Call(NamedTuple):
    """One shape of the kernel: which documents it takes, by length."""

    over: int
    """It takes documents of more tokens than this."""
    length: int
    """And of at most so many."""

    def slots(self, tokens: int) -> int:
        """Return the number of documents that one call takes of a batch of `tokens`."""
        return SLOTS * tokens // self.length


def calls_of(length: int) -> tuple[Call, ...]:
    """Return the calls for rows of this length, the longest documents first."""
    longest = [length]
    while longest[-1] > SHORTEST_CALL and longest[-1] % SLOTS == 0:
        longest.append(longest[-1] // SLOTS)
    return tuple(Call(over, most) for over, most in zip([*longest[1:], 0], longest, strict=True))


class Runs(NamedTuple):
    """Some documents in the packed layout. An unused slot has length 0 (with -1, Blackwell GPUs fail at times, jax#30023)."""

    starts: jax.Array
    """int32 [R + 1], the first token of each; after the last, T."""
    lengths: jax.Array
    """int32 [R]."""


class Taken(NamedTuple):
    """The documents of one call, and where each token finds itself among them."""

    runs: Runs
    holds: jax.Array
    """bool [T], whether the token's document is in the call."""
    slot: jax.Array
    """int32 [T], its slot, and the token's `place` in the document; meaningless where the call does not hold it."""
    place: jax.Array


class Documents(NamedTuple):
    """All documents of a batch, token by token: each int32 [T], but `begins`."""

    begins: jax.Array
    """bool [T], whether the token is a document's first."""
    start: jax.Array
    """The first token of its document."""
    length: jax.Array
    """The number of tokens of its document."""

    @classmethod
    def of(cls, segments_BL: jax.Array) -> Documents:
        """Find the documents; padding (number 0) is one too, and every row begins one."""
        changes = segments_BL[:, 1:] != segments_BL[:, :-1]
        first = jnp.ones_like(segments_BL[:, :1], bool)
        begins = jnp.concatenate([first, changes], axis=1).reshape(-1)
        ends = jnp.concatenate([changes, first], axis=1).reshape(-1)
        index = jnp.arange(len(begins), dtype=jnp.int32)
        start = lax.cummax(jnp.where(begins, index, 0))
        end = lax.cummin(jnp.where(ends, index + 1, len(begins)), reverse=True)
        return cls(begins, start, end - start)

    def _ranks(self, call: Call) -> tuple[jax.Array, jax.Array]:
        fits = (self.length > call.over) & (self.length <= call.length)
        return fits, jnp.cumsum(self.begins & fits, dtype=jnp.int32)

    def number(self, call: Call) -> jax.Array:
        """Return how many documents the call has to take, int32."""
        return self._ranks(call)[1][-1]

    def take(self, call: Call, after: jax.Array | int = 0) -> Taken:
        """Return those of a call's documents that fill its slots once, leaving out the first `after` of them."""
        tokens = len(self.begins)
        slots = call.slots(tokens)
        fits, rank = self._ranks(call)
        slot = rank - 1 - after
        index = jnp.arange(tokens, dtype=jnp.int32)
        holds = fits & (slot >= 0) & (slot < slots)
        where = jnp.where(self.begins & holds, slot, slots)  # the last is out of range, and dropped
        starts = jnp.full_like(index, tokens, shape=slots + 1).at[where].set(index, mode="drop").at[slots].set(tokens)
        lengths = jnp.zeros_like(index, shape=slots).at[where].set(self.length, mode="drop")
        return Taken(Runs(starts, lengths), holds, slot, index - self.start)


def meeting_runs(q_segments_BL: jax.Array, k_segments_BL: jax.Array) -> tuple[Runs, Runs]:
    """Return the one document a row that goes on from a piece of keys into a later piece of queries, in the first of two slots.

    It is the last of the keys and the first of the queries; where these are two documents both lengths are 0. The second slot
    is never used: JAX packs from two slots a row on.
    """
    batch, length = q_segments_BL.shape
    goes_on = q_segments_BL[:, :1] == k_segments_BL[:, -1:]
    of_queries = jnp.cumprod(q_segments_BL == q_segments_BL[:, :1], axis=1).sum(axis=1, dtype=jnp.int32)
    of_keys = jnp.cumprod((k_segments_BL == k_segments_BL[:, -1:])[:, ::-1], axis=1).sum(axis=1, dtype=jnp.int32)
    row_starts = length * jnp.arange(batch, dtype=jnp.int32)

    def runs(used: jax.Array, start: jax.Array) -> Runs:
        lengths = jnp.where(goes_on[:, 0], used, 0)
        starts = jnp.stack([start, row_starts + length], axis=1).reshape(-1)
        return Runs(
            jnp.concatenate([starts, jnp.full_like(starts[:1], batch * length)]),
            jnp.stack([lengths, jnp.zeros_like(lengths)], axis=1).reshape(-1),
        )

    return runs(of_queries, row_starts), runs(of_keys, row_starts + length - of_keys)
