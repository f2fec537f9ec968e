"""Before configs/grpo_quickstart.py: a small decoder learns to add badly, from examples that are off by up to 7.

The sums are so many, 900, that learning their rule is easier than learning them by heart: held-out ones come out right too.
A minute on 2 cores. `python configs/grpo_warmup.py` writes the examples, and the sums for rewards, in runs/arithmetic.
"""

import json
import random
from pathlib import Path

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)

FOLDER = Path("runs/arithmetic")
SUMS = [(a, b) for a in range(10, 100) for b in range(10)]
MOST_OFF = 7


def get_config() -> Config:
    return Config(
        name="grpo_warmup",
        model=ModelConfig(
            num_layers=2,
            embed_dim=128,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            mlp_dim=512,
            vocab_size=257,
            dtype="float32",
            tie_embeddings=True,
            qk_norm="head",
        ),
        data=DataConfig(
            sources=(DataSource(kind="chat", path=str(FOLDER / "guesses.jsonl")),),
            tokenizer="byte",
            sequence_length=128,
        ),
        objective=ObjectiveConfig(kind="sft"),
        optimizer=OptimizerConfig(name="muon", peak_lr=6e-3, warmup_steps=20),
        train=TrainConfig(steps=150, global_batch_size=16, remat="none", log_every=10, validate_every=75),
        checkpoint=CheckpointConfig(every=150),
    )


def write_rows() -> None:
    """Write guesses.jsonl, whose answers are right one time in fifteen or so, and prompts.jsonl with the right answers."""
    chance = random.Random(0)
    guesses = [
        {"prompt": f"{a}+{b}=", "completion": str(a + b + chance.randint(-MOST_OFF, MOST_OFF))}
        for a, b in chance.choices(SUMS, k=20_000)
    ]
    prompts = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in SUMS]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, rows in (("guesses", guesses), ("prompts", prompts)):
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write_rows()
