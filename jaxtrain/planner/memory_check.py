"""Check, before anything is allocated, whether a run fits the memory at hand.

Parameters, optimizer state and one batch are known exactly, and a run is refused if they alone do not fit. The rest is an
estimate (`planner.memory`) for a GPU's program: if that is larger than the memory it is a warning, and a refusal only if it is
`MOST_OVER` times as large.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxtrain.config import Config, Recipe
from jaxtrain.config.names import set_field
from jaxtrain.errors import ExplainedError
from jaxtrain.host_memory import available_bytes
from jaxtrain.mesh import make_mesh
from jaxtrain.models.building import choose_attention
from jaxtrain.planner.estimates import Memory
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.relief import change_lines, memory_lines, smallest_changes
from jaxtrain.planner.stages import worst_stage
from jaxtrain.telemetry.flops import num_parameters
from jaxtrain.text import readable_size

MOST_OVER = 4.0
UNIT = 64
"""Suggested widths are multiples of this."""


class Room(NamedTuple):
    """Memory that devices share."""

    available: float
    """Bytes."""
    devices: int
    """Number of the run's devices that share it."""
    host: float | None
    """Bytes available on the host, where batches are made; None if unknown."""
    batches: float
    """Share of each global batch that is made on this host."""
    words: str
    """Description: "available on this host"."""


def find_room(local_processes: int) -> Room | None:
    """Return the memory for a device of this process, or for all of this host if they are CPU devices; None if unknown.

    Args:
      local_processes: processes of the run on this host.
    """
    device, host, share = jax.local_devices()[0], available_bytes(), local_processes / jax.process_count()
    if device.platform == "cpu":
        devices = jax.local_device_count() * local_processes
        return None if host is None else Room(host, devices, host, share, "available on this host")
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return Room(limit, 1, host, share, "on the device") if limit else None


def check_memory(config: Config, room: Room, backend: str) -> str:
    """Return a line for the log: the memory that the run takes, and the memory available.

    Args:
      config: a valid config with a resolved mesh.
      backend: the attention backend.

    Raises:
      ExplainedError: it cannot fit; lists the memory's use and what would fit.
    """
    largest = max((stage.config for stage in Recipe(config).stages), key=batch_bytes)
    batch = batch_bytes(largest) * room.batches
    if room.host is not None and config.data.prefetch * batch > room.host:
        raise ExplainedError(_too_large_batch(largest, batch, room.host))
    stage, whole = worst_stage(config, backend), config
    config, memory = stage.config, estimate_memory(stage.config, backend)
    of_stage = f", most in stage {stage.name}" if whole.train.stages else ""
    state, total = _state(memory) * room.devices, memory.total * room.devices
    if state > room.available:
        raise ExplainedError(_too_large_state(config, memory, room))
    if total > MOST_OVER * room.available:
        raise ExplainedError(_too_large_step(config, memory, room, backend))
    of = f"{readable_size(room.available)} {room.words}"
    if total > room.available:
        return (
            f"warning    the run takes about {readable_size(total)} of memory by estimate{of_stage}, and there are {of}: "
            "it may run out; more train.microbatches, --train.remat=full or a smaller model take less"
        )
    return f"memory     about {readable_size(total)}{of_stage}, of {of}"


def batch_bytes(config: Config) -> float:
    """Return the bytes of a global batch: int32 tokens, targets, positions and, with documents packed, segments."""
    return 4.0 * (4 if config.data.mask_documents else 3) * config.train.global_batch_size * config.data.sequence_length


def _state(memory: Memory) -> float:
    return memory.parameters + memory.optimizer


def _too_large_batch(config: Config, batch: float, host: float) -> str:
    size, length, ahead = config.train.global_batch_size, config.data.sequence_length, config.data.prefetch
    share = host / (ahead * batch)
    sizes = {"data.prefetch": ahead, "train.global_batch_size": size, "data.sequence_length": length}
    return (
        f"out of host memory: a batch of train.global_batch_size={size:,} sequences of data.sequence_length={length:,} tokens "
        f"takes {readable_size(batch)} here, data.prefetch={ahead:,} of them {readable_size(ahead * batch)}, and "
        f"{readable_size(host)} are available on this host. Nothing was allocated. They would fit with one of: "
        f"{'; '.join(f'--{name}={int(now * share)}' for name, now in sizes.items() if now * share >= 1)}."
    )


def _too_large_state(config: Config, memory: Memory, room: Room) -> str:
    parameters, optimizer = memory.parameters * room.devices, memory.optimizer * room.devices
    lines = [
        f"out of memory: {config.name} has {num_parameters(config.model).total:,} parameters, which take "
        f"{readable_size(parameters)}, and {config.optimizer.name} keeps {readable_size(optimizer)}; there are "
        f"{readable_size(room.available)} {room.words}. Nothing was allocated."
    ]
    fits = lambda changed: _state(estimate_memory(changed, "blockwise")) * room.devices <= room.available  # noqa: E731
    offers = [f"--{name}={most}" for name, most in largest_that_fit(config, fits).items()]
    if offers:
        lines.append(f"The state alone would fit with one of: {'; '.join(offers)}.")
    lines.append("Further devices hold more: `jaxtrain plan --config=...` says how many it takes.")
    return "\n".join(lines)


def _too_large_step(config: Config, memory: Memory, room: Room, backend: str) -> str:
    lines = [
        f"out of memory: {config.name} takes about {readable_size(memory.total * room.devices)} by estimate, and there are "
        f"{readable_size(room.available)} {room.words}. Nothing was allocated."
    ]
    lines += memory_lines(memory, room.devices)
    changes = smallest_changes(config, math.prod(config.mesh.shape), room.available / room.devices, backend)
    lines += ["The smallest changes that fit:"] if changes else ["Fewer or shorter sequences, or a smaller model, take less."]
    return "\n".join(lines + change_lines(changes, room.devices))


def largest_that_fit(config: Config, fits: Callable[[Config], bool]) -> dict[str, int]:
    """{field: its largest value with which the model fits, all else unchanged}.

    Widths are multiples of `UNIT`, a vocabulary at least 257. Fields that alone do not suffice are left out.
    """
    model, offers = config.model, {}
    sizes = {"model.num_layers": (model.num_layers, 1, 1 + model.first_dense_layers)}
    sizes |= {"model.embed_dim": (model.embed_dim, UNIT, UNIT), "model.mlp_dim": (model.mlp_dim, UNIT, UNIT)}
    sizes |= {"model.vocab_size": (model.vocab_size, 1, 257)}
    if model.moe:
        sizes |= {"model.moe.num_experts": (model.moe.num_experts, 1, model.moe.experts_per_token)}
    for name, (now, unit, least) in sizes.items():
        counts = range(1, now // unit + 1)
        most = unit * bisect.bisect_left(counts, True, key=lambda n: not fits(set_field(config, name, n * unit)))  # noqa: B023
        if least <= most < now:
            offers[name] = most
    return offers


def ask_for_memory(config: Config, local_processes: int, say: Callable[[str], None]) -> None:
    """Report how much memory a run takes, before anything is allocated.

    Args:
      config: a valid config with a resolved mesh.
      local_processes: processes of the run on this host.

    Raises:
      ExplainedError: it cannot fit.
    """
    if room := find_room(local_processes):
        say(check_memory(config, room, choose_attention(config, make_mesh(config.mesh))[0]))
