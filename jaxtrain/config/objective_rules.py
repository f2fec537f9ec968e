"""Rules for the objective: what it needs of the data, the batch and the replicas."""

from __future__ import annotations

from jaxtrain.config.fields import Config
from jaxtrain.config.objective_fields import DistillConfig, DpoConfig, GrpoConfig


def objective_problems(config: Config) -> list[str]:
    """Return the problems of section `objective`."""
    kind, section = config.objective.kind, config.objective
    if kind != "pretrain" and config.parts.objective is not None:
        return [f"objective.kind={kind}, and an objective is plugged in: give one of them"]
    problems = {"dpo": _dpo_problems, "distill": _distill_problems, "grpo": _grpo_problems}
    found = problems[kind](getattr(section, kind), config) if kind in problems else []
    if kind in ("dpo", "grpo") and config.sync.sums_apart:
        found.append(
            f"objective.kind={kind} divides by sums over the whole batch, but with sync.mode={config.sync.mode} and "
            f"sync.compression={config.sync.compression} each replica sums its own part; use every_step and none"
        )
    return found


def _dpo_problems(dpo: DpoConfig, config: Config) -> list[str]:
    problems = []
    if dpo.beta <= 0:
        problems.append(f"objective.dpo.beta={dpo.beta} must be above 0")
    if not 0 <= dpo.label_smoothing < 0.5:
        problems.append(f"objective.dpo.label_smoothing={dpo.label_smoothing} is a probability below 0.5")
    if dpo.label_smoothing and dpo.loss != "sigmoid":
        problems.append(f"objective.dpo.label_smoothing is of loss=sigmoid; with loss={dpo.loss} leave it at 0")
    if not config.data.mask_documents:
        problems.append("objective.kind=dpo packs the two answers of a pair into one sequence: give --data.mask_documents=True")
    return problems


def _distill_problems(distill: DistillConfig, config: Config) -> list[str]:
    problems = []
    if not distill.teacher and not distill.kept:
        problems.append(
            "objective.kind=distill needs objective.distill.teacher, a HuggingFace folder or RUN[@STEP], or its tokens in "
            "objective.distill.kept"
        )
    if not 1 <= distill.top_k <= min(1024, config.model.vocab_size):
        most = min(1024, config.model.vocab_size)
        problems.append(f"objective.distill.top_k={distill.top_k} is from 1 to {most}")
    if not 0 < distill.weight <= 1:
        problems.append(f"objective.distill.weight={distill.weight} is a share above 0, up to 1")
    return problems


def _grpo_problems(grpo: GrpoConfig, config: Config) -> list[str]:
    positive = ("group_size", "max_new_tokens", "updates", "reward_workers", "temperature", "importance_cap", "reward_seconds")
    problems = [f"objective.grpo.{n}={getattr(grpo, n)} must be above 0" for n in positive if getattr(grpo, n) <= 0]
    not_negative = ("kl", "clip_high", "max_sampler_difference", "max_sampler_outside", "max_sampler_kl")
    problems += [f"objective.grpo.{n}={getattr(grpo, n)} must be 0 or more" for n in not_negative if getattr(grpo, n) < 0]
    if not 0 <= grpo.clip_low < 1:
        problems.append(f"objective.grpo.clip_low={grpo.clip_low} must be at least 0 and below 1")
    if not grpo.reward:
        problems.append("objective.kind=grpo needs objective.grpo.reward: PATH.py or PATH.py:FUNCTION")
    batch = config.train.global_batch_size
    if grpo.group_size > 0 and batch % grpo.group_size:
        problems.append(f"train.global_batch_size={batch} is not a multiple of objective.grpo.group_size={grpo.group_size}")
    if grpo.group_size == 1:
        problems.append("objective.grpo.group_size=1: an answer is compared with the others of its group; use 2 or more")
    if config.model.moe and config.model.moe.dispatch != "dropless":
        problems.append(
            f"model.moe.dispatch={config.model.moe.dispatch} drops tokens in training that sampling has kept; use dropless"
        )
    if grpo.updates > 1 and config.checkpoint.fast_every % grpo.updates:
        problems.append(
            f"checkpoint.fast_every={config.checkpoint.fast_every} is not a multiple of objective.grpo.updates={grpo.updates}: "
            "a snapshot holds no rollout"
        )
    if grpo.updates > 1 and "rollback" in (config.guard.non_finite, config.guard.spike):
        problems.append(
            f"guard.non_finite or guard.spike=rollback leaves batches out, but objective.grpo.updates={grpo.updates} of them "
            "share a rollout; use skip"
        )
    if grpo.max_new_tokens >= config.data.sequence_length:
        problems.append(
            f"objective.grpo.max_new_tokens={grpo.max_new_tokens} leaves no room for a prompt in "
            f"data.sequence_length={config.data.sequence_length}"
        )
    return problems
