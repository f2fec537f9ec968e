"""The order in which training sequences come: an endless, shuffled, weighted mixture with random access."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any


def shuffle_seed(seed: int, source: int) -> int:
    """The seed of one source's shuffle, in [0, 2^32).

    Hashed, because grain adds the epoch to it: with the bare seed, epoch 1 of seed 0 would be epoch 0 of seed 1.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {source}".encode(), digest_size=4).digest(), "big")


class Order:
    """Element n of the mixture, for any n >= 0: (index of the source, index of the window in it).

    Each source gives all its windows once an epoch, shuffled anew each time. The sources take turns so that the shares of
    any stretch follow the weights (to within 1%, grain's rounding), with no randomness in whose turn it is.
    """

    def __init__(self, window_counts: Sequence[int], weights: Sequence[float], seed: int):
        """`window_counts` and `weights` have an entry for each source; counts are at least 1, weights above 0."""
        import grain

        def ordered(source: int) -> Any:
            windows = grain.MapDataset.range(window_counts[source]).shuffle(seed=shuffle_seed(seed, source))
            return windows.map(lambda window: (source, window)).repeat()

        sources = [ordered(source) for source in range(len(window_counts))]
        self._elements: Any = sources[0] if len(sources) == 1 else grain.MapDataset.mix(sources, list(weights))

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, window) of element `index`."""
        source, window = self._elements[index]
        return int(source), int(window)
