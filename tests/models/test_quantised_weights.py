"""Weights in 8 bits: their error is that of the rounding, and models with them are equal on every mesh."""

import math
from dataclasses import replace
from statistics import NormalDist

import jax
import numpy as np
import pytest

from jaxtrain.config import LoraConfig, MeshConfig, MoEConfig
from jaxtrain.config.rules import validate
from jaxtrain.errors import ExplainedError
from jaxtrain.inference.model import Model
from jaxtrain.measure.layouts import BASE
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.models.quantised_weights import NF4, Quantised, dequantise, holding, is_matrix, summed
from jaxtrain.sharding import is_dims, named
from jaxtrain.train.state import initial_params

MODEL = replace(
    BASE.model, init_std=0.3, moe=MoEConfig(num_experts=4, mlp_dim=16, first_dense_layers=1, shared_experts=1), num_layers=3
)


@pytest.mark.parametrize(
    ("dims", "axes"),
    [
        (("chunk", "stage", "layer", "embed", "heads", "head_dim"), (3,)),
        (("chunk", "stage", "layer", "heads", "head_dim", "embed"), (3, 4)),
        (("layer", "experts", "mlp", "embed"), (2,)),
        (("experts", "embed", "mlp"), (1,)),
        (("vocab", "embed"), (1,)),
        (("embed", "vocab"), (0,)),
        (("latent", "heads", "head_dim"), (0,)),
    ],
)
def test_a_scale_belongs_to_an_output_channel(dims: tuple[str, ...], axes: tuple[int, ...]):
    assert summed(dims) == axes


@pytest.mark.parametrize("group", [0, 4, 1000])
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_numbers_are_within_half_a_step(kind, group: int):
    weight = np.random.default_rng(0).normal(size=(3, 8, 4, 6)).astype(np.float32)
    weight[1, :, :, 2] = 0
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    dims, lora = ("layer", "heads", "head_dim", "embed"), LoraConfig(base=kind, base_group=group)
    held = holding(lora, mesh)(dims, jax.numpy.asarray(weight))
    blocks = weight.reshape(3, 8, 1, 4, 6) if group else weight.reshape(3, 1, 1, 32, 6)
    scale = np.abs(blocks).max(3) / (127 if kind == "int8" else 448)
    np.testing.assert_allclose(held.scale, np.where(scale > 0, scale, 1), rtol=1e-6)
    back = np.asarray(held.values, np.float32) * np.asarray(held.scale)
    np.testing.assert_array_equal(dequantise(np, dims, jax.tree.map(np.asarray, held)), back)
    # int8: half a scale. float8_e4m3: half of 2^-3 of the number, or half of the smallest step, 2^-9.
    bound = 0.5 * scale if kind == "int8" else np.maximum(np.abs(weight) * 2**-4, 2**-10 * scale)
    assert (np.abs(back - weight) <= bound * 1.0001).all()
    assert held.values.dtype.itemsize == 1


def published_code(x: float) -> int:
    """Return bitsandbytes' code of a number in [-1, 1]: `dQuantizeNF4`, with the thresholds that its kernel has."""
    thresholds = [
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
        -0.13791173315048218, -0.045525018125772475, 0.03979014977812767, 0.12025525495409966, 0.2035212516784668,
        0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ]  # fmt: skip
    return sum(x > threshold for threshold in thresholds)


def test_nf4_is_that_of_the_paper():
    """Its numbers are quantiles of a normal distribution (appendix E), and a weight's codes those of the published kernel."""
    quantile = NormalDist().inv_cdf
    below, above = ([quantile(p) for p in np.linspace(0.9677083, 0.5, n)[:-1]] for n in (8, 9))
    numbers = np.sort([*(-n for n in below), 0.0, *above])
    np.testing.assert_allclose(NF4, numbers / numbers.max(), atol=2e-7)
    weight = np.random.default_rng(0).normal(size=(2, 128, 3)).astype(np.float32)
    weight[1, :64, 2] = 0
    mesh, dims, lora = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), ("layer", "embed", "mlp"), LoraConfig(base="nf4")
    held = jax.tree.map(np.asarray, holding(lora, mesh)(dims, jax.numpy.asarray(weight)))
    blocks = weight.reshape(2, 2, 64, 3)
    scale = np.abs(blocks).max(2, keepdims=True)
    scale[scale == 0] = 1
    codes = np.vectorize(published_code)(blocks / scale)
    np.testing.assert_array_equal(held.scale, scale[:, :, 0])
    pairs = codes.reshape(2, 64, 2, 3)
    np.testing.assert_array_equal(held.values, pairs[:, :, 0] * 16 + pairs[:, :, 1])
    np.testing.assert_array_equal(dequantise(np, dims, held), (NF4[codes] * scale).reshape(weight.shape))


def model(kind, group: int, **mesh: int) -> Model:
    config = validate(replace(BASE, model=MODEL, mesh=MeshConfig(**{"fsdp": 1, **mesh})), math.prod(mesh.values() or [1]))
    devices = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.shape)])
    dims = parameter_dims(config.model)
    params = jax.jit(lambda: initial_params(config), out_shardings=named(devices, dims))()
    if kind:
        config = replace(config, lora=LoraConfig(base=kind, base_group=group))
        params = jax.tree.map(holding(config.lora, devices), dims, params, is_leaf=is_dims)
    return Model(config, devices, params)


@pytest.mark.parametrize(
    ("kind", "group", "mesh"),
    [
        pytest.param("int8", 4, {"pipe": 2, "fsdp": 2}, marks=pytest.mark.slow),
        ("nf4", 8, {"fsdp": 2, "tensor": 2}),
        pytest.param("float8", 0, {"expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_computes_the_same(kind, group: int, mesh: dict[str, int]):
    one, on_mesh = model(kind, group), model(kind, group, **mesh)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 12))
    logits, exact = one.logits(tokens), model(None, 0).logits(tokens)
    np.testing.assert_allclose(on_mesh.logits(tokens), logits, atol=2e-5)
    assert on_mesh.generate([[5, 9, 1], [2]], 4) == one.generate([[5, 9, 1], [2]], 4)
    bound = {"int8": 0.1, "float8": 0.3, "nf4": 0.7}[kind]  # on average: the largest difference is that of another expert
    assert 1e-4 < np.abs(logits - exact).mean() < bound * np.abs(exact).mean()


def test_matrices_are_held_in_a_byte_a_number():
    one = model("int8", 0)
    dims = jax.tree.leaves(parameter_dims(MODEL), is_leaf=is_dims)
    leaves = jax.tree.leaves(one.params, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    assert [isinstance(leaf, Quantised) for leaf in leaves] == [is_matrix(d) for d in dims]
    numbers = sum(leaf.values.size for leaf in leaves if isinstance(leaf, Quantised))
    held = sum(leaf.values.nbytes + leaf.scale.nbytes for leaf in leaves if isinstance(leaf, Quantised))
    assert numbers <= held < 1.5 * numbers  # channels of 16 to 64 numbers here


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(
        ExplainedError, match=r"groups of 5 do not divide 32, the embed of chunk x stage x layer x embed x .*: use 4, 8, 16, 32"
    ):
        model("int8", 5)
