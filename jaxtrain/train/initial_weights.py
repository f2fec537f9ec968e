"""Initial weights from elsewhere, straight onto the mesh: `init_from` names a HuggingFace folder, or another run of ours."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxtrain.checkpoint.addresses import check_average, find, is_average
from jaxtrain.checkpoint.stored import digest as digest_of
from jaxtrain.checkpoint.stored import read_metadata, read_stored, restore, step_path
from jaxtrain.checkpoint.trees import leaves_by_path, nested
from jaxtrain.config import Config, ModelConfig, SyncConfig, config_at
from jaxtrain.config.as_json import from_json
from jaxtrain.data.chat_source import answer_ends
from jaxtrain.data.chat_template import read_chat_template
from jaxtrain.data.tokenizers import load_tokenizer
from jaxtrain.errors import CheckpointError, ConfigError, ExplainedError
from jaxtrain.files import user_path
from jaxtrain.huggingface.adapters import joined, read_adapter
from jaxtrain.huggingface.config import differing, family_of, table_of
from jaxtrain.huggingface.exporting import described_as
from jaxtrain.huggingface.files import WeightsFolder
from jaxtrain.huggingface.importing import TRAVELLING_FOLDER, keep_travelling, origin_of
from jaxtrain.huggingface.placing import place
from jaxtrain.huggingface.starting import is_model_folder
from jaxtrain.huggingface.table import Table
from jaxtrain.models.decoder import canonical_dims, parameter_dims
from jaxtrain.models.quantised_weights import holding
from jaxtrain.sharding import is_dims
from jaxtrain.train.state import Canonical, make_stacking

PyTree = Any


def initial_weights(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> tuple[PyTree, dict[str, Any]]:
    """Return one replica's {"params"}, with init_from_optimizer "optimizer" too, and where they come from.

    Raises:
      ExplainedError: init_from cannot be read.
      ConfigError: it holds another model; lists the fields.
    """
    if not is_folder(config.init_from):
        given, origin = _of_run(config, mesh, optimizer)
        return (_with_adapter(config, mesh, given, _table_of_run(config)), origin) if config.lora.init_from else (given, origin)
    if config.init_from_optimizer:
        raise ExplainedError(f"init_from={config.init_from} is a HuggingFace folder, which holds no optimizer state")
    with WeightsFolder(config.init_from) as folder:
        _check_same_model(config, folder.model)
        folder.check_tokenizer(config.model.vocab_size)
        params = place(config.model.base, make_stacking(config), mesh, folder.table, folder.fetch, holding(config.lora, mesh))
        given = {"params": params}
        return _with_adapter(config, mesh, given, folder.table) if config.lora.init_from else given, origin_of(folder)


def _table_of_run(config: Config) -> Table:
    """Return the table of the weights of init_from's run."""
    beside = Path(find(config.init_from)[0]).parent / TRAVELLING_FOLDER
    described = described_as(config.model.base, beside, config.data.sequence_length)
    return table_of(family_of(described), config.model.base)


def _with_adapter(config: Config, mesh: Mesh, given: dict[str, Any], table: Table) -> dict[str, Any]:
    """Return the weights with the adapters of lora.init_from."""
    adapters = read_adapter(config, table, make_stacking(config), mesh)
    return given | {"params": joined(given["params"], adapters)}


def is_folder(source: str) -> bool:
    """Return whether the folder is of a HuggingFace model, not of a run of ours."""
    return is_model_folder(user_path(source))


def keep_files(config: Config) -> None:
    """Copy what goes with init_from's weights, as the tokenizer, into run_dir for an export. Process 0 calls it."""
    beside = config.directory / TRAVELLING_FOLDER
    if not config.init_from or beside.is_dir():
        return
    if is_folder(config.init_from):
        with WeightsFolder(config.init_from) as folder:
            keep_travelling(folder, config.directory)
    else:
        source = Path(find(config.init_from)[0]).parent / TRAVELLING_FOLDER
        if source.is_dir():
            shutil.copytree(source, beside)
    if beside.is_dir() and any(source.kind == "chat" for source in config.data.sources):
        _keep_chat(config, beside)


