"""Which files or documents are held out for validation: a pure function of their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

SPLIT_RULE = "blake2b-threshold-1"  # part of every cache key: change it whenever the rule below changes


def hash_share(name: str) -> float:
    """A number in [0, 1), uniform over names, the same on every machine."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / float(1 << 53)


def held_out(names: Iterable[str], fraction: float) -> np.ndarray:
    """Boolean mask of the names that are held out: those with hash_share(name) < fraction.

    A name keeps its side when others come or go, except for the one that is moved so that both sides have at least one,
    where there are two names or more and fraction > 0.
    """
    shares = np.fromiter((hash_share(name) for name in names), dtype=np.float64)
    mask = shares < fraction
    if len(shares) >= 2 and fraction > 0:
        if not mask.any():
            mask[shares.argmin()] = True
        elif mask.all():
            mask[shares.argmax()] = False
    return mask
