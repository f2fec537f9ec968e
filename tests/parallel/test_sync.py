"""Each way of keeping replicas together, on a toy model over four devices, against its plain simulation in numpy."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.extend
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxtrain.config import SyncConfig
from jaxtrain.parallel import sync as module
from jaxtrain.parallel.sync import Piece, ReplicaExchange, exchange_at, exchanged_bytes, initial_state, state_dims
from jaxtrain.sharding import is_dims, spec
from tests.replicas import GradientSimulation, OuterSimulation

REPLICAS, LAYERS, LEARNING_RATE = 4, 4, 0.05
DIMS = {
    "outer": ("norm",),
    "layers": {"matrix": ("chunk", "stage", "layer", "norm", "norm"), "norm": ("chunk", "stage", "layer", "norm")},
}
SHAPES = {"outer": (11,), "layers/matrix": (LAYERS, 3, 7), "layers/norm": (LAYERS, 5)}
ONE = PartitionSpec("replica")
DILOCO = SyncConfig(mode="diloco", every=4)
OUTER = {
    "local": SyncConfig(mode="local", every=3),
    "diloco": DILOCO,
    "fragments": replace(DILOCO, fragments=2),
    "late": replace(DILOCO, overlap=2, mixing=0.25),
    "streaming": replace(DILOCO, fragments=4, overlap=3),
    "streaming local": SyncConfig(mode="local", every=5, fragments=2, overlap=1),
    "int8": replace(DILOCO, compression="int8", compression_block=8),
    "int8 with feedback, streaming": replace(
        DILOCO, fragments=2, overlap=3, compression="int8", compression_block=8, error_feedback=True
    ),
    "float8 with feedback": replace(DILOCO, compression="float8", compression_block=8, error_feedback=True),
}
GRADIENT = {
    "every_step int8": SyncConfig(compression="int8", compression_block=8),
    "every_step float8 with feedback": SyncConfig(compression="float8", compression_block=8, error_feedback=True),
    "delayed 1": SyncConfig(mode="delayed", delay=1),
    "delayed 3": SyncConfig(mode="delayed", delay=3),
    "delayed 2, bfloat16 with feedback": SyncConfig(mode="delayed", delay=2, compression="bfloat16", error_feedback=True),
}


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:REPLICAS]), ("replica",))


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(step: int, replica: int, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of |p - goal|^2 / 2, with a goal of its own for each replica and step."""
    rng = np.random.default_rng([step, replica])
    return {name: params[name] - rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in start().items()}


def stacked(tree: dict[str, np.ndarray]) -> Any:
    """As the module gets it: layers as [chunk, stage, layer, ...]."""
    layers = {name: tree[f"layers/{name}"][None, None] for name in ("matrix", "norm")}
    return {"outer": tree["outer"], "layers": layers}


def flat(tree: Any, replica: int) -> dict[str, np.ndarray]:
    """The reverse, of one replica's copy."""
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[replica], tree)
    return {"outer": one["outer"]} | {f"layers/{name}": leaf[0, 0] for name, leaf in one["layers"].items()}


def of_replicas(trees: list[dict[str, np.ndarray]]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(stacked, trees))


def own(dims: Any, tree: Any) -> Any:
    """Inside the region: without the dim "replica", where a leaf has it."""
    return jax.tree.map(lambda d, leaf: leaf[0] if d[:1] == ("replica",) else leaf, dims, tree, is_leaf=is_dims)


def back(dims: Any, tree: Any) -> Any:
    return jax.tree.map(lambda d, leaf: leaf[None] if d[:1] == ("replica",) else leaf, dims, tree, is_leaf=is_dims)


