"""Write the weights of a checkpoint as a HuggingFace folder, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # lets numpy know bfloat16
import numpy as np
from safetensors.numpy import save_file

from jaxtrain.checkpoint.addresses import check_average, find, is_average
from jaxtrain.checkpoint.blocks import StoredArray
from jaxtrain.checkpoint.stored import read_stored, step_path
from jaxtrain.config import Config, ModelConfig, config_at
from jaxtrain.config.as_json import from_json
from jaxtrain.data.progress import progress
from jaxtrain.errors import CheckpointError, ExplainedError
from jaxtrain.files import user_path
from jaxtrain.huggingface.config import family_of, read_config, same_model, table_of, write_config
from jaxtrain.huggingface.files import INDEX, SINGLE, travelling_files
from jaxtrain.huggingface.importing import TRAVELLING_FOLDER, dims_of, is_stacked
from jaxtrain.huggingface.table import Table
from jaxtrain.models import lora
from jaxtrain.models.quantised_weights import Quantised, dequantise

SHARD_BYTES = 512 << 20
"""Bytes of a weight file; a larger tensor has one of its own. A file is held in memory until it is written."""


Read = Callable[[list[str]], Iterator[tuple[str, Any]]]
"""Names of a checkpoint's arrays -> (name, array), one at a time."""


def export(run: str, target: str, dtype: str = "") -> dict[str, Any]:
    """Write the weights of RUN, RUN@STEP or RUN@best into the folder `target`, and return the config.json that it has.

    Args:
      dtype: of the matrices; empty for that of the imported folder, or model.dtype of a run from scratch.

    Raises:
      ExplainedError: there is no such checkpoint, no family has the model's settings, or the folder is not empty.
    """
    config, read, beside, _ = opened(run)
    return write_folder(config, read, target, beside, dtype)


def opened(run: str) -> tuple[Config, Read, Path, dict[str, Any]]:
    """Return a checkpoint's config, its arrays, the folder of the files that travel with its weights, and their origin.

    Args:
      run: RUN, RUN@STEP or RUN@best.

    Raises:
      ExplainedError: there is no such checkpoint, or its replicas differ.
    """
    folder, step = find(run)
    stored = read_stored(step_path(folder, step))
    metadata, leaves = stored["metadata"], stored["leaves"]
    check_average(run, leaves)
    config = config_at(from_json(json.dumps(metadata["config"])), step)
    if config.sync.replicas_differ:
        raise CheckpointError(f"{run}: the replicas of sync.mode={config.sync.mode} differ; an export needs one set of weights")
    beside = Path(folder).parent / TRAVELLING_FOLDER

    def read(names: list[str]) -> Iterator[tuple[str, Any]]:
        for name in names:
            average = name.replace("params/", "ema/", 1)
            held = average if is_average(run) and average in leaves else name
            if held not in leaves:
                raise CheckpointError(f"{run} holds no {held}")
            yield name, StoredArray(step_path(folder, step), held)

    return config, read, beside, metadata.get("origin") or {}


