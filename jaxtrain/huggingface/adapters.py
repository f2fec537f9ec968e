"""Adapters in the form of the PEFT library, in and out: adapter_config.json and adapter_model.safetensors.

A layer's A [inputs, rank] is their lora_A [rank, inputs], B [rank, outputs] their lora_B [outputs, rank]; inputs and outputs
are those of the family's table. A matrix that is not one Linear layer of theirs has no adapter there, e.g. where some share a
tensor. Experts have one each, as in files of `transformers` 4: PEFT (0.21) turns them into those of its `target_parameters`, of
twice the rank for gate and up together. It renames the adapters of other MLPs in such a model to theirs, too.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # lets safetensors give bfloat16
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxtrain.config import Config, ModelConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.files import user_path
from jaxtrain.huggingface.config import family_of, table_of
from jaxtrain.huggingface.exporting import described_as, new_folder, opened, tensors
from jaxtrain.huggingface.importing import dims_of
from jaxtrain.huggingface.placing import place
from jaxtrain.huggingface.table import FIRST, Row, Table
from jaxtrain.models import lora
from jaxtrain.parallel.stacking import Stacking
from jaxtrain.text import printable

SETTINGS, WEIGHTS, STEM = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
PLAIN = {"bias": "none", "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}
PLAIN |= {"modules_to_save": None, "trainable_token_indices": None, "layers_to_transform": None, "lora_bias": False}
"""What our adapters are, in the fields of adapter_config.json; other values of these fields are refused."""


def adapter_table(table: Table, model: ModelConfig) -> Table:
    """Return the table of a model's adapters, from that of its weights.

    Raises:
      ExplainedError: PEFT cannot hold some of them; names the matrices and says why.
    """
    known, rows, refused = dims_of(model), dict[Row, None](), dict[str, str]()
    sharing = defaultdict[str, set[str]](set)
    for row in table.rows:
        sharing[row.theirs].add(row.ours.removeprefix(FIRST).removeprefix("layers/"))
    for row in table.rows:
        a, b = lora.adapter_of(row.ours)
        if a not in known:
            continue
        left, right = (_words(side) for side in row.axes.split("->"))
        count = len(known[a]) - 2 - row.per_expert  # of the inputs' axes, without the layers', the experts' and the rank
        pair = {lora.adapter_of(row.ours.rpartition("/")[0] + name)[0] for name in ("/gate", "/up")}
        if len(left) != 2:
            refused[row.ours] = "it is of experts whose file has one tensor for all"
        elif row.per_expert and model.adapters.rank_stabilised:
            refused[row.ours] = "PEFT doubles the rank of experts' gate and up, which lora.rank_stabilised scales by"
        elif row.per_expert and a in pair and not pair <= known.keys():
            refused[row.ours] = "PEFT holds experts' gate and up as one: have both in lora.targets"
        elif model.moe and "/attention/" not in row.ours and not row.per_expert:
            refused[row.ours] = "beside experts, PEFT takes adapters of MLPs for theirs"
        elif len(sharing[row.theirs]) > 1:
            refused[row.ours] = f"{row.theirs} holds other matrices too"
        elif not all(word in left[1] for word in right[:count]):
            refused[row.ours] = f"{row.theirs} is stored with its inputs first"
        else:
            module, inputs, outputs = STEM + row.theirs.removesuffix(".weight"), right[:count], right[count:]
            rows[Row(a, f"{module}.lora_A.weight", f"r {left[1]} -> {' '.join(inputs)} r")] = None
            rows[Row(b, f"{module}.lora_B.weight", f"{left[0]} r -> r {' '.join(outputs)}")] = None
    if refused:
        lines = "".join(f"\n  - {name}: {why}" for name, why in refused.items())
        raise ExplainedError(
            f"a PEFT adapter cannot hold those of{lines}\nExport merged weights, without --adapter, or choose lora.targets "
            "without these."
        )
    return Table(list(rows), model)


def _words(side: str) -> list[str]:
    """Return the axes on one side of a pattern."""
    words, depth = [""], 0
    for letter in side.strip():
        depth += (letter == "(") - (letter == ")")
        if letter == " " and not depth:
            words.append("")
        else:
            words[-1] += letter
    return words


def export_adapter(run: str, target: str) -> list[str]:
    """Write the adapters of RUN[@STEP] as a folder that PEFT loads; return the modules that have one.

    Raises:
      ExplainedError: the run has none, PEFT cannot hold them, or the folder is there.
    """
    config, read, beside, origin = opened(run)
    if not config.lora.rank:
        raise ExplainedError(f"{run} was trained without adapters (lora.rank=0); export it without --adapter")
    table = _table(config, beside)
    names = (row.theirs.partition("{layer}.")[2].rpartition(".lora_")[0] for row in table.rows)
    modules = list(dict.fromkeys(name.replace("{expert}.", "") for name in names))
    with new_folder(target) as folder:
        save_file(dict(tensors(table, read, "float32")), folder / WEIGHTS, {"format": "pt"})
        described = _described(config, modules, origin)
        (folder / SETTINGS).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return modules


def _table(config: Config, beside: Path) -> Table:
    described = described_as(config.model, beside, config.data.sequence_length)
    return adapter_table(table_of(family_of(described), config.model), config.model)


def _described(config: Config, modules: list[str], origin: dict[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json."""
    while "origin" in origin:  # of a run whose weights came from another
        origin = origin["origin"]
    own = config.lora
    return PLAIN | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.get("from", ""),
        "r": own.rank,
        "lora_alpha": own.alpha or 2 * own.rank,
        "use_rslora": own.rank_stabilised,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "inference_mode": True,
    }


