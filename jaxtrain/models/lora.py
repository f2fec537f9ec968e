"""Low-rank adapters: a matrix as the forward pass sees it is W + s A B (LoRA; Hu et al. 2021, arXiv:2106.09685).

A is [inputs, rank] and B [rank, outputs], of each expert where W is of experts; s is `LoraConfig.scale`. Both are float32
parameters of the model, in a branch "lora" beside the blocks of a layer: "layers/lora/attention/query/a". They are sharded as
W's own dims are. B is 0 at first, so training begins exactly at W.

W may be held in few bits (`lora.base`, `quantised_weights.py`). DoRA (arXiv:2402.09353) is left out: its magnitudes begin as
the norms of W's columns, sums over inputs that fsdp and tensor cut, whose last bits would depend on the mesh; and each pass
would take the norms of all columns again.

The sum is made where a layer's weights are gathered, once in each pass over a microbatch, in float32, and rounded once to the
compute dtype. So whatever reads a weight is right with adapters: every kind of layer, experts, latent attention, every mesh,
generation and scoring; and the merged weights of an export are those that were trained. The price against the form (x A) B:
W's own gradient is computed, to be multiplied by A and B, and then dropped. With dW that gradient, dA = s dW B^T and
dB = s A^T dW. A step takes 0.83 to 0.93 of one that trains all weights, where torch with peft takes 0.77 to 0.83 of its own (on
two idle CPU cores: `python -m tests.measure.lora_speed 384 4 256 4`).
"""

from __future__ import annotations

import math
import zlib
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config import LoraConfig
from jaxtrain.errors import ConfigError, nearest
from jaxtrain.models.quantised_weights import NUMBERED, is_matrix, summed
from jaxtrain.sharding import LORA, Dims, is_dims

PyTree = Any
BRANCH = "lora"
"""Name of the branch of a layer's parameters that holds the adapters."""
KEY = zlib.crc32(b"lora")


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a layer's tree, dims or others, by their paths: "attention/query"."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_dims)[0]
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in flat}


def _nested(leaves: dict[str, Any]) -> PyTree:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def matrices_of(dims: PyTree) -> tuple[str, ...]:
    """Return the paths of a layer's matrices, which may have adapters: no router, norm or bias.

    Args:
      dims: logical dims of one layer's parameters.
    """
    return tuple(path for path, own in _by_path(dims).items() if is_matrix(own))


def targets_of(lora: LoraConfig, dims: PyTree) -> tuple[str, ...]:
    """Return the paths of a layer's matrices that have adapters."""
    if not lora.rank:
        return ()
    patterns = lora.targets or ("*",)
    return tuple(path for path in matrices_of(dims) if any(_fits(path, pattern) for pattern in patterns))


def _fits(path: str, pattern: str) -> bool:
    """Return whether a pattern names a matrix, by its path or by its last name alone."""
    return fnmatchcase(path, pattern) or fnmatchcase(path.rpartition("/")[2], pattern)


def check_targets(lora: LoraConfig, kinds: list[PyTree]) -> None:
    """Check that every pattern names a matrix.

    Args:
      kinds: logical dims of one layer, of each kind of layer.

    Raises:
      ConfigError: one does not; names the matrices.
    """
    known = list(dict.fromkeys(path for dims in kinds for path in matrices_of(dims)))
    unknown = [pattern for pattern in lora.targets if not any(_fits(path, pattern) for path in known)]
    if unknown:
        raise ConfigError([f"lora.targets has {pattern!r}: {nearest(pattern, known)}" for pattern in unknown])


