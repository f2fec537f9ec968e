"""What the schedule of a program compiled for H100s hides: tensor parallelism's transfers behind the other half's matmuls."""

import pytest

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, ShardingConfig, TrainConfig
from jaxtrain.config.rules import validate
from jaxtrain.planner import deviceless


def exposed_over_tensor(take_turns: bool) -> float:
    """Share of the bytes along tensor with no matmul between start and end."""
    config = Config(
        model=ModelConfig(num_layers=4, embed_dim=1024, num_heads=16, num_kv_heads=16, mlp_dim=4096, vocab_size=512),
        data=DataConfig(sequence_length=1024, mask_documents=False),
        train=TrainConfig(global_batch_size=8),
        mesh=MeshConfig(fsdp=2, tensor=4),
        sharding=ShardingConfig(take_turns=take_turns),
    )
    rows = [row for row in deviceless.report(validate(config, 8)).rows if row.axes == "tensor"]
    return 1 - sum(row.overlapped for row in rows) / sum(row.wire for row in rows)


@pytest.mark.plan
@pytest.mark.slow
def test_turns_hide_the_transfers_of_tensor_parallelism():
    alone, in_turns = exposed_over_tensor(False), exposed_over_tensor(True)
    assert alone > 0.5
    assert in_turns < 0.5 * alone
