"""Time a train step of ours, of torch, and its matmuls alone, in turns on one CPU.

    python -m tests.measure.rivals [WIDTH LAYERS LENGTH ROWS VOCABULARY]

Needs torch and transformers. All are Llama with AdamW in float32, heads of 64, and an MLP of three times the width. torch is
transformers' model as it is by default: eager, with torch's fused attention. The matmuls are y = x W, dx = g W^T and
dW = x^T g of each projection and of the head, jitted alone: a bound for a step without attention, norms and optimizer. A
kind's time is the least of its rounds, since other processes only ever add to it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from tests.measure.steps import stepper

ROUNDS = 4
Step = Callable[[], None]


class Sizes(NamedTuple):
    """The model and its batch."""

    width: int = 512
    layers: int = 8
    length: int = 512
    rows: int = 4
    vocabulary: int = 8192

    @property
    def mlp(self) -> int:
        """Width of the MLP."""
        return 3 * self.width


def our_config(sizes: Sizes, remat: Any = "none") -> Config:
    """Return the config of our step."""
    heads = sizes.width // 64
    model = ModelConfig(sizes.layers, sizes.width, heads, heads, 64, sizes.mlp, sizes.vocabulary, dtype="float32")
    data = DataConfig(sequence_length=sizes.length, mask_documents=False)
    return Config(model=model, mesh=MeshConfig(fsdp=1), data=data, train=TrainConfig(global_batch_size=sizes.rows, remat=remat))


def llama(sizes: Sizes) -> Any:
    """Return the model of torch."""
    shape = {"hidden_size": sizes.width, "intermediate_size": sizes.mlp, "num_hidden_layers": sizes.layers}
    heads = sizes.width // 64
    return LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=sizes.vocabulary, num_attention_heads=heads, max_position_embeddings=sizes.length)
    )


def torch_step(model: Any, sizes: Sizes) -> Step:
    """Return a function that takes one train step of a model of torch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, sizes.vocabulary, (sizes.rows, sizes.length)))

    def take() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return take


def matmuls(sizes: Sizes) -> Step:
    """Return a function that multiplies the matrices of one step."""
    d, f, tokens = sizes.width, sizes.mlp, sizes.rows * sizes.length
    shapes = {(d, d): 4 * sizes.layers, (d, f): 2 * sizes.layers, (f, d): sizes.layers, (d, sizes.vocabulary): 1}

    @jax.jit
    def products(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        return x @ w, g @ w.T, x.T @ g

    operands = [
        (tuple(jnp.ones(shape, jnp.float32) for shape in ((tokens, a), (a, b), (tokens, b))), count)
        for (a, b), count in shapes.items()
    ]

    def take() -> None:
        for arrays, count in operands:
            for _ in range(count):
                jax.block_until_ready(products(*arrays))

    return take


def least_seconds(kinds: Mapping[str, Step]) -> dict[str, float]:
    """Return the least seconds of each kind, taken in turns after one that warms up."""
    best = dict.fromkeys(kinds, float("inf"))
    for number in range(ROUNDS + 1):
        for kind, take in kinds.items():
            begun = time.perf_counter()
            take()
            if number:
                best[kind] = min(best[kind], time.perf_counter() - begun)
    return best


def main() -> None:
    """Print seconds a step of each kind, and its share of torch's."""
    sizes = Sizes(*map(int, sys.argv[1:6]))
    remats = {f"ours, remat {remat}": stepper(our_config(sizes, remat), "blockwise") for remat in ("none", "dots", "full")}
    best = least_seconds({"torch": torch_step(llama(sizes), sizes), **remats, "matmuls alone": matmuls(sizes)})
    for kind, seconds in best.items():
        print(f"{kind}: {seconds:.3f} s, {best['torch'] / seconds:.2f} times torch's speed")


if __name__ == "__main__":
    main()
