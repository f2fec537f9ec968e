"""Families: every config and every weight there and back, bit for bit, against what `transformers` wrote."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface.config import differing, family_of, read_config, table_of, write_config
from jaxtrain.huggingface.table import Table
from jaxtrain.models import decoder
from tests.huggingface import goldens, tiny


def described(family: str) -> tuple[dict, ModelConfig, Table]:
    golden = goldens.load(family)
    model = read_config(golden["config"])
    return golden, model, table_of(family_of(golden["config"]), model)


def ours(table: Table, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters by path, with the layers in front."""
    found = {}
    for path in table.parameters:
        shape = table.shape_of_ours(path)
        found[path] = np.full((table.count(path), *shape), np.nan, np.float32)
        for layer, out in enumerate(found[path]):
            table.read(path, layer, tuple(slice(0, n) for n in shape), out, lambda name, index: tensors[name][index])
    return found


def theirs(table: Table, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their tensors by name."""

    def get(path: str, layer: int, expert: int | None) -> np.ndarray:
        return params[path][layer] if expert is None else params[path][layer][expert]

    return {name: table.write(name, get, np.float32) for name in table.shapes()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_there_and_back(family: str):
    golden, model, table = described(family)
    assert table.shapes() == golden["shapes"]
    tensors = {name: tiny.weight(name, shape, family) for name, shape in golden["shapes"].items()}
    params = ours(table, tensors)
    numbers = np.arange(model.stacked_layers)
    canonical = jax.eval_shape(lambda: decoder.initialize(replace(model, param_dtype="float32"), jax.random.key(0), numbers))
    padded = {model.padded_vocab_size: model.vocab_size}
    expected = {
        "/".join(key.key for key in path): tuple(padded.get(n, n) for n in leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(canonical)[0]
    }
    got = {
        path: value.shape if path.startswith(("layers/", "outer/first")) else value.shape[1:] for path, value in params.items()
    }
    assert got == expected
    assert not any(np.isnan(value).any() for value in params.values())
    back = theirs(table, params)
    assert all(back[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_any_slice_reads_as_the_whole(family: str):
    golden, _, table = described(family)
    tensors = {name: tiny.weight(name, shape, family) for name, shape in golden["shapes"].items()}
    whole, random = ours(table, tensors), np.random.default_rng(0)
    for path, values in whole.items():
        letters = zip(values.shape[1:], table.axes(path), strict=True)
        cut = [n > 3 and not set(axis) & set("NpP") for n, axis in letters]
        for _ in range(4):
            index = tuple(
                slice(*sorted(random.choice(n + 1, 2, replace=False))) if c else slice(0, n)
                for n, c in zip(values.shape[1:], cut, strict=True)
            )
            layer = int(random.integers(len(values)))
            out = np.empty(values[layer][index].shape, np.float32)
            read = []
            table.read(path, layer, index, out, lambda name, part: read.append(tensors[name][part]) or read[-1])  # noqa: B023
            assert out.tobytes() == values[layer][index].tobytes(), (path, index)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_config_there_and_back(family: str):
    golden, model, _ = described(family)
    again = read_config(write_config(model, 64))
    assert differing(again, model) == []
    own = family_of(golden["config"])
    assert (
        differing(read_config({"model_type": own.model_type, "max_position_embeddings": 64, **own.write(model)}), model) == []
    )
