"""The fields of a stage of training: `train.stages`. `stages.py` says what each step trains with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtrain.config.model_fields import RopeScaling

LearningRateSchedule = Literal["constant", "cosine", "warmup_stable_decay", "inverse_sqrt"]


@dataclass(frozen=True)
class Stage:
    """A part of the run, from a step on. What it does not give stays as it was."""

    name: str = ""
    """Name in logs and pictures; empty: its number."""
    from_step: int = 0
    """Steps done when it begins, at least 1: before the first of train.stages the config's own fields hold."""
    from_tokens: int = 0
    """Tokens trained on when it begins, in place of from_step: at the first step that has seen so many."""
    weights: tuple[float, ...] = ()
    """Shares of all data.sources, in their order; 0 leaves one out. Each source goes on where it stood."""
    global_batch_size: int | None = None
    """train.global_batch_size from now on. train.microbatches grows with the tokens of a step."""
    sequence_length: int | None = None
    """data.sequence_length from now on; divides the longest of all stages (jaxtrain/train/README.md)."""
    rope_theta: float | None = None
    """model.rope_theta from now on."""
    rope_scaling: RopeScaling | None = None
    """model.rope_scaling from now on."""
    schedule: Literal["", "constant", "cosine", "warmup_stable_decay", "inverse_sqrt"] = ""
    """Begins a new learning-rate schedule here; empty: the one before goes on."""
    warmup_steps: int = 0
    """With schedule: steps from the rate before the stage to peak_lr."""
    schedule_steps: int = 0
    """With schedule: its steps, after which the rate stays; 0: all to train.steps."""
    decay_fraction: float | None = None
    """With schedule: optimizer.decay_fraction, of its steps."""
    final_lr_fraction: float | None = None
    """With schedule: optimizer.final_lr_fraction."""
    peak_lr: float | None = None
    """optimizer.peak_lr from now on; also in the middle of a schedule."""
    batch_rule: Literal["none", "sqrt", "linear"] = "none"
    """Factor on peak_lr where a step's tokens grow by r. sqrt: r^(1/2) (Malladi et al. 2022, arXiv:2205.10287); linear: r."""
    weight_decay: float | None = None
    """optimizer.weight_decay from now on."""
    z_loss: float | None = None
    """train.z_loss from now on."""
