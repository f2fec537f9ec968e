"""Prove that the layout does not change the result: compare any layout of a config with one device, in float32.

Compared are the initial parameters, bit by bit, the first loss and gradients, and the losses of a few optimizer steps.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.config import (
    FOLDED_SCHEDULES,
    MESH_AXES,
    Config,
    DataConfig,
    DistillConfig,
    DpoConfig,
    GrpoConfig,
    LatentAttentionConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PipelineConfig,
    Recipe,
    RopeScaling,
    ShardingConfig,
    Stage,
    SyncConfig,
    TrainConfig,
)
from jaxtrain.config.rules import find_problems
from jaxtrain.errors import ExplainedError
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.models.trained import trained, trained_dims, with_trained
from jaxtrain.objectives import objective_of
from jaxtrain.parallel.pipeline_schedule import SCHEDULES
from jaxtrain.parallel.stacking import make_stacking
from jaxtrain.sharding import LORA, is_dims
from jaxtrain.train.balance import step_biases
from jaxtrain.train.gradients import batch_names, batch_sharding, make_loss_and_gradients
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.rounding import apply_updates
from jaxtrain.train.schedule import seed_words
from jaxtrain.train.state import create_state, to_canonical

BATCH, LENGTH, VOCAB, STEPS = 32, 32, 100, 3
LAYOUTS_A_TASK = 2
MOST_TRIES = 100
"""Rounds of draws without a valid layout after which the search ends."""
BASE = Config(
    model=ModelConfig(
        num_layers=4,
        embed_dim=32,
        num_heads=8,
        num_kv_heads=8,
        head_dim=4,
        mlp_dim=64,
        vocab_size=VOCAB,
        dtype="float32",
        attention="reference",
    ),
    mesh=MeshConfig(fsdp=1),
    data=DataConfig(sequence_length=LENGTH),
    optimizer=OptimizerConfig(peak_lr=1e-2),
    train=TrainConfig(steps=STEPS, global_batch_size=BATCH, loss_chunk=8, z_loss=1e-3, validate_every=0),
)


# ---------------------------------------------------------------------------------------------------------------------
# What may be drawn


Choose = Callable[[Sequence[Any]], Any]
"""Picks one option: hypothesis in tests, so that a failure shrinks to earlier options; a random generator in long runs."""


def draw_mixture(choose: Choose) -> MoEConfig:
    """Draw a mixture of eight experts, of any kind."""
    groups = choose((1, 4))
    return MoEConfig(
        num_experts=8,
        experts_per_token=choose((2, 3)),
        mlp_dim=16,
        shared_experts=choose((0, 1)),
        first_dense_layers=choose((0, 1)),
        router=choose(("softmax", "sigmoid")),
        groups=groups,
        groups_per_token=2 if groups > 1 else 1,
        balance_loss=0.02,
        router_z_loss=0.01,
        bias_update_rate=choose((0.0, 0.01)),
        dispatch=choose(("dropless", "capacity")),
        capacity_group=2,
    )


def draw_model(choose: Choose) -> ModelConfig:
    """Draw a tiny decoder of any kind."""
    moe = draw_mixture(choose) if choose((False, True)) else None
    latent = choose((None, None, LatentAttentionConfig(query_rank=12, kv_rank=8, rope_dim=4, value_dim=6)))
    model = replace(
        BASE.model,
        num_layers=choose((4, 5)) + (moe.first_dense_layers if moe else 0),
        moe=moe,
        latent_attention=latent,
        num_kv_heads=8 if latent else choose((8, 4, 2)),
        tie_embeddings=choose((False, True)),
        sliding_window=choose((0, 0, 11)),
        attention=choose(("reference", "blockwise")),
        param_dtype=choose(("float32", "float32", "bfloat16")),
    )
    model = draw_attention(draw_blocks(model, choose), choose)
    return model if moe and moe.first_dense_layers else draw_pattern(model, choose)


def draw_blocks(model: ModelConfig, choose: Choose) -> ModelConfig:
    """Draw norms, residuals, the MLP and the scales."""
    norm, residual = choose(("rms", "layer")), choose(("sequential", "sequential", "parallel", "parallel_one_norm"))
    gated = bool(model.moe) or choose((True, False))
    return replace(
        model,
        norm=norm,
        norm_bias=norm == "layer" and choose((False, True)),
        norm_offset=choose((0.0, 1.0)),
        norm_placement=choose(("pre", "post", "both")) if residual == "sequential" else "pre",
        residual=residual,
        residual_scale=choose((1.0, 0.3)),
        embedding_scale=choose((1.0, 5.0)),
        logit_scale=choose((1.0, 0.25)),
        logit_softcap=choose((0.0, 3.0)),
        gated_mlp=gated,
        activation=choose(("silu", "gelu", "gelu_tanh", *(("clipped_silu",) if gated else ()))),
        activation_limit=0.5,
        mlp_bias=choose((False, True)),
    )


def draw_attention(model: ModelConfig, choose: Choose) -> ModelConfig:
    """Draw positions, and the scores of attention."""
    latent = model.latent_attention is not None
    return replace(
        model,
        qk_norm="none" if latent else choose(("none", "head", "width")),
        attention_bias="none" if latent else choose(("none", "qkv", "all")),
        attention_sinks=not latent and choose((False, True)),
        attention_softcap=choose((0.0, 0.5)),
        attention_scale=choose((0.0, 0.7)),
        rope_fraction=1.0 if latent else choose((1.0, 0.5)),
        rope_scaling=choose((None, RopeScaling(kind="yarn", original_length=16, factor=4.0, attention_factor=1.1))),
        learned_positions=choose((0, 0, LENGTH)),
    )


def draw_pattern(model: ModelConfig, choose: Choose) -> ModelConfig:
    """Draw the kinds of layers that repeat."""
    pattern = choose(((), ("local", "global"), ("local", "local", "nope")))
    window = 7 if pattern else model.sliding_window
    return replace(model, pattern=pattern, sliding_window=window, local_rope_theta=choose((0.0, 100.0)))


def draw_task(choose: Choose) -> Config:
    """Draw a config for one device."""
    task = replace(BASE, model=draw_model(choose), data=replace(BASE.data, mask_documents=choose((False, True))))
    targets = choose(((), ("attention/*",), ("up", "down")))
    base = choose(("", "int8", *(() if task.model.latent_attention else ("nf4",))))  # odd latents have no pairs
    adapters = LoraConfig(rank=4, alpha=8.0, targets=targets, base=base, base_group=2 if base == "nf4" else 0)
    frozen = choose(((), ("outer/*",), ("layers/attention/*",)))
    task = choose((task, task, replace(task, lora=adapters), replace(task, train=replace(task.train, frozen=frozen))))
    task = replace(task, objective=draw_objective(choose, task.data.mask_documents))
    return task if task.objective.kind != "pretrain" else draw_stages(task, choose)


def draw_stages(task: Config, choose: Choose) -> Config:
    """Draw a second stage, of shorter rows and more of them, at other positions, or none."""
    rows, theta = 2 * task.train.global_batch_size, task.model.rope_theta / 2
    stage = Stage(from_step=1, sequence_length=LENGTH // 2, global_batch_size=rows, rope_theta=theta)
    return replace(task, train=replace(task.train, stages=choose(((), (), (), (stage,)))))


def draw_objective(choose: Choose, with_documents: bool) -> ObjectiveConfig:
    """Draw an objective; preferences are between documents of a row."""
    others = [ObjectiveConfig("grpo", grpo=GrpoConfig("reward.py", kl=0.1, temperature=1.3))]
    others += [ObjectiveConfig("distill", distill=DistillConfig("teacher", top_k=3, weight=0.7))]
    others += [ObjectiveConfig("dpo", dpo=DpoConfig(loss)) for loss in ("sigmoid", "orpo")] if with_documents else []
    return choose((*[ObjectiveConfig()] * 4, *others))


def draw_layout(task: Config, choose: Choose, devices: int) -> Config:
    """Draw a layout of the task over `devices` (a power of two) that keeps replicas in step; it may be invalid."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    for _ in range(devices.bit_length() - 1):
        sizes[choose(MESH_AXES)] *= 2
    schedule = choose(tuple(SCHEDULES)) if sizes["pipe"] > 1 else "1f1b"
    chunks = 2 if schedule in ("interleaved", *FOLDED_SCHEDULES) else choose((1, 2)) if schedule == "zero_bubble" else 1
    return replace(
        task,
        mesh=MeshConfig(**sizes),
        pipeline=PipelineConfig(schedule=schedule, chunks=chunks),
        sharding=ShardingConfig(
            zero=choose((3, 2, 1)) if sizes["fsdp"] > 1 else 3,
            context_attention=choose(("auto", "ring", "gather", "ulysses")) if sizes["context"] > 1 else "auto",
        ),
        train=replace(task.train, microbatches=choose((1, 2, 4)), remat=choose(("none", "dots", "named", "full"))),
    )


