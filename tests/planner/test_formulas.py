"""Closed forms against the sharded state, against arithmetic by hand, and against programs compiled for H100s."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jaxlib.version
import pytest

from jaxtrain.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PipelineConfig,
    ShardingConfig,
    TrainConfig,
)
from jaxtrain.config.loading import load_config
from jaxtrain.config.rules import validate
from jaxtrain.planner import deviceless
from jaxtrain.planner.formulas import muon_flops, step_flops
from jaxtrain.planner.formulas_collectives import Transfers, collectives
from jaxtrain.planner.memory import estimate_memory
from tests.planner.reference_layouts import totals

MOE = ModelConfig(
    num_layers=2,
    embed_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=1000,
    moe=MoEConfig(num_experts=8, experts_per_token=2, mlp_dim=256, shared_experts=1),
)
CAPACITY = replace(MOE, moe=MoEConfig(num_experts=8, experts_per_token=2, mlp_dim=256, dispatch="capacity"))
MODEL = ModelConfig(
    num_layers=4, embed_dim=256, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=768, vocab_size=1000, qk_norm="head"
)
WIDE = replace(MODEL, embed_dim=512, mlp_dim=1024)
"""Wide enough that copies divide muon's matrices (`muon_shares.SHARED_ROWS`)."""
MUON, ADAFACTOR = OptimizerConfig(name="muon"), OptimizerConfig(name="adafactor")


@dataclass(frozen=True)
class Case:
    """A layout of 8 devices."""

    mesh: MeshConfig
    microbatches: int = 1
    remat: str = "full"
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    model: ModelConfig = MODEL
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    remat_save: tuple[str, ...] = ("attention",)
    length: int = 256
    prefetches: bool = True
    """Whether XLA pipelines all-gathers over the layers, as the trainer has it do (see `test_compiled_for_h100`)."""

    def config(self) -> Config:
        """Two sequences a microbatch and device."""
        config = Config(
            model=self.model,
            mesh=self.mesh,
            pipeline=self.pipeline,
            sharding=self.sharding,
            data=DataConfig(sequence_length=self.length, mask_documents=False),
            optimizer=self.optimizer,
            train=TrainConfig(
                global_batch_size=2 * self.mesh.batch_shards * self.microbatches,
                microbatches=self.microbatches,
                remat=self.remat,  # type: ignore[arg-type]
                remat_save=self.remat_save,
                loss_chunk=128,
            ),
        )
        return validate(config, 8)