def _keep_chat(config: Config, beside: Path) -> None:
    """Write the template that a run is trained with, and the ids that end its answers, into the files that go with its weights.

    A base model's own files know neither, and an export would not stop.
    """
    if config.data.chat_template:
        template = read_chat_template(user_path(config.data.chat_template))
        (beside / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    file = beside / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = settings or json.loads((beside / "config.json").read_text(encoding="utf-8"))
    ends = named.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [end for end in [ends] if end is not None]
    added = [end for end in answer_ends(config, load_tokenizer(config.data.tokenizer)) if end not in ends]
    if added:
        file.write_text(json.dumps(settings | {"eos_token_id": [*ends, *added]}, indent=2), encoding="utf-8")


def from_words(origin: dict[str, Any]) -> str:
    """Return an origin in words."""
    step = f", step {origin['step']}" if "step" in origin else ""
    return f"of {origin['from']}{step} ({origin['kind']}, {origin['sha256'][:12]})"


def _check_same_model(config: Config, found: ModelConfig) -> None:
    """Check that the weights are those of the config's model, whose vocabulary may be larger."""
    wanted = config.model
    grown = replace(found, vocab_size=max(found.vocab_size, wanted.vocab_size))
    names = differing(grown, wanted)
    if names:
        lines = [f"model.{name}: {getattr(found, name)} in init_from, {getattr(wanted, name)} in the config" for name in names]
        raise ConfigError(lines, f"with init_from={config.init_from}, whose weights are of another model")


def _check_adapters(config: Config, source: Config) -> None:
    """Check that adapters of the run that weights come from are those of this run, if it has any."""
    before, now = source.model.adapters, config.model.adapters
    if before.rank and before != now and before != replace(now, base="", base_group=0):
        base = f", lora.base={before.base}" if before.base else ""
        raise ExplainedError(
            f"init_from={config.init_from} was trained with adapters (lora.rank={before.rank}, scale {before.scale:g}, targets "
            f"{','.join(before.targets) or 'all'}{base}), which this run's lora settings do not have: give the same ones, or "
            "begin from its merged weights, `jaxtrain export RUN DIR`"
        )
    if config.init_from_optimizer and before != now:
        raise ExplainedError(f"init_from_optimizer: the moments of init_from={config.init_from} are not of adapters")


def _of_run(config: Config, mesh: Mesh, optimizer: optax.GradientTransformation) -> tuple[PyTree, dict[str, Any]]:
    """Return the weights of a checkpoint of another run."""
    folder, step = find(config.init_from)
    saved = read_metadata(folder, step)
    source = config_at(from_json(json.dumps(saved["config"])), step)
    _check_same_model(config, source.model)
    if source.sync.replicas_differ:
        raise CheckpointError(f"init_from={config.init_from}: its replicas differ (sync.mode={source.sync.mode})")
    _check_adapters(config, source)
    if config.init_from_optimizer and is_average(config.init_from):
        raise ExplainedError(f"init_from_optimizer: moments are not of the average of weights, init_from={config.init_from}")
    plain = replace(config, sync=SyncConfig(), lora=source.lora)
    if not config.init_from_optimizer:
        plain, optimizer = replace(plain, train=replace(plain.train, frozen=())), optax.identity()
    canonical = Canonical(plain, mesh, optimizer)
    before, now = source.model.vocab_size, config.model.vocab_size
    names = ("params", "optimizer") if config.init_from_optimizer else ("params",)
    if before != now and config.init_from_optimizer:
        raise ExplainedError(
            f"init_from_optimizer with another vocabulary ({before} -> {now}): moments of new rows are unknown"
        )
    abstract = {name: canonical.abstract[name] for name in names}
    dims = canonical_dims(plain.model)
    if before != now:
        abstract["params"] = jax.tree.map(
            lambda d, leaf: _of_vocabulary(leaf, d, before), dims, abstract["params"], is_leaf=is_dims
        )
    state = _read(config.init_from, folder, step, abstract)
    if before != now:
        state["params"] = jax.tree.map(lambda d, leaf: _grown(leaf, d, now), dims, state["params"], is_leaf=is_dims)
    seal = digest_of(read_stored(step_path(folder, step)))
    origin = {"from": os.path.dirname(os.path.abspath(folder)), "kind": "run", "step": step, "sha256": seal}
    given = canonical.part_to_state(state)
    if config.lora.base and not source.lora.base:
        hold = holding(config.lora, mesh)
        given["params"] = jax.tree.map(hold, parameter_dims(plain.model), given["params"], is_leaf=is_dims)
    origin |= {"weights": "average"} if is_average(config.init_from) else {}
    return given, origin | ({"origin": saved["origin"]} if saved.get("origin") else {})


def _read(name: str, folder: str, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Return parts of a checkpoint, with averages in place of the weights that have one where `name` asks for them."""
    if not is_average(name):
        return restore(folder, step, abstract, part=True)
    stored = read_stored(step_path(folder, step))["leaves"]
    check_average(name, stored)
    leaves, structure = leaves_by_path(abstract["params"])
    averaged = {path: leaf.update(dtype=jnp.float32) for path, leaf in leaves.items() if f"ema/{'/'.join(path)}" in stored}
    rest = {path: leaf for path, leaf in leaves.items() if path not in averaged}
    state = restore(folder, step, {"params": nested(rest), "ema": nested(averaged)}, part=True)
    found, _ = leaves_by_path(state)
    values = [found["ema" if path in averaged else "params", *path].astype(leaf.dtype) for path, leaf in leaves.items()]
    return {"params": jax.tree.unflatten(structure, values)}


def _of_vocabulary(leaf: jax.ShapeDtypeStruct, dims: tuple[str, ...], size: int) -> jax.ShapeDtypeStruct:
    """Return the leaf with another vocabulary, whole on every device along it."""
    if "vocab" not in dims:
        return leaf
    axis, sharding = dims.index("vocab"), leaf.sharding
    spec = [None if dim == axis else name for dim, name in enumerate(sharding.spec)]
    shape = tuple(size if dim == axis else n for dim, n in enumerate(leaf.shape))
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding.update(spec=jax.sharding.PartitionSpec(*spec)))


def _grown(leaf: jax.Array, dims: tuple[str, ...], size: int) -> jax.Array:
    """Return the leaf with rows of new tokens, which are the mean of the others."""
    if "vocab" not in dims:
        return leaf
    axis = dims.index("vocab")

    def grow(held: jax.Array) -> jax.Array:
        mean = held.astype(jnp.float32).mean(axis, keepdims=True).astype(held.dtype)
        return jnp.concatenate([held, jnp.repeat(mean, size - held.shape[axis], axis)], axis)

    return jax.jit(grow, out_shardings=leaf.sharding)(leaf)
