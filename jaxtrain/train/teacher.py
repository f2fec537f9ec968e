"""The teacher of a distillation: another model on the same mesh, which tells its most likely tokens of every batch.

With objective.distill.kept it tells them once, before the first step (`kept_numbers.py`), and is not held in training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import optax

from jaxtrain.checkpoint.addresses import AVERAGE, find, is_average
from jaxtrain.checkpoint.stored import digest as digest_of
from jaxtrain.checkpoint.stored import read_stored, step_path
from jaxtrain.config import Config, ObjectiveConfig, SyncConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.data.pipeline import Data
from jaxtrain.errors import ConfigError, ExplainedError
from jaxtrain.files import user_path
from jaxtrain.huggingface.files import WeightsFolder
from jaxtrain.models.building import choose_attention
from jaxtrain.objectives.distill import TEACHER_IDS, TEACHER_LOG_PROBS
from jaxtrain.train.gradients import make_top_k
from jaxtrain.train.initial_weights import initial_weights, is_folder
from jaxtrain.train.kept_numbers import TRAINING, KeptNumbers, identity_of
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
        if not distill.teacher:
            raise ExplainedError(
                f"objective.distill.kept={distill.kept} holds nothing whole; give objective.distill.teacher too"
            )
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
        return batch | self.numbers(batch)

    def numbers(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Return the teacher's tokens of a placed batch, and their log-probabilities."""
        found = self._top(self._params, batch)
        return {TEACHER_IDS: found["top_ids"], TEACHER_LOG_PROBS: found["top_log_probs"]}


def kept_by_teacher(config: Config, data: Data) -> KeptNumbers:
    """Return where a teacher's numbers are kept, and what they depend on."""
    distill = config.objective.distill
    of = {
        "data": identity_of(data),
        "top_k": str(distill.top_k),
        "teacher": _identity(distill.teacher) if distill.teacher else "",
    }
    width = (distill.top_k,)
    widths = {TEACHER_IDS: width, TEACHER_LOG_PROBS: width}
    return KeptNumbers(user_path(distill.kept), "objective.distill.kept", of, widths, (TRAINING,))


def _identity(teacher: str) -> str:
    """Return the hash of a teacher's weights, read from its files."""
    try:
        if is_folder(teacher):
            with WeightsFolder(teacher) as folder:
                return folder.sha256
        folder, step = find(teacher)
        return digest_of(read_stored(step_path(folder, step))) + (AVERAGE if is_average(teacher) else "")
    except ExplainedError as error:
        raise ExplainedError(f"objective.distill.teacher: {error}") from error
