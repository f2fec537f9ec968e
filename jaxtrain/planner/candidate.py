"""A layout: all that a search chooses, apart from the config that it changes."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from jaxtrain.config import FOLDED_SCHEDULES, Config, LatentAttentionConfig, MeshConfig


class Candidate(NamedTuple):
    """All that a search chooses, small enough to make hundreds of thousands of."""

    mesh: tuple[int, ...]
    """Sizes in the order of MESH_AXES."""
    microbatches: int
    schedule: str
    chunks: int
    remat: str
    remat_save: tuple[str, ...]
    zero: int
    context: str
    """`sharding.context_attention`."""

    @property
    def folded(self) -> bool:
        """Return whether activations go both ways along pipe."""
        return self.schedule in FOLDED_SCHEDULES


def layout_of(config: Config) -> Candidate:
    """Return the layout of a config."""
    train, pipeline, sharding = config.train, config.pipeline, config.sharding
    return Candidate(
        config.mesh.shape,
        train.microbatches,
        pipeline.schedule,
        pipeline.chunks,
        train.remat,
        train.remat_save if train.remat == "named" else (),
        sharding.zero,
        sharding.context_attention,
    )


def with_layout(config: Config, layout: Candidate) -> Config:
    """Return the config in another layout."""
    named = {"remat_save": layout.remat_save} if layout.remat == "named" else {}
    return replace(
        config,
        mesh=MeshConfig(*layout.mesh),
        train=replace(config.train, microbatches=layout.microbatches, remat=layout.remat, **named),
        pipeline=replace(config.pipeline, schedule=layout.schedule, chunks=layout.chunks),
        sharding=replace(config.sharding, zero=layout.zero, context_attention=layout.context),
    )


def stand_in(config: Config) -> Config:
    """Return the nearest config that the closed forms cover: itself, where they cover all of it (`uncovered`).

    First dense layers become layers like the others. Latent attention becomes attention of as many heads, each as wide as the
    mean of its query, key and value. A window along context is dropped. Replicas that keep apart sum nothing in a step. Other
    models (`other_models`) are no part of it.
    """
    model, mesh = config.model, config.mesh
    latent: LatentAttentionConfig | None = model.latent_attention
    if model.moe and model.moe.first_dense_layers:
        model = replace(model, moe=replace(model.moe, first_dense_layers=0))
    if latent:
        width = (2 * (model.head_dim + latent.rope_dim) + 2 * latent.value_dim) // 4
        model = replace(model, latent_attention=None, head_dim=width)
    if mesh.context > 1:
        everywhere = tuple("global" if kind == "local" else kind for kind in model.pattern)
        model = replace(model, sliding_window=0, pattern=everywhere)
    return replace(config, model=model)
