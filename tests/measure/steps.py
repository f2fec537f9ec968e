"""A train step on one device, to be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxtrain.config import Config
from jaxtrain.measure.layouts import batch_of
from jaxtrain.mesh import make_mesh
from jaxtrain.objectives import objective_of
from jaxtrain.train.gradients import batch_names, batch_sharding
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.state import create_state
from jaxtrain.train.step import compile_train_step, place_numbers


def stepper(config: Config, backend: str, given: Mapping[str, np.ndarray] | None = None) -> Callable[[], None]:
    """Return a function that takes one train step and waits for it.

    Args:
      given: arrays of the batch, in place of random ones, and ones for the inputs of the objective.
    """
    mesh, optimizer = make_mesh(config.mesh, jax.devices()[:1]), optimizer_of(config)
    held, numbers = [create_state(config, mesh, optimizer)], place_numbers(config, mesh)
    rows, length = config.train.global_batch_size, config.data.sequence_length
    arrays = batch_of(rows, length, vocabulary=config.model.vocab_size)
    arrays |= {name: np.ones((rows, length), np.float32) for name in objective_of(config).inputs}
    arrays |= given or {}
    batch = jax.device_put({name: arrays[name] for name in batch_names(config)}, batch_sharding(mesh))
    step = compile_train_step(config, mesh, optimizer, backend)

    def take() -> None:
        held[0], metrics = step(held[0], batch, numbers)
        jax.block_until_ready(metrics)

    return take
