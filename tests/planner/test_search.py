"""The search: what it generates is what is valid, its best is that of going through everything, and it says what would do."""

import dataclasses
import itertools
import math
from dataclasses import replace

import pytest

from jaxtrain.config import Config, DataConfig, LoraConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from jaxtrain.config.rules import divisors, find_problems
from jaxtrain.errors import ConfigError
from jaxtrain.hardware import find_chip
from jaxtrain.planner.candidate import Candidate, with_layout
from jaxtrain.planner.cost import CostModel
from jaxtrain.planner.estimates import Cluster, axes_in_use
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.planner.search import search, smallest_cluster
from jaxtrain.planner.space import Space, useful_chunks

H100 = find_chip("h100-sxm")
MODEL = ModelConfig(num_layers=6, embed_dim=1024, num_heads=8, num_kv_heads=4, head_dim=128, mlp_dim=4096, vocab_size=32000)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(sequence_length=2048, mask_documents=False),
    train=TrainConfig(global_batch_size=12, remat_save=("attention", "mlp_gate")),
)
PATTERN = replace(CONFIG, model=replace(MODEL, pattern=("local", "global"), sliding_window=512))
MOE = replace(CONFIG, model=replace(MODEL, moe=MoEConfig(num_experts=4, mlp_dim=512)))
SCHEDULES = [("1f1b", 1), *(("interleaved", k) for k in (2, 3, 6)), *(("zero_bubble", k) for k in (1, 2, 3, 6))]
SCHEDULES += [("v_shape", 2), ("zero_bubble_v", 2)]


def everything(config: Config, devices: int, per_host: int) -> list[Candidate]:
    """All layouts that `config/rules.py` and `make_mesh` take, of those kinds that a search looks at, found by trying all."""
    found = []
    sizes = itertools.product([1], *[divisors(devices)] * 6)
    for mesh in (mesh for mesh in sizes if math.prod(mesh) == devices):
        kinds = ("ring", "ulysses") if mesh[5] > 1 else ("auto",)
        zeros = (1, 2, 3) if mesh[3] > 1 else (3,)
        for (name, chunks), kind, zero, m in itertools.product(SCHEDULES, kinds, zeros, divisors(12)):
            layout = Candidate(mesh, m, name, chunks, "none", (), zero, kind)
            groups = math.ceil(6 / len(config.model.kinds))
            in_groups = chunks == 1 or (m % mesh[1] == 0 and chunks in useful_chunks(groups, mesh[1])) or layout.folded
            data_axis = mesh[4] > 1 and not config.model.moe  # without experts, the axis `expert` is one more `data`
            fills = 2 * (mesh[1] - 1) <= m <= 8 * mesh[1] and 6 % (mesh[1] * chunks * len(config.model.kinds)) == 0
            in_groups = in_groups and (not name.startswith("zero_bubble") or (mesh[1] > 1 and fills))
            if in_groups and not data_axis and not find_problems(with_layout(config, layout), devices)[1]:
                found.append(layout)
    return found


@pytest.mark.parametrize(("config", "devices"), [(CONFIG, 6), (MOE, 4), (PATTERN, 4)], ids=["dense", "experts", "pattern"])
def test_the_space_is_what_is_valid(config: Config, devices: int):
    space = Space(config, devices, devices)
    generated = [layout for mesh in space.meshes() for layout in space.layouts(mesh)]
    assert len(generated) == len(set(generated))
    assert set(generated) == set(everything(config, devices, devices))


def test_no_mesh_cuts_the_groups_of_a_base_in_few_bits():
    """Two groups of 512 in a width of 1,024."""
    config = replace(CONFIG, lora=LoraConfig(rank=4, base="nf4", base_group=512))
    space = Space(config, 4, 4)
    assert {mesh[3] for mesh in space.meshes()} == {1, 2}
    assert space.pruned["the groups of lora.base, or the blocks of moments, would be cut"] > 0