@functools.cache
def jitted_exchange(sync: SyncConfig, exchange: ReplicaExchange) -> Any:
    dims = state_dims(sync, DIMS)
    state_specs = jax.tree.map(spec, dims, is_leaf=is_dims)
    # The toy's parameters are sharded over nothing but `replica`, whatever their dims are called.
    state_specs = jax.tree.map(lambda s: ONE if s[:1] == ("replica",) else PartitionSpec(), state_specs)

    def region(params: Any, state: Any) -> Any:
        params, state = jax.tree.map(lambda leaf: leaf[0], params), own(dims, state)
        params, state, _ = module.exchange_parameters(sync, exchange, DIMS, params, state)
        return jax.tree.map(lambda leaf: leaf[None], params), back(dims, state)

    return jax.jit(
        jax.shard_map(region, mesh=mesh(), in_specs=(ONE, state_specs), out_specs=(ONE, state_specs), check_vma=False),
    )


@pytest.mark.parametrize("name", OUTER)
def test_local_and_diloco_as_simulated(name: str):
    sync = OUTER[name]
    state = initial_state(sync, stacked(start()), REPLICAS)
    simulation = OuterSimulation(sync, start(), REPLICAS)
    params = expected = [start() for _ in range(REPLICAS)]

    def inner(step: int, params: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        slopes = [gradients(step, r, p) for r, p in enumerate(params)]
        return [{n: p[n] - np.float32(LEARNING_RATE) * g[n] for n in p} for p, g in zip(params, slopes, strict=True)]

    for step in range(1, 14):
        expected = simulation.after(step, inner(step, expected))
        params = inner(step, params)
        exchange = exchange_at(sync, step)
        if exchange != ReplicaExchange():
            arrays, state = jitted_exchange(sync, exchange)(of_replicas(params), state)
            params = [flat(arrays, r) for r in range(REPLICAS)]
        for got, want in zip(params, expected, strict=True):
            for leaf in got:
                np.testing.assert_allclose(got[leaf], want[leaf], rtol=1e-6, atol=1e-6, err_msg=f"step {step}, {leaf}")
    assert simulation.arrivals >= 2
    assert np.abs(params[0]["outer"] - start()["outer"]).max() > 0.1


@functools.cache
def jitted_gradients(sync: SyncConfig, applies: bool) -> Any:
    dims = state_dims(sync, DIMS)
    assert set(jax.tree.leaves(jax.tree.map(lambda d: d[0], dims, is_leaf=is_dims))) <= {"replica"}

    def region(gradients: Any, targets: Any, state: Any, step: Any) -> Any:
        gradients, targets, state = jax.tree.map(lambda leaf: leaf[0], (gradients, targets, state))
        if sync.queued:
            gradients, targets, state = module.queue_gradients(sync, step, gradients, targets, state)
        if applies:
            gradients, state = module.mean_gradients(sync, gradients, targets, state)
        return jax.tree.map(lambda leaf: leaf[None], (gradients, state))

    return jax.jit(
        jax.shard_map(region, mesh=mesh(), in_specs=(ONE, ONE, ONE, PartitionSpec()), out_specs=ONE, check_vma=False),
    )


@pytest.mark.parametrize("name", GRADIENT)
def test_every_step_and_delayed_as_simulated(name: str):
    sync = GRADIENT[name]
    state = initial_state(sync, stacked(start()), REPLICAS)
    simulation, params, expected, applied = GradientSimulation(sync, start(), REPLICAS), start(), start(), 0
    for step in range(1, 9):
        targets = np.random.default_rng(step).integers(1, 50, REPLICAS).astype(np.float32)
        mean = simulation.mean([gradients(step, r, expected) for r in range(REPLICAS)], targets)
        exchange = exchange_at(sync, step)
        assert exchange.applies == (mean is not None)
        slopes = of_replicas([gradients(step, r, params) for r in range(REPLICAS)])
        arrived, state = jitted_gradients(sync, exchange.applies)(slopes, targets, state, np.int32(step - 1))
        if mean is None:
            continue
        applied += 1
        copies = [flat(arrived, r) for r in range(REPLICAS)]
        for leaf in mean:
            assert all(np.array_equal(copies[0][leaf], copy[leaf]) for copy in copies), "replicas would drift apart"
            np.testing.assert_allclose(copies[0][leaf], mean[leaf], rtol=1e-5, atol=1e-6, err_msg=f"step {step}, {leaf}")
            expected[leaf] = expected[leaf] - LEARNING_RATE * mean[leaf]
            params[leaf] = params[leaf] - LEARNING_RATE * copies[0][leaf]
    assert applied == 8 - sync.queued


def test_delay_0_is_every_step():
    """Not nearly: no queue, no state, the same program."""
    sync = SyncConfig(mode="delayed", delay=0)
    assert not sync.sums_apart
    assert not sync.replicas_differ
    assert state_dims(sync, DIMS) == state_dims(SyncConfig(), DIMS) == {}
    assert exchange_at(sync, 1) == exchange_at(SyncConfig(), 1) == ReplicaExchange()


def test_which_step_exchanges_what():
    sync = replace(DILOCO, fragments=2, overlap=3, every=4)
    assert [exchange_at(sync, step) for step in range(1, 8)] == [
        ReplicaExchange(),
        ReplicaExchange(begins=1),
        ReplicaExchange(travels=(Piece(1, 0),)),
        ReplicaExchange(begins=0, travels=(Piece(1, 1),)),
        ReplicaExchange(travels=(Piece(0, 0), Piece(1, 2)), ends=1),
        ReplicaExchange(begins=1, travels=(Piece(0, 1),)),
        ReplicaExchange(travels=(Piece(1, 0), Piece(0, 2)), ends=0),
    ]
    delayed = SyncConfig(mode="delayed", delay=2)
    assert [exchange_at(delayed, step).applies for step in range(1, 5)] == [False, False, True, True]
    assert len({exchange_at(sync, step) for step in range(100)}) <= 8, "each is a program to compile"


@pytest.mark.parametrize("name", OUTER)
def test_every_number_travels_once_in_a_period(name: str):
    """Fragments and pieces cut the parameters without loss or overlap: bytes of a period are those of one whole exchange."""
    sync = replace(OUTER[name], compression="none")
    shards = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stacked(start()))
    whole = sum(int(np.prod(shape)) for shape in SHAPES.values()) * 4 * 2 * (REPLICAS - 1) / REPLICAS
    steps = range(10 * sync.every + 1, 11 * sync.every + 1)
    sent = [exchanged_bytes(sync, exchange_at(sync, step), DIMS, shards, REPLICAS) for step in steps]
    assert sum(sent) == pytest.approx(whole)
    assert exchanged_bytes(sync, ReplicaExchange(), DIMS, shards, REPLICAS) == 0


