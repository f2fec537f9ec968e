"""The quickstart's model in three stages: short sequences, longer ones, and an annealed end on one part of the text.

Under a minute on 2 cores.
"""

import dataclasses
import sysconfig

from jaxtrain.config import Config, DataSource, OptimizerConfig, Stage
from jaxtrain.config.loading import load_config


def get_config() -> Config:
    base = load_config("quickstart")
    asyncio = DataSource(kind="text", path=f"{sysconfig.get_paths()['stdlib']}/asyncio/*.py", weight=0.05)
    stages = (
        Stage(name="long", from_step=80, sequence_length=512, global_batch_size=4, rope_theta=5e4, batch_rule="sqrt"),
        Stage(
            name="anneal",
            from_step=130,
            weights=(0.7, 0.3),
            schedule="warmup_stable_decay",
            decay_fraction=1.0,
            final_lr_fraction=0.0,
            weight_decay=0.01,
        ),
    )
    return dataclasses.replace(
        base,
        name="stages_quickstart",
        data=dataclasses.replace(base.data, sources=(*base.data.sources, asyncio), sequence_length=128),
        optimizer=OptimizerConfig(name="muon", peak_lr=4e-3, warmup_steps=20, schedule="constant"),
        train=dataclasses.replace(
            base.train, steps=170, stages=stages, global_batch_size=8, validate_every=20, validate_batches=16, sample_tokens=100
        ),
        checkpoint=dataclasses.replace(base.checkpoint, every=100),
    )
