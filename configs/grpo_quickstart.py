"""Reinforcement: the decoder of configs/grpo_warmup.py learns to add from rewards alone. Some minutes on 2 cores."""

from grpo_warmup import FOLDER
from grpo_warmup import get_config as warmup

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    GrpoConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)


def reward(prompts: list[str], completions: list[str], rows: list[dict]) -> list[float]:
    """Return 1 for a right answer, else 0; a call has all answers to one prompt."""
    return [float(completion == row["answer"]) for completion, row in zip(completions, rows, strict=True)]


def get_config() -> Config:
    return Config(
        name="grpo_quickstart",
        init_from="runs/grpo_warmup",
        model=warmup().model,
        data=DataConfig(
            sources=(DataSource(kind="chat", path=str(FOLDER / "prompts.jsonl")),),
            tokenizer="byte",
            sequence_length=8,
            validation_fraction=0.1,
        ),
        objective=ObjectiveConfig(
            kind="grpo",
            grpo=GrpoConfig(reward="configs/grpo_quickstart.py", group_size=16, max_new_tokens=4),
        ),
        optimizer=OptimizerConfig(name="muon", peak_lr=2e-3, warmup_steps=5, weight_decay=0.0),
        train=TrainConfig(steps=400, global_batch_size=256, remat="none", log_every=5, validate_every=25),
        checkpoint=CheckpointConfig(every=50),
    )
