"""The quickstart, short enough for thousands of steps of several processes, with the faults of a plan (see faulty.py)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from jaxtrain.config import Config, DistributedConfig, MeshConfig
from jaxtrain.config.loading import load_config
from tests.faults.faulty import Faults, process_id

EVERY = 20
"""Steps between two checkpoints."""


def get_config() -> Config:
    """configs/quickstart.py on 2 devices, four rows of 32 tokens a step, no validation."""
    process, folder = process_id(), os.environ.get("JAXTRAIN_TEST_FOLDER")
    if folder and process is not None:
        Faults(Path(folder), process).install()
    config = load_config("configs/quickstart.py")
    return replace(
        config,
        name="soaked",
        mesh=MeshConfig(data=2),  # every device does all of Muon's matmuls: four take twice as long on two cores
        data=replace(config.data, sequence_length=32),
        train=replace(config.train, global_batch_size=4, log_every=1, validate_every=0, sample_tokens=0),
        checkpoint=replace(config.checkpoint, every=EVERY, keep=3),
        distributed=DistributedConfig(heartbeat_seconds=10, start_timeout_seconds=120, hang_seconds=20),
    )
