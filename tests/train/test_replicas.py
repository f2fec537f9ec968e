"""The real train step with several replicas: held to independent single runs, put together by the simulations in numpy."""

import functools
import math
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.config import Config, MeshConfig, OptimizerConfig, SyncConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.errors import CheckpointError
from jaxtrain.measure.layouts import batch_of
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.parallel.sync import exchange_at
from jaxtrain.program.collectives import read_collectives, table
from jaxtrain.program.groups import layout_of
from jaxtrain.sharding import is_dims, named
from jaxtrain.train import state as state_module
from jaxtrain.train.exchange import exchanged_bytes
from jaxtrain.train.gradients import batch_names, batch_sharding, make_evaluation_step, make_loss_and_gradients
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import (
    Canonical,
    check_same_replicas,
    create_state,
    make_stacking,
    params_dims,
    to_canonical,
)
from jaxtrain.train.step import TrainSteps, abstract_arguments, make_train_step, read_metrics
from tests.replicas import GradientSimulation, OuterSimulation
from tests.tiny import tiny
from tests.train.runs import prepared_of

ORIGINAL = state_module.initial_params
ROWS, STEPS = 8, 6
BASE = tiny(
    model={"head_dim": 4, "mlp_dim": 24, "vocab_size": 128},
    mesh={"replica": 2, "fsdp": 2},
    optimizer=OptimizerConfig(peak_lr=1e-2, schedule="constant", clip_norm=1.0),
    train={"steps": STEPS, "global_batch_size": ROWS, "remat": "none"},
)
DILOCO = SyncConfig(mode="diloco", every=2)
INT8 = replace(DILOCO, compression="int8", error_feedback=True)
CASES = {
    "every_step": (SyncConfig(), MeshConfig(replica=2, fsdp=2)),
    "local": (SyncConfig(mode="local", every=3), MeshConfig(replica=2, pipe=2, fsdp=1)),
    "diloco": (DILOCO, MeshConfig(replica=2, fsdp=2, tensor=2)),
    "streaming": (replace(DILOCO, every=4, fragments=2, overlap=1), MeshConfig(replica=2, fsdp=1)),
    "delayed": (SyncConfig(mode="delayed", delay=2), MeshConfig(replica=2, pipe=2, fsdp=1)),
    # A replica of one device: blocks are then cut as in the simulation, so that every bit that is lost is the same one.
    "diloco int8": (INT8, MeshConfig(replica=4, fsdp=1)),
    "every_step float8": (SyncConfig(compression="float8", error_feedback=True), MeshConfig(replica=2, fsdp=1)),
}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Parameters that are data instead of drawn by a program."""
    patch = pytest.MonkeyPatch()
    patch.setattr(state_module, "initial_params", drawn_by_numpy)
    yield
    patch.undo()


@functools.cache
def canonical_start() -> Any:
    """Random parameters, layers as [num_layers, ...]."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: ORIGINAL(replace(BASE, mesh=MeshConfig(fsdp=1))))

    def leaf(dims: tuple[str, ...], shape: Any) -> np.ndarray:
        value = rng.normal(size=shape.shape).astype(np.float32)
        return (1 + 0.1 * value if dims[-1] == "norm" else 0.1 * value).reshape(
            shape.shape[2:] if "stage" in dims else shape.shape
        )

    return jax.tree.map(leaf, parameter_dims(BASE.model), shapes, is_leaf=is_dims)


def drawn_by_numpy(config: Config, seed: Any = None) -> Any:
    start = canonical_start()
    return jax.tree.map(jnp.asarray, start | {"layers": jax.tree.map(make_stacking(config).stack, start["layers"])})


def setup(sync: SyncConfig, mesh_config: MeshConfig) -> tuple[Config, jax.sharding.Mesh, Any]:
    config = replace(BASE, sync=sync, mesh=mesh_config)
    devices = math.prod(mesh_config.shape)
    assert find_problems(config, devices)[1] == []
    optimizer = make_optimizer(config.optimizer, STEPS, parameter_dims(config.model))
    return config, make_mesh(mesh_config, jax.devices()[:devices]), optimizer


