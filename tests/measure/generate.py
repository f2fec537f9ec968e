"""Greedy generation beside `transformers`: tokens/s of both with the same weights, and of decoding at full memory bandwidth.

python -m tests.measure.generate [tiny] [135m], with the extra `hf`. Float32, 64 new tokens; the best of three runs, by turns.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import jaxtrain
from jaxtrain.inference.model import Model

PROMPT, NEW = 16, 64
TINY = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "vocab_size": 1024}
SMALL = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "vocab_size": 49152}
SHAPES = {"tiny": TINY | {"num_key_value_heads": 2}, "135m": SMALL | {"num_key_value_heads": 3, "tie_word_embeddings": True}}


def best(*works: Callable[[], object]) -> list[float]:
    """Seconds of the fastest of three calls of each, by turns, after one that compiles."""
    seconds = [[] for _ in works]
    for number in range(4):
        for work, own in zip(works, seconds, strict=True):
            begun = time.perf_counter()
            work()
            own += [time.perf_counter() - begun] * (number > 0)
    return [min(own) for own in seconds]


def compare(theirs: LlamaForCausalLM, ours: Model, batch: int) -> str:
    """Return a line on one batch size."""
    size = 4 * sum(p.numel() for p in theirs.parameters())
    tokens = np.random.default_rng(0).integers(3, ours.config.model.vocab_size, (batch, PROMPT))
    ids, prompts = torch.from_numpy(tokens), tokens.tolist()

    def of_theirs() -> list[list[int]]:
        with torch.no_grad():
            made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        return made[:, PROMPT:].tolist()

    def of_ours() -> list[list[int]]:
        return ours.generate(prompts, NEW, slots=batch)

    weights = torch.ones(size // 4)  # a sum reads them all, by all threads of torch
    slow, fast, reading = best(of_theirs, of_ours, lambda: [weights.sum().item() for _ in range(NEW)])
    bound = NEW / reading
    rates = f"transformers {batch * NEW / slow:.1f} tokens/s, jaxtrain {batch * NEW / fast:.1f}, ratio {slow / fast:.2f}"
    bounds = f"weights {size / 1e6:.0f} MB, bound {bound:.1f} steps/s, {bound / (NEW / fast):.2f} x ours"
    return f"batch {batch}: {rates}; same tokens: {of_theirs() == of_ours()}; {bounds}"


def main(*names: str) -> None:
    """Print a line for each shape and batch size."""
    for name in names or SHAPES:
        torch.manual_seed(0)
        theirs = LlamaForCausalLM(LlamaConfig(**SHAPES[name], eos_token_id=None)).eval()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = jaxtrain.load(folder)
        for batch in (1, 8):
            print(f"{name}, {compare(theirs, ours, batch)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
