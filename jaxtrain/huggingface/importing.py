"""Turn a HuggingFace folder into a run of ours that holds its weights: a checkpoint of step 0, config.json, tokenizer."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.checkpoint import blocks
from jaxtrain.checkpoint.blocks import Index
from jaxtrain.checkpoint.streamed import Leaf, save_streamed
from jaxtrain.config import Config, ModelConfig, to_json, to_plain
from jaxtrain.config.fields import DType
from jaxtrain.data.progress import progress
from jaxtrain.files import replace_file, user_path
from jaxtrain.huggingface.files import WeightsFolder, travelling_files
from jaxtrain.huggingface.table import FIRST, Table
from jaxtrain.models.decoder import canonical_dims
from jaxtrain.models.parameters import held_dtype
from jaxtrain.sharding import is_dims
from jaxtrain.telemetry.flops import num_parameters

TRAVELLING_FOLDER = "huggingface"
"""In run_dir: the files that go with the weights, for an export."""


def origin_of(folder: WeightsFolder) -> dict[str, Any]:
    """Return where weights come from, as later checkpoints say it."""
    return {"from": str(folder.path.resolve()), "kind": folder.family.model_type, "sha256": folder.sha256}


def import_folder(path: str, run_dir: str, param_dtype: DType) -> Config:
    """Write the weights of a folder into run_dir as a checkpoint of step 0, and return the config that stands beside it.

    Raises:
      ExplainedError: the folder is not whole, or run_dir cannot be written; nothing is left in it then.
    """
    with WeightsFolder(path) as folder:
        folder.check_tokenizer(folder.model.vocab_size)
        target = user_path(run_dir)
        config = imported_config(folder, run_dir, param_dtype)
        metadata = {
            "config": to_plain(config),
            "origin": origin_of(folder),
            "num_parameters": num_parameters(config.model).total,
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "safetensors")},
        }
        with progress(f"importing {folder.path.name}", folder.size) as advance:
            save_streamed(target / "checkpoints", 0, _leaves(folder, config.model, advance), metadata)
        keep_travelling(folder, target)
        replace_file(target / "config.json", to_json(config) + "\n")
        return config


def imported_config(folder: WeightsFolder, run_dir: str, param_dtype: DType) -> Config:
    """Return a config for training these weights further, with their tokenizer."""
    tokenizer = user_path(run_dir) / TRAVELLING_FOLDER / "tokenizer.json"
    has_one = (folder.path / "tokenizer.json").is_file()
    config = Config(name=folder.path.resolve().name, run_dir=run_dir)
    data = replace(config.data, tokenizer=str(tokenizer)) if has_one else config.data
    return replace(config, model=replace(folder.model, param_dtype=param_dtype), data=data)


def keep_travelling(folder: WeightsFolder, run_dir: Path) -> None:
    """Copy the files that go with the weights into run_dir."""
    beside = run_dir / TRAVELLING_FOLDER
    beside.mkdir(parents=True, exist_ok=True)
    for file in travelling_files(folder.path):
        shutil.copyfile(file, beside / file.name)


def dims_of(model: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return the logical dims of our parameters by path, in canonical form."""
    flat = jax.tree_util.tree_flatten_with_path(canonical_dims(model), is_leaf=is_dims)[0]
    return {"/".join(str(key.key) for key in path): dims for path, dims in flat}


def is_stacked(ours: str) -> bool:
    """Return whether a parameter's first dim is that of the layers."""
    return ours.startswith(("layers/", FIRST))


def canonical_shape(table: Table, ours: str) -> tuple[int, ...]:
    """Return the shape of a parameter of all layers."""
    return (*([table.count(ours)] * is_stacked(ours)), *table.shape_of_ours(ours))


def _leaves(folder: WeightsFolder, model: ModelConfig, advance: Callable[[int], None]) -> Iterator[Leaf]:
    """Yield the parameters of a checkpoint, in canonical form."""
    dims = dims_of(model)
    for ours in folder.table.parameters:
        dtype = jax.dtypes.canonicalize_dtype(held_dtype(dims[ours], model.param_dtype))
        shape = canonical_shape(folder.table, ours)
        block = _block(dims[ours], shape, dtype.itemsize)

        def read(index: Index, ours: str = ours, dtype: np.dtype = dtype) -> np.ndarray:
            array = read_block(folder, ours, dtype, index)
            advance(array.size * (4 if folder.dtype == "float32" else 2))
            return array

        yield Leaf(f"params/{ours}", shape, dtype, block, read)


def _block(dims: tuple[str, ...], shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the shape of blocks of BLOCK_BYTES, if they can be so small: some layers, experts of one, rows of a vocabulary."""
    block = list(shape)
    for name in ("layer", "experts", "vocab"):
        if name in dims:
            axis = dims.index(name)
            block[axis] = max(1, min(block[axis], block[axis] * blocks.BLOCK_BYTES // (math.prod(block) * itemsize)))
    return tuple(block)


def read_block(folder: WeightsFolder, ours: str, dtype: np.dtype, index: Index) -> np.ndarray:
    """Return a block of a parameter in canonical form."""
    array = np.empty([part.stop - part.start for part in index], dtype)
    if not is_stacked(ours):
        folder.table.read(ours, 0, index, array, folder.fetch)
        return array
    for layer, part in zip(range(index[0].start, index[0].stop), array, strict=True):
        folder.table.read(ours, layer, index[1:], part, folder.fetch)
    return array
