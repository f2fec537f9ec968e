"""Distillation from a run: the student's divergence from its teacher falls, on a mesh, and the teacher never changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.config import DataConfig, DistillConfig, MeshConfig, ObjectiveConfig, OptimizerConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.train.trainer import Trainer
from tests.tiny import tiny


@pytest.mark.slow
def test_a_student_comes_near_to_its_teacher(tmp_path: Path):
    (tmp_path / "text.txt").write_text("\n".join(f"{n} is {n % 7} and {n * n}" for n in range(600)))
    data = DataConfig((replace(DataConfig().sources[0], kind="text", path=str(tmp_path / "text.txt")),), sequence_length=16)
    teacher = tiny(
        run_dir=str(tmp_path / "teacher"), mesh=MeshConfig(fsdp=4, tensor=2), model={"vocab_size": 260, "num_layers": 3},
        data=replace(data, cache_dir=str(tmp_path / "cache")), optimizer=OptimizerConfig(peak_lr=0.02, schedule="constant"),
        train={"steps": 8, "log_every": 1, "validate_every": 0, "compilation_cache": ""},
        checkpoint={"asynchronous": False, "every": 8},
    )  # fmt: skip
    Trainer(teacher).train()
    distill = ObjectiveConfig("distill", distill=DistillConfig(str(tmp_path / "teacher"), top_k=20, weight=0.8))
    student = replace(
        teacher, run_dir=str(tmp_path / "student"), objective=distill, model=replace(teacher.model, num_layers=1),
        mesh=MeshConfig(fsdp=2, context=2, data=2),
    )  # fmt: skip
    trainer = Trainer(student)
    trainer.train()
    divergence = trainer.metrics["teacher_divergence"]
    assert divergence[-1] < 0.5 * divergence[0]
    by_hand = Trainer(replace(student, run_dir=str(tmp_path / "by hand")))
    assert by_hand.step()["teacher_divergence"] == pytest.approx(divergence[0], rel=1e-5)
    assert 0.1 < np.min(trainer.metrics["teacher_mass"]) <= np.max(trainer.metrics["teacher_mass"]) <= 1 + 1e-6
    kept = replace(distill, distill=replace(distill.distill, kept=str(tmp_path / "kept")))
    first = Trainer(replace(student, run_dir=str(tmp_path / "first"), objective=kept))
    first.train()
    np.testing.assert_array_equal(first.metrics["teacher_divergence"], divergence)
    alone = replace(kept, distill=replace(kept.distill, teacher=""))
    assert (
        Trainer(replace(student, run_dir=str(tmp_path / "second"), objective=alone)).step()["loss"] == first.metrics["loss"][0]
    )
    another = replace(alone, distill=replace(alone.distill, kept=str(tmp_path / "nothing")))
    with pytest.raises(ExplainedError, match=r"nothing holds nothing whole; give objective\.distill\.teacher too"):
        Trainer(replace(student, run_dir=str(tmp_path / "third"), objective=another)).step()
    other = replace(student, model=replace(student.model, vocab_size=300))
    with pytest.raises(ExplainedError, match="260 token ids, the student has model.vocab_size=300"):
        Trainer(other).step()
