"""The first step writes into the state's own memory, however the state came to be: else a restart needs twice the memory."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain.checkpoint import Checkpoints, restore
from jaxtrain.checkpoint.fast import FastTier
from jaxtrain.config import (
    CheckpointConfig,
    Config,
    GuardConfig,
    OptimizerConfig,
)
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.train.gradients import batch_sharding
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import Canonical, abstract_state, create_state
from jaxtrain.train.step import compile_train_step, place_numbers
from jaxtrain.train.step_acceptance import record_to_plain
from tests.tiny import tiny

CONFIG = tiny(
    model={"num_layers": 3, "vocab_size": 120},
    mesh={"fsdp": 2},
    data={"mask_documents": False},
    optimizer=OptimizerConfig(peak_lr=1e-3),
    train={"steps": 20, "global_batch_size": 4},
    guard=GuardConfig(non_finite="skip", spike="skip", spike_window=8),
)


class Start:
    """A mesh with its compiled step."""

    def __init__(self, config: Config):
        self.config, self.mesh = config, make_mesh(config.mesh, jax.devices()[:2])
        self.optimizer = make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))
        self.canonical = Canonical(config, self.mesh, self.optimizer)
        self.abstract = abstract_state(config, self.mesh, self.optimizer)

    def fresh(self) -> Any:
        return jax.block_until_ready(create_state(self.config, self.mesh, self.optimizer))


@pytest.fixture(scope="module")
def here() -> Start:
    start = Start(CONFIG)
    start.step = compile_train_step(CONFIG, start.mesh, start.optimizer, "reference")
    return start


def from_checkpoint(here: Start, folder: Path) -> Any:
    """Also what a rollback, a mirror's download and a checkpoint of another mesh end with: `Canonical.to_state`."""
    state = here.fresh()
    with Checkpoints(folder, CheckpointConfig(every=1)) as checkpoints:
        checkpoints.save(1, jax.block_until_ready(here.canonical.from_state(state)), {}, wait=True)
    return here.canonical.to_state(restore(folder, 1, here.canonical.abstract), record_to_plain(state["guard"]))


def from_snapshot(here: Start, folder: Path) -> Any:
    (folder / "run").mkdir()
    tier = FastTier(folder / "fast", folder / "run", lambda: "")
    tier.save(1, here.fresh(), {})
    tier.wait()
    found = tier.restore(0, here.abstract, lambda step, metadata: None)
    assert found is not None
    return found[1]


WAYS = {
    "fresh": lambda here, folder: here.fresh(),
    "checkpoint": from_checkpoint,
    "snapshot": from_snapshot,
}


def places(state: Any) -> list[list[int]]:
    """Where each leaf's shards lie."""
    return [[shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards] for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("way", WAYS)
def test_the_first_step_writes_into_the_states_own_memory(way: str, here: Start, tmp_path: Path):
    ids = np.random.default_rng(0).integers(0, 120, (4, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8))
    batch = jax.device_put({"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": positions}, batch_sharding(here.mesh))
    state = jax.block_until_ready(WAYS[way](here, tmp_path))
    before = places(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after, metrics = here.step(state, batch, place_numbers(here.config, here.mesh))
    assert np.isfinite(metrics["loss"])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert places(jax.block_until_ready(after)) == before
