"""A random permutation of any number of elements, computed element by element without a table.

It is that of grain's index_shuffle: the cipher SIMON (Beaulieu et al. 2013, eprint 2013/404) in four rounds, with keys from
C++'s std::seed_seq, over the smallest blocks of an even number of bits, at least 16, that hold the count; what falls beyond it
is encrypted again (cycle walking, Black and Rogaway 2002).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

ROUNDS = 4
SMALLEST_BLOCK = 16  # bits


def permuted(indices: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return where the permutation of `count` elements numbered `seed`, in [0, 2^32), puts `indices`, [n] int64 each."""
    if count == 1:
        return np.zeros_like(indices)
    bits = math.ceil(math.log2(count - 1))
    half = max(bits + bits % 2, SMALLEST_BLOCK) // 2
    values = indices.astype(np.uint64)
    walking = np.arange(len(values))
    while walking.size:
        values[walking] = found = _encrypted(values[walking], seed, half)
        walking = walking[found >= count]
    return values.astype(np.int64)


def _encrypted(values: np.ndarray, seed: int, half: int) -> np.ndarray:
    """Return SIMON's encryption of blocks of 2 `half` bits."""
    mask = np.uint64((1 << half) - 1)

    def rotated(word: np.ndarray, by: int) -> np.ndarray:
        return (word << np.uint64(by)) | (word >> np.uint64(half - by))

    def mixed(word: np.ndarray) -> np.ndarray:
        return (rotated(word, 1) & rotated(word, 8)) ^ rotated(word, 2)

    left, right = values >> np.uint64(half), values & mask
    for key in _keys(seed):  # the halves take turns
        left, right = right, (left ^ mixed(right) ^ np.uint64(key)) & mask
    return (left << np.uint64(half)) | right


@lru_cache(maxsize=256)
def _keys(seed: int) -> tuple[int, ...]:
    """Return what std::seed_seq{seed} generates for ROUNDS numbers of 32 bits ([rand.util.seedseq] of the C++ standard)."""
    n, p, q = ROUNDS, 1, 2
    state = [0x8B8B8B8B] * n

    def stirred(number: int) -> int:
        return number ^ (number >> 27)

    for k in range(n):
        first = 1664525 * stirred(state[k] ^ state[(k + p) % n] ^ state[k - 1]) % 2**32
        second = first + (1 if k == 0 else k + seed if k == 1 else k)
        state[(k + p) % n] = (state[(k + p) % n] + first) % 2**32
        state[(k + q) % n] = (state[(k + q) % n] + second) % 2**32
        state[k] = second % 2**32
    for k in range(n):
        third = 1566083941 * stirred((state[k] + state[(k + p) % n] + state[k - 1]) % 2**32) % 2**32
        state[(k + p) % n] ^= third
        state[(k + q) % n] ^= (third - k) % 2**32
        state[k] = (third - k) % 2**32
    return tuple(state)
