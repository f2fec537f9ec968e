"""The first law, measured: the layout never changes the result. Compares any layout with one device, in float32.

`python tests/layouts.py` runs the full matrix and prints the README's table; `--draws=N` a random sample of it.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import functools
import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, PipelineConfig, TrainConfig
from jaxtrain.config_rules import find_problems
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import create_state, to_canonical
from jaxtrain.train.step import batch_names, batch_sharding, make_loss_and_gradients

BATCH, LENGTH, VOCAB, STEPS = 32, 16, 100, 10
BASE = Config(
    model=ModelConfig(
        num_layers=4, embed_dim=32, num_heads=8, num_kv_heads=8, head_dim=4, mlp_dim=64, vocab_size=VOCAB, dtype="float32"
    ),
    mesh=MeshConfig(fsdp=1),
    data=DataConfig(sequence_length=LENGTH),
    optimizer=OptimizerConfig(peak_lr=1e-2),
    train=TrainConfig(steps=STEPS, global_batch_size=BATCH, loss_chunk=8, z_loss=1e-3, validate_every=0),
)


@dataclass(frozen=True)
class Layout:
    """What must not matter."""

    pipe: int
    data: int
    fsdp: int
    tensor: int
    schedule: str
    chunks: int
    microbatches: int
    remat: str

    def config(self, base: Config = BASE) -> Config:
        """The base config in this layout."""
        return replace(
            base,
            mesh=MeshConfig(pipe=self.pipe, data=self.data, fsdp=self.fsdp, tensor=self.tensor),
            pipeline=PipelineConfig(schedule=self.schedule, chunks=self.chunks),  # type: ignore[arg-type]
            train=replace(base.train, microbatches=self.microbatches, remat=self.remat),  # type: ignore[arg-type]
        )


def all_layouts(devices: int = 8) -> list[Layout]:
    """Every valid layout over 8 devices: factorisations x schedules x microbatches x remat policies."""
    meshes = [m for m in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(m) == devices]
    schedules = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2))
    found = [
        Layout(*mesh, schedule, chunks, microbatches, remat)
        for mesh in meshes
        for schedule, chunks in schedules
        for microbatches in (1, 2, 3, 4)
        for remat in ("none", "dots", "full")
        if not (mesh[0] == 1 and schedule == "interleaved")
    ]
    return [layout for layout in found if not find_problems(layout.config(base_for(layout)), devices)[1]]


def base_for(layout: Layout) -> Config:
    """8 layers where the parts are many, and a batch that three microbatches divide: compared with the same on one device."""
    layers = 8 if layout.pipe * layout.chunks > 4 else 4
    batch = 48 if layout.microbatches == 3 else BATCH
    return replace(BASE, model=replace(BASE.model, num_layers=layers), train=replace(BASE.train, global_batch_size=batch))


@functools.cache
def batch_of(rows: int, length: int = LENGTH, seed: int = 0) -> dict[str, np.ndarray]:
    """A packed batch with ragged documents, unequal numbers of targets a row, and some rows all padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, length + 1)).astype(np.int32)
    segments = np.cumsum(rng.random((rows, length)) < 0.2, axis=1).astype(np.int32) + 1
    starts = np.concatenate([np.ones((rows, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = np.arange(length, dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    targets = np.where(rng.random((rows, length)) < rng.random((rows, 1)), -1, tokens[:, 1:])
    padding = rng.random(rows) < 0.1
    targets[padding], segments[padding] = -1, 0
    return {"tokens": tokens[:, :-1], "targets": targets.astype(np.int32), "positions": positions, "segments": segments}


@dataclass(frozen=True)
class Outcome:
    """What a layout computes, in canonical form on the host."""

    params: Any
    losses: list[float]
    gradients: Any


def run(config: Config, steps: int = STEPS, backend: str = "reference") -> Outcome:
    """Initial parameters, the first gradients, and the losses of `steps` optimizer steps on the same batch."""
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.shape)])
    dims = parameter_dims(config.model)
    optimizer = make_optimizer(config.optimizer, config.train.steps, dims)
    state = create_state(config, mesh, optimizer)
    params, optimizer_state = state["params"], state["optimizer"]
    rows = batch_of(config.train.global_batch_size, config.data.sequence_length)
    batch = jax.device_put({name: rows[name] for name in batch_names(config)}, batch_sharding(mesh))
    loss_and_gradients = jax.jit(make_loss_and_gradients(config, mesh, backend))

    def canonical(tree: Any) -> Any:
        return jax.tree.map(np.asarray, to_canonical(config, tree, dims))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, optimizer_state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state

    initial, losses, first = canonical(params), [], None
    for _ in range(steps):
        metrics, _, gradients = loss_and_gradients(params, batch)
        losses.append(float(metrics["total_loss"]))
        first = first or canonical(gradients)
        params, optimizer_state = update(params, optimizer_state, gradients)
    return Outcome(initial, losses, first)


@functools.cache
def one_device(base: Config, steps: int = STEPS) -> Outcome:
    """The truth: one device, one microbatch, nothing recomputed."""
    return run(Layout(1, 1, 1, 1, "1f1b", 1, 1, "none").config(base), steps)


@dataclass(frozen=True)
class Errors:
    """Distance of a layout from one device."""

    same_start: bool
    loss: float
    gradient: float
    curve: float


def compare(layout: Layout, base: Config | None = None, steps: int = STEPS, backend: str = "reference") -> Errors:
    """Relative errors: of the first loss, of the worst gradient leaf (norm of difference over norm), of the worst loss."""
    base = base or base_for(layout)
    truth, got = one_device(base, steps), run(layout.config(base), steps, backend)
    same = jax.tree.leaves(jax.tree.map(np.array_equal, truth.params, got.params))
    distance = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(a), truth.gradients, got.gradients)
    curve = np.abs(np.array(got.losses) / np.array(truth.losses) - 1)
    return Errors(all(same), float(curve[0]), max(map(float, jax.tree.leaves(distance))), float(curve.max()))


def main(draws: int | None) -> None:
    """Prints the worst error of each kind of layout."""
    layouts = all_layouts()
    if draws:
        layouts = random.Random(0).sample(layouts, draws)
    worst: dict[str, list[Errors]] = {}
    for i, layout in enumerate(layouts):
        errors = compare(layout)
        axes = [a for a in ("pipe", "data", "fsdp", "tensor") if getattr(layout, a) > 1]
        worst.setdefault(" x ".join(axes), []).append(errors)
        print(f"{i + 1}/{len(layouts)} {layout} {errors}", file=sys.stderr, flush=True)
        jax.clear_caches()
    print("| axes above 1 | layouts | same initial bits | loss | worst gradient leaf | 10-step loss curve |")
    print("|---|---|---|---|---|---|")
    for axes, errors in sorted(worst.items(), key=lambda item: (item[0].count("x"), item[0])):
        same = "yes" if all(e.same_start for e in errors) else "NO"
        figures = " | ".join(f"{max(getattr(e, name) for e in errors):.1e}" for name in ("loss", "gradient", "curve"))
        print(f"| {axes} | {len(errors)} | {same} | {figures} |")


if __name__ == "__main__":
    main(int(sys.argv[1].removeprefix("--draws=")) if len(sys.argv) > 1 else None)
