"""The cost model: what it takes apart adds up again, its closed forms are the tables', and it answers as physics must."""

import math
from collections import defaultdict
from dataclasses import replace

import pytest

from jaxtrain.config import Config, DataConfig, LatentAttentionConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from jaxtrain.config.rules import validate
from jaxtrain.errors import ExplainedError
from jaxtrain.hardware import find_chip
from jaxtrain.parallel.pipeline_counts import count_passes
from jaxtrain.parallel.pipeline_schedule import IDLE, make_schedule
from jaxtrain.planner.candidate import layout_of, stand_in, with_layout
from jaxtrain.planner.cost import CostModel, Practice, estimate
from jaxtrain.planner.estimates import Cluster
from jaxtrain.planner.formulas import count_ticks, step_flops
from jaxtrain.planner.formulas_collectives import PARTS, collectives, phase_counts, uncovered
from jaxtrain.planner.layer_table import layer_weights, matmuls
from jaxtrain.planner.roofline import roofline
from jaxtrain.planner.traffic import Flow, flows_by_phase, place, seconds

H100 = find_chip("h100-sxm")
MODEL = ModelConfig(num_layers=8, embed_dim=512, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1024, vocab_size=1000)
MOE = replace(MODEL, moe=MoEConfig(num_experts=8, experts_per_token=2, mlp_dim=256, shared_experts=1))


def config_of(devices: int, model: ModelConfig = MODEL, batch: int = 64, length: int = 1024, **fields: object) -> Config:
    """A valid config; fields of mesh, train, pipeline and sharding by their own names."""
    sections = {"mesh": MeshConfig(fsdp=1), "train": TrainConfig(global_batch_size=batch)}
    config = Config(model=model, data=DataConfig(sequence_length=length, mask_documents=False), **sections)
    for name, value in fields.items():
        section = next(s for s in ("mesh", "train", "pipeline", "sharding") if hasattr(getattr(config, s), name))
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return validate(config, devices)


FAMILY = replace(MODEL, gated_mlp=False, norm_placement="both", qk_norm="width", attention_bias="all", learned_positions=1024)
LAYOUTS = {
    "family": config_of(8, FAMILY, fsdp=2, tensor=4, microbatches=2),
    "fsdp": config_of(8, fsdp=8, microbatches=2),
    "zero 1, data": config_of(8, fsdp=4, data=2, zero=1, microbatches=4),
    "tensor, none": config_of(8, fsdp=2, tensor=4, remat="none"),
    "pipe": config_of(8, pipe=4, fsdp=2, microbatches=8, remat="dots"),
    "interleaved": config_of(16, pipe=4, fsdp=2, tensor=2, microbatches=8, schedule="interleaved", chunks=2),
    "folded": config_of(16, pipe=4, fsdp=2, tensor=2, microbatches=8, schedule="zero_bubble_v", chunks=2),
    "ring": config_of(8, context=4, fsdp=2, context_attention="ring"),
    "ulysses": config_of(8, context=4, fsdp=2, context_attention="ulysses", remat="none"),
    "experts": config_of(8, MOE, expert=4, fsdp=2, microbatches=2),
    "experts, pipe": config_of(16, MOE, expert=2, tensor=2, pipe=2, fsdp=2, microbatches=4),
}


TABLES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 3), ("v_shape", 2), ("zero_bubble_v", 2))


@pytest.mark.parametrize("name", LAYOUTS)
def test_phases_add_up_to_the_formulas(name: str):
    """Bytes of a layer, a pass, a step, times how often each happens, are `collectives` to the byte."""
    config, sums = LAYOUTS[name], defaultdict(float)
    times = phase_counts(count_ticks(config))
    for part in PARTS.values():
        for phase, flows in flows_by_phase(part(config)).items():
            for flow in flows:
                sums[flow.axes, flow.kind, flow.dtype] += times[phase] * flow.payload
    expected = defaultdict(float)
    for entry in collectives(config):
        expected[entry.axes, entry.kind, entry.dtype] += entry.payload
    assert sums == pytest.approx(expected)


@pytest.mark.parametrize(
    "case",
    [(n, s, k, m) for s in (1, 2, 4) for m in (1, 2, 4, 6, 8) for n, k in TABLES],
)
def test_passes_are_those_of_the_table(case: tuple[str, int, int, int]):
    name, stages, chunks, microbatches = case
    table = make_schedule(name, stages, chunks, microbatches)
    forward, backward = ((m != IDLE).any(1) for m in (table.forward_microbatch, table.backward_microbatch))
    assert count_passes(*case) == (forward.sum(), backward.sum(), (forward & backward).sum())


