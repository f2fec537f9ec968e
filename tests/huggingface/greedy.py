"""Greedy answers of `transformers` by the tiny model of each family: `python -m tests.huggingface.greedy --write`.

Needs the extra `hf`. goldens/greedy.npz then lets the tests run without torch. Beside the tokens it holds the smallest distance
of the two largest logits: a difference of rounding changes no token while it is smaller than half of that.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.huggingface import goldens, tiny

FILE = goldens.FOLDER / "greedy.npz"


def load(family: str) -> tuple[list[list[int]], float]:
    """A family's answers to each of `tiny.prompts()` alone, and the smallest distance of the two largest logits in them."""
    with np.load(FILE) as stored:
        return stored[family].tolist(), float(stored[f"{family} margin"])


def make_folder(folder: Path, family: str) -> None:
    """Write the tiny model with room for the answers."""
    golden = goldens.load(family)
    config, shapes = tiny.with_room(golden["config"], golden["shapes"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tiny.weight(name, shape, family) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def by_transformers(folder: Path, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(answers, distances of the two largest logits) [prompts, NEW_TOKENS]; shorter prompts are padded at the left."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    length = max(map(len, prompts))
    tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": tiny.NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    made = model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **settings)
    best = torch.stack(made.logits, 1).topk(2).values
    return made.sequences[:, length:].numpy(), (best[..., 0] - best[..., 1]).numpy()


def write(families: list[str]) -> None:
    """Compute and write the answers, and say whether `transformers` gives the same to each prompt alone."""
    stored = dict(np.load(FILE)) if FILE.exists() else {}
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            make_folder(Path(folder) / "in", family)
            prompts = tiny.prompts()
            together = by_transformers(Path(folder) / "in", prompts)[0]
            alone = [by_transformers(Path(folder) / "in", [prompt]) for prompt in prompts]
        answers, margins = (np.concatenate(parts) for parts in zip(*alone, strict=True))
        same = (answers == together).sum(1).tolist()
        print(f"{family:20} smallest margin {margins.min():.1e}, tokens that are the same in a batch: {same}", flush=True)
        stored |= {family: answers.astype(np.int16), f"{family} margin": margins.min()}
    np.savez_compressed(FILE, **stored)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit("usage: python -m tests.huggingface.greedy --write [FAMILY ...]")
    write(sys.argv[2:] or list(tiny.FAMILIES))