def _split(own: Dims) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the axes of a matrix by role: those that number matrices, inputs, outputs."""
    numbered = tuple(i for i, name in enumerate(own) if name in NUMBERED)
    inputs = summed(own)
    return numbered, inputs, tuple(i for i in range(len(own)) if i not in (*numbered, *inputs))


def factors(lora: LoraConfig, dims: PyTree, shapes: PyTree) -> dict[str, tuple[Dims, tuple[int, ...]]]:
    """Return (logical dims, shape) of every A and B of one layer, by path: "attention/query/a".

    Args:
      dims: logical dims of the layer's own parameters, without adapters.
      shapes: of the same, any leaves with `shape`.
    """
    found, by_path, sizes = dict[str, tuple[Dims, tuple[int, ...]]](), _by_path(dims), _by_path(shapes)
    for path in targets_of(lora, dims):
        own, shape = by_path[path], sizes[path].shape
        numbered, inputs, outputs = _split(own)

        def take(*axes: int | str, own: Dims = own, shape: tuple[int, ...] = shape) -> tuple[Dims, tuple[int, ...]]:
            names = tuple(LORA if isinstance(axis, str) else own[axis] for axis in axes)
            return names, tuple(lora.rank if isinstance(axis, str) else shape[axis] for axis in axes)

        found |= {f"{path}/a": take(*numbered, *inputs, LORA), f"{path}/b": take(*numbered, LORA, *outputs)}
    return found


def with_adapters(lora: LoraConfig, dims: PyTree, shapes: PyTree) -> PyTree:
    """Return the logical dims of one layer's parameters with those of its adapters; arguments as of `factors`."""
    found = {path: own for path, (own, _) in factors(lora, dims, shapes).items()}
    return dims | {BRANCH: _nested(found)} if found else dims


def initial_adapters(lora: LoraConfig, dims: PyTree, shapes: PyTree, key: jax.Array) -> PyTree:
    """Return a layer's new adapters: A uniform in +-1 / sqrt(inputs), as in PEFT, and B 0; arguments as of `factors`.

    An A depends on the key and the matrix's name alone.
    """
    found = dict[str, jax.Array]()
    for path, (own, shape) in factors(lora, dims, shapes).items():
        if path.endswith("/b"):
            found[path] = jnp.zeros(shape)
            continue
        inputs = math.prod(size for name, size in zip(own[:-1], shape[:-1], strict=True) if name not in NUMBERED)
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        # Not drawn between the bounds: the sum that this takes is rounded once or twice, as the compiler likes, on each mesh.
        found[path] = jax.random.uniform(own_key, shape, minval=-1.0, maxval=1.0) * (1 / math.sqrt(inputs))
    return _nested(found)


def adapter_of(path: str) -> tuple[str, str]:
    """Return the paths of A and B in a tree of parameters, of the matrix at `path` ("layers/mlp/up")."""
    above = "outer/first_layers/" if path.startswith("outer/") else "layers/"
    own = f"{above}{BRANCH}/{path.removeprefix(above)}"
    return f"{own}/a", f"{own}/b"


def merged(lora: LoraConfig, weights: PyTree) -> PyTree:
    """Return one layer's weights with W + s A B in place of W, and without the branch of the adapters."""
    if BRANCH not in weights:
        return weights
    flat, adapters = _by_path({n: tree for n, tree in weights.items() if n != BRANCH}), _by_path(weights[BRANCH])
    with jax.named_scope("lora"):
        for path in {path.rpartition("/")[0] for path in adapters}:
            flat[path] = merge(jnp, lora.scale, flat[path], adapters[f"{path}/a"], adapters[f"{path}/b"])
    return _nested(flat)


def merge(numpy: Any, scale: float, w: Any, a: Any, b: Any) -> Any:
    """Return W + s A B, computed in float32, in W's dtype.

    Args:
      numpy: the module to compute with, `numpy` or `jax.numpy`.
      w, a, b: of one matrix, or with further first dims that number matrices.
    """

    def product(a: Any, b: Any, numbering: int) -> Any:
        if not numbering:
            return numpy.tensordot(a, b, 1)
        if numpy is np:
            return np.stack([product(*each, numbering - 1) for each in zip(a, b, strict=True)])
        return jax.vmap(lambda a, b: product(a, b, numbering - 1))(a, b)

    return (w.astype("float32") + scale * product(a, b, a.ndim + b.ndim - w.ndim - 2)).astype(w.dtype)
