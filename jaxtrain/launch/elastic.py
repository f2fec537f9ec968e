"""Choose the mesh for a run that resumes on fewer or more devices: same global batch and model, another layout.

The layout never changes the result, so this is only a question of memory and speed. Imports no jax.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jaxtrain.config import MESH_AXES, Config, MeshConfig
from jaxtrain.config.rules import divisors, find_problems
from jaxtrain.errors import ConfigError


def mesh_for(config: Config, devices: int, fallbacks: Sequence[MeshConfig] = ()) -> Config:
    """Return the config for `devices`: unchanged if its mesh fits, else with the first fallback that fits, else the nearest.

    A mesh is near if it shards the model over as many devices as before (pipe x fsdp x expert x tensor, since memory is what
    runs out), and then keeps tensor, pipe, expert, context and fsdp as they were. Microbatches grow so that a device has no
    more sequences at a time than before. Replicas that have parameters of their own are not taken away.

    Raises:
      ConfigError: no mesh over so many devices is valid for this config.
    """
    as_it_is, problems = find_problems(config, devices)
    if not problems:
        return as_it_is
    for mesh in fallbacks:
        candidate, problems = find_problems(_with_mesh(config, mesh), devices)
        if not problems:
            return candidate
    candidates = [
        candidate for mesh in _meshes(config, devices) if not find_problems(candidate := _with_mesh(config, mesh), devices)[1]
    ]
    if not candidates:
        raise ConfigError([f"{config.name}: no mesh over {devices} devices is valid; {problems[0]}"])
    return max(candidates, key=lambda candidate: _nearness(config.mesh, candidate.mesh))


def mesh_flags(before: Config, after: Config) -> list[str]:
    """Return the command-line flags that turn one config into the other: axes and microbatches."""
    flags = [f"--mesh.{axis}={getattr(after.mesh, axis)}" for axis in MESH_AXES]
    if before.train.microbatches != after.train.microbatches:
        flags.append(f"--train.microbatches={after.train.microbatches}")
    return flags


def _with_mesh(config: Config, mesh: MeshConfig) -> Config:
    """Return the config on another mesh, with enough microbatches that a device's share of one is no larger than before."""
    batch, train = config.train.global_batch_size, config.train
    rows = max(1, batch // (max(config.mesh.batch_shards, 1) * train.microbatches))
    per_shard = batch // mesh.batch_shards
    fitting = [n for n in divisors(per_shard) if per_shard // n <= rows] if per_shard else []
    count = fitting[0] if fitting else train.microbatches
    return replace(config, mesh=mesh, train=replace(train, microbatches=max(count, 1)))


def _meshes(config: Config, devices: int) -> Iterator[MeshConfig]:
    """Yield the meshes over that many devices whose axes divide the old ones; fsdp and data may take what the others leave."""
    now = config.mesh
    free = ("data", "fsdp")
    options = []
    for axis in MESH_AXES:
        size = getattr(now, axis)
        if axis in free:
            options.append(divisors(devices))
        elif axis == "replica" and config.sync.replicas_differ:
            options.append([size])
        else:
            options.append(divisors(size))
    for sizes in itertools.product(*options):
        if math.prod(sizes) == devices:
            yield MeshConfig(*sizes)


def _nearness(before: MeshConfig, after: MeshConfig) -> tuple[float, ...]:
    def sharded(mesh: MeshConfig) -> int:
        return mesh.pipe * mesh.fsdp * mesh.expert * mesh.tensor

    kept = (float(getattr(before, axis) == getattr(after, axis)) for axis in ("tensor", "pipe", "expert", "context", "fsdp"))
    return (min(1.0, sharded(after) / max(sharded(before), 1)), *kept, -after.fsdp)


def parse_mesh(text: str) -> MeshConfig:
    """Parse a mesh such as "data=2,fsdp=2"; axes left out are 1.

    Raises:
      ConfigError: it has another form.
    """
    try:
        sizes = {axis.strip(): int(size) for axis, size in (part.split("=") for part in text.split(","))}
        return MeshConfig(**({"fsdp": 1} | sizes))
    except (ValueError, TypeError) as error:
        raise ConfigError([f"--fallback_mesh={text!r}: give axes and sizes, e.g. data=2,fsdp=2"]) from error
