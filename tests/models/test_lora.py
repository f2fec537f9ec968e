"""Adapters and frozen parameters: gradients in closed form, and what exists for a frozen parameter."""

import functools
import math
import operator
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import Config, LatentAttentionConfig, LoraConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig
from jaxtrain.errors import ConfigError
from jaxtrain.measure.layouts import BASE, batch_of, with_second_factors
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.models.lora import merge
from jaxtrain.models.quantised_weights import DTYPES, dequantised
from jaxtrain.models.trained import describe_trained, trained, trained_dims
from jaxtrain.sharding import is_dims, named
from jaxtrain.train.gradients import batch_names, batch_sharding, make_loss_and_gradients
from jaxtrain.train.optimizer import optimizer_of
from jaxtrain.train.state import create_state, to_canonical
from jaxtrain.train.step import compile_train_step, place_numbers

LORA = LoraConfig(rank=3, alpha=5.0, rank_stabilised=True)
MIXTURE = replace(
    BASE.model,
    num_layers=3,
    moe=MoEConfig(num_experts=4, mlp_dim=16, shared_experts=1, first_dense_layers=1, bias_update_rate=0.1),
    latent_attention=LatentAttentionConfig(query_rank=12, kv_rank=8, rope_dim=4, value_dim=6),
)


def tiny(model: ModelConfig = BASE.model, **changes) -> Config:
    """Return a config of one device with a batch of four."""
    return replace(BASE, model=model, train=replace(BASE.train, global_batch_size=4, microbatches=2), **changes)


def batch(config: Config, mesh) -> dict:
    """Return a batch of the config on the mesh."""
    rows = batch_of(config.train.global_batch_size)
    return jax.device_put({name: rows[name] for name in batch_names(config)}, batch_sharding(mesh))