def draw_configs(choose: Choose, devices: int, task: Config | None = None) -> list[Config]:
    """Draw valid layouts of one task, mostly `LAYOUTS_A_TASK`: they share the one-device run, which costs as much as one.

    Args:
      task: the one-device config; drawn if None.
    """
    task = task or draw_task(choose)
    drawn = (draw_layout(task, choose, devices) for _ in range(10 * LAYOUTS_A_TASK))
    return list(itertools.islice((config for config in drawn if not find_problems(config, devices)[1]), LAYOUTS_A_TASK))


def random_configs(draws: int, devices: int, seed: int, task: Config | None = None) -> Iterator[Config]:
    """Yield `draws` valid configs from a plain random generator (hypothesis tends to repeat itself).

    Raises:
      ExplainedError: hardly any layout of the task is valid.
    """
    chance = random.Random(seed)

    def drawn() -> list[Config]:
        for _ in range(MOST_TRIES):
            if found := draw_configs(chance.choice, devices, task):
                return found
        last = draw_layout(task or draw_task(chance.choice), chance.choice, devices)
        problems = find_problems(last, devices)[1]
        raise ExplainedError(
            f"no layout over {devices} devices that was drawn is valid: give heads, mlp_dim, sequence_length and "
            f"global_batch_size that 2, 4 and 8 divide; of the last one: {problems[0] if problems else 'nothing'}"
        )

    return itertools.islice(itertools.chain.from_iterable(iter(drawn, None)), draws)


