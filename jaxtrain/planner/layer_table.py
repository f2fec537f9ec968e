"""The layer table: one row for each weight of the model, as the decoder declares it, and for each matmul with one.

FLOPs, bytes, kept activations and seconds are sums over these rows. Letters: B sequences in a microbatch of one device, L
sequence length, D embed_dim, E experts, K experts of a token, G tokens of a group; t, c: devices along tensor and context.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import nnx

from jaxtrain.config import Config, ModelConfig
from jaxtrain.layout import capacity_rows, keeps, local_length, microbatch_rows
from jaxtrain.models import lora
from jaxtrain.models.decoder import adapter_factors
from jaxtrain.models.float8_weights import is_in_float8
from jaxtrain.models.layers import EmbeddingAndHead, layer_kind
from jaxtrain.models.parameters import declare, held_dtype
from jaxtrain.models.quantised_weights import held_dims, held_shapes, is_held
from jaxtrain.sharding import LORA, RULES

BYTES = {"bfloat16": 2, "float32": 4, "int8": 1, "float8": 1, "nf4": 1}
FLOAT32 = BYTES["float32"]
HLO_DTYPE = {"bfloat16": "bf16", "float32": "f32", "int8": "s8", "float8": "f8e4m3fn", "nf4": "u8"}
"""As HLO writes the arrays of a dtype, or of a base of adapters: two numbers of nf4 are a byte."""
RESULTS = {
    "attention.query": "query",
    "attention.query_up": "query",
    "attention.key": "key",
    "attention.key_up": "key",
    "attention.value": "value",
    "attention.value_up": "value",
    "attention.out": "attention_out",
    "mlp.gate": "mlp_gate",
    "mlp.up": "mlp_up",
    "mlp.down": "mlp_out",
    "moe.router": "router",
    "moe.gate": "expert_gate",
    "moe.up": "expert_up",
    "moe.down": "expert_out",
    "moe.shared_gate": "mlp_gate",
    "moe.shared_up": "mlp_up",
    "moe.shared_down": "mlp_out",
}
"""The name under which remat can keep a weight's product."""


@dataclass(frozen=True)
class Weight:
    """One parameter of a layer, or of what is outside of the stack of layers."""

    name: str
    """Its place in the parameter tree: "attention.query"."""
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    """Logical dims (`sharding.RULES`)."""
    layers: int = 1
    """Copies: of a mixture's first dense layers."""

    @functools.cached_property
    def elements(self) -> int:
        return self.layers * math.prod(self.shape)

    @functools.cached_property
    def axes(self) -> tuple[Any, ...]:
        """Mesh axes that shard it, but for pipe."""
        return tuple(RULES[dim] for dim in self.dims if RULES[dim])

    @property
    def is_matrix(self) -> bool:
        """Return whether it is kept in shards over fsdp, and so gathered; norms and biases are not."""
        return "fsdp" in self.axes

    @property
    def is_of_experts(self) -> bool:
        """Return whether it is one matrix of each expert."""
        return self.dims[:1] == ("experts",)

    @property
    def experts(self) -> int:
        """Number of like matrices side by side."""
        return self.shape[0] if self.is_of_experts else 1

    @property
    def inputs(self) -> int:
        """k of its matmul [m, k] x [k, n]: its first dim, or all but the last where that is the model's width."""
        own = self.shape[self.is_of_experts :]
        return math.prod(own[:-1]) if self.dims[-1] == "embed" else own[0]

    @property
    def outputs(self) -> int:
        """n of its matmul."""
        return math.prod(self.shape) // (self.inputs * self.experts)

    @property
    def result(self) -> str:
        """The name under which remat can keep its product; "" if there is none."""
        return RESULTS.get(self.name, "")

    def dtype(self, dtype: str) -> str:
        """Return the dtype in which it is held and used where the model's is `dtype`."""
        return held_dtype(self.dims, dtype)

    def arrays(self, model: ModelConfig, dtype: str) -> list[tuple[Weight, str]]:
        """Return (array, its dtype) where the model's dtype is `dtype`: the weight, or the two arrays of one in few bits."""
        lora = model.adapters
        if not is_held(lora, self.dims):
            return [(self, self.dtype(dtype))]
        shapes, dims = held_shapes(lora, self.dims, self.shape), held_dims(lora, self.dims)
        scale = replace(self, name=f"{self.name}.scale", shape=shapes.scale, dims=dims.scale)
        return [(replace(self, shape=shapes.values), lora.base), (scale, "float32")]

    def is_in_float8(self, model: ModelConfig) -> bool:
        """Return whether it is multiplied in float8."""
        return model.matmul_dtype == "float8" and self.name not in ("table", "head", "positions") and is_in_float8(self.dims)

    def computed(self, model: ModelConfig) -> list[tuple[Weight, str]]:
        """Return (array, its dtype) as matmuls take it, but for float8's scales: few numbers, never gathered."""
        return [(self, "float8")] if self.is_in_float8(model) else self.arrays(model, model.dtype)

    def shard(self, config: Config, without: tuple[str, ...] = ()) -> int:
        """Return the elements on one device; `without` names axes over which it has been gathered."""
        return self.elements // math.prod(getattr(config.mesh, axis) for axis in self.axes if axis not in without)


def _declared(module: Any, model: ModelConfig, layers: int = 1, lead: str = "") -> dict[str, Weight]:
    """Return the parameters that a module of the decoder declares, by name."""
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(declare(module, model), nnx.Param)):
        name = lead + ".".join(map(str, path))
        found[name] = Weight(name, leaf.get_value().shape, leaf.get_metadata()["dims"], layers)
    return found


