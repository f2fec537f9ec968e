"""A config made ready on a mesh: what training, replay and measuring all begin with. No state, no data, no files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import jax
import numpy as np

from jaxtrain.config import Config, Recipe
from jaxtrain.hardware import resolve_chip
from jaxtrain.layout import fewer_rows
from jaxtrain.mesh import describe_mesh, make_mesh
from jaxtrain.models.building import choose_attention
from jaxtrain.ops.float8_choice import choose_matmuls
from jaxtrain.train.feed import owned_rows, to_global
from jaxtrain.train.gradients import batch_names, batch_sharding
from jaxtrain.train.initial_weights import initial_weights
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.state import Canonical, create_state, state_of

PyTree = Any


class Prepared:
    """Mesh, attention backend, optimizer and sharding of batches of a valid config.

    Raises:
      ExplainedError: the attention backend that the config asks for cannot be had here.
    """

    def __init__(self, config: Config):
        self.mesh = make_mesh(config.mesh)
        chip = resolve_chip(config.telemetry.hardware, self.mesh.devices.flat[0].device_kind)
        self.config, self.matmuls = choose_matmuls(config, chip)
        """`matmuls` says their dtype, and why; "" where nothing is asked of them."""
        config = self.config
        self.backend, self.why_backend = choose_attention(config, self.mesh)
        self.optimizer = optimizer_of(config)
        self.sharding = batch_sharding(self.mesh)
        self.origin: dict[str, Any] = {}
        """Where the initial weights came from, if not at random; every checkpoint says it."""
        self.recipe = Recipe(config)
        self._of_stages: dict[int, Self] = {}

    def at(self, batch: int) -> Self:
        """Return this with the config of the stage to which a batch belongs."""
        if not self.config.train.stages:
            return self
        stage = self.recipe.at(batch)
        if stage.first not in self._of_stages:
            made = self._of_stages[stage.first] = self._with(stage.config)
            made.backend, made.why_backend = choose_attention(stage.config, self.mesh)
        return self._of_stages[stage.first]

    def for_validation(self, batch: int) -> Self:
        """Return `at(batch)` with train.global_batch_size and data.sequence_length, in which held-out text is scored through
        all stages.
        """
        if not self.config.train.stages:
            return self
        model = self.recipe.at(batch).config.model
        return self._with(replace(self.config, model=model, train=replace(self.config.train, stages=())))

    def of_rows(self, rows: int) -> Self:
        """Return this for batches of so many rows, train.global_batch_size or fewer (`layout.fewer_rows`)."""
        if rows == self.config.train.global_batch_size:
            return self
        microbatches = fewer_rows(self.config, rows)[1]
        train = replace(self.config.train, global_batch_size=rows, microbatches=microbatches)
        return self._with(replace(self.config, train=train))

    def _with(self, config: Config) -> Self:
        made = copy.copy(self)
        made.config = config
        return made

    def __str__(self) -> str:
        matmuls = f", matmuls in {self.matmuls}" if self.matmuls else ""
        return f"{describe_mesh(self.mesh)} in {self.config.model.dtype}{matmuls}"

    def rows(self, num_rows: int | None = None) -> slice:
        """Return which rows of a batch, by default a global one, this process's devices hold."""
        num_rows = self.config.train.global_batch_size if num_rows is None else num_rows
        return owned_rows(self.sharding, (num_rows, self.config.data.sequence_length))

    def place(self, batch: Mapping[str, np.ndarray], num_rows: int | None = None) -> dict[str, jax.Array]:
        """Return global arrays of a batch of which this process gives its `rows`; what no step reads is left out."""
        num_rows = self.config.train.global_batch_size if num_rows is None else num_rows
        names = tuple(name for name in batch_names(self.config) if name in batch)
        return to_global(batch, self.rows(num_rows), num_rows, names, self.sharding)

    def create_state(self) -> PyTree:
        """Return the state at step 0, born sharded: random, or with the weights of config.init_from.

        Raises:
          ExplainedError: init_from cannot be read, or holds another model.
        """
        if not self.config.init_from:
            return create_state(self.config, self.mesh, self.optimizer)
        given, self.origin = initial_weights(self.config, self.mesh, self.optimizer)
        return state_of(self.config, self.mesh, self.optimizer, given)

    def canonical(self) -> Canonical:
        """Return the conversions between the state in memory and the form in which it is saved."""
        return Canonical(self.config, self.mesh, self.optimizer)