def flat(tree) -> dict[str, np.ndarray]:
    """Return the leaves by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


def put(tree: dict, path: str, value: np.ndarray) -> None:
    """Replace a leaf of nested dicts."""
    *above, last = path.split("/")
    functools.reduce(operator.getitem, above, tree)[last] = value


def without_adapters(params: dict, scale: float) -> tuple[dict, dict[str, tuple[str, np.ndarray, np.ndarray]]]:
    """Return merged parameters, and {path of a matrix: (path of its adapter, A, B)}."""
    leaves, adapters = flat(params), {}
    for path in [p.removesuffix("/a") for p in leaves if "/lora/" in p and p.endswith("/a")]:
        adapters[path.replace("/lora/", "/")] = (path, leaves[f"{path}/a"], leaves[f"{path}/b"])
    tree = jax.tree.map(np.asarray, params)
    for part in (tree["layers"], tree["outer"].get("first_layers", {})):
        part.pop("lora", None)
    for path, (_, a, b) in adapters.items():
        put(tree, path, merge(np, scale, leaves[path], a, b))
    return tree, adapters


def matrix(array: np.ndarray, lead: int, inputs: int) -> np.ndarray:
    """Return an array as [matrices, inputs, outputs]."""
    shape = array.shape
    count, rows = np.prod(shape[:lead], dtype=int), np.prod(shape[lead : lead + inputs], dtype=int)
    return array.reshape(count, rows, -1).astype(np.float64)


@pytest.mark.parametrize(
    "model", [pytest.param(MIXTURE, id="mixture"), pytest.param(BASE.model, id="dense", marks=pytest.mark.slow)]
)
def test_gradients_are_those_of_the_full_weight_times_the_other_factor(model):
    config = tiny(model, lora=LORA)
    mesh, scale = make_mesh(config.mesh, jax.devices()[:1]), 5 / np.sqrt(3)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf), create_state(config, mesh, optimizer_of(config))["params"])
    for path, leaf in flat(params).items():
        if path.endswith("/b"):
            assert not leaf.any()
            put(params, path, rng.normal(0, 0.02, leaf.shape).astype(np.float32))
    full = replace(config, lora=LoraConfig())
    whole, adapters = without_adapters(params, scale)
    assert {path.rpartition("/")[2] for path in adapters} >= {"out", "up"}
    rows = batch(config, mesh)
    metrics, _, got = jax.jit(make_loss_and_gradients(config, mesh, "reference"))(params, rows)
    expected, _, d_whole = jax.jit(make_loss_and_gradients(full, mesh, "reference"))(whole, rows)
    assert float(metrics["total_loss"]) == pytest.approx(float(expected["total_loss"]), rel=1e-6)
    got, d_whole = flat(got), flat(d_whole)
    assert sorted(got) == sorted(f"{path}/{factor}" for path, _, _ in adapters.values() for factor in "ab")
    for path, (adapter, a, b) in adapters.items():
        lead = a.ndim + b.ndim - d_whole[path].ndim - 2
        inputs = a.ndim - lead - 1
        d, a, b = matrix(d_whole[path], lead, inputs), matrix(a, lead, inputs), matrix(b, lead, 1)
        for factor, true in (("a", d @ b.transpose(0, 2, 1)), ("b", a.transpose(0, 2, 1) @ d)):
            own = got[f"{adapter}/{factor}"]
            found = own.reshape(true.shape)
            assert np.linalg.norm(found - scale * true) <= 1e-5 * np.linalg.norm(scale * true), (adapter, factor)


def trained_paths(config: Config) -> list:
    """Return the dims of all trained parameters."""
    return jax.tree.leaves(trained_dims(config), is_leaf=is_dims)


def gradients_of(config: Config, mesh, params: dict, rows: dict) -> dict[str, np.ndarray]:
    """Return the loss and the gradients, in canonical form by path."""
    metrics, _, gradients = jax.jit(make_loss_and_gradients(config, mesh, "reference"))(params, rows)
    return {"loss": np.asarray(metrics["loss"])} | flat(to_canonical(config, jax.device_get(gradients), trained_dims(config)))


@pytest.mark.parametrize(
    ("model", "base", "meshes"),
    [
        pytest.param(replace(BASE.model, num_layers=2), "nf4", [{}], id="dense in nf4"),  # the layouts drawn have it on meshes
        pytest.param(
            BASE.model, "nf4", [{}, {"fsdp": 2, "tensor": 2}, {"pipe": 2, "fsdp": 2}], id="nf4", marks=pytest.mark.slow
        ),
        pytest.param(
            MIXTURE,
            "int8",
            [{}, {"expert": 2, "context": 2}, {"pipe": 2, "fsdp": 2}],
            id="mixture in int8",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_base_in_few_bits_gives_the_gradients_of_its_numbers(model, base, meshes):
    """On each mesh the same bits at the start, and the gradients of a float32 base that holds the same numbers."""
    starts, found, truth = [], [], {}
    for sizes in meshes:
        held = tiny(
            model, lora=replace(LORA, base=base, base_group=4 if base == "nf4" else 0), mesh=MeshConfig(**{"fsdp": 1, **sizes})
        )
        held, plain = replace(held, model=replace(held.model, init_std=0.3)), replace(held, lora=LORA)
        mesh = make_mesh(held.mesh, jax.devices()[: math.prod(held.mesh.shape)])
        dims, optimizer = parameter_dims(held.model), optimizer_of(held)
        state, rows = create_state(held, mesh, optimizer), batch(held, mesh)
        starts.append(flat(jax.device_get(to_canonical(held, state["params"], dims))))
        params = with_second_factors(held, state["params"])
        found.append(gradients_of(held, mesh, params, rows))
        assert len(jax.tree.leaves(state["optimizer"])) == 2 * len(trained_paths(held)) + 2
        if sizes:
            continue
        numbers = jax.jit(lambda tree, dims=dims: dequantised(tree, dims, "float32"))(params)
        truth = gradients_of(plain, mesh, jax.device_put(numbers, named(mesh, parameter_dims(plain.model))), rows)
    for one in found:
        assert one.keys() == truth.keys()
        assert all(np.linalg.norm(one[path] - leaf) <= 1e-5 * np.linalg.norm(leaf) for path, leaf in truth.items())
    assert any(leaf.dtype == DTYPES[base] for leaf in starts[0].values())
    for other in starts[1:]:
        assert {path: leaf.tobytes() for path, leaf in other.items()} == {p: leaf.tobytes() for p, leaf in starts[0].items()}


def test_the_start_is_the_base_model_bit_for_bit():
    config = tiny(lora=LORA)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    found, base = (
        flat(create_state(each, mesh, optimizer_of(each))["params"]) for each in (config, replace(config, lora=LoraConfig()))
    )
    assert len(base) < len(found)
    assert all(np.array_equal(found[path], leaf) for path, leaf in base.items())


def bytes_of(tree) -> int:
    """Return the bytes of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("model", "frozen", "lora", "optimizer"),
    [
        pytest.param(BASE.model, (), LORA, "muon", id="adapters with muon"),
        pytest.param(MIXTURE, (), LORA, "adafactor", id="adapters with adafactor", marks=pytest.mark.slow),
        pytest.param(MIXTURE, ("outer/*", "layers/moe/[rb]*"), LoraConfig(), "adamw", id="by name", marks=pytest.mark.slow),
    ],
)
def test_a_frozen_parameter_stays_and_has_neither_gradient_nor_moments(model, frozen, lora, optimizer):
    config = tiny(model, lora=lora, optimizer=OptimizerConfig(name=optimizer), mesh=MeshConfig(fsdp=2))
    config = replace(config, train=replace(config.train, frozen=frozen))
    mesh, optimizer = make_mesh(config.mesh, jax.devices()[:2]), optimizer_of(config)
    state, rows = create_state(config, mesh, optimizer), batch(config, mesh)
    before, moving = flat(state["params"]), flat(trained(config, state["params"]))
    assert 0 < len(moving) < len(before)
    program = jax.jit(make_loss_and_gradients(config, mesh, "reference")).lower(state["params"], rows).compile()
    dims = jax.tree.leaves(trained_dims(config), is_leaf=lambda leaf: type(leaf) is tuple)
    assert len(dims) == len(moving) == len(jax.tree.leaves(program.out_info[2]))
    moments = bytes_of(state["optimizer"])
    assert moments <= 2.01 * sum(leaf.size for leaf in moving.values()) * 4 + 64
    step, numbers = compile_train_step(config, mesh, optimizer, "reference"), place_numbers(config, mesh)
    for _ in range(20):
        state, _ = step(state, rows, numbers)
    after = flat(state["params"])
    assert {path for path, leaf in before.items() if np.array_equal(leaf, after[path])} == set(before) - set(moving)


