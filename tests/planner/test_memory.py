"""Memory in closed form: against the sharded state, against what a traced layer keeps, and against compiled programs."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxtrain.config import (
    Config,
    DataConfig,
    GrpoConfig,
    LatentAttentionConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PipelineConfig,
    ShardingConfig,
    SyncConfig,
    TrainConfig,
)
from jaxtrain.config.rules import validate
from jaxtrain.mesh import make_mesh
from jaxtrain.models.building import make_decoder
from jaxtrain.models.decoder import parameter_dims, to_compute
from jaxtrain.models.trained import trained
from jaxtrain.parallel.pipeline import _Residuals
from jaxtrain.planner import deviceless
from jaxtrain.planner.activations import Sizes, operand_bytes
from jaxtrain.planner.estimates import Memory
from jaxtrain.planner.formulas_collectives import Transfers
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.sharding import specs, vary
from jaxtrain.train.gradients import batch_names, make_loss_and_gradients
from jaxtrain.train.optimizer import make_optimizer, optimizer_of
from jaxtrain.train.state import abstract_state, initial_params
from tests.planner import reference_layouts
from tests.planner.reference_layouts import LAYOUTS, compare, worst_deviation

DENSE = ModelConfig(num_layers=16, embed_dim=256, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=768, vocab_size=1000)
LATENT = replace(
    DENSE,
    num_kv_heads=8,
    latent_attention=LatentAttentionConfig(query_rank=96, kv_rank=64, rope_dim=32, value_dim=48),
    moe=MoEConfig(
        num_experts=4, mlp_dim=256, shared_experts=1, dispatch="capacity", first_dense_layers=1, bias_update_rate=0.001
    ),
)
FAMILY = replace(DENSE, norm_placement="both", gated_mlp=False, activation="gelu_tanh", attention_bias="all", mlp_bias=True)
ONE_NORM = replace(DENSE, residual="parallel_one_norm", activation="clipped_silu", norm="layer", qk_norm="width")
MOE = replace(DENSE, moe=MoEConfig(num_experts=8, experts_per_token=2, mlp_dim=256, dispatch="capacity"))


def config_of(model: ModelConfig, mesh: MeshConfig, rows: int = 2, **sections: Any) -> Config:
    """`rows` sequences a microbatch and device, on 8 devices."""
    train = replace(sections.pop("train", TrainConfig()), loss_chunk=128)
    train = replace(train, global_batch_size=rows * mesh.batch_shards * train.microbatches)
    return validate(
        Config(model=model, mesh=mesh, data=DataConfig(sequence_length=256, mask_documents=False), train=train, **sections), 8
    )


# ---------------------------------------------------------------------------------------------------------------------
# The state


def held(tree: Any) -> int:
    """Bytes on one device, but for counts."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size > 16]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("moments", ["float32", "int8"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "adafactor", "muon"])
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        (replace(DENSE, tie_embeddings=True), MeshConfig(pipe=2, fsdp=2, tensor=2)),
        (LATENT, MeshConfig(fsdp=2, expert=2, tensor=2)),
    ],
)
def test_the_state_of_every_optimizer(model: ModelConfig, mesh: MeshConfig, optimizer: str, moments: str):
    pipeline = PipelineConfig("interleaved", 2) if mesh.pipe > 1 else PipelineConfig()
    if (optimizer, moments) == ("adafactor", "int8"):
        pytest.skip("refused: adafactor holds no moments of a matrix's size")
    rule = OptimizerConfig(name=optimizer, moments_dtype=moments)  # type: ignore[arg-type]
    config = config_of(model, mesh, pipeline=pipeline, optimizer=rule)
    rule = optimizer_of(config)
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:8]), rule)
    memory = estimate_memory(config)
    assert (memory.parameters, memory.optimizer) == (held(state["params"]), held(state["optimizer"]))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize(
    ("model", "lora", "frozen"),
    [
        (DENSE, LoraConfig(rank=4), ()),
        (LATENT, LoraConfig(rank=20, targets=("attention/*", "gate")), ()),
        (LATENT, LoraConfig(), ("outer/*", "layers/moe/up")),
        (DENSE, LoraConfig(rank=4, base="nf4"), ()),
        (LATENT, LoraConfig(rank=20, base="int8"), ()),
        (LATENT, LoraConfig(rank=20, base="float8", base_group=16), ()),
    ],
)
def test_the_state_of_what_is_trained(model: ModelConfig, lora: LoraConfig, frozen: tuple[str, ...], optimizer: str):
    """Frozen weights have no moments and adapters are float32, whatever param_dtype is."""
    mesh = MeshConfig(fsdp=2, expert=2, tensor=2) if model.moe else MeshConfig(pipe=2, fsdp=2, tensor=2)
    rule = OptimizerConfig(name=optimizer)  # type: ignore[arg-type]
    config = config_of(replace(model, param_dtype="bfloat16"), mesh, lora=lora, optimizer=rule)
    config = replace(config, train=replace(config.train, frozen=frozen))
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:8]), optimizer_of(config))
    memory = estimate_memory(config)
    assert (memory.parameters, memory.optimizer) == (held(state["params"]), held(state["optimizer"]))
    rewarded = replace(config, objective=ObjectiveConfig("grpo", grpo=GrpoConfig("reward.py", kl=0.1)))
    assert estimate_memory(rewarded).other_models == held(trained(config, state["params"]))
    whole = replace(config, lora=LoraConfig(), train=replace(config.train, frozen=()))
    of_all = estimate_memory(whole)
    assert memory.optimizer + memory.gradients < (0.9 if frozen else 0.4) * (of_all.optimizer + of_all.gradients)


