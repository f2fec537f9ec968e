"""Forward and backward of blockwise attention over reference, by length: the figures behind BLOCKWISE_FROM_LENGTH.

.venv/bin/python -m tests.measure.blockwise_time
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.ops.attention import attention

TOKENS, ROUNDS = 2048, 5


def seconds(backend: str, *inputs: jax.Array) -> float:
    """The quickest of some rounds."""

    def loss(q, k, v, segments):
        return attention(q, k, v, backend=backend, segments_BL=segments).astype(jnp.float32).sum()

    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    jax.block_until_ready(step(*inputs))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(step(*inputs))
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Prints a ratio for each dtype and length, both measured in this run."""
    for dtype in ("float32", "bfloat16"):
        for length in (128, 256, 512, 1024, 2048):
            batch = TOKENS // length
            q, k, v = (jax.random.normal(jax.random.key(h), (batch, length, h, 64), dtype) for h in (4, 2, 2))
            segments = jnp.asarray(np.repeat(np.arange(1, 5), length // 4)[None].repeat(batch, 0), jnp.int32)
            ratio = seconds("blockwise", q, k, v, segments) / seconds("reference", q, k, v, segments)
            print(f"{dtype} length {length}: blockwise takes {ratio:.2f} of reference")


if __name__ == "__main__":
    main()
