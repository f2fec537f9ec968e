"""Mixtral 8x7B in shape (Jiang et al. 2024, arXiv:2401.04088, and its config.json): 46.7 B parameters, 12.9 B active.

Its router is a softmax over the logits of the chosen two: the same as a softmax over all eight, normalised over the two. One
expert on each of 8 GPUs of a host, everything else sharded over them as data.
"""

from jaxtrain.config import Config, DataConfig, DataSource, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="mixtral_8x7b",
        model=ModelConfig(
            num_layers=32,
            embed_dim=4096,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=32000,
            rope_theta=1_000_000.0,
            moe=MoEConfig(num_experts=8, experts_per_token=2, mlp_dim=14336, balance_loss=0.02),
        ),
        mesh=MeshConfig(expert=8),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=4096),
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2000),
        train=TrainConfig(steps=500_000, global_batch_size=512, validate_every=1000, validate_batches=10),
    )