CASES = {
    "data": Case(MeshConfig(data=8, fsdp=1), microbatches=2),
    "fsdp": Case(MeshConfig(fsdp=8), microbatches=2),
    "fsdp, tied": Case(MeshConfig(fsdp=8), model=replace(MODEL, tie_embeddings=True)),
    "zero 1": Case(MeshConfig(fsdp=8), microbatches=2, sharding=ShardingConfig(zero=1)),
    "zero 2": Case(MeshConfig(fsdp=8), microbatches=2, sharding=ShardingConfig(zero=2)),
    "data x fsdp": Case(MeshConfig(data=2, fsdp=4), remat="dots"),
    "tensor": Case(MeshConfig(fsdp=1, tensor=4, data=2), remat="none"),
    "fsdp x tensor": Case(
        MeshConfig(fsdp=2, tensor=4), remat="named", remat_save=("attention", "attention_out"), optimizer=MUON
    ),
    "fsdp x tensor, full": Case(MeshConfig(fsdp=4, tensor=2), prefetches=False),
    "pipe, 1f1b": Case(MeshConfig(pipe=4, fsdp=2), microbatches=5),
    "pipe, gpipe": Case(MeshConfig(pipe=2, data=4, fsdp=1), microbatches=3, pipeline=PipelineConfig("gpipe"), remat="none"),
    "pipe, interleaved": Case(
        MeshConfig(pipe=2, fsdp=2, tensor=2),
        microbatches=4,
        pipeline=PipelineConfig("interleaved", 2),
        remat="named",
        remat_save=("attention", "attention_out", "query", "mlp_up"),
    ),
    "pipe, folded": Case(
        MeshConfig(pipe=2, fsdp=2, tensor=2), microbatches=4, pipeline=PipelineConfig("v_shape", 2), remat="dots"
    ),
    "replica x fsdp": Case(MeshConfig(replica=2, fsdp=4)),
    "expert, dropless": Case(MeshConfig(fsdp=2, expert=4), model=MOE, prefetches=False),
    "expert, capacity": Case(MeshConfig(fsdp=2, expert=4), model=CAPACITY, remat="dots"),
    "expert x tensor": Case(
        MeshConfig(fsdp=1, expert=4, tensor=2), model=CAPACITY, microbatches=2, remat="none", prefetches=False
    ),
    "context, ring": Case(MeshConfig(fsdp=2, context=4), length=512, sharding=ShardingConfig(context_attention="ring")),
    "context, gather": Case(
        MeshConfig(fsdp=2, context=4), length=512, sharding=ShardingConfig(context_attention="gather"), prefetches=False
    ),
    "context x tensor, ulysses": Case(
        MeshConfig(fsdp=1, data=2, tensor=2, context=2),
        length=512,
        remat="none",
        sharding=ShardingConfig(context_attention="ulysses"),
    ),
}
CASES |= {
    "adafactor, fsdp x tensor": Case(MeshConfig(fsdp=4, tensor=2), optimizer=ADAFACTOR, prefetches=False),
    "adafactor, pipe": Case(MeshConfig(pipe=2, data=2, fsdp=2), microbatches=3, optimizer=ADAFACTOR),
    "adafactor, expert": Case(MeshConfig(fsdp=2, expert=2, tensor=2), model=CAPACITY, optimizer=ADAFACTOR, prefetches=False),
    "muon, data x fsdp": Case(MeshConfig(data=2, fsdp=4), model=WIDE, optimizer=MUON),
    "muon, pipe": Case(MeshConfig(pipe=2, fsdp=4), microbatches=3, model=replace(MODEL, num_layers=5), optimizer=MUON),
    "muon, expert": Case(MeshConfig(fsdp=2, expert=2, tensor=2), model=CAPACITY, optimizer=MUON, prefetches=False),
    "muon, context": Case(
        MeshConfig(fsdp=4, context=2), model=WIDE, length=512, optimizer=MUON, sharding=ShardingConfig(context_attention="ring")
    ),
}
FLOAT8 = replace(MODEL, matmul_dtype="float8")
CASES |= {
    "float8, fsdp": Case(MeshConfig(fsdp=8), microbatches=2, model=FLOAT8),
    "float8, zero 1": Case(MeshConfig(fsdp=8), microbatches=2, sharding=ShardingConfig(zero=1), model=FLOAT8),
    "float8, tensor": Case(MeshConfig(fsdp=4, tensor=2), model=FLOAT8, prefetches=False),
    "float8, pipe": Case(MeshConfig(pipe=4, fsdp=2), microbatches=5, model=FLOAT8, remat="none"),
    "float8, experts": Case(MeshConfig(fsdp=2, expert=4), model=replace(MOE, matmul_dtype="float8"), prefetches=False),
}
FEW = ("fsdp x tensor", "expert, dropless")
"""Compiled for GPUs in every run with the extra `plan`; 14 to 57 s of CPU each."""

# ---------------------------------------------------------------------------------------------------------------------
# By hand


@functools.cache
def seven_billion(fsdp: int, tensor: int) -> Config:
    model = ModelConfig(
        num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11008, vocab_size=32000
    )
    config = Config(
        model=model,
        mesh=MeshConfig(fsdp=fsdp, tensor=tensor),
        data=DataConfig(sequence_length=4096, mask_documents=False),
        train=TrainConfig(global_batch_size=fsdp),
    )
    return validate(config, fsdp * tensor)


