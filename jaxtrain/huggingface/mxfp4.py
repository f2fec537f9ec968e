"""MXFP4, in which gpt-oss stores its experts: blocks of 32 four-bit floats with one power of two (OCP Microscaling 1.0)."""

from __future__ import annotations

import numpy as np

BLOCKS, SCALES = "_blocks", "_scales"
VALUES_OF_BLOCK = 32
BIAS = 127
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The sixteen numbers of E2M1, by their code."""


def expand(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the matrices [experts, inputs, outputs], float32; exact, since a value is a small number times a power of two.

    Args:
      blocks: uint8 [experts, outputs, inputs / 32, 16]; the lower half of a byte comes first.
      scales: uint8 [experts, outputs, inputs / 32], exponents with a bias of 127.
    """
    values = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1)
    values = values.reshape(*blocks.shape[:-1], VALUES_OF_BLOCK)
    scaled = np.ldexp(values, scales[..., None].astype(np.int32) - BIAS)
    return scaled.reshape(*blocks.shape[:2], -1).swapaxes(1, 2)
