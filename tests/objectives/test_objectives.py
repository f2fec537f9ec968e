"""Objectives: values and gradients on meshes against autodiff of the published formulas on plain logits."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import Config, DistillConfig, DpoConfig, GrpoConfig, MeshConfig, ObjectiveConfig
from jaxtrain.inference.whole import make_logits
from jaxtrain.measure.layouts import batch_of
from jaxtrain.mesh import make_mesh
from jaxtrain.objectives import Objective, SequenceObjective, objective_of
from jaxtrain.ops.losses import negative_log_likelihood
from jaxtrain.sharding import named
from jaxtrain.train.gradients import batch_names, batch_sharding, make_loss_and_gradients, make_score, make_top_k
from jaxtrain.train.state import initial_params, params_dims, to_canonical
from tests.tiny import UNEVEN, tiny

ROWS, LENGTH, TOP = 8, 16, 5
MESHES = [
    {"fsdp": 1},
    {"pipe": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 2, "tensor": 2},
    {"pipe": 2, "context": 2, "fsdp": 2},
]


def config_of(objective: ObjectiveConfig, mesh: dict[str, int], microbatches: int = 2, **train: Any) -> Config:
    return tiny(
        model=UNEVEN,
        mesh=MeshConfig(**{"fsdp": 1} | mesh),
        data={"sequence_length": LENGTH},
        train={"global_batch_size": ROWS, "microbatches": microbatches, "loss_chunk": 5, **train},
        objective=objective,
    )


@functools.cache
def pairs(seed: int = 0) -> dict[str, np.ndarray]:
    """Return rows of one or two pairs of answers of unequal lengths, some rows without any, and floats of each token."""
    rng = np.random.default_rng(seed)
    rows = batch_of(ROWS, LENGTH)
    batch = {name: np.zeros((ROWS, LENGTH), np.int32) for name in ("tokens", "targets", "positions", "segments")}
    batch["tokens"] = np.array(rows["tokens"])
    batch["targets"] -= 1
    for row in range(ROWS):
        at = 0
        for document in range(1, 2 * rng.integers(0, 3) + 1):
            length = int(rng.integers(2, 5))
            batch["segments"][row, at : at + length] = document
            batch["positions"][row, at : at + length] = np.arange(length)
            batch["targets"][row, at + 1 : at + length] = rng.integers(0, 100, length - 1)
            at += length
    floats = ("reference_log_probs", "old_log_probs", "sampler_log_probs")
    batch |= {name: rng.uniform(-5.2, -4.0, (ROWS, LENGTH)).astype(np.float32) for name in floats}
    batch["old_log_probs"][0] = np.nan
    batch["advantages"] = rng.normal(size=(ROWS, LENGTH)).astype(np.float32)
    batch["weights"] = rng.uniform(0, 0.1, (ROWS, LENGTH)).astype(np.float32)
    teacher = np.asarray(jax.nn.log_softmax(2 * rng.normal(size=(ROWS, LENGTH, 100)).astype(np.float32)))
    batch["teacher_ids"] = np.argsort(-teacher)[..., :TOP].astype(np.float32)
    batch["teacher_log_probs"] = -np.sort(-teacher)[..., :TOP]
    return batch


@functools.cache
def outcome(config: Config) -> tuple[dict[str, np.ndarray], Any]:
    """Return metrics, and gradients in canonical form."""
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(config.mesh.shape))])
    dims = params_dims(config)
    params = jax.jit(lambda: initial_params(config), out_shardings=named(mesh, dims))()
    batch = jax.device_put({name: pairs()[name] for name in batch_names(config)}, batch_sharding(mesh))
    metrics, _, gradients = jax.jit(make_loss_and_gradients(config, mesh, "reference"))(params, batch)
    return jax.tree.map(np.asarray, metrics), jax.tree.map(np.asarray, to_canonical(config, gradients, dims))


def plain_distribution(config: Config) -> Any:
    """Return params -> log p of every token [B, L, V], of whole logits, on one device."""
    logits = make_logits(config, make_mesh(config.mesh, jax.devices()[:1]))
    batch = {k: pairs()[k] for k in ("tokens", "positions", "segments")}
    return lambda params: jax.nn.log_softmax(logits(params, batch)[..., :100])


def plain_log_probs(config: Config) -> Any:
    """Return params -> log p of each target [B, L], of whole logits, on one device."""
    targets, distribution = pairs()["targets"], plain_distribution(config)

    def log_probs(params: Any) -> jax.Array:
        taken = jnp.take_along_axis(distribution(params), np.maximum(targets, 0)[..., None], -1)[..., 0]
        return jnp.where(targets >= 0, taken, 0)

    return log_probs


def dpo_formula(dpo: DpoConfig, log_ps: Any) -> Any:
    """State the losses pair by pair, as published."""
    batch, losses, chosen_sum, chosen_count = pairs(), [], 0.0, 0
    reference = batch["reference_log_probs"] if dpo.reference == "initial" and dpo.loss != "orpo" else 0 * batch["weights"]
    for row in range(ROWS):
        for document in range(1, batch["segments"][row].max() + 1, 2):
            of = [(batch["segments"][row] == d) & (batch["targets"][row] >= 0) for d in (document, document + 1)]
            (c, r), (nc, nr) = (jnp.sum((log_ps - reference)[row] * m) for m in of), (m.sum() for m in of)
            if dpo.loss == "sigmoid":
                e, h = dpo.label_smoothing, dpo.beta * (c - r)
                losses.append(-(1 - e) * jnp.log(1 / (1 + jnp.exp(-h))) - e * jnp.log(1 / (1 + jnp.exp(h))))
            elif dpo.loss == "ipo":
                losses.append((c / nc - r / nr - 1 / (2 * dpo.beta)) ** 2)
            else:
                odds = [jnp.exp(m) / (1 - jnp.exp(m)) for m in (c / nc, r / nr)]
                losses.append(-dpo.beta * jnp.log(1 / (1 + odds[1] / odds[0])))
                chosen_sum, chosen_count = chosen_sum - c, chosen_count + nc
    return sum(losses) / len(losses) + (chosen_sum / chosen_count if chosen_count else 0)


def grpo_formula(grpo: GrpoConfig, log_ps: Any) -> Any:
    batch = pairs()
    old = jnp.where(np.isnan(batch["old_log_probs"]), jax.lax.stop_gradient(log_ps), batch["old_log_probs"])
    r, a = jnp.exp(log_ps - old), batch["advantages"]
    gain = jnp.minimum(r * a, jnp.clip(r, 1 - grpo.clip_low, 1 + grpo.clip_high) * a)
    importance = jnp.minimum(jnp.exp(old - batch["sampler_log_probs"]), grpo.importance_cap)
    d = batch["reference_log_probs"] - log_ps
    terms = batch["weights"] * (grpo.kl * (jnp.exp(d) - d - 1) - importance * gain)
    return jnp.sum(jnp.where(batch["targets"] >= 0, terms, 0))


def distill_formula(distill: DistillConfig, log_ps: Any) -> Any:
    """State KL(q || p) over the teacher's best tokens and the rest, token by token, with the data's own loss beside it."""
    batch, total = pairs(), 0.0
    for row, place in zip(*np.nonzero(batch["targets"] >= 0), strict=True):
        ids, q = batch["teacher_ids"][row, place].astype(int), np.exp(batch["teacher_log_probs"][row, place])
        p = jnp.exp(log_ps[row, place])
        q, p_all = np.append(q, 1 - q.sum()), jnp.append(p[ids], 1 - p[ids].sum())
        total += distill.weight * jnp.sum(q * jnp.log(q / p_all)) - (1 - distill.weight) * jnp.log(
            p[batch["targets"][row, place]]
        )
    return total / (batch["targets"] >= 0).sum()


CASES = {
    "dpo": ObjectiveConfig("dpo", dpo=DpoConfig(beta=0.5)),
    "smoothed": ObjectiveConfig("dpo", dpo=DpoConfig(beta=0.5, label_smoothing=0.2, reference="none")),
    "ipo": ObjectiveConfig("dpo", dpo=DpoConfig("ipo", beta=0.5)),
    "orpo": ObjectiveConfig("dpo", dpo=DpoConfig("orpo", beta=0.5)),
    "distill": ObjectiveConfig("distill", distill=DistillConfig("teacher", top_k=TOP, weight=0.7)),
    "grpo": ObjectiveConfig("grpo", grpo=GrpoConfig("r.py", kl=0.1, clip_low=0.1, clip_high=0.3, importance_cap=1.2)),
}


def formula_of(objective: ObjectiveConfig) -> Any:
    """Return log p [B, L] -> the published loss."""
    formulas = {"dpo": dpo_formula, "grpo": grpo_formula, "distill": distill_formula}
    return functools.partial(formulas[objective.kind], getattr(objective, objective.kind))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind == "dpo"])
def test_coefficients_are_the_derivatives_of_the_published_loss(name: str):
    rng, counted = np.random.default_rng(1), pairs()["targets"] >= 0
    log_ps = np.where(counted, rng.uniform(-3, -0.5, counted.shape), 0).astype(np.float32)
    value, derivatives = jax.value_and_grad(formula_of(CASES[name]))(log_ps)
    objective = objective_of(config_of(CASES[name], {}))
    assert isinstance(objective, SequenceObjective)
    batch = {key: array for key, array in pairs().items() if key in ("targets", "segments", *objective.inputs)}
    coefficients, loss, metrics = objective.weigh(log_ps, batch)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    np.testing.assert_allclose(-coefficients, derivatives, atol=1e-6)
    assert metrics["pairs"] == sum(rows.max() // 2 for rows in pairs()["segments"])


@pytest.mark.parametrize("name", ["dpo", "distill", pytest.param("grpo", marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_the_formula(name: str):
    objective, config = CASES[name], config_of(CASES[name], {}, microbatches=1)
    params, log_probs = initial_params(config), (plain_distribution if name == "distill" else plain_log_probs)(config)
    value, gradients = jax.value_and_grad(lambda params: formula_of(objective)(log_probs(params)))(params)
    metrics, ours = outcome(config)
    np.testing.assert_allclose(metrics["total_loss"], value, rtol=1e-5)
    close(ours, to_canonical(config, gradients, params_dims(config)))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("dpo", MESHES[1]), ("distill", MESHES[3])]
    + [
        pytest.param(name, mesh, marks=pytest.mark.slow)
        for name, mesh in (
            ("dpo", MESHES[2]),
            ("dpo", MESHES[3]),
            ("grpo", MESHES[1]),
            ("grpo", MESHES[3]),
            ("distill", MESHES[1]),
        )
    ],
    ids=str,
)
def test_every_mesh_gives_the_same(name: str, mesh: dict[str, int]):
    (metrics, gradients), (others, ours) = (
        outcome(config_of(CASES[name], *cut)) for cut in (({}, 1), (mesh, 2 if "pipe" in mesh else 4))
    )
    assert set(metrics) == set(others)
    for key, value in metrics.items():
        np.testing.assert_allclose(others[key], value, rtol=2e-6, atol=2e-6, err_msg=key)
    close(ours, gradients, 2e-6)


@pytest.mark.parametrize("mesh", [MESHES[3], *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[1:3])], ids=str)
def test_scores_are_log_probabilities_of_the_targets(mesh: dict[str, int]):
    one, config = (config_of(ObjectiveConfig(), m) for m in ({}, mesh))
    want = plain_log_probs(one)(initial_params(one))
    devices = make_mesh(config.mesh, jax.devices()[: int(np.prod(config.mesh.shape))])
    params = jax.jit(lambda: initial_params(config), out_shardings=named(devices, params_dims(config)))()
    batch = {name: pairs()[name] for name in ("tokens", "targets", "positions", "segments")}
    got = make_score(config, devices, "reference")(params, jax.device_put(batch, batch_sharding(devices)))
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("mesh", [MESHES[2], *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[1:4:2])], ids=str)
def test_the_most_likely_tokens_are_those_of_the_whole_distribution(mesh: dict[str, int]):
    one, config = (config_of(ObjectiveConfig(), m) for m in ({}, mesh))
    want = np.asarray(plain_distribution(one)(initial_params(one)))
    devices = make_mesh(config.mesh, jax.devices()[: int(np.prod(config.mesh.shape))])
    params = jax.jit(lambda: initial_params(config), out_shardings=named(devices, params_dims(config)))()
    batch = jax.device_put({name: pairs()[name] for name in batch_names(config)}, batch_sharding(devices))
    got = jax.tree.map(np.asarray, make_top_k(config, devices, "reference", TOP)(params, batch))
    np.testing.assert_allclose(got["top_log_probs"], -np.sort(-want)[..., :TOP], atol=2e-6)
    ids = got["top_ids"].astype(int)
    np.testing.assert_allclose(np.take_along_axis(want, ids, -1), got["top_log_probs"], atol=2e-6)


def test_a_step_tells_its_log_probabilities_and_a_ratio_of_one():
    config = config_of(CASES["grpo"], {}, microbatches=1)
    metrics, _ = outcome(config)
    want = plain_log_probs(config)(initial_params(config))
    np.testing.assert_allclose(metrics["log_probs"], want, atol=2e-6)
    batch = dict(pairs(), old_log_probs=np.full((ROWS, LENGTH), np.nan, np.float32))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    region = jax.jit(make_loss_and_gradients(config, mesh, "reference"))
    first, _, _ = region(initial_params(config), {name: batch[name] for name in batch_names(config)})
    assert float(first["ratio_change"]) == 0
    assert float(first["clipped"]) == 0


def test_microbatches_without_a_target_change_nothing():
    """Rows without targets, all of them in one microbatch, and means over the global batch."""
    configs = [config_of(ObjectiveConfig("sft"), {}, microbatches) for microbatches in (1, 8)]
    assert (pairs()["targets"] < 0).all(1).any()
    (metrics, gradients), *rest = map(outcome, configs)
    for others, ours in rest:
        np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-6)
        close(ours, gradients, 1e-6)


@pytest.mark.slow
def test_users_measures_are_means_over_targets():
    config = config_of(ObjectiveConfig(), {})
    seen = Objective(negative_log_likelihood, measures={"squared": lambda log_p, _: jnp.square(log_p)})
    config = replace(config, parts=replace(config.parts, objective=seen))
    assert objective_of(config) is seen
    want = plain_log_probs(config)(initial_params(config))
    np.testing.assert_allclose(outcome(config)[0]["squared"], (want**2).sum() / (pairs()["targets"] >= 0).sum(), rtol=1e-5)


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Compare trees: the norm of each leaf's difference against the largest leaf norm."""
    scale = max(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(want))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(np.asarray(ours) - np.asarray(theirs)) < tolerance * scale
