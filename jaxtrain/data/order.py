"""The order of training sequences: an endless, shuffled, weighted mixture with random access.

Grain gives the two functions of a position that need no state and no memory: a permutation of any number of windows, and a
mixture by weights. Its readers, samplers and loaders keep iterator state and are not used: the position is the step number.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

FEW_WINDOWS = 1024
"""Below this count windows are shuffled by sorting random numbers. Grain's shuffle walks a cycle of 2^16 numbers whatever the
count: 11 ms per element for two windows, 65 us for a thousand, 24 us for many."""


def shuffle_seed(seed: int, source: int) -> int:
    """Return the seed of one source's shuffle, in [0, 2^32).

    It is hashed because grain adds the epoch to it: with the bare seed, epoch 1 of seed 0 would be epoch 0 of seed 1.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {source}".encode(), digest_size=4).digest(), "big")


class Order:
    """Element n of the mixture, for any n >= 0: (index of the source, index of the window in it).

    Each source gives all its windows once per epoch, shuffled anew each time. Sources alternate deterministically so that the
    shares in any stretch follow the weights (to within 1%, grain's rounding).
    """

    def __init__(self, window_counts: Sequence[int], weights: Sequence[float], seed: int):
        """Take one entry of `window_counts` (at least 1) and of `weights` (above 0) for each source."""
        import grain

        def turns(source: int) -> Any:
            return grain.MapDataset.range(sys.maxsize).map(lambda place: (source, place))

        sources = range(len(window_counts))
        self._turns: Any = (
            grain.MapDataset.mix([turns(source) for source in sources], list(weights)) if len(sources) > 1 else None
        )
        self._shuffles = [_shuffle(count, shuffle_seed(seed, source)) for source, count in enumerate(window_counts)]

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, window) of element `index`."""
        source, place = self._turns[index] if self._turns is not None else (0, index)
        return source, self._shuffles[source](place)


def _shuffle(count: int, seed: int) -> Callable[[int], int]:
    """Return a function from a position in a source's endless sequence to the window at that position."""
    if count < FEW_WINDOWS:
        return lambda place: _few_shuffled(count, seed, place)
    import grain

    windows: Any = grain.MapDataset.range(count).shuffle(seed=seed).repeat()
    return lambda place: int(windows[place])


def _few_shuffled(count: int, seed: int, place: int) -> int:
    epoch, index = divmod(place, count)
    at_once = -(-FEW_WINDOWS // count)
    return int(_epochs(count, seed, epoch // at_once, at_once)[epoch % at_once, index])


@lru_cache(maxsize=64)
def _epochs(count: int, seed: int, block: int, at_once: int) -> np.ndarray:
    """Return the orders of epochs block * at_once and following, [at_once, count], as the argsort of random 64-bit numbers."""
    numbers = np.random.Philox(key=np.array([seed, block], np.uint64)).random_raw(at_once * count)
    return numbers.reshape(at_once, count).argsort(axis=1, kind="stable")