@pytest.mark.parametrize("memory", [80e9, 5e9], ids=["room for all", "tight"])
@pytest.mark.parametrize("objective", ["time", "energy"])
def test_the_best_is_the_best_of_all(objective: str, memory: float):
    cluster = Cluster(replace(H100, memory_bytes=int(memory)), hosts=1, devices_per_host=4, reserved_bytes=0)
    space, model = Space(CONFIG, 4, 4), CostModel(CONFIG, cluster)
    layouts = (one for mesh in space.meshes() for layout in space.layouts(mesh) for one in (layout, *space.remats(layout)))
    estimates = [model.estimate(layout) for layout in layouts]
    value = (lambda e: e.joules) if objective == "energy" else (lambda e: e.time.total)
    best = min(value(e) for e in estimates if e.fits)
    result = search(CONFIG, cluster, objective)  # type: ignore[arg-type]
    assert value(result.ranked[0]) == pytest.approx(best)
    assert result.candidates == len(estimates)
    values = [value(e) for e in result.ranked]
    assert values == sorted(values)
    assert len({tuple(e.mesh.items()) for e in result.ranked}) == len(result.ranked)
    for e in result.ranked:
        assert find_problems(e.config, 4)[1] == []
        assert e.fits
        assert e.memory == estimate_memory(e.config)
    assert (result.smallest, result.leanest) == (None, None)


def test_the_pareto_front_trades_time_for_memory():
    result = search(CONFIG, Cluster(H100, 1, 4))
    times, bytes_held = [e.time.total for e in result.pareto], [e.memory.total for e in result.pareto]
    assert times == sorted(times)
    assert bytes_held == sorted(bytes_held, reverse=True)
    assert times[0] == pytest.approx(result.ranked[0].time.total)
    assert {(p.seconds, p.bytes) for p in result.points} >= set(zip(times, bytes_held, strict=True))


def test_impossible_requests_get_the_smallest_cluster_that_would_do():
    tiny = Cluster(replace(H100, memory_bytes=1_600_000_000), hosts=1, devices_per_host=2, reserved_bytes=0)
    result = search(CONFIG, tiny)
    assert (result.ranked, result.pareto) == ((), ())
    assert result.leanest is not None
    assert not result.leanest.fits
    assert result.smallest is not None
    space = Space(CONFIG, tiny.devices, 2)
    others = (one for mesh in space.meshes() for layout in space.layouts(mesh) for one in (layout, *space.remats(layout)))
    assert min(estimate_memory(with_layout(CONFIG, one)).total for one in others) > tiny.budget_bytes
    assert search(CONFIG, result.smallest).ranked
    assert smallest_cluster(CONFIG, replace(tiny, chip=replace(H100, memory_bytes=10_000))) is None


def test_replicas_and_the_kind_of_attention_stay_as_they_are_given():
    config = replace(CONFIG, mesh=MeshConfig(replica=2), sharding=replace(CONFIG.sharding, context_attention="gather"))
    result = search(config, Cluster(H100, 1, 4))
    assert {e.config.mesh.replica for e in result.ranked} == {2}
    assert {e.config.sharding.context_attention for e in result.ranked} == {"gather"}


def test_a_config_that_no_layout_mends_is_refused():
    wrong = replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, peak_lr=-1.0))
    with pytest.raises(ConfigError, match="peak_lr"):
        search(wrong, Cluster(H100, 1, 4))


def test_the_best_of_other_kinds():
    """Ranked: the best mesh alone. Of every other kind its best mesh, the same that a search that ranks all meshes finds."""
    cluster = Cluster(replace(H100, memory_bytes=int(6e9)), hosts=1, devices_per_host=4, reserved_bytes=0)
    found, every = search(CONFIG, cluster, ranked=1), search(CONFIG, cluster, ranked=10_000)
    best: dict[frozenset[str], float] = {}
    for estimate in every.ranked:
        best.setdefault(axes_in_use(estimate.config.mesh.shape), estimate.time.total)
    kinds = {axes_in_use(estimate.config.mesh.shape): estimate.time.total for estimate in (*found.ranked, *found.kinds)}
    assert kinds == best
    assert len(kinds) > 3
    assert every.kinds == ()


def test_many_divisors_and_chunks_are_gone_through_in_steps():
    assert [useful_chunks(126, pipe) for pipe in (8, 16)] == [[2, 4, 8], [2, 4]]
    assert useful_chunks(6, 6) == []
    many = replace(CONFIG, train=replace(CONFIG.train, global_batch_size=5040))
    layouts = [layout for mesh in Space(many, 4, 4).meshes() for layout in Space(many, 4, 4).layouts(mesh)]
    counts = sorted({layout.microbatches for layout in layouts if layout.mesh == (1, 1, 1, 4, 1, 1, 1)})
    assert (counts[0], counts[-1]) == (1, 1260)
    assert all(b <= 2 * a for a, b in itertools.pairwise(counts))
    assert {layout.schedule for layout in layouts} == {name for name, _ in SCHEDULES} - {"zero_bubble_v"}  # 6 layers, 4 parts