def write_folder(config: Config, read: Read, target: str, beside: Path, dtype: str = "") -> dict[str, Any]:
    """Write the weights of a config's model as the folder `target`, and return the config.json that it has.

    Adapters are added to their weights.

    Args:
      read: gives our parameters by the names of a checkpoint, in canonical form.
      beside: the folder of the files that travel with the weights, if there is one.
      dtype: of the matrices; empty for that of the imported folder, or model.dtype.

    Raises:
      ExplainedError: no family has the model's settings, or the folder is there.
    """
    described = described_as(config.model, beside, config.data.sequence_length)
    dtype = dtype or described.get("dtype") or config.model.dtype
    described = {name: value for name, value in described.items() if name != "torch_dtype"} | {"dtype": dtype}
    table, read = table_of(family_of(described), config.model), merging(config.model, read)
    with new_folder(target) as unfinished:
        write_weights(table, read, unfinished, dtype, f"exporting {user_path(target).name}")
        for file in travelling_files(beside):
            shutil.copyfile(file, unfinished / file.name)
        (unfinished / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return described


@contextlib.contextmanager
def new_folder(target: str) -> Iterator[Path]:
    """Give a folder to fill, which becomes `target` at the end, and is removed after an error.

    Raises:
      ExplainedError: the target is there.
    """
    goal = user_path(target)
    if goal.exists() and (not goal.is_dir() or any(goal.iterdir())):
        raise ExplainedError(f"{target} is there already; give a new folder")
    unfinished = goal.with_name(f"{goal.name}.{os.getpid()}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if goal.is_dir():
            goal.rmdir()
        unfinished.rename(goal)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def merging(model: ModelConfig, read: Read) -> Read:
    """Return `read` with W + s A B in place of a matrix W that has an adapter, computed in float32, in W's dtype.

    A W that is held in few bits is float32.
    """
    known = dims_of(model)

    def array_of(name: str) -> Any:
        """Return an array; of a matrix that is held in few bits its float32 numbers."""
        dims = known.get(f"{name.removeprefix('params/')}/values")
        if dims is None:
            ((_, array),) = read([name])
            return array
        values, scale = (np.asarray(array) for _, array in read([f"{name}/values", f"{name}/scale"]))
        return dequantise(np, dims, Quantised(values, scale))

    def merged(names: list[str]) -> Iterator[tuple[str, Any]]:
        for name in names:
            array, factors = array_of(name), lora.adapter_of(name.removeprefix("params/"))
            if factors[0] in known:
                both = (np.asarray(array_of(f"params/{factor}")) for factor in factors)
                array = lora.merge(np, model.adapters.scale, np.asarray(array), *both)
            yield name, array

    return merged


def described_as(model: ModelConfig, beside: Path, length: int) -> dict[str, Any]:
    """Return the config.json of a model: the one it was imported with where that still describes it, else a new one.

    Args:
      beside: the folder of the files that travel with the weights.
      length: longest sequence it was trained on.
    """
    if not (beside / "config.json").is_file():
        return write_config(model, length)
    config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = config.get("dtype") or config.get("torch_dtype")
    config.pop("quantization_config", None)
    if same_model(read_config(config), model):
        return config
    own = config | family_of(config).write(model)
    return own if same_model(read_config(own), model) else write_config(model, length)


def write_weights(table: Table, read: Read, folder: Path, dtype: str, title: str) -> None:
    """Write the tensors of a table into weight files, with an index if there are several."""
    dtypes, files = table.dtypes(dtype), _Shards(folder)
    sizes = {name: int(np.prod(shape)) * np.dtype(dtypes[name]).itemsize for name, shape in table.shapes().items()}
    with progress(title, sum(sizes.values())) as advance:
        for name, tensor in tensors(table, read, dtype):
            files.add(name, tensor)
            advance(sizes[name])
    files.finish(sum(sizes.values()))


def tensors(table: Table, read: Read, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of a table by name, put together from our parameters.

    Those are read a block of layers at a time; one outside the stack is whole in memory, in the tensor's dtype.
    """
    dtypes = table.dtypes(dtype)
    for ours, theirs in table.groups():
        held = {name.removeprefix("params/"): array for name, array in read([f"params/{own}" for own in ours])}
        for name in theirs:
            kind = np.dtype(dtypes[name])

            def part(own: str, layer: int, expert: int | None, held: dict = held, kind: np.dtype = kind) -> np.ndarray:
                lead = (layer,) * is_stacked(own) + (() if expert is None else (expert,))
                array = held[own]
                return array.read(lead, kind) if isinstance(array, StoredArray) else np.asarray(array)[lead]

            yield name, table.write(name, part, kind)
        held.clear()  # before the next is read


class _Shards:
    """Weight files under temporary names until their number is known."""

    def __init__(self, folder: Path):
        self._folder, self._held, self._bytes = folder, dict[str, np.ndarray](), 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Add a tensor, and write the file that it would make too large."""
        if self._held and self._bytes + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._held[name] = tensor
        self._bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._held, self._folder / f"{len(self._files)}.part", {"format": "pt"})
        self._files.append(list(self._held))
        self._held, self._bytes = {}, 0

    def finish(self, size: int) -> None:
        """Give the files their names, and write the index of several."""
        self._flush()
        count, where = len(self._files), dict[str, str]()
        for number, names in enumerate(self._files):
            file = SINGLE if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
            (self._folder / f"{number}.part").rename(self._folder / file)
            where |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