def as_task(config: Config) -> Config:
    """Return the config on one device, in float32, with reference attention.

    Not in float8, in which a sum in another order may move a number by a step of 1/8 (`tests/models/test_float8_weights.py`).
    """
    alone = on_one_device(config, config.train.remat)
    return replace(alone, model=replace(alone.model, dtype="float32", matmul_dtype="default"), sync=SyncConfig())


def on_one_device(config: Config, remat: str = "none") -> Config:
    """Return the config to compare with: one device, one microbatch, no recomputation, reference attention."""
    return replace(
        config,
        model=replace(config.model, attention="reference"),
        mesh=MeshConfig(fsdp=1),
        pipeline=PipelineConfig(),
        sharding=ShardingConfig(),
        train=replace(config.train, microbatches=1, remat=remat),
    )


@functools.cache
def batch_of(rows: int, length: int = LENGTH, seed: int = 0, vocabulary: int = VOCAB) -> dict[str, np.ndarray]:
    """Return a packed batch with ragged documents, unequal numbers of targets per row, and some rows all padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    segments = np.cumsum(rng.random((rows, length)) < 0.2, axis=1).astype(np.int32) + 1
    starts = np.concatenate([np.ones((rows, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    index = np.arange(length, dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    targets = np.where(rng.random((rows, length)) < rng.random((rows, 1)), -1, tokens[:, 1:])
    padding = rng.random(rows) < 0.1
    targets[padding], segments[padding] = -1, 0
    return {"tokens": tokens[:, :-1], "targets": targets.astype(np.int32), "positions": positions, "segments": segments}


def _experts(config: Config) -> dict[str, np.ndarray]:
    """Return experts that a batch may say, int32 [B, L, layers K]: K different ones a layer, or the router's own (-1)."""
    moe, shape = config.model.moe, (config.train.global_batch_size, config.data.sequence_length, config.model.stacked_layers)
    if moe is None:
        return {}
    rng = np.random.default_rng(0)
    chosen = rng.random((*shape, moe.num_experts)).argsort(-1)[..., : moe.experts_per_token]
    is_own = rng.random((*shape, 1)) < 0.5
    return {"experts": np.where(is_own, -1, chosen).reshape(*shape[:2], -1).astype(np.int32)}


def _inputs_of(config: Config, name: str) -> np.ndarray:
    """Return an input of the objective, float32 [B, L] or [B, L, K]: token ids, log-probabilities, or floats around 1."""
    widths, vocabulary = getattr(objective_of(config), "widths", {}), config.model.vocab_size
    shape = (config.train.global_batch_size, config.data.sequence_length, *((widths[name],) if name in widths else ()))
    rng = np.random.default_rng(list(name.encode()))
    if name.endswith("_ids"):
        return rng.random((*shape[:2], vocabulary)).argsort(-1)[..., : shape[-1]].astype(np.float32)
    low, high = (-5.0, -3.0) if name.endswith("_log_probs") else (0.5, 1.5)
    return rng.uniform(low, high, shape).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


@dataclass(frozen=True)
class Outcome:
    """The results of a layout, in canonical form on the host."""

    params: Any
    losses: list[float]
    gradients: Any


