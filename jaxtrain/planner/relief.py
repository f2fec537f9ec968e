"""Explain a lack of memory: the device's memory by category, and the smallest changes of the config that would fit.

Changes are tried one by one, then two and three at a time, each by its smallest amount first; a change counts if the config is
valid with it and the closed forms of `planner.memory` fit the device. None changes what is learnt: not the global batch, the
model or the sequence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from jaxtrain.config import Config
from jaxtrain.config.names import with_fields
from jaxtrain.config.rules import divisors, find_problems
from jaxtrain.planner.estimates import Memory
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.wording import MEMORY_WORDS
from jaxtrain.text import readable_size

Flags = Mapping[str, Any]
"""Fields to change, {"train.microbatches": 8}."""
REMATS = ("none", "dots", "full")
SHOWN = 4
MOST_AT_ONCE = 3
LEAST_CHUNK = 128
CLEARLY_LESS = 0.9
"""Share of the estimate that a change must reach if the estimate alone does not explain why memory ran out."""
WORDS = MEMORY_WORDS | {
    "optimizer": "optimizer state",
    "weights": "weights in the compute dtype",
    "activations": "activations kept for the backward pass",
    "working": "what one layer or the loss needs while it is computed",
    "other_models": "a teacher's weights, or those that rewards stay near",
    "rollouts": "the cache of rollouts, beyond what only a step holds",
    "kernels": "what attention's kernels need while they compute gradients",
}


def turns(config: Config) -> dict[str, list[Flags]]:
    """Return the possible values of each setting, the smallest change first."""
    train, mesh = config.train, config.mesh
    remats = REMATS[REMATS.index(train.remat) + 1 :] if train.remat in REMATS else ("full",)
    rows = train.global_batch_size // mesh.batch_shards
    chunks = [train.loss_chunk >> n for n in range(1, 20) if train.loss_chunk >> n >= LEAST_CHUNK]

    def taken(axis: str, other: str) -> list[Flags]:
        """Return the changes that move devices from the axis `other` to `axis`."""
        parts = [n for n in divisors(getattr(mesh, other)) if n > 1]
        return [{f"mesh.{axis}": getattr(mesh, axis) * n, f"mesh.{other}": getattr(mesh, other) // n} for n in parts]

    knobs: dict[str, list[Flags]] = {
        "microbatches": [{"train.microbatches": n} for n in divisors(rows) if n > train.microbatches],
        "remat": [{"train.remat": remat} for remat in remats],
        "zero": [{"sharding.zero": n} for n in range(config.sharding.zero + 1, 4) if mesh.fsdp > 1],
        "fsdp": taken("fsdp", "data"),
        "tensor": taken("tensor", "data") + taken("tensor", "fsdp"),
        "pipe": taken("pipe", "data"),
        "loss_chunk": [{"train.loss_chunk": n} for n in chunks],
        "inputs": [{"train.layer_inputs_memory": "host"}] if train.layer_inputs_memory == "device" else [],
        "moments": [{"optimizer.moments_memory": "host"}] if config.optimizer.moments_memory == "device" else [],
    }
    return {knob: options for knob, options in knobs.items() if options}


def smallest_changes(config: Config, devices: int, budget: float, backend: str) -> list[tuple[Flags, float]]:
    """(changes, bytes on the fullest device) that fit: as few settings as suffice, each set of them changed the least."""
    knobs = turns(config)
    for at_once in range(1, MOST_AT_ONCE + 1):
        found = [
            first
            for names in itertools.combinations(knobs, at_once)
            if (first := next(_that_fit(config, devices, budget, backend, [knobs[name] for name in names]), None))
        ]
        if found:
            return sorted(found, key=lambda change: -change[1])[:SHOWN]
    return []


def _that_fit(
    config: Config, devices: int, budget: float, backend: str, options: list[list[Flags]]
) -> Iterator[tuple[Flags, float]]:
    for choice in sorted(itertools.product(*map(range, map(len, options))), key=lambda places: (sum(places), max(places))):
        flags: dict[str, Any] = {}
        for knob, place in zip(options, choice, strict=True):
            if flags.keys() & knob[place].keys():  # both would take devices from the same axis
                break
            flags |= knob[place]
        else:
            changed = with_fields(config, flags)
            if find_problems(changed, devices)[1]:
                continue
            held = estimate_memory(changed, backend).total
            if held <= budget:
                yield flags, held


def explain_out_of_memory(
    config: Config, devices: int, error: str, limit: float | None, held: float | None = None, backend: str = "cudnn"
) -> str:
    """Return the message for the user.

    Args:
      config: a valid config with its mesh resolved for `devices`.
      error: XLA's message.
      limit: bytes that a program may take on one device; None if unknown.
      held: bytes of them in use.
      backend: the attention backend.
    """
    memory = estimate_memory(config, backend)
    there = f", of {readable_size(limit)} on the device" if limit else ""
    lines = [f"out of device memory: {(error.strip() or 'no message').splitlines()[0]}"]
    if held is not None:
        lines.append(f"{readable_size(held)} were in use when that was asked for.")
    lines.append(f"By estimate the fullest device needs {readable_size(memory.total)}{there}:")
    lines += memory_lines(memory)
    budget = min(limit or math.inf, CLEARLY_LESS * memory.total)
    changes = smallest_changes(config, devices, budget, backend)
    if limit and memory.total <= limit:
        lines.append("That would fit: other programs may hold memory there, or the estimate is short. What holds clearly less:")
    elif changes:
        lines.append("The smallest changes that fit:" if limit else "The smallest changes that hold clearly less:")
    lines += change_lines(changes)
    if not changes:
        lines.append("No change of microbatches, remat, ZeRO level or mesh on these devices fits.")
    lines.append("`jaxtrain plan --config=...` ranks all layouts, and says how many devices it takes.")
    return "\n".join(lines)


def categories(memory: Memory) -> list[tuple[str, float]]:
    """(words, bytes) of each non-empty category, the largest first."""
    sizes = [(WORDS[field.name], getattr(memory, field.name)) for field in fields(memory)]
    return sorted([(words, size) for words, size in sizes if size], key=lambda item: -item[1])


def memory_lines(memory: Memory, devices: int = 1) -> list[str]:
    """Return a line for each category, of so many devices together."""
    return [f"  {readable_size(size * devices):>9}  {words}" for words, size in categories(memory)]


def change_lines(changes: Sequence[tuple[Flags, float]], devices: int = 1) -> list[str]:
    """Return a line for each change: its flags, and what so many devices then take together."""
    flags = [" ".join(f"--{name}={value}" for name, value in each.items()) for each, _ in changes]
    return [f"  {words}  ({readable_size(size * devices)})" for words, (_, size) in zip(flags, changes, strict=True)]