def read_adapter(config: Config, table: Table, stacking: Stacking, mesh: Mesh) -> Any:
    """Return the adapters of the folder `lora.init_from` on the mesh: their branches of a tree of parameters.

    Args:
      table: of the model's weights.

    Raises:
      ExplainedError: the folder cannot be read, or holds adapters of other settings than the config's.
    """
    folder = user_path(config.lora.init_from)
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        held = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        what = f"{SETTINGS} and {WEIGHTS}"
        raise ExplainedError(f"lora.init_from={folder} is no adapter of PEFT, {what}: {printable(str(error))}") from error
    adapters = adapter_table(table, config.model)
    problems = _other_settings(config, settings) + _other_tensors(adapters, held)
    if problems:
        lines = "".join(f"\n  - {printable(problem)}" for problem in problems)
        raise ExplainedError(f"lora.init_from={folder} does not hold this run's adapters:{lines}")
    return place(config.model, stacking, mesh, adapters, lambda name, index: held[name][index])


def _other_settings(config: Config, settings: dict[str, Any]) -> list[str]:
    """Return what adapter_config.json says otherwise than the config."""
    own, rank = config.lora, settings.get("r")
    problems = [] if settings.get("peft_type") == "LORA" else [f"peft_type={settings.get('peft_type')!r} is not LORA"]
    problems += [] if rank == own.rank else [f"r={rank}, but lora.rank={own.rank}"]
    stabilised = bool(settings.get("use_rslora"))
    found = replace(own, rank=rank or 1, alpha=float(settings.get("lora_alpha", 0)), rank_stabilised=stabilised)
    if not math.isclose(found.scale, own.scale):
        problems.append(
            f"lora_alpha={settings.get('lora_alpha')} with use_rslora={stabilised} scales by {found.scale:g}, but lora.alpha="
            f"{own.alpha:g} with lora.rank_stabilised={own.rank_stabilised} by {own.scale:g}"
        )
    return problems + [
        f"{name}={settings[name]!r} is not supported" for name, plain in PLAIN.items() if (settings.get(name) or plain) != plain
    ]


def _other_tensors(table: Table, held: dict[str, np.ndarray]) -> list[str]:
    """Return how the tensors of a file differ from those of a table."""
    expected = table.shapes()
    missing, extra = ([n for n in one if n not in other] for one, other in ((expected, held), (held, expected)))
    problems = [
        f"{names[0]} and {len(names) - 1} more {what}"
        for names, what in (
            (missing, "are not in it: leave them out of lora.targets"),
            (extra, "are in it, which lora.targets does not name"),
        )
        if names
    ]
    for name, shape in expected.items():
        if name in held and held[name].shape != shape:
            problems.append(f"{name} is {list(held[name].shape)}, but this model's is {list(shape)}")
        elif name in held and not np.isfinite(held[name].astype(np.float32)).all():
            problems.append(f"{name} holds numbers that are not finite")
    return problems


def joined(params: Any, adapters: Any) -> Any:
    """Return a tree of parameters with the branches of adapters in it."""
    return params | {name: joined(params[name], branch) if name in params else branch for name, branch in adapters.items()}
