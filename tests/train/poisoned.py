"""A config whose batch 5 is a NaN, by one token in the rows of the last process: for runs in processes of their own."""

from __future__ import annotations

import numpy as np
import pytest

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    GuardConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

ROWS, BAD_BATCH = 8, 5


def get_config() -> Config:
    """Two devices in all. Batches and train steps are wrapped: the product has no switch for that."""
    poison()
    return Config(
        name="poisoned",
        model=ModelConfig(
            num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32, vocab_size=257, dtype="float32"
        ),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), tokenizer="byte", sequence_length=16),
        mesh=MeshConfig(data=2, fsdp=1),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
        train=TrainConfig(
            steps=12, global_batch_size=ROWS, log_every=1, validate_every=0, sample_tokens=0, compilation_cache=""
        ),
        checkpoint=CheckpointConfig(every=4),
        guard=GuardConfig(non_finite="rollback"),
    )


def poison() -> None:
    """Wraps what makes train steps, and what hands out batches."""
    from jaxtrain.data.pipeline import Data
    from tests.train.poison import NAN, poisonable

    poisonable(pytest.MonkeyPatch())
    healthy = Data.train_batch

    def train_batch(data, number, rows):
        batch = healthy(data, number, rows)
        tokens = np.where(batch["tokens"] >= NAN, 0, batch["tokens"])
        if number == BAD_BATCH and rows.stop == ROWS:
            tokens[-1, 2] = NAN
        return {**batch, "tokens": tokens}

    Data.train_batch = train_batch
