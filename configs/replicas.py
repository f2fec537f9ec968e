"""Two replicas on the quickstart's text, to compare how they keep together; about two minutes of CPU time a run.

export XLA_FLAGS=--xla_force_host_platform_device_count=2
jaxtrain train --config=configs/replicas.py --name=every_step
jaxtrain train --config=configs/replicas.py --name=diloco --sync.mode=diloco --sync.every=20
jaxtrain train --config=configs/replicas.py --name=delayed --sync.mode=delayed --sync.delay=1
jaxtrain report runs/every_step runs/diloco runs/delayed --html=replicas.html
"""

from jaxtrain.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="replicas",
        model=ModelConfig(
            num_layers=2,
            embed_dim=128,
            num_heads=2,
            num_kv_heads=2,
            head_dim=64,
            mlp_dim=384,
            vocab_size=2048,
            dtype="float32",
            tie_embeddings=True,
            qk_norm="head",
        ),
        mesh=MeshConfig(replica=2, fsdp=1),
        data=DataConfig(sources=(DataSource(kind="stdlib"),), tokenizer="bpe:2048", sequence_length=128),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=40),
        train=TrainConfig(steps=400, global_batch_size=16, remat="none", log_every=5, validate_every=100, validate_batches=40),
        checkpoint=CheckpointConfig(every=0),
    )
