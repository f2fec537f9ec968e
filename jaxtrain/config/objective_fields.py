"""The configuration of the objective: what training minimises (`jaxtrain/objectives/`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DpoConfig:
    """Preferences: pairs of a chosen and a rejected answer."""

    loss: Literal["sigmoid", "ipo", "orpo"] = "sigmoid"
    """sigmoid: DPO (Rafailov et al. 2023). ipo: the squared loss of Azar et al. 2023. orpo: the likelihood of the chosen answer
    with an odds ratio (Hong et al. 2024), which needs no reference."""
    beta: float = 0.1
    """Strength of the pull towards the reference; orpo: weight of the odds ratio."""
    label_smoothing: float = 0.0
    """sigmoid: probability that a pair's label is the wrong way round."""
    reference: Literal["initial", "none"] = "initial"
    """Model to stay near to: initial: the weights that the run begins with, whose log-probabilities are computed once, before
    the first step; none: no model (the reference's log-probabilities are 0)."""


@dataclass(frozen=True)
class DistillConfig:
    """Distillation: the most likely next tokens of a teacher."""

    teacher: str = ""
    """The teacher, with the same tokenizer: a HuggingFace folder, or RUN[@STEP]. It lies on the same mesh, in model.dtype."""
    kept: str = ""
    """Folder that keeps the teacher's tokens of all training rows: read if it holds them, without a teacher too, else written
    before the first step (8 top_k bytes a token). Empty: the teacher stays on the mesh, and tells them of each batch."""
    top_k: int = 32
    """Tokens of the teacher's distribution; the others together are one more."""
    weight: float = 1.0
    """Share of the teacher's loss; the rest is that of the data."""


@dataclass(frozen=True)
class GrpoConfig:
    """Reinforcement: answers of the model being trained, and a reward for each."""

    reward: str = ""
    """PATH.py or PATH.py:FUNCTION: a function of (prompts, completions, rows) that gives a number for each answer."""
    group_size: int = 8
    """Answers to each prompt; train.global_batch_size is a multiple of it."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    temperature: float = 1.0
    """Temperature at which answers are sampled, and under which their log-probabilities are trained."""
    updates: int = 1
    """Optimizer steps on the same answers."""
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """grpo: (reward - mean) / std of the group, each answer's tokens averaged. dr_grpo: reward - mean, tokens summed and
    divided by max_new_tokens. rloo: reward - mean of the group's others."""
    clip_low: float = 0.2
    """The ratio of new to old probability counts down to 1 - this."""
    clip_high: float = 0.2
    """The ratio of new to old probability counts up to 1 + this."""
    packing: bool = True
    """Whether a row of data.sequence_length may hold several prompts with their answers, as documents of their own, where a
    step of a quarter, a half or three quarters of the rows then holds all answers."""
    kl: float = 0.0
    """Weight of the KL divergence from the initial weights; 0: none, and they are not kept."""
    replay_routing: bool = True
    """Whether the tokens of an answer go to the same experts in training as in sampling (Ma et al. 2025, arXiv:2510.11370): the
    router's weights are computed anew, its choices are not. Without a mixture of experts, or with a layer of your own, nothing
    is replayed."""
    importance_cap: float = 2.0
    """Largest factor by which a token counts more because training gives it a higher probability than sampling did."""
    max_sampler_difference: float = 0.05
    """Largest mean |log p of training - log p of sampling| in a step; above it the run stops. 0: no limit."""
    max_sampler_outside: float = 0.2
    """Largest share of tokens in a step whose probabilities in training and sampling differ by more than a tenth; above it the
    run stops. 0: no limit."""
    max_sampler_kl: float = 0.05
    """Largest KL divergence of sampling from training, in nats a token; above it the run stops. 0: no limit."""
    reward_seconds: float = 30.0
    """Time limit of a call of the reward function, in seconds."""
    reward_workers: int = 4
    """Threads that call the reward function, each for one group."""
    on_reward_error: Literal["zero", "stop"] = "stop"
    """Reaction to an exception or a timeout in the reward function: stop the run, or count the reward as zero."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective of training, and the settings of each kind."""

    kind: Literal["pretrain", "sft", "dpo", "distill", "grpo"] = "pretrain"
    """pretrain: -log p of the next token. sft: the same, on the answers of conversations. dpo: preferences. distill: a
    teacher's probabilities. grpo: rewards."""
    dpo: DpoConfig = field(default_factory=DpoConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