def test_the_7b_on_64_gpus():
    """All weights but the table's twice in bf16; all gradients in float32; 4 and 8 bytes a parameter of state."""
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    bytes_moved = totals(collectives(seven_billion(64, 1)))
    assert bytes_moved["fsdp", "all-gather", "bf16"] == 2 * (2 * 32 * layer + 2 * 32000 * 4096)
    assert bytes_moved["fsdp", "reduce-scatter", "f32"] == 4 * (32 * layer + 2 * 32000 * 4096)
    parameters = (32 * layer + 2 * 32000 * 4096) // 64 + 65 * 4096
    memory = estimate_memory(seven_billion(64, 1))
    assert (memory.parameters, memory.optimizer) == (4 * parameters, 8 * parameters)


def test_the_7b_with_tensor_parallelism():
    """Activations of 32 MiB in bf16: 6 gathers and 5 scatters a layer, and 2 of each around the layers."""
    bytes_moved = totals(collectives(seven_billion(8, 8)))
    activation = 4096 * 4096 * 2
    assert bytes_moved["tensor", "all-gather", "bf16"] == (32 * 6 + 2) * activation
    assert bytes_moved["tensor", "reduce-scatter", "bf16"] == (32 * 5 + 2) * activation
    assert bytes_moved["tensor", "all-reduce", "f32"] == pytest.approx(3 * 4 * 4096, rel=0.01)


def test_one_device_moves_nothing():
    assert collectives(replace(Case(MeshConfig(fsdp=8)).config(), mesh=MeshConfig(fsdp=1))) == []


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for H100s


SCALARS = 256  # bytes: numbers that XLA may well add up before it sends them


def deviations(
    report: deviceless.CompiledStep, entries: Sequence[Transfers], tolerance: float = 0.02, parts: int = 1
) -> list[str]:
    """Where the program's bytes are not the closed form's, by axes, kind and dtype; empty where all are."""
    expected, found = totals(entries), {(row.axes, row.kind, row.dtype): row for row in report.rows}
    calls, unread = dict.fromkeys(expected, 0), dict.fromkeys(expected, 0.0)
    for entry in entries:
        calls[entry.axes, entry.kind, entry.dtype] += entry.calls
        unread[entry.axes, entry.kind, entry.dtype] += entry.unread
    wrong = []
    for key in sorted(expected | found):
        want, got = expected.get(key, 0.0), found[key].payload if key in found else 0.0
        slack = tolerance * want
        if not want - max(slack, SCALARS) - unread.get(key, 0.0) <= got <= want + max(slack, 4):
            wrong.append(f"{key}: {got:,.0f} bytes compiled, {want:,.0f} expected")
        if key in found and found[key].calls > parts * calls.get(key, 0):
            wrong.append(f"{key}: {found[key].calls:,.0f} calls compiled, {calls.get(key, 0):,} in the code")
    return wrong


@pytest.mark.plan
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in CASES])
def test_compiled_for_h100(name: str):
    """No byte more or less than the formula, in no other dtype, kind or axis; FLOPs and state too.

    XLA's pipelined all-gather brings gathers of the backward pass forward by an iteration, with all that they depend on, and so
    runs that twice. Of weights that is nothing; but with tensor > 1 and remat=full, with dropless experts (whose counts are
    gathered) and with gathered keys, it is the whole attention block. In those cases it is turned off here.
    """
    case = CASES[name]
    config = case.config()
    option = (
        {} if jaxlib.version.__version_info__ >= (0, 12) else {"xla_gpu_enable_pipelined_all_gather": False}
    )  # gone in 0.12
    report = deviceless.report(config, options=None if case.prefetches else option)
    assert report.attention.startswith("cudnn")
    # Layers that take turns send what they send in two halves.
    parts = 2 if config.mesh.tensor > 1 or config.mesh.expert > 1 else 1
    assert deviations(report, collectives(config), parts=parts) == []
    assert report.flops == pytest.approx(step_flops(config, "cudnn"), rel=0.02)
    batch = 3 * 4 * config.train.global_batch_size * case.length // (config.mesh.batch_shards * config.mesh.context)
    memory = estimate_memory(config)
    assert report.argument_bytes == pytest.approx(memory.parameters + memory.optimizer + batch, abs=64)