def with_second_factors(config: Config, params: Any) -> Any:
    """Return the parameters with waves in place of the adapters' B, whose zeros would leave A without a gradient."""

    def leaf(path: tuple, dims: tuple[str, ...], value: jax.Array) -> jax.Array:
        if LORA not in dims or path[-1].key != "b":
            return value
        own = value.shape[dims.index(LORA) :]
        return value + 0.05 * jnp.sin(jnp.arange(math.prod(own), dtype=jnp.float32)).reshape(own)

    if not config.lora.rank:
        return params
    return jax.tree_util.tree_map_with_path(leaf, parameter_dims(config.model), params, is_leaf=is_dims)


def run(config: Config, steps: int = STEPS) -> Outcome:
    """Return initial parameters, the first gradients, and the losses of `steps` optimizer steps on the same batch."""
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.shape)])
    layers = make_stacking(config).layer_numbers()
    all_dims, dims = parameter_dims(config.model), trained_dims(config)
    seed = jnp.asarray(seed_words(config.train.seed))
    optimizer = optimizer_of(config)
    state = create_state(config, mesh, optimizer)
    params, optimizer_state = with_second_factors(config, state["params"]), state["optimizer"]
    recipe, held = Recipe(config), dict[int, tuple[Any, Any]]()
    for stage in recipe.stages:
        region = make_loss_and_gradients(stage.config, mesh, config.model.attention)
        batch = _placed_batch(stage.config, mesh)
        held[stage.first] = jax.jit(region).lower(params, batch).compile(), batch

    def canonical(tree: Any, dims: Any) -> Any:
        return jax.tree.map(np.asarray, to_canonical(config, tree, dims))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, optimizer_state: Any, gradients: Any, reports: Any, step: Any) -> tuple[Any, Any]:
        before = trained(config, params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, before, mesh=mesh)
        after = step_biases(config.model, apply_updates(before, updates, dims, layers, seed, step), reports)
        return with_trained(config, params, after), optimizer_state

    initial, losses, first = canonical(params, all_dims), [], None
    for step in range(steps):
        loss_and_gradients, batch = held[recipe.at(step).first]
        metrics, reports, gradients = loss_and_gradients(params, batch)
        losses.append(float(metrics["total_loss"]))
        first = first or canonical(gradients, dims)
        params, optimizer_state = update(params, optimizer_state, gradients, reports, step)
    return Outcome(initial, losses, first)


def _placed_batch(config: Config, mesh: Mesh) -> dict[str, jax.Array]:
    """Return the batch of a stage, with what its objective reads."""
    rows = batch_of(config.train.global_batch_size, config.data.sequence_length, vocabulary=config.model.vocab_size)
    rows = rows | {name: _inputs_of(config, name) for name in objective_of(config).inputs} | _experts(config)
    return jax.device_put({name: rows[name] for name in batch_names(config)}, batch_sharding(mesh))


@functools.lru_cache(maxsize=64)
def truth(config: Config, steps: int = STEPS) -> Outcome:
    """Return `run` of `on_one_device`, cached for all layouts that share it."""
    return run(config, steps)


@dataclass(frozen=True)
class Errors:
    """Distance of a layout from one device."""

    same_start: bool
    loss: float
    gradient: float
    curve: float

    @property
    def problem(self) -> str | None:
        """Return the result that differs from one device's, in words, or None."""
        limits = {"loss": 1e-6, "gradient": 1e-5, "curve": 1e-5}
        over = [
            f"{name} is off by {getattr(self, name):.1e}" for name, most in limits.items() if not getattr(self, name) <= most
        ]
        return "; ".join(([] if self.same_start else ["initial parameters differ"]) + over) or None


def _distance(truth: np.ndarray, got: np.ndarray) -> float:
    """||truth - got|| / ||truth||; ||got|| for a zero `truth`."""
    size = float(np.linalg.norm(truth))
    return float(np.linalg.norm(truth - got)) / (size or 1.0)


def compare(config: Config, steps: int = STEPS) -> Errors:
    """Return the relative errors of the first loss, the worst gradient leaf (norm of difference / norm), the worst loss."""
    exact, got = truth(on_one_device(config), steps), run(config, steps)
    same = jax.tree.leaves(jax.tree.map(np.array_equal, exact.params, got.params))
    distance = jax.tree.leaves(jax.tree.map(_distance, exact.gradients, got.gradients))
    curve = np.abs(np.array(got.losses) / np.array(exact.losses) - 1)
    return Errors(all(same), float(curve[0]), max(distance), float(curve.max()))


def axes_of(config: Config) -> str:
    """Return the names of the axes above 1."""
    return " x ".join(axis for axis in MESH_AXES if getattr(config.mesh, axis) > 1)