@functools.cache
def rows(step: int) -> dict[str, np.ndarray]:
    """Another batch every step, with different numbers of targets on the replicas."""
    return batch_of(ROWS, BASE.data.sequence_length, seed=step)


def placed(config: Config, mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray]) -> Any:
    return jax.device_put({name: batch[name] for name in batch_names(config)}, batch_sharding(mesh))


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """{"layers/mlp/gate": ...}"""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in flat}


def canonical(config: Config, params: Any) -> dict[str, np.ndarray]:
    return named_leaves(to_canonical(config, params, params_dims(config)))


# ---------------------------------------------------------------------------------------------------------------------
# The law: single runs put together in numpy


@functools.cache
def alone() -> tuple[Any, Any, Any, Any]:
    """(config, mesh, jitted loss and gradients, jitted optax update) of one replica on one device."""
    config, mesh, optimizer = setup(SyncConfig(), MeshConfig(fsdp=1))
    gradients = jax.jit(make_loss_and_gradients(config, mesh, "reference"))

    @jax.jit
    def update(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return config, mesh, gradients, update


def part_of(batch: dict[str, np.ndarray], replica: int, replicas: int) -> dict[str, np.ndarray]:
    """A replica's rows, repeated to the size that the single run is compiled for: the mean over targets is the same."""
    own = {name: np.split(array, replicas)[replica] for name, array in batch.items()}
    return {name: np.concatenate([array] * replicas) for name, array in own.items()}


@functools.cache
def simulated(
    sync: SyncConfig, replicas: int, steps: int = STEPS
) -> tuple[list[dict[str, np.ndarray]], list[float], dict[int, float]]:
    """(each replica's parameters after the last step, the loss of each step, divergence by the step that exchanges)"""
    config, mesh, gradients, update = alone()
    structure, first = jax.tree.structure(canonical_start()), named_leaves(canonical_start())

    def as_tree(leaves: dict[str, np.ndarray]) -> Any:
        return jax.tree.unflatten(
            structure, [leaf[None, None] if p.startswith("layers") else leaf for p, leaf in leaves.items()]
        )

    outer, averaging = OuterSimulation(sync, first, replicas), GradientSimulation(sync, first, replicas)
    empty = make_optimizer(config.optimizer, STEPS, parameter_dims(config.model)).init(as_tree(first))
    params, states, losses = [first] * replicas, [empty] * replicas, []
    for step in range(1, steps + 1):
        parts = [placed(config, mesh, part_of(rows(step), r, replicas)) for r in range(replicas)]
        results = [gradients(as_tree(p), part) for p, part in zip(params, parts, strict=True)]
        counts = np.array([float(metrics["targets"]) for metrics, _, _ in results], np.float32)
        losses.append(float(np.average([float(metrics["loss"]) for metrics, _, _ in results], weights=counts)))
        slopes: list[Any] = [canonical(config, slope) for _, _, slope in results]
        if not sync.replicas_differ:
            slopes = [averaging.mean(slopes, counts)] * replicas
        if slopes[0] is not None:
            updated = [update(as_tree(p), s, as_tree(g)) for p, s, g in zip(params, states, slopes, strict=True)]
            params, states = [canonical(config, p) for p, _ in updated], [s for _, s in updated]
        if sync.replicas_differ:
            params = outer.after(step, params)
    return params, losses, outer.divergence


@functools.cache
def trained(name: str) -> tuple[Config, jax.sharding.Mesh, Any, list[dict[str, float]], TrainSteps]:
    """(config, mesh, state after the last step, metrics of each step, programs) of the distributed run."""
    config, mesh, optimizer = setup(*(CASES | SHARDS)[name])
    steps = STEPS if name in CASES else DILOCO.every
    state, metrics = create_state(config, mesh, optimizer), []
    train = TrainSteps(prepared_of(config, mesh, optimizer), 0, steps)
    for step in range(1, steps + 1):
        state, values = train(state, placed(config, mesh, rows(step)))
        metrics.append(read_metrics(values))
    return config, mesh, state, metrics, train


@pytest.mark.parametrize("name", CASES)
def test_the_train_step_is_what_single_runs_put_together_are(name: str):
    sync, mesh = CASES[name]
    expected, losses, _ = simulated(sync, mesh.replica)
    config, _, state, metrics, _ = trained(name)
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=2e-6 if sync.compression == "none" else 1e-5)
    got = canonical(config, state["params"])
    far = total = 0
    for r, want in enumerate(expected):
        for path, leaf in want.items():
            own = got[path][r] if sync.replicas_differ else got[path]
            far, total = far + np.sum(np.abs(own - leaf) > 2e-5), total + own.size
            assert np.abs(own - named_leaves(canonical_start())[path]).max() > 1e-3, f"{path} has not moved"
    # A number on the edge between two codes may fall to either side; any other must agree.
    assert far <= (0 if sync.compression == "none" else 0.005 * total)