def test_deviations_are_found():
    """The test of the test: a transfer too few, too many, in float32, or twice."""
    entries = collectives(replace(CASES["fsdp"], microbatches=1).config())
    payload = totals(entries)["fsdp", "all-gather", "bf16"]

    def row(dtype: str, share: float) -> deviceless.CollectiveRow:
        return deviceless.CollectiveRow("fsdp", "all-gather", dtype, 1, share * payload, 0, 0, 0, False)

    others = [e for e in entries if e.kind != "all-gather"]
    rest = [deviceless.CollectiveRow(*key, 1, total, 0, 0, 0, False) for key, total in totals(others).items()]

    def found(*rows: deviceless.CollectiveRow) -> list[str]:
        return deviations(deviceless.CompiledStep(0, (*rows, *rest), 0, 0, 0, 0, ""), entries)

    assert found(row("bf16", 1)) == []
    assert found(row("bf16", 1.015)) == []
    for wrong in ([], [row("bf16", 0.9)], [row("bf16", 2)], [row("f32", 2)], [row("bf16", 1), row("f32", 0.1)]):
        assert found(*wrong) != []
    assert found(replace(row("bf16", 1), calls=10_000)) == [
        "('fsdp', 'all-gather', 'bf16'): 10,000 calls compiled, 58 in the code"
    ]


def test_muon_moves_what_the_program_compiled_for_h100s_does():
    """8b on fsdp=8, compiled with jax 0.10.2: 61.12 GiB and 6.148e14 FLOPs a step; with adamw 57.87 GiB and 5.316e14."""
    config = load_config("configs/8b.py")
    config = replace(config, mesh=replace(config.mesh, fsdp=8), train=replace(config.train, global_batch_size=8))
    muon = replace(config, optimizer=replace(config.optimizer, name="muon"))
    of_adamw, moved = (sum(totals(collectives(each)).values()) / 2**30 for each in (config, muon))
    assert totals(collectives(muon))["fsdp", "all-to-all", "bf16"] == 2 * 2 * 32 * (2 * 4096 * (4096 + 1024 + 3 * 7168)) // 8
    assert moved == pytest.approx(61.12, rel=1e-3)
    assert moved < 1.06 * of_adamw
    assert step_flops(muon, "cudnn") == pytest.approx(6.148e14, rel=1e-3)
    assert step_flops(config, "cudnn") == pytest.approx(5.316e14, rel=1e-3)


@pytest.mark.parametrize(
    ("mesh", "waste"),
    [
        (MeshConfig(fsdp=8), 1.0),
        (MeshConfig(fsdp=64), 1.27),
        (MeshConfig(data=4, fsdp=8), 1.0),
        (MeshConfig(fsdp=8, tensor=2), 1.0),
        (MeshConfig(pipe=2, fsdp=8), 1.0),
    ],
)
def test_muon_divides_its_flops_by_the_devices(mesh: MeshConfig, waste: float):
    """But for matrices that the devices do not divide: of 3 x 32 in the MLP on 64 devices each has 2, not 1.5."""
    config = replace(load_config("configs/8b.py"), optimizer=OptimizerConfig(name="muon"))
    alone = muon_flops(replace(config, mesh=MeshConfig(fsdp=1)))
    devices = math.prod(mesh.shape)
    assert muon_flops(replace(config, mesh=mesh)) * devices == pytest.approx(waste * alone, rel=0.01)
