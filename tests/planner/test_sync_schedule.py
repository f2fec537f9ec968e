"""What the schedule of a program compiled for H100s hides of the transfers between replicas, each on a host of its own."""

import functools
from dataclasses import replace

import pytest

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, SyncConfig, TrainConfig
from jaxtrain.config.rules import validate
from jaxtrain.parallel.sync import ReplicaExchange, exchange_at
from jaxtrain.planner import deviceless
from jaxtrain.program.collectives import read_collectives
from jaxtrain.program.groups import layout_of
from jaxtrain.train.exchange import exchanged_bytes

pytestmark = [pytest.mark.plan, pytest.mark.slow]
BASE = Config(
    model=ModelConfig(num_layers=4, embed_dim=1024, num_heads=16, num_kv_heads=16, mlp_dim=4096, vocab_size=512),
    data=DataConfig(sequence_length=1024, mask_documents=False),
    train=TrainConfig(global_batch_size=32),
    mesh=MeshConfig(replica=2, fsdp=8),
)


@functools.cache
def behind_matmuls(sync: SyncConfig, exchange: ReplicaExchange) -> float:
    """Share of the bytes between replicas that have matmuls between start and done."""
    config = validate(replace(BASE, sync=sync), 16)
    program, mesh, _ = deviceless.compile_for(config, exchange=exchange)
    transfers = read_collectives(program.as_text(), layout_of(mesh))
    sent = [transfer for transfer in transfers if "replica" in transfer.group.axes]
    wire = sum(transfer.wire for transfer in sent)
    assert wire == pytest.approx(exchanged_bytes(config, mesh, exchange), abs=8)
    return sum(transfer.overlapped for transfer in sent) / wire


@pytest.mark.parametrize(
    "sync",
    [SyncConfig(mode="delayed", delay=1), SyncConfig(mode="diloco", every=4, fragments=2, overlap=1)],
    ids=["delayed", "diloco"],
)
def test_late_exchanges_travel_behind_the_step(sync: SyncConfig):
    assert behind_matmuls(sync, exchange_at(sync, 5)) > 0.9


def test_an_exchange_that_is_awaited_at_once_travels_behind_nothing():
    """Which shows that the test above can fail."""
    sync = SyncConfig(mode="diloco", every=4)
    assert behind_matmuls(sync, exchange_at(sync, 4)) < 0.1
