"""Decide whether a resume continues the same run: compare the config, data and versions of a checkpoint with the present
ones.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtrain.errors import CheckpointError

_HARD_FLAGS = (
    "data.tokenizer data.sequence_length data.mask_documents data.validation_fraction train.seed train.global_batch_size "
    "optimizer.name objective.kind train.frozen lora.rank lora.alpha lora.targets lora.rank_stabilised "
    "lora.base lora.base_group "
    "objective.grpo.updates objective.grpo.group_size objective.grpo.max_new_tokens objective.grpo.temperature"
).split()
_HARD_SOURCE_FIELDS = ("kind", "text_field", "weight")  # not path: the same data may have moved
_SOFT_MODEL_FLAGS = "model.attention model.dtype model.init_std".split()


@dataclass(frozen=True)
class Differences:
    """Differences between a checkpoint and the present run, one line each: flag, both values."""

    hard: list[str] = field(default_factory=list)
    """Another run: other shapes, other data, or the same data in another order."""
    soft: list[str] = field(default_factory=list)
    """The same run executed otherwise: mesh, pipeline, schedule, steps, versions."""


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], done: int | None = None) -> Differences:
    """Compare two metadata dicts: "config" (`to_plain`), "recipe", "data_fingerprint", "versions" and "parts", where present.

    Args:
      done: batches of the data that the checkpoint has seen; stages from there on are its future. None: all of them.

    Raises:
      CheckpointError: the saved "config" is not a config.
    """
    found = Differences()
    try:
        before, after = (_flags(metadata) for metadata in (saved, current))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"a checkpoint holds something else where its run's config should be ({error})") from error
    for flag in [*after, *(flag for flag in before if flag not in after)]:
        if flag in before and flag in after:
            if before[flag] != after[flag] and flag != "checkpoint.resume":  # it is of one start
                (found.hard if _is_hard(flag) else found.soft).append(f"{flag}: {before[flag]} -> {after[flag]}")
            continue
        line = f"{flag}: {before.get(flag, 'not in the checkpoint')} -> {after.get(flag, 'gone')}"
        # An added source is other data. Any other field was added or removed since: its default changes nothing.
        (found.hard if flag.startswith("data.sources.") and _is_hard(flag) else found.soft).append(line)
    _compare_recipes(found, saved, current, done)
    old, new = (as_json_gives_it_back(m.get("data_fingerprint")) for m in (saved, current))
    if old != new:
        (found.soft if old is None or new is None else found.hard).append(f"data fingerprint: {old} -> {new}")
    return found


def _compare_recipes(found: Differences, saved: Mapping[str, Any], current: Mapping[str, Any], done: int | None) -> None:
    """Add the first difference between stages that the checkpoint has seen, and one line for those to come."""
    before, after = (as_json_gives_it_back(m.get("recipe", {})) for m in (saved, current))
    old, new = (recipe.get("stages", []) for recipe in (before, after))
    blocks = [recipe.get("block_length") for recipe in (before, after)]
    if None not in blocks and blocks[0] != blocks[1]:
        found.hard.append(
            f"the longest sequence_length of train.stages: {blocks[0]} -> {blocks[1]}; the data is shuffled in blocks of it, "
            "so it stays what it was at the start: a stage of that length may lie beyond train.steps"
        )
    begun = [[stage for stage in stages if done is None or stage["first"] < done] for stages in (old, new)]
    for first, then in itertools.zip_longest(*begun):
        if first != then:
            found.hard.append(f"train.stages, which has begun by step {done}: {_stage_words(first)} -> {_stage_words(then)}")
            return
    to_come = [stages[len(seen) :] for stages, seen in zip((old, new), begun, strict=True)]
    if to_come[0] != to_come[1]:
        changed = ([s for s in to_come[i] if s not in to_come[1 - i]] for i in (0, 1))
        was, now = ("; ".join(map(_stage_words, stages)) or "none" for stages in changed)
        found.soft.append(f"train.stages to come: {was} -> {now}")


def _stage_words(stage: Mapping[str, Any] | None) -> str:
    if stage is None:
        return "none"
    given = ", ".join(f"{name}={value}" for name, value in stage.items() if name != "first")
    return f"from step {stage['first']}: {given or 'nothing'}"


def check_same_run(
    saved: Mapping[str, Any], current: Mapping[str, Any], directory: os.PathLike | str, done: int | None = None
) -> list[str]:
    """Return the soft differences, for the log; `done` is that of `differences`.

    Raises:
      CheckpointError: there are hard differences; lists all of them and the way out.
    """
    found = differences(saved, current, done)
    if found.hard:
        lines = "\n".join(f"  - {line}" for line in found.hard)
        raise CheckpointError(
            f"the checkpoint in {os.fspath(directory)} belongs to another run (checkpoint -> now):\n{lines}\n"
            "Set these back to go on with it, or start a new run with another --run_dir (or with --checkpoint.resume=never and "
            "a fresh folder), from its weights with --init_from=RUN@STEP."
        )
    return found.soft


def _is_hard(flag: str) -> bool:
    if flag.startswith("model."):
        return flag not in _SOFT_MODEL_FLAGS
    if flag.startswith("data.sources."):
        return flag.rpartition(".")[2] in _HARD_SOURCE_FIELDS
    return flag in _HARD_FLAGS


def _flags(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config and the versions as {"model.num_layers": 12, "data.sources.0.kind": "text", "versions.jax": ...}."""
    sections = {
        **as_json_gives_it_back(metadata.get("config", {})),
        "versions": as_json_gives_it_back(metadata.get("versions", {})),
        "parts": as_json_gives_it_back(metadata.get("parts", {})),
    }
    flat: dict[str, Any] = {}
    for section, fields in sections.items():
        for name, value in fields.items() if isinstance(fields, dict) else [("", fields)]:
            flag = f"{section}.{name}".rstrip(".")
            if flag == "train.stages":  # `_compare_recipes`
                continue
            if flag == "data.sources":
                flat |= {f"{flag}.{i}.{key}": item for i, source in enumerate(value) for key, item in source.items()}
            else:
                flat[flag] = value
    return flat


def as_json_gives_it_back(value: Any) -> Any:
    """Return `value` after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(value))
