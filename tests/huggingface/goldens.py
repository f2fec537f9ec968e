"""Logits and gradients of `transformers` for the tiny model of each family: `python -m tests.huggingface.goldens --write`.

Needs the extra `hf`. What it writes beside itself, goldens/FAMILY.npz, lets the tests run without torch: the family's
config.json, the name and shape of every weight in its files, float32 logits, and of the gradient of the mean loss with respect
to every weight its norm and its products with `tiny.direction`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.huggingface import tiny

FOLDER = Path(__file__).parent / "goldens"


def load(family: str) -> dict[str, Any]:
    """A family's golden: config (dict), shapes {name: shape}, logits [2, L, V], gradients {name: (norm, products [4])}."""
    with np.load(FOLDER / f"{family}.npz") as stored:
        described, gradients = json.loads(str(stored["described"])), stored["gradients"]
        shapes = {name: tuple(shape) for name, shape in described["shapes"].items()}
        norms = {name: (row[0], row[1:]) for name, row in zip(shapes, gradients, strict=True)}
        return {"config": described["config"], "shapes": shapes, "logits": stored["logits"], "gradients": norms}


def make_folder(family: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Write the tiny model as `transformers` writes a folder, with our weights; return the shapes by name."""
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file

    transformers.utils.logging.disable_progress_bar()

    class_name, _ = tiny.FAMILIES[family]
    config = getattr(transformers, class_name)(**tiny.arguments(family))
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    shapes = {name: value.shape for name, value in load_file(folder / "model.safetensors").items()}
    weights = {name: tiny.weight(name, shape, family) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return shapes


def compute(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """(logits, gradients by the names in the folder's file, mean loss) of the folder's model, in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    held = {name: torch.from_numpy(value.astype(np.int64)) for name, value in tiny.batch().items()}
    logits = model(input_ids=held["tokens"], position_ids=held["positions"], use_cache=False, **_masks(model.config)).logits
    alone = model(input_ids=held["tokens"][1:, 11:25], use_cache=False).logits
    apart = (logits[1:, 11:25] - alone).abs().max().item()
    assert apart < 1e-5 or "longrope" in json.dumps(model.config.to_dict()), f"packed documents see each other: {apart}"
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held["targets"].flatten(), ignore_index=tiny.IGNORED)
    loss.backward()
    return logits.detach().numpy(), gradients_of(model), loss.item()


def gradients_of(model: Any) -> dict[str, np.ndarray]:
    """Return a model's gradients by the names of its file; they take the place of its weights."""
    import torch
    from safetensors.numpy import load_file

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for _, buffer in model.named_buffers():
            buffer.zero_()
    with tempfile.TemporaryDirectory() as written:
        model.save_pretrained(written)
        return load_file(Path(written) / "model.safetensors")


def _masks(config: Any) -> dict[str, Any]:
    """The masks of gpt-oss, whose code in `transformers` (5.24) does not pass the positions on that tell documents apart."""
    import torch

    if config.model_type != "gpt_oss":
        return {}
    segments, places = tiny.batch()["segments"], np.arange(tiny.LENGTH)
    seen = (segments[:, :, None] == segments[:, None]) & (places[:, None] >= places)
    near = seen & (places[:, None] - places < config.sliding_window)
    masks = {"full_attention": seen, "sliding_attention": near}
    to_float = lambda mask: torch.where(torch.from_numpy(mask[:, None]), 0.0, torch.finfo(torch.float32).min)  # noqa: E731
    return {"attention_mask": {kind: to_float(mask) for kind, mask in masks.items()}}


def write(family: str) -> None:
    """Compute and write a family's golden."""
    with tempfile.TemporaryDirectory() as folder:
        shapes = make_folder(family, Path(folder))
        logits, gradients, loss = compute(Path(folder))
        config = json.loads((Path(folder) / "config.json").read_text())
    assert gradients.keys() == shapes.keys()
    rows = [
        [
            np.linalg.norm(gradients[name].astype(np.float64)),
            *(gradients[name] * tiny.direction(name, shape)).reshape(4, -1).sum(1),
        ]
        for name, shape in shapes.items()
    ]
    described = json.dumps({"config": config, "shapes": shapes})
    np.savez_compressed(FOLDER / f"{family}.npz", described=described, logits=logits, gradients=np.array(rows))
    zero = [name for name, row in zip(shapes, rows, strict=True) if row[0] == 0]
    print(f"{family:20} loss {loss:.4f}  largest logit {np.abs(logits).max():.2f}  without gradient: {zero}")


if __name__ == "__main__":
    names = sys.argv[2:] or list(tiny.FAMILIES)
    if sys.argv[1:2] != ["--write"]:
        sys.exit("usage: python -m tests.huggingface.goldens --write [FAMILY ...]")
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        write(name)
