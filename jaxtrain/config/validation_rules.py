"""Rules for the fields that say what is validated on, and which of its numbers decides something."""

from __future__ import annotations

import re
from collections import Counter

from jaxtrain.config.data_fields import names_of
from jaxtrain.config.fields import Config
from jaxtrain.config.source_rules import source_problems
from jaxtrain.errors import nearest


def validation_problems(config: Config) -> list[str]:
    """Return the problems of data.validation, train.position_ranges and train.validation_metric."""
    data, train, problems = config.data, config.train, []
    kind, ranges = config.objective.kind, train.position_ranges
    names = [*names_of(data.sources, "source"), *names_of(data.validation, "set")]
    for name, count in Counter(names).items():
        if not re.fullmatch(r"(?!\.+$)[\w.+-]+", name) or count > 1:
            why = f"{count} sources or sets have this name" if count > 1 else "use letters, digits and . _ + -"
            problems.append(f"name={name!r} of data.sources or data.validation: {why}")
    for i, source in enumerate(data.validation):
        problems += source_problems(f"data.validation.{i}.", source, config.model.vocab_size)
        if source.kind == "synthetic":
            problems.append(
                f"data.validation.{i}.kind=synthetic: random tokens have no loss to learn from; give text or tokens"
            )
    if (data.validation or ranges) and kind in ("dpo", "grpo"):
        name = "data.validation" if data.validation else "train.position_ranges"
        problems.append(f"{name} scores single tokens, of which objective.kind={kind} has no loss; leave it out")
    if (data.validation or ranges) and not train.validate_every:
        problems.append("data.validation and train.position_ranges need validations; use --train.validate_every=100 or so")
    if ranges and data.sequence_length >> (ranges - 1) < 1:
        most = data.sequence_length.bit_length()
        problems.append(f"train.position_ranges={ranges} of data.sequence_length={data.sequence_length}: use {most} or fewer")
    known = [f"validation_{number}{part}" for number in ("loss", "bits_per_byte") for part in ("", *(f"/{n}" for n in names))]
    known += [name.replace("validation_", "validation_ema_", 1) for name in known if train.ema_decay]
    metric = train.validation_metric
    if kind not in ("dpo", "grpo") and metric not in known:
        ema = " (with train.ema_decay validation_ema_loss too)" if metric.startswith("validation_ema") else ""
        problems.append(f"train.validation_metric={metric!r}: {nearest(metric, known)}{ema}")
    if train.stop_at_validation_loss and "loss" not in metric:
        problems.append(f"train.stop_at_validation_loss compares a loss, but train.validation_metric={metric}")
    return problems
