"""Losses and their derivatives by each token's log-probability against trl's own trainers, where trl is installed."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest

from jaxtrain.config import DpoConfig, GrpoConfig
from jaxtrain.objectives.dpo import dpo_objective
from jaxtrain.objectives.grpo import grpo_objective

trl = pytest.importorskip("trl")
torch = pytest.importorskip("torch")
PAIRS, LENGTH = 6, 9


def alone() -> dict:
    """Return what a trainer of one process has to log with."""
    same = lambda x: x  # noqa: E731
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same, num_processes=1)
    accelerator.reduce = lambda x, **_: x
    logged = defaultdict(lambda: defaultdict(list))
    return {"accelerator": accelerator, "_metrics": logged, "_total_train_tokens": 0, "_tp_size": 1}


def answers(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log p and reference log p of the tokens of 2 PAIRS answers, and a mask; the tokens before an answer have none."""
    rng = np.random.default_rng(seed)
    log_p, reference = rng.uniform(-4, -0.2, (2, 2 * PAIRS, LENGTH)).astype(np.float32)
    first, last = rng.integers(0, 3, (2 * PAIRS, 1)), rng.integers(5, LENGTH, (2 * PAIRS, 1))
    mask = ((np.arange(LENGTH) >= first) & (np.arange(LENGTH) < last)).astype(np.float32)
    return log_p * mask, reference * mask, mask


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sigmoid", DpoConfig(beta=0.3)),
        ("robust", DpoConfig(beta=0.3, label_smoothing=0.0)),
        ("sigmoid", DpoConfig(beta=0.3, reference="none")),
        ("ipo", DpoConfig("ipo", beta=0.3)),
    ],
)
def test_preferences(name: str, config: DpoConfig):
    log_p, reference, mask = answers()
    given = torch.tensor(log_p, requires_grad=True)
    sums = torch.tensor((reference * mask).sum(1) * (config.reference == "initial"))
    trainer = MagicMock(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[name],
        loss_weights=[1.0], beta=config.beta, label_smoothing=config.label_smoothing, use_weighting=False, **alone(),
    )  # fmt: skip
    padded = torch.tensor(np.pad(mask, ((0, 0), (1, 0)))).long()
    zeros = torch.zeros_like(given)
    outputs = SimpleNamespace(log_probs=given, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    inputs = {
        "input_ids": torch.zeros_like(padded), "attention_mask": padded, "completion_mask": padded,
        "ref_chosen_logps": sums[:PAIRS], "ref_rejected_logps": sums[PAIRS:],
    }  # fmt: skip
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()

    # The same answers as documents of rows: pair n is row n, its chosen answer document 1, its rejected one document 2.
    rows = lambda a: np.concatenate([a[:PAIRS], a[PAIRS:]], axis=1)  # noqa: E731
    batch = {"targets": np.where(rows(mask) > 0, 1, -1), "segments": np.repeat([[1, 2]], LENGTH, axis=1).repeat(PAIRS, axis=0)}
    objective = dpo_objective(config)
    batch |= {name: rows(reference) for name in objective.inputs}
    coefficients, ours, _ = objective.weigh(rows(log_p), batch)
    np.testing.assert_allclose(ours, loss.detach(), rtol=1e-5)
    np.testing.assert_allclose(-coefficients, rows(given.grad.numpy() * mask), atol=1e-6)  # trl's model gives no others


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("with_old", [True, False])
def test_rewards(loss_type: str, with_old: bool):
    log_p, reference, mask = answers(1)
    rng = np.random.default_rng(2)
    old = (log_p + rng.normal(scale=0.3, size=log_p.shape)).astype(np.float32)
    advantages = rng.normal(size=len(log_p)).astype(np.float32)
    given = torch.tensor(log_p, requires_grad=True)
    config = GrpoConfig("reward.py", kl=0.07, clip_low=0.1, clip_high=0.2, max_new_tokens=LENGTH)
    trainer = MagicMock(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=config.kl,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False), loss_type=loss_type, epsilon_low=config.clip_low,
        epsilon_high=config.clip_high, use_vllm=False, current_gradient_accumulation_steps=1, max_completion_length=LENGTH,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, model=MagicMock(training=True), **alone(),
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies.return_value = (given, torch.zeros_like(given), None)
    tensors = {"completion_mask": mask, "advantages": advantages, "ref_per_token_logps": reference}
    inputs = {name: torch.tensor(array) for name, array in tensors.items()} | {
        "completion_ids": torch.zeros(log_p.shape).long()
    }
    inputs |= {"prompt_ids": torch.zeros((len(log_p), 1)).long(), "prompt_mask": torch.ones((len(log_p), 1))}
    inputs |= {"old_per_token_logps": torch.tensor(old)} if with_old else {}
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()

    lengths = mask.sum(1, keepdims=True) if loss_type == "grpo" else LENGTH
    ours = grpo_objective(config)
    floats = {
        "advantages": np.broadcast_to(advantages[:, None], log_p.shape), "weights": mask / lengths / len(log_p),
        "old_log_probs": old if with_old else np.full_like(old, np.nan), "reference_log_probs": reference,
    }  # fmt: skip
    floats["sampler_log_probs"] = old if with_old else log_p  # which makes the importance 1
    value, gradient = jax.value_and_grad(lambda log_p: ours.loss(log_p, floats).sum())(log_p)
    np.testing.assert_allclose(value, loss.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, given.grad.numpy(), atol=1e-6)
