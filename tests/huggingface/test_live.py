"""What `transformers` makes of our exports, and its greedy answers beside ours, live: needs the extra `hf`; skipped without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtrain
from jaxtrain import Trainer
from jaxtrain.config import CheckpointConfig, LoraConfig, OptimizerConfig
from jaxtrain.huggingface.adapters import export_adapter
from jaxtrain.huggingface.exporting import export
from jaxtrain.huggingface.importing import import_folder
from tests.huggingface import goldens, greedy, tiny
from tests.huggingface.test_folders import make
from tests.huggingface.test_init_from import config_of

pytestmark = pytest.mark.slow


def error_of_export(family: str, folder: Path) -> float:
    """Largest difference of the logits that `transformers` computes from our export, and from what it wrote itself."""
    pytest.importorskip("transformers")
    make(folder / "in", family)
    import_folder(str(folder / "in"), str(folder / "run"), "float32")
    export(str(folder / "run"), str(folder / "out"))
    (folder / "out" / "tokenizer.json").unlink()  # holds none
    seen = tiny.batch()["segments"] > 0
    return float(np.abs(goldens.compute(folder / "out")[0] - goldens.load(family)["logits"])[seen].max())


def compare_answers(family: str, folder: Path) -> tuple[list[int], list[float]]:
    """Tokens of each answer before the first that differs from live `transformers`, and its smallest margins."""
    pytest.importorskip("transformers")
    greedy.make_folder(folder / "in", family)
    ours = jaxtrain.load(folder / "in").generate(tiny.prompts(), tiny.NEW_TOKENS)
    equal, margins = [], []
    for prompt, answer in zip(tiny.prompts(), ours, strict=True):
        theirs, distance = greedy.by_transformers(folder / "in", [prompt])
        equal.append(int((theirs[0] == answer).cumprod().sum()))
        margins.append(float(distance.min()))
    return equal, margins


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama3_2"])
def test_peft_reads_our_adapters(family: str, tmp_path: Path):
    """Of attention and experts: logits of base and adapter are those of our merged export; and they come in again."""
    torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
    make(tmp_path / "base", family)
    (tmp_path / "base" / "tokenizer.json").unlink()  # it has no tokens
    config = config_of(tmp_path / "base", tmp_path / "run", fsdp=2, tensor=2, data=2)
    config = replace(config, optimizer=OptimizerConfig(peak_lr=0.05, schedule="constant"), lora=LoraConfig(rank=2))
    trainer = Trainer(replace(config, checkpoint=CheckpointConfig(every=1, asynchronous=False)))
    trainer.train()
    export_adapter(config.run_dir, str(tmp_path / "adapter"))
    export(config.run_dir, str(tmp_path / "merged"))

    def model(folder: str):
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32).eval()

    ids = torch.tensor(tiny.batch()["tokens"]).long()
    with torch.no_grad():
        base, want = model("base")(ids).logits, model("merged")(ids).logits[..., : tiny.VOCAB]
        got = peft.PeftModel.from_pretrained(model("base"), tmp_path / "adapter")(ids).logits
    assert (want - base).abs().max() > 0.1
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    again = replace(config, run_dir=str(tmp_path / "again"), lora=LoraConfig(rank=2, init_from=str(tmp_path / "adapter")))
    ours, theirs = (held.state["params"]["layers"]["lora"] for held in (trainer, Trainer(again)))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transformers_reads_our_export(family: str, tmp_path: Path):
    assert error_of_export(family, tmp_path) < 1e-6


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_are_those_of_transformers(family: str, tmp_path: Path):
    equal, margins = compare_answers(family, tmp_path)
    assert equal == [tiny.NEW_TOKENS] * len(equal), margins