def test_a_late_piece_depends_on_nothing_of_its_step():
    """What travels behind a step's work must not wait for it: the collectives' operands do not come from the parameters."""
    sync = replace(DILOCO, overlap=2)
    exchange = ReplicaExchange(travels=(Piece(0, 1),), ends=0)
    params, state = of_replicas([start()] * REPLICAS), initial_state(sync, stacked(start()), REPLICAS)
    jaxpr = jitted_exchange(sync, exchange).trace(params, state).jaxpr

    def reached(jaxpr: Any, tainted: set) -> bool:
        """Whether what `tainted` variables touch comes into a sum."""
        for equation in jaxpr.eqns:
            hit = [not isinstance(v, jax.extend.core.Literal) and v in tainted for v in equation.invars]
            inner = equation.params.get("jaxpr")
            if inner is not None and any(hit):
                inner = getattr(inner, "jaxpr", inner)
                if reached(inner, {v for v, h in zip(inner.invars, hit, strict=True) if h}):
                    return True
            if any(hit) and "psum" in equation.primitive.name:
                return True
            if any(hit):
                tainted |= set(equation.outvars)
        return False

    count = len(jax.tree.leaves(params))
    own, others = jaxpr.jaxpr.invars[:count], jaxpr.jaxpr.invars[count:]
    assert not reached(jaxpr.jaxpr, set(own))
    assert reached(jaxpr.jaxpr, set(others)), "the walk must be able to find what it looks for"
