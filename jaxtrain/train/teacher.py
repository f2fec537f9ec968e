"""The teacher of a distillation: another model on the same mesh, which tells its most likely tokens of every batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import optax

from jaxtrain.config import ObjectiveConfig, SyncConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.errors import ConfigError, ExplainedError
from jaxtrain.models.building import choose_attention
from jaxtrain.objectives.distill import TEACHER_IDS, TEACHER_LOG_PROBS
from jaxtrain.train.gradients import make_top_k
from jaxtrain.train.initial_weights import initial_weights
from jaxtrain.train.loading import config_of_source
from jaxtrain.train.prepared import Prepared


class Teacher:
    """Adds the teacher's most likely tokens to batches.

    Its weights lie on the run's mesh in model.dtype; nothing of it is trained or saved.

    Raises:
      ExplainedError: the teacher cannot be read, does not fit the mesh, or has another vocabulary.
    """

    def __init__(self, prepared: Prepared):
        config, distill = prepared.config, prepared.config.objective.distill
        try:
            found = config_of_source(distill.teacher).model
        except ExplainedError as error:
            raise ExplainedError(f"objective.distill.teacher: {error}") from error
        if found.vocab_size != config.model.vocab_size:
            raise ExplainedError(
                f"objective.distill.teacher={distill.teacher} has {found.vocab_size} token ids, the student has "
                f"model.vocab_size={config.model.vocab_size}: teacher and student share one tokenizer"
            )
        model = replace(found, dtype=config.model.dtype, param_dtype=config.model.dtype)
        config = replace(
            config, model=model, init_from=distill.teacher, init_from_optimizer=False, lora=type(config.lora)(),
            objective=ObjectiveConfig(), sync=SyncConfig(), train=replace(config.train, frozen=()),
        )  # fmt: skip
        config, problems = find_problems(config, prepared.mesh.devices.size)
        problems = [problem for problem in problems if problem.startswith(("mesh.", "model."))]
        if problems:
            raise ConfigError(problems, f"with the teacher {distill.teacher}")
        self._params: Any = initial_weights(config, prepared.mesh, optax.identity())[0]["params"]
        backend = choose_attention(config, prepared.mesh)[0]
        self._top = make_top_k(config, prepared.mesh, backend, distill.top_k)

    def __call__(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Return a placed batch with the teacher's tokens, [B, L, top_k] each."""
        found = self._top(self._params, batch)
        return batch | {TEACHER_IDS: found["top_ids"], TEACHER_LOG_PROBS: found["top_log_probs"]}


def completion_of(prepared: Prepared) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """Return what adds to a placed batch the arrays that another model gives; without one, nothing."""
    return Teacher(prepared) if prepared.config.objective.kind == "distill" else lambda batch: batch
