"""Rules for the objective: what it needs of the data, the batch and the replicas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jaxtrain.config.fields import Config
from jaxtrain.config.objective_fields import DistillConfig, DpoConfig, GrpoConfig
from jaxtrain.errors import violated


def objective_problems(config: Config) -> list[str]:
    """Return the problems of section `objective`."""
    kind, section = config.objective.kind, config.objective
    if kind != "pretrain" and config.parts.objective is not None:
        return [f"objective.kind={kind}, and an objective is plugged in: give one of them"]
    problems = {"dpo": _dpo_problems, "distill": _distill_problems, "grpo": _grpo_problems}
    apart = {
        f"objective.kind={kind} divides by sums over the whole batch, but with sync.mode={config.sync.mode} and "
        f"sync.compression={config.sync.compression} each replica sums its own part; use every_step and none": (
            kind in ("dpo", "grpo") and config.sync.sums_apart
        )
    }
    return violated((problems[kind](getattr(section, kind), config) if kind in problems else {}) | apart)


def _dpo_problems(dpo: DpoConfig, config: Config) -> dict[str, object]:
    smoothing = f"objective.dpo.label_smoothing={dpo.label_smoothing}"
    return {
        f"objective.dpo.beta={dpo.beta} must be above 0": dpo.beta <= 0,
        f"{smoothing} is a probability below 0.5": not 0 <= dpo.label_smoothing < 0.5,
        f"objective.dpo.label_smoothing is of loss=sigmoid; with loss={dpo.loss} leave it at 0": (
            dpo.label_smoothing and dpo.loss != "sigmoid"
        ),
        "objective.kind=dpo packs the two answers of a pair into one sequence: give --data.mask_documents=True": (
            not config.data.mask_documents
        ),
    }


def _distill_problems(distill: DistillConfig, config: Config) -> dict[str, object]:
    most = min(1024, config.model.vocab_size)
    return {
        "objective.kind=distill needs objective.distill.teacher, a HuggingFace folder or RUN[@STEP], or its tokens in "
        "objective.distill.kept": not distill.teacher and not distill.kept,
        f"objective.distill.top_k={distill.top_k} is from 1 to {most}": not 1 <= distill.top_k <= most,
        f"objective.distill.weight={distill.weight} is a share above 0, up to 1": not 0 < distill.weight <= 1,
    }


def _grpo_problems(grpo: GrpoConfig, config: Config) -> dict[str, object]:
    positive = ("group_size", "max_new_tokens", "updates", "reward_workers", "temperature", "importance_cap", "reward_seconds")
    not_negative = ("kl", "clip_high", "max_sampler_difference", "max_sampler_outside", "max_sampler_kl")
    batch, moe, fast_every = config.train.global_batch_size, config.model.moe, config.checkpoint.fast_every
    return {
        **{f"objective.grpo.{name}={value} must be above 0": value <= 0 for name, value in _fields(grpo, positive)},
        **{f"objective.grpo.{name}={value} must be 0 or more": value < 0 for name, value in _fields(grpo, not_negative)},
        f"objective.grpo.clip_low={grpo.clip_low} must be at least 0 and below 1": not 0 <= grpo.clip_low < 1,
        "objective.kind=grpo needs objective.grpo.reward: PATH.py or PATH.py:FUNCTION": not grpo.reward,
        f"train.global_batch_size={batch} is not a multiple of objective.grpo.group_size={grpo.group_size}": (
            grpo.group_size > 0 and batch % grpo.group_size
        ),
        "objective.grpo.group_size=1: an answer is compared with the others of its group; use 2 or more": grpo.group_size == 1,
        f"model.moe.dispatch={moe and moe.dispatch} drops tokens in training that sampling has kept; use dropless": (
            moe and moe.dispatch != "dropless"
        ),
        f"checkpoint.fast_every={fast_every} is not a multiple of objective.grpo.updates={grpo.updates}: a snapshot holds no "
        "rollout": grpo.updates > 1 and fast_every % grpo.updates,
        f"guard.non_finite or guard.spike=rollback leaves batches out, but objective.grpo.updates={grpo.updates} of them "
        "share a rollout; use skip": grpo.updates > 1 and "rollback" in (config.guard.non_finite, config.guard.spike),
        f"objective.grpo.max_new_tokens={grpo.max_new_tokens} leaves no room for a prompt in "
        f"data.sequence_length={config.data.sequence_length}": grpo.max_new_tokens >= config.data.sequence_length,
    }


def _fields(section: GrpoConfig, names: Iterable[str]) -> Iterator[tuple[str, float]]:
    return ((name, getattr(section, name)) for name in names)