def test_no_buffer_holds_gradients_of_frozen_parameters():
    """Accumulated over microbatches, the gradients of all parameters would be float32 arrays of a loop."""
    full = tiny()
    mesh = make_mesh(full.mesh, jax.devices()[:1])

    def temporaries(config: Config) -> tuple[int, int]:
        optimizer = optimizer_of(config)
        params = create_state(config, mesh, optimizer)["params"]
        program = jax.jit(make_loss_and_gradients(config, mesh, "reference")).lower(params, batch(config, mesh)).compile()
        return program.memory_analysis().temp_size_in_bytes, bytes_of(trained(config, params))

    assert describe_trained(full) == ""
    (all_bytes, all_gradients), (some_bytes, some_gradients) = temporaries(full), temporaries(replace(full, lora=LORA))
    assert describe_trained(replace(full, lora=LORA)) == f", {some_gradients // 4:,} in adapters, which alone are trained"
    assert some_gradients < 0.3 * all_gradients
    assert all_bytes - some_bytes > 0.7 * (all_gradients - some_gradients)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": LoraConfig(rank=2, targets=("attention/querry",))}, "attention/query"),
        ({"train": replace(BASE.train, frozen=("outer/tables",))}, "outer/table"),
        ({"train": replace(BASE.train, frozen=("*",))}, "leaves no parameter"),
    ],
)
def test_a_name_of_no_parameter_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        trained_dims(replace(BASE, **changes))
