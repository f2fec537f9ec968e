"""Load a model from a HuggingFace folder or a run, for notebooks and scripts."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import optax

from jaxtrain.checkpoint.addresses import find
from jaxtrain.checkpoint.stored import read_metadata
from jaxtrain.config import Config, DType, MeshConfig, SyncConfig, config_at
from jaxtrain.config.as_json import from_json
from jaxtrain.config.rules import find_problems
from jaxtrain.data.chat_source import answer_ends
from jaxtrain.data.tokenizers import Tokenizer, begin_ids, load_tokenizer
from jaxtrain.errors import ConfigError, ExplainedError, nearest
from jaxtrain.files import user_path
from jaxtrain.huggingface.files import WeightsFolder
from jaxtrain.huggingface.importing import TRAVELLING_FOLDER
from jaxtrain.inference.model import Model
from jaxtrain.mesh import count_devices, make_mesh
from jaxtrain.models.quantised_weights import Kind
from jaxtrain.numerics import settled
from jaxtrain.train.export import hf_writer
from jaxtrain.train.initial_weights import initial_weights, is_folder


@settled()
def load(
    source: str | os.PathLike,
    mesh: MeshConfig | None = None,
    dtype: DType | None = None,
    quantisation: Kind | None = None,
    group: int = 0,
) -> Model:
    """Return the model of a HuggingFace folder, or of a run: its newest checkpoint, or RUN@STEP.

    Args:
      mesh: how devices hold it; by default one device does.
      dtype: of matmuls and activations; by default float32 for a folder, the run's own for a run.
      quantisation: int8, float8 or nf4 to hold matrices in 8 or 4 bits (`jaxtrain.models.quantised_weights`); each is read
        before it is quantised, and matmuls stay in `dtype`.
      group: neighbouring inputs with a scale of their own; 0: one scale for an output channel, or 64 inputs of nf4.

    Raises:
      ExplainedError: it cannot be read, or the mesh does not fit the model.
    """
    source = str(source)
    _check(mesh, quantisation, group)
    config, ends, beside = _of_source(source)
    if quantisation and config.lora.base:
        raise ExplainedError(f"{source} holds its weights in {config.lora.base} already; load it without quantisation")
    if quantisation:
        config = replace(config, lora=replace(config.lora, base=quantisation, base_group=group))
    mesh = mesh or MeshConfig(fsdp=1)
    sizes, here = [size for size in mesh.shape if size > 0], count_devices()
    count = math.prod(sizes) if len(sizes) == len(mesh.shape) else here
    model = replace(config.model, dtype=dtype or config.model.dtype)
    config, problems = find_problems(replace(config, model=model, mesh=mesh, sync=SyncConfig(), init_from=source), count)
    problems = [problem for problem in problems if problem.startswith(("mesh.", "model."))]
    if problems:
        raise ConfigError(problems, f"with {source}")
    if count > here:
        raise ExplainedError(f"the mesh wants {count} devices, there are {here}; give a smaller mesh.*")
    devices = make_mesh(config.mesh, jax.devices()[:count])
    params = initial_weights(config, devices, optax.identity())[0]["params"]
    tokenizer = _tokenizer(config)
    if not ends and tokenizer is not None:
        ends = _answer_ends(config, tokenizer)
    begins, write = _begins(beside / "tokenizer.json", config.data.tokenizer), _refuse if quantisation else hf_writer(beside)
    return Model(config, devices, params, tokenizer, ends, begins, write)


def _check(mesh: Any, quantisation: Any, group: int) -> None:
    """Refuse arguments of `load` that say nothing."""
    if not isinstance(mesh, MeshConfig | None):
        raise ExplainedError(f"mesh={mesh!r}: give a MeshConfig, such as jaxtrain.config.MeshConfig(fsdp=2)")
    if quantisation and quantisation not in get_args(Kind):
        raise ExplainedError(f"quantisation={quantisation!r}: {nearest(quantisation, get_args(Kind))}")
    if group < 0 or (group and not quantisation):
        raise ExplainedError(f"group={group}: it is a number of neighbouring inputs, of a model with quantisation")


def _refuse(*_: Any) -> dict[str, Any]:
    raise ExplainedError("the weights are quantised; load the model without quantisation to write it")


def config_of_source(source: str) -> Config:
    """Return a config of the model in a HuggingFace folder or a run; its mesh and training are of no meaning.

    Raises:
      ExplainedError: it cannot be read.
    """
    return _of_source(source)[0]


def _of_source(source: str) -> tuple[Config, tuple[int, ...], Path]:
    return _of_folder(source) if is_folder(source) else _of_run(source)


def _of_folder(source: str) -> tuple[Config, tuple[int, ...], Path]:
    """Return a config of the folder's model, the tokens that end an answer, and where the files beside the weights are."""
    with WeightsFolder(source) as folder:
        model, path = replace(folder.model, dtype="float32"), folder.path
        files = [path / "generation_config.json", path / "config.json"]
    has_tokenizer = (path / "tokenizer.json").is_file()
    config = Config(model=model)
    length = min(config.data.sequence_length, model.learned_positions or config.data.sequence_length)
    tokenizer = str(path / "tokenizer.json") if has_tokenizer else "none"
    config = replace(config, data=replace(config.data, tokenizer=tokenizer, sequence_length=length))
    return config, next((ends for file in files if (ends := _ends(file, model.vocab_size))), ()), path


def _ends(file: Path, vocab_size: int) -> tuple[int, ...]:
    """Return eos_token_id of a JSON file: one id, several, or none."""
    if not file.is_file():
        return ()
    found: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return tuple(i for i in ids if isinstance(i, int) and 0 <= i < vocab_size)


def _of_run(source: str) -> tuple[Config, tuple[int, ...], Path]:
    """Return the config that a checkpoint was saved with, no tokens, and where the files beside its weights are."""
    folder, step = find(source)
    beside = Path(folder).parent / TRAVELLING_FOLDER
    saved, kept = read_metadata(folder, step), beside / "chat_template.jinja"
    config = config_at(from_json(json.dumps(saved["config"])), step)
    if config.data.chat_template and kept.is_file():
        config = replace(config, data=replace(config.data, chat_template=str(kept)))
    return config, (), beside


def _answer_ends(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer, without the chat template's own where that is no longer there."""
    try:
        return answer_ends(config, tokenizer)
    except ExplainedError:
        return tuple(sorted({end for end in (tokenizer.separator, tokenizer.end) if end >= 0}))


def _begins(file: Path, used: str) -> tuple[int, ...]:
    """Return the token ids that a folder's tokenizer.json puts before a text, which our own encoding leaves out.

    Args:
      used: the model's tokenizer; a run may have another than the folder its weights came from.
    """
    if not file.is_file() or not user_path(used).is_file() or file.read_bytes() != user_path(used).read_bytes():
        return ()
    return begin_ids(file)


def _tokenizer(config: Config) -> Any:
    """Return the tokenizer of the data, or None where it is made from data that is not at hand.

    Raises:
      ExplainedError: it has ids that the model lacks: another stands there than the one that the run was trained with.
    """
    name, size = config.data.tokenizer, config.model.vocab_size
    if name == "byte":
        return load_tokenizer(name)
    if not user_path(name).exists():
        return None
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > size:
        raise ExplainedError(f"{name} has {tokenizer.vocab_size} ids, but the model vocab_size={size}: put its own there")
    return tokenizer
