"""Plans made by hand, for tests of what is said and drawn of them: the figures are simple, and none is a claim."""

import dataclasses
import itertools

from jaxtrain.config import MESH_AXES, Config, MeshConfig
from jaxtrain.config.loading import load_config
from jaxtrain.hardware import find_chip
from jaxtrain.planner.answer import Plan, make_bill
from jaxtrain.planner.estimates import Cluster, Estimate, Memory, Point, SearchResult, StepTime, Wire

CLUSTER = Cluster(find_chip("h100-sxm"), hosts=16)
SEVENTY = load_config("configs/70b.py")


def make_layout(config: Config = SEVENTY, microbatches: int = 8, remat: str = "full", **mesh: int) -> Config:
    """The config with this mesh, axes left out being 1."""
    sizes = MeshConfig(**{axis: mesh.get(axis, 1) for axis in MESH_AXES})
    train = dataclasses.replace(config.train, microbatches=microbatches, remat=remat)
    return dataclasses.replace(config, mesh=sizes, train=train)


def make_estimate(config: Config, cluster: Cluster = CLUSTER, **time: float) -> Estimate:
    """Some figures that grow and shrink with the mesh as real ones do; parts of the time can be given."""
    mesh, microbatches = config.mesh, config.train.microbatches
    shards, rows = mesh.pipe * mesh.fsdp * mesh.tensor, config.train.global_batch_size / mesh.batch_shards / microbatches
    kept = {"none": 34.0, "full": 2.0}.get(config.train.remat, 8.0)
    activations = kept * rows * 8192 * 8192 * 80 / (mesh.pipe * mesh.tensor) * min(microbatches, 2 * mesh.pipe)
    memory = Memory(4 * 70e9 / shards, 8 * 70e9 / shards, 4 * 70e9 / shards, 4e9 / mesh.tensor, activations, 3e9)
    share = (mesh.pipe - 1) / (microbatches + mesh.pipe - 1)
    parts = {
        "matmul": (4.6 if config.train.remat == "full" else 3.6) * (1 + 0.02 * mesh.tensor),
        "attention": 0.5,
        "memory_bound": 0.4,
        "optimizer": 0.05,
        "exposed": 0.02 * mesh.tensor + 0.03 * mesh.fsdp * microbatches / 8,
        "bubble": 5 * share / (1 - share),
        "overhead": 0.01,
    }
    wires = tuple(
        Wire(axis, kind, "bf16", 1e9 * getattr(mesh, axis), 0.2, 0.01 * getattr(mesh, axis), axis != "tensor")
        for axis, kind in (("fsdp", "all-gather"), ("tensor", "reduce-scatter"), ("pipe", "collective-permute"))
        if getattr(mesh, axis) > 1
    )
    step = StepTime(**(parts | time))
    return Estimate(config, cluster, "estimate", memory, step, wires, 1e15, 4.3e17, 500.0 * cluster.devices * step.total)


def make_search(config: Config = SEVENTY, cluster: Cluster = CLUSTER) -> SearchResult:
    """Every mesh of pipe, fsdp and tensor on the cluster, with a few microbatches and remat policies."""
    powers = [2**n for n in range(12)]
    estimates = [
        make_estimate(make_layout(config, m, remat, pipe=p, tensor=t, fsdp=cluster.devices // (p * t)), cluster)
        for p, t, m, remat in itertools.product(powers, powers[:4], powers[:7], ("full", "none"))
        if cluster.devices % (p * t) == 0 and config.train.global_batch_size % (cluster.devices // (p * t) * m) == 0
        if p <= config.model.num_layers
    ]
    fitting = sorted((e for e in estimates if e.fits), key=lambda e: e.time.total)
    front: list[Estimate] = []
    for estimate in fitting:
        if not front or estimate.memory.total < front[-1].memory.total:
            front.append(estimate)
    points = tuple(Point(e.time.total, e.memory.total, e.config.mesh.shape, e.fits) for e in estimates)
    return SearchResult(
        ranked=tuple(fitting[:50]),
        candidates=len(estimates),
        pruned={"do not fit": len(estimates) - len(fitting)},
        points=points,
        pareto=tuple(front),
        smallest=None if fitting else dataclasses.replace(cluster, hosts=4 * cluster.hosts),
        leanest=min(estimates, key=lambda e: e.memory.total, default=None),
        seconds=0.1,
    )


def make_plan(config: Config = SEVENTY, cluster: Cluster = CLUSTER, tokens: float = 0) -> Plan:
    """A whole answer."""
    from jaxtrain.planner.words import explain_plan

    found = make_search(config, cluster)
    words = explain_plan(config, cluster, "time", found, found.ranked, make_search)
    bill = make_bill(found.ranked[0], tokens, 0, 2.0) if tokens else None
    return Plan(config, cluster, "time", found, found.ranked[:8], words, bill)