@pytest.mark.parametrize("name", ["local", "diloco", "streaming"])
def test_replica_divergence_is_that_of_the_newest_exchange(name: str):
    """Over all shards and stages of a replica, of the fragment that travels; kept until the next one does."""
    sync, mesh = CASES[name]
    at_exchange = simulated(sync, mesh.replica)[2]
    newest = [max((at for at in at_exchange if at <= step), default=0) for step in range(1, STEPS + 1)]
    _, _, _, metrics, _ = trained(name)
    assert ["replica_divergence" in m for m in metrics] == [at > 0 for at in newest]
    got = [m["replica_divergence"] for m in metrics if "replica_divergence" in m]
    np.testing.assert_allclose(got, [at_exchange[at] for at in newest if at], rtol=1e-4)
    assert min(got) > 1e-3


SHARDS = {"int8 on shards": (INT8, MeshConfig(replica=2, fsdp=2))}


def test_quantised_on_shards_within_the_bound():
    """Where a replica is several devices each quantises its own shard: after the first exchange, replicas are alike, and the
    anchor is no further from the exact one than lr (1 + momentum) times the bound of one mean."""
    config, _, state, _, _ = trained("int8 on shards")
    lossy, exact = canonical(config, state["params"]), simulated(DILOCO, 2, DILOCO.every)[0]
    factor = DILOCO.outer_lr * (1 + DILOCO.outer_momentum)
    for path, leaf in named_leaves(canonical_start()).items():
        assert np.array_equal(lossy[path][0], lossy[path][1])
        # Two steps of Adam at 1e-2 (with decay) go at most 0.021 from the anchor; each of the two quantisations loses 1/254.
        assert 0 < np.abs(lossy[path][0] - exact[0][path]).max() <= factor * 2 * 0.021 / 254, path
        assert np.abs(exact[0][path] - leaf).max() > 5e-3


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def test_delay_0_is_every_step_bit_for_bit():
    """It is the same program."""
    texts = set()
    for sync in (SyncConfig(), SyncConfig(mode="delayed", delay=0)):
        config, mesh, optimizer = setup(sync, MeshConfig(replica=2, fsdp=2))
        step = make_train_step(config, mesh, optimizer, "reference", exchange_at(sync, 1))
        texts.add(step.lower(*abstract_arguments(config, mesh, optimizer)).as_text())
    assert len(texts) == 1


@pytest.mark.parametrize("name", ["local", "diloco", "diloco int8", "every_step float8", "delayed", "streaming"])
def test_every_byte_between_replicas_is_counted(name: str):
    """A step without an exchange sends nothing between replicas, not even its loss; one with it sends what is said."""
    config, mesh, _, _, train = trained(name)
    assert len(train.programs) <= 5
    for (_, kind), program in train.programs.items():
        rows = table(read_collectives(program.as_text(), layout_of(mesh)))
        sent = [row for row in rows if "replica" in row.axes]
        wire = sum(row.wire for row in sent)
        said = exchanged_bytes(config, mesh, kind)
        # Beside it only how many targets each replica had: 4 bytes.
        assert wire == pytest.approx(said, abs=8), f"{kind}: {sent}"
        if config.sync.compression != "none" and wire:
            assert {row.dtype for row in sent if row.wire > 8} == {"u8"}
        if config.sync.replicas_differ and not kind.travels:
            assert wire == 0