@pytest.mark.parametrize("name", LAYOUTS)
def test_flops_are_those_of_the_formulas(name: str):
    """All passes of all stages, without what lock-step pipelines count beside."""
    config = LAYOUTS[name]
    found = estimate(config, Cluster(H100, math.prod(config.mesh.shape) // 8)).flops
    if config.mesh.pipe == 1:
        assert found == pytest.approx(step_flops(config, "cudnn"))
    else:
        assert 0.5 * step_flops(config, "cudnn") < found < step_flops(config, "cudnn")


@pytest.mark.parametrize("name", LAYOUTS)
def test_matmuls_are_with_all_of_the_weights(name: str):
    """One device's k n of each matrix, of its experts, is its share of the weight, gathered over fsdp."""
    config = LAYOUTS[name]
    matrices = {name: weight for name, weight in layer_weights(config.model).items() if weight.is_matrix}
    assert {row.weight.name: row.k * row.n * row.batch for row in matmuls(config)} == {
        name: weight.shard(config, without=("fsdp",)) for name, weight in matrices.items()
    }


def test_matmuls_are_slower_for_tiles_and_waves_and_never_beyond_the_peak():
    chip = roofline(H100, "bfloat16")
    large = 2 * 8192**3 / chip.matmul(8192, 8192, 8192)
    assert 0.6 * chip.peak < large < chip.peak
    assert chip.matmul(8192, 8192, 8192) < chip.matmul(8193, 8192, 8192)  # one more row is one more row of tiles
    assert 2 * 8192 * 64 * 8192 / chip.matmul(8192, 64, 8192) < 0.5 * large  # the result's bytes take longer than its FLOPs
    assert chip.matmul(1, 8192, 8192) >= 2 * 8192**2 / chip.bandwidth  # the weight is read


def test_axes_are_placed_as_the_mesh_places_them():
    """70b's own layout: tensor fills the host; fsdp=4 x tensor=4 lies half inside."""
    inside = place((1, 1, 1, 16, 1, 1, 8), 8)
    assert (inside.of("tensor"), inside.of("fsdp")) == ((8, 1), (1, 16))
    half = place((1, 1, 1, 4, 1, 1, 4), 8)
    assert (half.of("tensor"), half.of("fsdp"), half.of("fsdp+tensor")) == ((4, 1), (2, 2), (8, 2))
    flow = Flow("fsdp", "all-gather", "bf16", 0, 1e9)
    alone, shared = (seconds(flow, p, replace(H100, nic_bandwidth=1e9)).nic for p in (place((1, 1, 1, 4, 1, 1, 8), 8), half))
    assert alone == pytest.approx(2 * shared)  # two devices of the group in a host have two NICs


def test_time_adds_up_and_waits_where_bytes_cross_hosts():
    config = LAYOUTS["fsdp"]
    near, far = estimate(config, Cluster(H100, 1)), estimate(config, Cluster(H100, 8, devices_per_host=1))
    assert near.time.exposed < far.time.exposed
    assert near.time.matmul == far.time.matmul
    assert {wire.crosses_hosts for wire in near.wires} == {False}
    assert {wire.crosses_hosts for wire in far.wires} == {True}
    assert all(0 <= wire.exposed_seconds <= wire.seconds * (1 + 1e-9) for wire in (*near.wires, *far.wires))
    assert near.joules < far.joules  # type: ignore[operator]


def test_bubble_is_the_schedules():
    """Interleaving cuts the bubble; a stage works kM of kM + S - 1 ticks each way."""
    plain = config_of(8, pipe=4, fsdp=2, microbatches=8, batch=64)
    cut = replace(plain, pipeline=replace(plain.pipeline, schedule="interleaved", chunks=2))
    one, two = (estimate(config, Cluster(H100, 1)).time for config in (plain, cut))
    compute = one.matmul + one.attention + one.memory_bound
    assert one.bubble == pytest.approx(3 / 8 * compute, rel=0.35)  # the loss is no part of a pass, transfers are
    assert two.bubble == pytest.approx(one.bubble / 2, rel=0.1)


def test_a_pattern_takes_the_mean_of_its_places():
    """Of attention, which alone knows windows."""
    local, mixed = replace(MODEL, sliding_window=256), replace(MODEL, sliding_window=256, pattern=("local", "global"))
    near, half, far = (
        estimate(config_of(8, model, length=8192, fsdp=8), Cluster(H100, 1)).time.attention for model in (local, mixed, MODEL)
    )
    assert near < 0.9 * far
    assert half == pytest.approx((near + far) / 2)


def test_turns_hide_what_tensor_sends():
    """An even number of rows takes turns; 2 tick-tocks of one row do not, unless a program hides transfers otherwise."""
    cluster = Cluster(H100, 1)
    even = config_of(8, tensor=4, fsdp=2, batch=32, length=4096)
    odd = config_of(8, tensor=4, fsdp=2, batch=32, length=4096, microbatches=16)
    hidden, shown = (estimate(config, cluster).time.exposed for config in (even, odd))
    assert hidden < 0.5 * shown
    others = CostModel(odd, cluster, Practice(hides_tensor=True)).step(layout_of(odd)).time.exposed
    assert others < 0.7 * shown


def test_what_no_formula_speaks_of_is_labelled_approximate():
    latent = replace(MOE, num_kv_heads=8, latent_attention=LatentAttentionConfig(query_rank=256, kv_rank=128), moe=None)
    config = config_of(8, latent, fsdp=8)
    assert estimate(config, Cluster(H100, 1)).origin == "approximate"
    assert uncovered(stand_in(config)) == []
    assert estimate(LAYOUTS["fsdp"], Cluster(H100, 1)).origin == "estimate"


def test_layouts_go_there_and_back():
    for config in LAYOUTS.values():
        assert with_layout(config, layout_of(config)) == config


def test_a_chip_without_figures_is_refused():
    with pytest.raises(ExplainedError, match="calibrate"):
        estimate(config_of(1), Cluster(find_chip("cpu"), 1, 1))
    with pytest.raises(ExplainedError, match="network between hosts"):
        estimate(config_of(16, fsdp=16), Cluster(find_chip("a100-pcie-80"), 2))
