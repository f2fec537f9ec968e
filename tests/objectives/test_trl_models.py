"""Gradients of a whole model by trl's own trainers, for each objective, on the same weights and tokens: needs the extra `hf`.

`transformers` computes the forward pass, trl the loss, torch the gradients; a trainer here is its loss function and settings.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from jaxtrain.config import DistillConfig, DpoConfig, GrpoConfig, ObjectiveConfig
from tests.huggingface import goldens, tiny
from tests.huggingface.test_oracle import MESHES, Ours

trl = pytest.importorskip("trl")
torch = pytest.importorskip("torch")

from tests.objectives.test_trl import alone  # noqa: E402  # it is skipped where trl is not

FAMILY, ROWS, PROMPT, LENGTH = "llama3_1", 8, 3, 16
"""Rows of a prompt and an answer; the first half is chosen, the second rejected where there are pairs."""


@functools.cache
def rows() -> dict[str, np.ndarray]:
    """Return rows of unequal length, [ROWS, LENGTH + 1] ids and masks, and floats of each target [ROWS, LENGTH]."""
    rng = np.random.default_rng(3)
    lengths, place = rng.integers(PROMPT + 2, LENGTH + 2, (ROWS, 1)), np.arange(LENGTH + 1)
    lengths[0] = LENGTH + 1
    held = place < lengths
    ids = np.where(held, rng.integers(3, tiny.VOCAB, (ROWS, LENGTH + 1)), 0)
    old, reference = rng.normal(-4.5, 0.5, (2, ROWS, LENGTH)).astype(np.float32)
    teacher = torch.log_softmax(torch.tensor(rng.normal(size=(ROWS, LENGTH, tiny.VOCAB)).astype(np.float32)), -1).numpy()
    answer = held & (place >= PROMPT)
    advantages = rng.normal(size=ROWS).astype(np.float32)
    return {"ids": ids, "held": held, "answer": answer, "old": old, "reference": reference, "advantages": advantages,
            "teacher": teacher}  # fmt: skip


def batch_of(objective: ObjectiveConfig) -> dict[str, np.ndarray]:
    """Return the rows as ours: pairs of preferences are the two documents of a row."""
    r = rows()
    segments, counted = r["held"][:, :-1].astype(np.int32), r["answer"][:, 1:]
    batch = {
        "tokens": r["ids"][:, :-1], "targets": np.where(counted, r["ids"][:, 1:], -1), "segments": segments,
        "positions": np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH)), "reference_log_probs": r["reference"],
    }  # fmt: skip
    if objective.kind == "dpo":
        joined = {name: np.concatenate(np.split(array, 2), axis=1) for name, array in batch.items()}
        joined["segments"][:, LENGTH:] *= 2
        return joined | {name: joined[name].astype(np.int32) for name in ("tokens", "targets", "segments", "positions")}
    order = np.argsort(-r["teacher"], -1)
    batch |= {"teacher_ids": order.astype(np.float32), "teacher_log_probs": np.take_along_axis(r["teacher"], order, -1)}
    lengths = counted.sum(1, keepdims=True) if objective.grpo.advantage == "grpo" else LENGTH + 1 - PROMPT
    batch |= {"advantages": r["advantages"][:, None] * counted, "weights": (counted / lengths / ROWS).astype(np.float32)}
    batch |= {"old_log_probs": r["old"], "sampler_log_probs": r["old"]}
    return batch | {name: batch[name].astype(np.int32) for name in ("tokens", "targets", "segments", "positions")}


def trainer_of(**settings: Any) -> Any:
    """Return what a loss function of trl reads of its trainer."""
    common = alone()
    same = lambda model: model  # noqa: E731
    vars(common["accelerator"]).update(
        {"parallelism_config": None, "autocast": nullcontext, "unwrap_model": same, "is_main_process": False}
    )
    return MagicMock(aux_loss_enabled=False, model=MagicMock(training=True), **common, **settings)


def tensors(**arrays: np.ndarray) -> dict[str, Any]:
    return {name: torch.tensor(array) for name, array in arrays.items()}


def sft_loss(model: Any, objective: ObjectiveConfig) -> Any:
    r = rows()
    args = SimpleNamespace(loss_type="nll", average_tokens_across_devices=False)
    trainer = trainer_of(compute_loss_func=None, label_smoother=None, args=args)
    labels = np.where(r["answer"], r["ids"], -100)
    inputs = tensors(input_ids=r["ids"], attention_mask=r["held"].astype(int), labels=labels)
    return trl.SFTTrainer.compute_loss(trainer, model, inputs)


def dpo_loss(model: Any, objective: ObjectiveConfig) -> Any:
    r, dpo = rows(), objective.dpo
    trainer = trainer_of(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[dpo.loss], loss_weights=[1.0],
        beta=dpo.beta, label_smoothing=0.0, use_weighting=False,
    )  # fmt: skip
    sums = (r["reference"] * r["answer"][:, 1:]).sum(1) * (dpo.reference == "initial")
    inputs = tensors(input_ids=r["ids"], attention_mask=r["held"].astype(int), completion_mask=r["answer"].astype(int))
    inputs |= tensors(ref_chosen_logps=sums[: ROWS // 2], ref_rejected_logps=sums[ROWS // 2 :])
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, False)


def split() -> dict[str, Any]:
    """Return prompts and answers apart."""
    r = rows()
    inputs = tensors(prompt_ids=r["ids"][:, :PROMPT], completion_ids=r["ids"][:, PROMPT:])
    masks = {"prompt_mask": r["held"][:, :PROMPT], "completion_mask": r["held"][:, PROMPT:]}
    return inputs | tensors(**{name: mask.astype(int) for name, mask in masks.items()})


def grpo_loss(model: Any, objective: ObjectiveConfig) -> Any:
    r, grpo = rows(), objective.grpo
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, report_to=[])
    trainer = trainer_of(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=grpo.kl,
        args=args, loss_type=grpo.advantage, epsilon_low=grpo.clip_low,
        epsilon_high=grpo.clip_high, use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=LENGTH + 1 - PROMPT, _entropy_bonus_enabled=False,
    )  # fmt: skip
    of_model = trl.GRPOTrainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = functools.partial(of_model, trainer)
    floats = tensors(old_per_token_logps=r["old"], ref_per_token_logps=r["reference"])
    floats = {name: array[:, PROMPT - 1 :] for name, array in floats.items()} | tensors(advantages=r["advantages"])
    return trl.GRPOTrainer._compute_loss(trainer, model, split() | floats)


def distill_loss(model: Any, objective: ObjectiveConfig) -> Any:
    """Give the teacher as hidden states whose head is the identity: its log-probabilities are any."""
    trainer = trainer_of(beta=0.0, temperature=1.0)
    trainer.teacher_model.config.get_text_config.return_value = SimpleNamespace()
    identity = SimpleNamespace(weight=torch.eye(tiny.VOCAB), bias=None)
    trainer.teacher_model.get_output_embeddings.return_value = identity
    hidden = torch.tensor(rows()["teacher"][:, PROMPT - 1 :])
    trainer._forward_redirection.return_value = hidden
    trainer._get_last_hidden_state = functools.partial(trl.DistillationTrainer._get_last_hidden_state, trainer)
    return trl.DistillationTrainer._compute_loss(trainer, model, split(), None)[0]


GRPO = {"reward": "r.py", "kl": 0.07, "clip_low": 0.1, "clip_high": 0.2, "max_new_tokens": LENGTH + 1 - PROMPT, "group_size": 4}
CASES = {
    "sft": (sft_loss, ObjectiveConfig("sft"), "pipe x fsdp x tensor"),
    "dpo": (dpo_loss, ObjectiveConfig("dpo", dpo=DpoConfig(beta=0.3)), "pipe x fsdp x context"),
    "dpo alone": (dpo_loss, ObjectiveConfig("dpo", dpo=DpoConfig(beta=0.3, reference="none")), "fsdp x context x tensor"),
    "ipo": (dpo_loss, ObjectiveConfig("dpo", dpo=DpoConfig("ipo", beta=0.3)), "one device"),
    "grpo": (grpo_loss, ObjectiveConfig("grpo", grpo=GrpoConfig(**GRPO)), "pipe x fsdp x tensor"),
    "dr_grpo": (grpo_loss, ObjectiveConfig("grpo", grpo=GrpoConfig(**GRPO, advantage="dr_grpo")), "fsdp x context x tensor"),
    "distill": (
        distill_loss,
        ObjectiveConfig("distill", distill=DistillConfig(kept="folder", top_k=tiny.VOCAB)),
        "fsdp x context x tensor",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    goldens.make_folder(FAMILY, made)
    return made


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_trl(name: str, folder: Path):
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    loss_of, objective, mesh = CASES[name]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    loss = loss_of(model, objective)
    loss.backward()
    want = goldens.gradients_of(model)
    scale = max(np.linalg.norm(gradient) for gradient in want.values())
    for cut in dict.fromkeys(("one device", mesh)):
        ours = Ours(FAMILY, batch_of(objective), objective, **MESHES[cut])
        found = ours.gradients()
        assert found.keys() == want.keys()
        for key, gradient in want.items():
            assert np.linalg.norm(found[key] - gradient) < 1e-5 * scale, (cut, key)
        assert float(ours.metrics["total_loss"]) == pytest.approx(loss.item(), rel=1e-5)
