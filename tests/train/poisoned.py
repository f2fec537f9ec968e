"""A config whose batch 5 is a NaN, by one token in the rows of the last process: for runs in processes of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxtrain.config import Config, MeshConfig
from tests.faults import faulty

BAD_BATCH = 5


def get_config() -> Config:
    """The tiny run of the fault tests, of two devices. Batches and train steps are wrapped."""
    base = faulty.get_config()
    poison(base.train.global_batch_size)
    return replace(
        base,
        name="poisoned",
        mesh=MeshConfig(data=2, fsdp=1),
        train=replace(base.train, steps=12, compilation_cache=""),
        guard=replace(base.guard, non_finite="rollback", copies="stop"),
    )


def poison(batch_size: int) -> None:
    """Wraps what makes train steps, and what hands out batches."""
    from jaxtrain.data.pipeline import Data
    from tests.train.poison import NAN, poisonable

    poisonable(pytest.MonkeyPatch())
    healthy = Data.train_batch

    def train_batch(data, number, rows):
        batch = healthy(data, number, rows)
        tokens = np.where(batch["tokens"] >= NAN, 0, batch["tokens"])
        if number == BAD_BATCH and rows.stop == batch_size:
            tokens[-1, 2] = NAN
        return {**batch, "tokens": tokens}

    Data.train_batch = train_batch