@functools.lru_cache(maxsize=1024)
def layer_weights(model: ModelConfig) -> Mapping[str, Weight]:
    """Return the weights of one decoder layer, by name."""
    return MappingProxyType(_declared(*layer_kind(model)))


@functools.lru_cache(maxsize=1024)
def outer_weights(model: ModelConfig) -> Mapping[str, Weight]:
    """Return the embedding table, the final norm, the output projection unless it is tied, and a mixture's first layers."""
    first = model.first_dense_layers
    dense = _declared(*layer_kind(replace(model, moe=None)), first, "first_layers.") if first else {}
    return MappingProxyType(_declared(EmbeddingAndHead, model) | dense)


@functools.lru_cache(maxsize=1024)
def trained_weights(model: ModelConfig, frozen: tuple[str, ...]) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """Return the weights that are trained (`models.trained`), adapters among them, of a layer and of what is outside."""
    layer, outer = dict(layer_weights(model)), dict(outer_weights(model))
    if not model.adapters.rank and not frozen:
        return tuple(layer.values()), tuple(outer.values())
    of_layer, of_outer = adapters(model)
    every = [*(("layers", w) for w in (*layer.values(), *of_layer)), *(("outer", w) for w in (*outer.values(), *of_outer))]

    def is_trained(lead: str, weight: Weight) -> bool:
        name = f"{lead}/{weight.name.replace('.', '/')}"
        return (not model.adapters.rank or LORA in weight.dims) and not any(fnmatchcase(name, p) for p in frozen)

    kept = [(lead, weight) for lead, weight in every if is_trained(lead, weight)]
    return tuple(w for lead, w in kept if lead == "layers"), tuple(w for lead, w in kept if lead == "outer")


@functools.lru_cache(maxsize=1024)
def adapters(model: ModelConfig) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """Return the factors of the adapters of a layer, and of a mixture's first layers."""

    leads = (("", 1), ("first_layers.", model.first_dense_layers))
    found = [
        tuple(
            Weight(f"{lead}{lora.BRANCH}.{path.replace('/', '.')}", shape, dims, layers) for path, (dims, shape) in own.items()
        )
        for (lead, layers), own in zip(leads, adapter_factors(model), strict=False)
    ]
    return found[0], found[1] if model.first_dense_layers else ()


class Matmul(NamedTuple):
    """The product [m, k] x [k, n] with a layer's weight, in one pass over one microbatch, on one device."""

    weight: Weight
    m: int
    k: int
    n: int
    batch: int
    """Products in one kernel: the device's experts, each with its share of the rows."""
    again: bool
    """Whether the backward pass runs it a second time."""

    @property
    def flops(self) -> float:
        """2 m k n, of all products."""
        return 2.0 * self.m * self.k * self.n * self.batch


def matmuls(config: Config, parts: int = 1) -> list[Matmul]:
    """Return the matmuls of one layer; where layers take turns (`parts` 2), each on half of the rows.

    A weight that tensor does not cut (a router, a projection to latents) meets only this device's slice of the sequence.
    """
    tensor, tokens = config.mesh.tensor, microbatch_rows(config) * local_length(config)
    rows = []
    for weight in layer_weights(config.model).values():
        if not weight.is_matrix:
            continue
        k, n, batch, m = weight.inputs, weight.outputs, 1, tokens
        if weight.is_of_experts:
            batch = weight.experts // config.mesh.expert
            m = expert_rows(config) // batch
        if "tensor" not in weight.axes:
            m //= tensor
        elif weight.dims[-1] == "embed":
            k //= tensor
        else:
            n //= tensor
        rows.append(Matmul(weight, max(1, m // parts), k, n, batch, runs_again(config, weight.result)))
    return rows


def is_read_again(model: ModelConfig, result: str) -> bool:
    """Return whether the backward pass needs a block's output, by its name under remat: where a norm reads it.

    That is the norm of the output itself, or of attention's output the MLP's norm unless both blocks read the same.
    """
    read_by_mlp = result == "attention_out" and model.residual == "sequential"
    return result not in ("attention_out", "mlp_out") or model.norm_placement != "pre" or read_by_mlp


def runs_again(config: Config, result: str) -> bool:
    """Return whether the backward pass computes a value again, by its name under remat.

    `none` and `dots` keep the results of all matmuls and of attention.
    """
    is_dropped = config.train.remat in ("named", "full") and not keeps(config.train, result)
    return is_dropped and is_read_again(config.model, result)


def count_norms(model: ModelConfig) -> int:
    """Return how often a layer normalises the residual stream or a block's output."""
    return 4 if model.norm_placement == "both" else 2


def is_gated(model: ModelConfig) -> bool:
    """Return whether a dense MLP (or the shared experts) multiplies by a gate."""
    return any(weight.result == "mlp_gate" for weight in layer_weights(model).values())


def expert_rows(config: Config) -> int:
    """Return the rows that all experts together take from one microbatch of one device, those left empty included.

    Dropless: B L/c K. Capacity: E experts x (B L/c / G groups) x room of an expert.
    """
    moe, tokens = config.model.moe, microbatch_rows(config) * local_length(config)
    assert moe is not None
    return tokens * moe.experts_per_token if moe.dispatch == "dropless" else capacity_rows(moe, tokens, local_length(config))
