"""The order of layers in memory: stacked as [chunk, stage, layer of the part, ...], canonically as [num_layers, ...].

Part p = chunk * stages + stage holds consecutive layers, so an even cut is a plain reshape of the canonical order. If layers do
not divide, some parts hold one layer less and an empty slot (zeros) at their end, which the executor skips: the last part
first, then the first one, and so on inward, because those also do the loss and the embedding.

Part p of a folded stack (`layout.stage_of_part`) lies on stage S - 1 - p % S in odd chunks.

Where kinds of layers repeat with a period (`model.pattern`), a part holds whole groups of that many layers, so that a slot's
place in the pattern is the same on every stage; the group at the end of the stack may be incomplete.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config import FOLDED_SCHEDULES, Config
from jaxtrain.layout import layers_per_part

PyTree = Any


@dataclass(frozen=True)
class Stacking:
    """The cut of `num_layers` layers into `stages * chunks` parts."""

    num_layers: int
    stages: int
    chunks: int
    period: int = 1
    """Layers in a group that no cut divides."""
    folded: bool = False
    """Whether odd chunks go through the stages from the last to the first."""

    @property
    def layers_per_part(self) -> int:
        """Number of slots of a part."""
        return layers_per_part(self.num_layers, self.stages, self.chunks, self.period)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[chunks, stages, layers_per_part]."""
        return self.chunks, self.stages, self.layers_per_part

    @property
    def is_even(self) -> bool:
        """Return whether every slot holds a layer."""
        return math.prod(self.shape) == self.num_layers

    def counts(self) -> np.ndarray:
        """Return the number of layers that each stage holds of each chunk, int32 [chunks, stages]."""
        parts, groups = self.stages * self.chunks, math.ceil(self.num_layers / self.period)
        empty = parts * self.layers_per_part // self.period - groups
        outermost_first = sorted(range(parts), key=lambda part: (min(part, parts - 1 - part), -part))
        counts = np.full(parts, self.layers_per_part, np.int32)
        counts[outermost_first[:empty]] -= self.period
        counts[np.flatnonzero(counts)[-1]] -= groups * self.period - self.num_layers
        return self._fold(counts.reshape(self.chunks, self.stages))

    def _fold(self, parts: Any) -> Any:
        """[chunks, stages, ...] in the order of parts -> by stage; it is its own inverse."""
        if not self.folded:
            return parts
        turned = [parts[chunk, ::-1] if chunk % 2 else parts[chunk] for chunk in range(self.chunks)]
        return (jnp if isinstance(parts, jax.Array) else np).stack(turned)

    def layer_slots(self) -> np.ndarray:
        """Return each layer's slot in the flattened [chunks * stages * layers_per_part], int32 [num_layers]."""
        held = self._fold(np.arange(self.layers_per_part) < self.counts()[..., None])
        slots = self._fold(np.arange(math.prod(self.shape), dtype=np.int32).reshape(self.shape))
        return slots[held]

    def layer_numbers(self) -> np.ndarray:
        """Return the layer number in each slot, int32 [chunks, stages, layers_per_part]; -1 in an empty slot."""
        numbers = np.full(math.prod(self.shape), -1, np.int32)
        numbers[self.layer_slots()] = np.arange(self.num_layers)
        return numbers.reshape(self.shape)

    def stack(self, canonical: jax.Array) -> jax.Array:
        """[num_layers, ...] -> [chunks, stages, layers_per_part, ...]; empty slots are zero."""
        if self.is_even:
            return self._fold(canonical.reshape(*self.shape, *canonical.shape[1:]))
        slots = jnp.zeros((math.prod(self.shape), *canonical.shape[1:]), canonical.dtype)
        return slots.at[self.layer_slots()].set(canonical).reshape(*self.shape, *canonical.shape[1:])

    def unstack(self, stacked: jax.Array) -> jax.Array:
        """[chunks, stages, layers_per_part, ...] -> [num_layers, ...]."""
        if self.is_even:
            return self._fold(stacked).reshape(-1, *stacked.shape[3:])
        return stacked.reshape(-1, *stacked.shape[3:])[self.layer_slots()]

    def by_place(self, layers: PyTree) -> tuple[PyTree, ...]:
        """Return a stage's layers [chunks, 1, layers_per_part, ...] for each place in the group, [chunks, groups, ...].

        A scan over groups then takes each layer's weights as they are: cut inside, they would be new arrays, which a pipeline
        does not know as parameters and stores for the backward pass.
        """

        def at(leaf: jax.Array, place: int) -> jax.Array:
            own = leaf[:, 0]
            if self.period == 1:
                return own
            return own.reshape(own.shape[0], -1, self.period, *own.shape[2:])[:, :, place]

        return tuple(jax.tree.map(lambda leaf, place=place: at(leaf, place), layers) for place in range(self.period))

    def from_places(self, places: tuple[PyTree, ...]) -> PyTree:
        """Return the inverse of `by_place`."""

        def leaf(*of_places: jax.Array) -> jax.Array:
            joined = jnp.stack(of_places, axis=2)
            return joined.reshape(joined.shape[0], 1, -1, *joined.shape[3:])

        return jax.tree.map(leaf, *places)


def make_stacking(config: Config) -> Stacking:
    """Return how a resolved config distributes its layers over stages."""
    model, pipeline = config.model, config.pipeline
    folded = pipeline.schedule in FOLDED_SCHEDULES
    return Stacking(model.stacked_layers, config.mesh.pipe, pipeline.chunks, len(model.kinds), folded)