@pytest.mark.parametrize("model", [replace(DENSE, param_dtype="bfloat16"), replace(LATENT, param_dtype="bfloat16")])
def test_parameters_in_bfloat16_but_norms_routers_and_biases(model: ModelConfig):
    config = config_of(model, MeshConfig(fsdp=2, tensor=4))
    rule = make_optimizer(config.optimizer, 10, parameter_dims(config.model))
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:8]), rule)
    assert estimate_memory(config).parameters == held(state["params"])


@pytest.mark.parametrize(
    "sync",
    [
        SyncConfig("local"),
        SyncConfig("diloco", overlap=2),
        SyncConfig("delayed", delay=3, compression="int8", error_feedback=True),
        SyncConfig("every_step", compression="bfloat16", error_feedback=True),
    ],
)
def test_what_replicas_keep(sync: SyncConfig):
    config = config_of(DENSE, MeshConfig(replica=2, fsdp=4), sync=sync)
    rule = make_optimizer(config.optimizer, 10, parameter_dims(config.model))
    state = abstract_state(config, make_mesh(config.mesh, jax.devices()[:8]), rule)
    assert estimate_memory(config).optimizer == held(state["optimizer"]) + held(state["sync"])


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def traced_bytes(config: Config, backend: str) -> int:
    """What the layers of a config keep of one microbatch: the residuals of their vjp that are no parameters."""
    mesh, dims, kept = make_mesh(config.mesh, jax.devices()[:8]), parameter_dims(config.model), []
    decoder = make_decoder(config, mesh, backend)
    functions = decoder.loss_functions()
    length = config.data.sequence_length // config.mesh.context
    rows = config.train.global_batch_size // config.mesh.batch_shards

    def region(params: Any) -> jax.Array:
        master = vary(params)
        both = (master, to_compute(master, dims, "bfloat16"))
        trees = [jax.tree.map(lambda leaf: leaf[0], decoder.stacking.by_place(params["layers"])) for params in both]
        whole = vary(jnp.zeros((rows, length), jnp.int32))
        microbatch = {"tokens": whole, "targets": whole, "positions": whole, "scale": vary(jnp.ones(()))}
        x = vary(jnp.zeros((rows, length // config.mesh.tensor, config.model.embed_dim), jnp.bfloat16))
        _, closure = jax.vjp(lambda trees, x: functions.layers(trees, x, microbatch, jnp.zeros((), jnp.int32)), trees, x)
        parameters = {id(leaf) for leaf in jax.tree.leaves(trees)}
        kept.extend(leaf for leaf in jax.tree.leaves(closure) if id(leaf) not in parameters)
        return jnp.zeros(())

    traced = jax.shard_map(region, mesh=mesh, in_specs=(specs(dims),), out_specs=PartitionSpec(), check_vma=False)
    with deviceless.cudnn_without_a_gpu((9, 0)):
        jax.eval_shape(traced, jax.eval_shape(functools.partial(initial_params, config)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def handed_on_bytes(config: Config) -> float:
    """What is traced as kept, only because it goes through the barrier at which the second of two parts waits for the first's
    result. The backward pass does not read it, and XLA drops it."""
    mesh, moe, remat = config.mesh, config.model.moe, config.train.remat
    rows = config.train.global_batch_size // mesh.batch_shards
    if mesh.tensor * mesh.expert == 1 or rows % 2:
        return 0.0
    whole = rows / 2 * config.data.sequence_length * config.model.embed_dim * 2 * config.model.stacked_layers
    if remat == "dots":
        return whole if moe is None or moe.shared_experts else 0.0
    return whole / mesh.tensor if remat == "named" and "mlp_out" in config.train.remat_save else 0.0


ALL_NAMES = ("query", "key", "value", "attention", "attention_out", "mlp_gate", "mlp_up", "mlp_hidden", "mlp_out")
EXPERT_NAMES = ("router", "expert_in", "expert_gate", "expert_up", "expert_hidden", "expert_out", "mlp_out")


@pytest.mark.parametrize(
    ("model", "mesh", "rows", "remat", "names"),
    [
        (DENSE, MeshConfig(fsdp=8), 2, "none", ()),
        (DENSE, MeshConfig(fsdp=8), 2, "dots", ()),
        (DENSE, MeshConfig(fsdp=2, tensor=4), 1, "none", ()),
        (DENSE, MeshConfig(fsdp=2, tensor=4), 2, "none", ()),
        (DENSE, MeshConfig(fsdp=2, tensor=4), 2, "dots", ()),
        (DENSE, MeshConfig(fsdp=2, tensor=4), 2, "named", ALL_NAMES),
        (DENSE, MeshConfig(fsdp=2, tensor=4), 2, "named", ("attention",)),
        (DENSE, MeshConfig(fsdp=2, tensor=4), 2, "full", ()),
        (DENSE, MeshConfig(fsdp=2, context=4), 2, "none", ()),
        (DENSE, MeshConfig(fsdp=2, context=4), 2, "dots", ()),
        (replace(DENSE, qk_norm="head"), MeshConfig(fsdp=8), 2, "none", ()),
        (FAMILY, MeshConfig(fsdp=8), 2, "none", ()),
        (FAMILY, MeshConfig(fsdp=2, tensor=4), 1, "dots", ()),
        (ONE_NORM, MeshConfig(fsdp=8), 2, "none", ()),
        (replace(DENSE, norm_placement="post"), MeshConfig(fsdp=8), 2, "none", ()),
        (ONE_NORM, MeshConfig(fsdp=2, tensor=4), 1, "named", ALL_NAMES),
        (MOE, MeshConfig(fsdp=2, expert=4), 2, "none", ()),
        (MOE, MeshConfig(fsdp=2, expert=4), 1, "none", ()),
        (MOE, MeshConfig(fsdp=2, expert=2, tensor=2), 2, "none", ()),
        (MOE, MeshConfig(fsdp=2, expert=4), 2, "dots", ()),
        (MOE, MeshConfig(fsdp=2, expert=2, tensor=2), 2, "named", EXPERT_NAMES),
        (LATENT, MeshConfig(fsdp=8), 2, "none", ()),
        (LATENT, MeshConfig(fsdp=4, expert=2), 2, "dots", ()),
        (LATENT, MeshConfig(fsdp=4, expert=2), 2, "full", ()),
    ],
)
def test_what_layers_keep(model: ModelConfig, mesh: MeshConfig, rows: int, remat: str, names: Sequence[str]):
    """To 2%: single numbers a row, such as the norms' factors, are left out."""
    train = TrainConfig(remat=remat, remat_save=tuple(names))  # type: ignore[arg-type]
    config = config_of(model, mesh, rows, train=train, sharding=ShardingConfig(context_attention="ring"))
    traced = traced_bytes(config, "cudnn") - handed_on_bytes(config)
    assert estimate_memory(config).activations == pytest.approx(traced, rel=0.02)


@pytest.mark.parametrize(
    ("model", "mesh", "remat"),
    [
        (DENSE, MeshConfig(pipe=2, fsdp=2, tensor=2), "full"),
        pytest.param(replace(FAMILY, mlp_bias=False), MeshConfig(pipe=2, fsdp=4), "dots", marks=pytest.mark.slow),
        (MOE, MeshConfig(pipe=2, fsdp=2, expert=2), "full"),
    ],
)
def test_what_put_off_weight_gradients_keep(model: ModelConfig, mesh: MeshConfig, remat: str, monkeypatch: pytest.MonkeyPatch):
    """The operands that a backward pass leaves, of a stage's layers; to 2%, as above."""
    train = TrainConfig(remat=remat, microbatches=2)  # type: ignore[arg-type]
    config = config_of(model, mesh, 2, train=train, pipeline=PipelineConfig("zero_bubble"))
    cuts, cut = [], _Residuals.backward

    def spy(self: _Residuals, *arguments: Any) -> Any:
        made = cut(self, *arguments)
        cuts.append(sum(value.size * value.dtype.itemsize for value in made[2]))
        return made

    monkeypatch.setattr(_Residuals, "backward", spy)
    rows = {name: jnp.zeros((config.train.global_batch_size, 256), jnp.int32) for name in batch_names(config)}
    region = make_loss_and_gradients(config, make_mesh(config.mesh, jax.devices()[:8]), "reference")
    jax.eval_shape(region, jax.eval_shape(functools.partial(initial_params, config)), rows)
    assert 8 * operand_bytes(config, Sizes.of(config)) == pytest.approx(cuts[0], rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Laws


def memory_of(mesh: MeshConfig, microbatches: int = 1, remat: str = "full", zero: int = 3, schedule: str = "1f1b") -> Memory:
    """Of 16 sequences in all."""
    return estimate_memory(
        config_of(
            replace(DENSE, num_layers=8),
            mesh,
            16 // (mesh.batch_shards * microbatches),
            train=TrainConfig(microbatches=microbatches, remat=remat),  # type: ignore[arg-type]
            sharding=ShardingConfig(zero=zero),  # type: ignore[arg-type]
            pipeline=PipelineConfig(schedule),  # type: ignore[arg-type]
        )
    )


def falls(*memories: Memory) -> bool:
    totals = [memory.total for memory in memories]
    return all(before > after for before, after in zip(totals, totals[1:], strict=False))


def test_laws():
    """What must not depend on how well any factor is known."""
    assert falls(*(memory_of(MeshConfig(data=8 // fsdp, fsdp=fsdp)) for fsdp in (1, 2, 4, 8)))
    assert falls(*(memory_of(MeshConfig(fsdp=8), remat=remat) for remat in ("none", "dots", "named", "full")))
    assert falls(*(memory_of(MeshConfig(fsdp=8), zero=zero) for zero in (1, 2, 3)))
    assert falls(*(memory_of(MeshConfig(data=1, fsdp=2, pipe=4), microbatches=m) for m in (1, 2, 4)))
    gpipe, one_f_one_b = (memory_of(MeshConfig(fsdp=2, pipe=4), 8, schedule=name) for name in ("gpipe", "1f1b"))
    assert falls(gpipe, one_f_one_b)
    single, cut = memory_of(MeshConfig(fsdp=8), 1), memory_of(MeshConfig(fsdp=8), 2)
    assert cut.parameters == single.parameters


# ---------------------------------------------------------------------------------------------------------------------
# The list of layouts


def test_the_layouts_are_thirty_and_of_every_kind():
    configs = [layout.config() for layout in LAYOUTS]
    assert len({layout.name for layout in LAYOUTS}) == 30
    assert {math.prod(config.mesh.shape) for config in configs} >= {8, 64, 1024}
    assert {config.train.remat for config in configs} == {"none", "dots", "named", "full"}
    assert {config.pipeline.schedule for config in configs} == {"gpipe", "1f1b", "interleaved"}
    assert {config.sharding.zero for config in configs} == {1, 2, 3}
    assert all(max(getattr(config.mesh, axis) for config in configs) > 1 for axis in ("replica", "pipe", "data", "context"))
    assert any(config.mesh.expert > 1 and config.mesh.pipe > 1 for config in configs)


def test_deviations_of_bytes():
    entry = Transfers("once", "fsdp", "all-gather", "bf16", 4, 2**30, "weights", 8, unread=2**28)

    def deviation(payload: float, dtype: str = "bf16") -> float:
        found = deviceless.CollectiveRow("fsdp", "all-gather", dtype, 1, payload, 0, 0, 0, False)
        return worst_deviation([entry], deviceless.CompiledStep(0, (found,), 0, 0, 0, 0, ""))

    assert deviation(2**30) == deviation(0.75 * 2**30) == 0
    assert deviation(1.5 * 2**30) == 0.5
    assert deviation(2**30, "f32") == math.inf


def test_a_table_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    compiled = []

    def report(config: Config) -> deviceless.CompiledStep:
        compiled.append(config.name)
        return deviceless.CompiledStep(1.0, (), 2**30, 2**30, 0, 0, "cudnn")

    monkeypatch.setattr(deviceless, "report_in_subprocess", report)
    cache = f"--cache={tmp_path / 'new' / 'kept.json'}"
    for only in ("--only=1", "--only=3", "--only=1"):
        assert reference_layouts.main([only, cache]) == 0
    assert compiled == ["1b", "1b"]
    package = reference_layouts.PACKAGE
    assert all(list(package.glob(pattern)) for pattern in reference_layouts.STEP)
    assert "| 3 | 1b on 8: tensor=2 global_batch_size=32 remat=full |" in capsys.readouterr().out


@pytest.mark.plan
@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_compiled_for_h100(number: int, tmp_path: Path):
    """The whole list is printed by `python -m tests.planner.reference_layouts`."""
    comparison = compare(LAYOUTS[number - 1], tmp_path / "kept.json")
    assert abs(comparison.memory_error) < 0.1
    assert comparison.bytes_error is not None
    assert comparison.bytes_error < 0.02
