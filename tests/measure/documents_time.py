"""Forward and backward of blockwise attention: rows of short documents over rows of one document each, float32, on this CPU.

.venv/bin/python -m tests.measure.documents_time
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.measure.blockwise_time import seconds

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def main() -> None:
    """Print a ratio for each length, all measured in this run."""
    for rows, length in ((2, 2048), (1, 4096), (1, 8192)):
        shapes = [(rows, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
        index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
        times = {size: seconds("blockwise", q, k, v, jnp.asarray(1 + index // size)) for size in (length, 1024, 256)}
        shown = ", ".join(f"of {size} tokens {times[size] / times[length]:.2f}" for size in (1024, 256))
        print(f"{rows} x {length} tokens in documents {shown} of the time of one a row ({times[length]:.2f} s)")


if __name__ == "__main__":
    main()
