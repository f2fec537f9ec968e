"""Checks of what the sources of a mixture must have in common."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtrain.config import Config
from jaxtrain.data.open_source import OpenSource
from jaxtrain.errors import DataError


def check_split_rules(sources: Sequence[OpenSource]) -> None:
    """Raise DataError if what one source holds out could be trained on in another."""
    rules = [(rule, i) for i, source in enumerate(sources) for rule in sorted(source.split_rules)]
    other = next(((rule, i) for rule, i in rules if rule != rules[0][0]), None)
    if other is None or not any(source.validation.count for source in sources):
        return
    raise DataError(
        f"data.sources.{rules[0][1]} is split by the rule {rules[0][0]!r}, data.sources.{other[1]} by {other[0]!r}: what one "
        "holds out could be trained on in the other; tokenize again with the same --validation_fraction, or, where the others "
        "are text, give that of the tokens as --data.validation_fraction"
    )


def check_sorts(sources: Sequence[OpenSource], config: Config) -> None:
    """Raise DataError where pairs or prompts are mixed with anything else, or are not what the objective reads."""
    sorts = ["samples" if source.chat is None else source.chat.sort for source in sources]
    other = next((i for i, sort in enumerate(sorts) if sort != sorts[0]), None)
    if other is not None:
        raise DataError(
            f"data.sources.0 has {sorts[0]}, data.sources.{other} has {sorts[other]}; pairs and prompts stand alone"
        )
    kind = config.objective.kind
    wanted = {"dpo": "pairs", "grpo": "prompts"}.get(kind, "samples")
    if sorts[0] != wanted and config.parts.objective is None:
        raise DataError(
            f"data.sources.0 has {sorts[0]}, but objective.kind={kind} needs {wanted}: rows of kind=chat with chosen and "
            "rejected are pairs, those with a prompt alone are prompts; other rows, and texts, are samples"
        )
    if sorts[0] == "prompts" and len({source.weight for source in sources}) > 1:
        raise DataError("data.sources: prompts of several sources are taken in equal shares; leave their weights out")


def checked_epochs(config: Config, epochs: Sequence[float]) -> str:
    """Return how often the run reads each source, in words where it has stages.

    Raises:
      DataError: more often than max_epochs.
    """
    steps = config.train.steps
    for i, (source, found) in enumerate(zip(config.data.sources, epochs, strict=True)):
        if 0 < source.max_epochs < found:
            raise DataError(
                f"data.sources.{i} would be read {found:.2f} times in train.steps={steps:,}, more than max_epochs="
                f"{source.max_epochs:g}; give it a smaller weight or more text, or take fewer steps"
            )
    read = ", ".join(f"{found:.3g}" for found in epochs)
    return f"; read {read} times in {steps:,} steps" if config.train.stages else ""
