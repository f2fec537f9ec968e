"""The order of training sequences: an endless, shuffled, weighted mixture with random access.

Both functions of a position need no state and no memory, and give what grain's MapDataset.shuffle, repeat and mix give, which a
test compares: grain walks Python objects for each element, which costs more than reading the element's tokens. The position is
the step number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from jaxtrain.data.permutation import permuted

FEW_WINDOWS = 1024
"""Below this count windows are shuffled by sorting random numbers: `permuted` walks a cycle of 2^16 numbers for any count."""
AT_ONCE = 4096
"""Elements that are computed together, and kept until others are asked for."""
SMALLEST_SHARE = 100
"""Whole number that stands for the smallest weight, so that shares are right to 1%; grain's."""


def shuffle_seed(seed: int, source: int) -> int:
    """Return the seed of one source's shuffle, in [0, 2^32).

    It is hashed because the epoch is added to it: with the bare seed, epoch 1 of seed 0 would be epoch 0 of seed 1.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {source}".encode(), digest_size=4).digest(), "big")


class Order:
    """Element n of the mixture, for any n >= 0: (index of the source, index of the window in it).

    Each source gives all its windows once per epoch, shuffled anew each time. Sources alternate deterministically so that the
    shares in any stretch follow the weights (to within 1%, see SMALLEST_SHARE).
    """

    def __init__(
        self,
        window_counts: Sequence[int],
        weights: Sequence[float],
        seed: int,
        begins: Sequence[int] = (),
        in_order: Sequence[bool] = (),
    ):
        """Take one entry of `window_counts` (at least 1), `weights` (0 for none), `begins` and `in_order` for each source: the
        place in its endless sequence where it begins, by default 0, and whether it is not shuffled, by default False.
        """
        self._counts, self._begins = list(window_counts), begins or [0] * len(window_counts)
        self._seeds = seeds_of(seed, len(self._counts), in_order)
        self.shares = [int(weight * (SMALLEST_SHARE / min(filter(None, weights)))) for weight in weights]
        self._block = lru_cache(maxsize=8)(self._make_block)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, window) of element `index`."""
        return self.stretch(index, index + 1)[0]

    def stretch(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return elements start to stop - 1."""
        found = []
        while start < stop:
            block, place = divmod(start, AT_ONCE)
            found += self._block(block)[place : place + stop - start]
            start = (block + 1) * AT_ONCE
        return found

    def _make_block(self, block: int) -> list[tuple[int, int]]:
        """Return elements block * AT_ONCE and the following ones, AT_ONCE in all."""
        sources, places = take_turns(self.shares, block * AT_ONCE, AT_ONCE)
        windows = np.empty(AT_ONCE, np.int64)
        for source, (count, seed) in enumerate(zip(self._counts, self._seeds, strict=True)):
            own = sources == source
            windows[own] = shuffled(count, seed, places[own] + self._begins[source])
        return list(zip(sources.tolist(), windows.tolist(), strict=True))


def seeds_of(seed: int, sources: int, in_order: Sequence[bool]) -> list[int | None]:
    """Return the seed of each source's shuffle; None for one that is read in order."""
    return [None if source < len(in_order) and in_order[source] else shuffle_seed(seed, source) for source in range(sources)]


def take_turns(shares: Sequence[int], start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return of elements start to start + count - 1 of a mixture the source, [count], and the place in that source, [count].

    Source i of those from i on takes element k where floor(k (rest - share) / rest) does not grow, the rest being their
    shares' sum; the others take what is left, by the same rule.
    """
    before = np.arange(start, start + count).astype(object if (start + count) * sum(shares) >= 2**63 else np.int64)
    after, rest = before + 1, sum(shares)
    sources, places = np.full(count, -1), np.zeros(count, np.int64)
    for source, share in enumerate(shares):
        next_before, next_after = (number * (rest - share) // max(rest, 1) for number in (before, after))
        taken = (sources < 0) & (next_before == next_after)
        sources[taken] = source
        places[taken] = (before - next_before)[taken]
        before, after, rest = next_before, next_after, rest - share
    return sources, places


def drawn(shares: Sequence[int], count: int) -> list[int]:
    """Return how many of the first `count` elements of a mixture come from each source, by the rule of `take_turns`."""
    counts, rest = [], sum(shares)
    for share in shares:
        others = count * (rest - share) // max(rest, 1)
        counts.append(count - others)
        count, rest = others, rest - share
    return counts


def shuffled(count: int, seed: int | None, places: np.ndarray) -> np.ndarray:
    """Return the windows at `places`, ascending, of a source's endless sequence; in order where there is no seed."""
    if seed is None:
        return places % count
    windows = np.empty(len(places), np.int64)
    at_once = -(-FEW_WINDOWS // count)  # epochs: one where there are many windows
    blocks = places // (count * at_once)
    for block in np.unique(blocks).tolist():
        own = blocks == block
        if count < FEW_WINDOWS:
            windows[own] = _epochs(count, seed, block, at_once)[places[own] - block * count * at_once]
        else:
            windows[own] = permuted(places[own] - block * count, count, (seed + block) % 2**32)
    return windows


@lru_cache(maxsize=64)
def _epochs(count: int, seed: int, block: int, at_once: int) -> np.ndarray:
    """Return the orders of epochs block * at_once and following, [at_once * count], as the argsort of random 64-bit numbers."""
    numbers = np.random.Philox(key=np.array([seed, block], np.uint64)).random_raw(at_once * count)
    return numbers.reshape(at_once, count).argsort(axis=1, kind="stable").reshape(-1)