# ---------------------------------------------------------------------------------------------------------------------
# Reading the state


def test_each_replica_is_evaluated_with_its_own_parameters():
    config, mesh, state, _, _ = trained("diloco")  # after an exchange parameters are alike, so one replica's are halved
    params = jax.tree.map(
        lambda leaf: leaf * np.array([1, 0.5], np.float32).reshape(2, *[1] * (leaf.ndim - 1)), state["params"]
    )
    params = jax.device_put(params, named(mesh, params_dims(config)))
    batch = rows(1)
    whole = make_evaluation_step(config, mesh, "reference")(params, placed(config, mesh, batch))
    one, one_mesh, _, _ = alone()
    evaluate = make_evaluation_step(one, one_mesh, "reference")
    loss = targets = 0.0
    for r in range(2):
        own = jax.tree.map(lambda leaf, r=r: np.asarray(leaf)[r], params)
        part = placed(one, one_mesh, part_of(batch, r, 2))
        sums = evaluate(own, part)
        loss, targets = loss + float(sums["loss"]) / 2, targets + float(sums["targets"]) / 2
    assert float(whole["targets"]) == targets
    assert float(whole["loss"]) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["diloco int8", "delayed"])
def test_the_state_goes_through_its_canonical_form(name: str):
    """To the mesh that it came from and, all of it, to one where a replica is laid out otherwise."""
    config, mesh, state, _, _ = trained(name)
    optimizer = setup(*CASES[name])[2]
    there = replace(config, mesh=MeshConfig(replica=config.mesh.replica, fsdp=2))
    other = make_mesh(there.mesh, jax.devices()[: math.prod(there.mesh.shape)])
    canonical_state = Canonical(config, mesh, optimizer).from_state(state)
    moved = Canonical(there, other, optimizer)
    on_host = jax.tree.map(np.asarray, canonical_state)
    arrived = moved.to_state(jax.device_put(on_host, jax.tree.map(lambda leaf: leaf.sharding, moved.abstract)))
    again = jax.tree.map(np.asarray, moved.from_state(arrived))
    jax.tree.map(np.testing.assert_array_equal, again, on_host)
    kept = again["sync"]
    assert all(leaf.any() for leaf in jax.tree.leaves(kept)), "nothing was there to be moved"
    for path, leaf in named_leaves(kept).items():
        if "layers" in path:
            assert config.model.num_layers in leaf.shape[:3], f"{path} {leaf.shape} is not canonical"


def test_metrics_of_several_replicas_are_read():
    values = {"loss": np.array([1.0, 4.0]), "targets": np.array([3, 1]), "grad_norm": np.array([1.0, 2.0])}
    assert read_metrics(values | {"exchanged_bytes": 5.0}) == {
        "loss": 1.75,
        "targets": 4.0,
        "grad_norm": 1.5,
        "exchanged_bytes": 5.0,
    }


def test_other_replicas_are_refused():
    two = replace(BASE, sync=DILOCO, mesh=MeshConfig(replica=2, fsdp=1))
    check_same_replicas(asdict(two), replace(two, mesh=MeshConfig(replica=2, fsdp=4)), "here")
    check_same_replicas(asdict(BASE), replace(BASE, mesh=MeshConfig(replica=4, fsdp=2)), "here")
    with pytest.raises(CheckpointError, match=r"mesh\.replica: 2 -> 4"):
        check_same_replicas(asdict(two), replace(two, mesh=MeshConfig(replica=4, fsdp=1)), "here")
    with pytest.raises(CheckpointError, match=r"sync\.mode: diloco -> every_step"):
        check_same_replicas(asdict(two), replace(two, sync=SyncConfig()), "here")
    queued = replace(two, sync=SyncConfig(mode="delayed", delay=1))
    with pytest.raises(CheckpointError, match=r"sync\.delay: 1 -> 3"):
        check_same_replicas(asdict(queued), replace(two, sync=SyncConfig(mode="delayed", delay=3)), "here")
