"""DeepSeek-V3 in shape (arXiv:2412.19437, section 4.2, and its config.json): 671 B parameters, 37 B active.

Multi-head latent attention; three dense layers, then 58 with a shared expert and 8 of 256 routed ones, of 4 of 8 groups, chosen
by sigmoid scores with a bias in place of a large balance loss. Its multi-token prediction module (14 B more) is left out.
"""

from jaxtrain.config import (
    Config,
    DataConfig,
    DataSource,
    LatentAttentionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PipelineConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="deepseek_v3",
        model=ModelConfig(
            num_layers=61,
            embed_dim=7168,
            num_heads=128,
            num_kv_heads=128,
            head_dim=128,
            mlp_dim=18432,
            vocab_size=129280,
            norm_epsilon=1e-6,
            init_std=0.006,
            latent_attention=LatentAttentionConfig(query_rank=1536, kv_rank=512, rope_dim=64, value_dim=128),
            moe=MoEConfig(
                num_experts=256,
                experts_per_token=8,
                mlp_dim=2048,
                shared_experts=1,
                first_dense_layers=3,
                router="sigmoid",
                weight_scale=2.5,
                groups=8,
                groups_per_token=4,
                balance_loss=0.0001,
                bias_update_rate=0.001,
            ),
        ),
        mesh=MeshConfig(pipe=16, expert=8),
        pipeline=PipelineConfig(schedule="1f1b"),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=4096),
        optimizer=OptimizerConfig(peak_lr=2.2e-4, warmup_steps=2000),
        train=TrainConfig(steps=500_000, global_batch_size=15360, microbatches=120, validate_every=1000, validate_batches=10),
    )
