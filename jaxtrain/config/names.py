"""Config fields by dotted name: list, read from text, set, and find the one that was meant.

The command line, sweeps and `--against` read fields here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import decimal
import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from jaxtrain.config import NO_SETTINGS, Config
from jaxtrain.errors import ExplainedError, nearest

RUN = "run"
"""Section of the fields of `Config` itself."""
LONGEST_NUMBER = 40
"""Most decimal places of a whole number: no field is as large, and 1e999999999 would fill the memory."""
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_OTHER_NAMES = {
    "optimizer.peak_lr": "lr learning_rate max_lr",
    "optimizer.beta1": "momentum",
    "optimizer.clip_norm": "grad_clip max_grad_norm",
    "optimizer.schedule": "lr_scheduler_type",
    "optimizer.warmup_steps": "warmup",
    "train.global_batch_size": "batch_size",
    "train.microbatches": "gradient_accumulation_steps",
    "train.steps": "max_steps num_steps max_iters epochs num_train_epochs",
    "train.log_every": "logging_steps",
    "train.validate_every": "eval_every eval_interval eval_steps",
    "train.remat": "gradient_checkpointing",
    "train.seed": "random_seed",
    "data.sequence_length": "seq_len seq_length max_seq_len block_size context_length",
    "data.sources.0.path": "dataset",
    "data.workers": "num_workers",
    "checkpoint.every": "save_steps save_every",
    "checkpoint.keep": "save_total_limit",
    "checkpoint.resume": "resume_from_checkpoint",
    "run_dir": "output_dir out_dir",
    "model.embed_dim": "hidden_size d_model dim",
    "model.mlp_dim": "intermediate_size",
    "model.num_layers": "num_hidden_layers n_layers",
    "model.num_heads": "n_heads",
    "model.dtype": "precision bf16",
    "mesh.data": "dp",
    "mesh.expert": "ep",
    "mesh.context": "cp",
    "mesh.tensor": "tp",
    "mesh.pipe": "pp",
    "telemetry.wandb_project": "wandb",
    "lora.rank": "lora_r",
    "lora.alpha": "lora_alpha",
    "lora.targets": "target_modules",
    "objective.grpo.group_size": "num_generations",
    "objective.grpo.max_new_tokens": "max_completion_length",
    "objective.grpo.updates": "num_iterations",
    "objective.grpo.reward": "reward_funcs",
}
"""Names of our fields in other trainers."""
PEERS = {name: field for field, names in _OTHER_NAMES.items() for name in names.split()}
CUTS = ("top_k", "top_p", "min_p")
"""Restrictions of sampling that rewards cannot have."""


class NoSuchField(ExplainedError):
    """A dotted name is none of a config's fields."""


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """Return {name: type} of a dataclass's fields, without plugged-in parts, which are not settings."""
    return {name: hint for name, hint in get_type_hints(kind).items() if name not in NO_SETTINGS}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a dataclass's field; MISSING where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def nested(hint: Any) -> type | None:
    """Return the dataclass that a field of this type holds (X of `X | None`), or None for a plain value."""
    if get_origin(hint) is UnionType:
        hint = get_args(hint)[0]
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def section_kind(hint: Any, held: Any = None) -> type | None:
    """Return the dataclass that a field holds: its value's, which may be a subclass, else its type's; None if plain."""
    return type(held) if dataclasses.is_dataclass(held) else nested(hint)


class Section(NamedTuple):
    """Fields of one dataclass of the config."""

    name: str
    """Dotted prefix of its fields; "run" for those of Config itself."""
    kind: type
    here: Any
    """The part of the config that is shown, or None."""
    fields: list[str]

    @property
    def prefix(self) -> str:
        """Prefix of a field's name in its flag."""
        return "" if self.name == RUN else f"{self.name}."


def sections_of(config: Any, kind: type = Config, name: str = "") -> Iterator[Section]:
    """Yield the sections of a config, also those that are None; a tuple of dataclasses has one, for its first item."""
    plain, inner = [], []
    for field, hint in hints_of(kind).items():
        is_many = get_origin(hint) is tuple
        held = getattr(config, field, None)
        part = nested(get_args(hint)[0]) if is_many else section_kind(hint, held)
        if part is None:
            plain.append(field)
            continue
        here = held[0] if is_many and held else None if is_many else held
        inner.append(sections_of(here, part, f"{name}.{field}".lstrip(".") + (".0" if is_many else "")))
    yield Section(name or RUN, kind, config, plain)
    yield from itertools.chain.from_iterable(inner)


def field_names(config: Config | type[Config] = Config) -> Iterator[str]:
    """Yield the dotted names of all plain fields, also of optional parts; one index for each tuple of dataclasses (sources.0).

    Args:
      config: a config, whose sections may be subclasses with more fields, or the class of one.
    """
    for section in sections_of(config, config if isinstance(config, type) else type(config)):
        yield from (section.prefix + name for name in section.fields)


def field_values(part: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: value} of all plain fields, also of every source; a part that is None is one value."""
    values: dict[str, Any] = {}
    for name in hints_of(type(part)):
        value = getattr(part, name)
        if dataclasses.is_dataclass(value):
            values |= field_values(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for place, item in enumerate(value):
                values |= field_values(item, f"{prefix}{name}.{place}.")
        else:
            values[prefix + name] = value
    return values


def field_hint(name: str, config: Config | None = None) -> Any:
    """Return the type of a field of a config, by default of `Config`.

    Raises:
      NoSuchField: there is none of that name.
    """
    hint: Any = Config
    held: Any = config
    for part in name.split("."):
        inner = section_kind(hint, held)
        if inner is not None and part in hints_of(inner):
            hint, held = hints_of(inner)[part], getattr(held, part, None)
        elif get_origin(hint) is tuple and nested(get_args(hint)[0]) and re.fullmatch("[0-9]{1,4}", part):
            hint = get_args(hint)[0]
        else:
            raise NoSuchField(f"no such field; {meant(name, config=config)}")
    return hint


def set_field(config: Any, name: str, value: Any) -> Any:
    """Return the config with one field, given by its dotted name, replaced.

    A part that is None, and the index after the last of a tuple of dataclasses, are first created with defaults.

    Raises:
      NoSuchField: the index lies further behind the end.
    """
    first, _, rest = name.partition(".")
    if not rest:
        return dataclasses.replace(config, **{first: value})
    hint, held = hints_of(type(config))[first], getattr(config, first)
    if get_origin(hint) is not tuple:
        kind = section_kind(hint, held)
        assert kind is not None, f"{first} holds no fields"
        return dataclasses.replace(config, **{first: set_field(kind() if held is None else held, rest, value)})
    place, _, field = rest.partition(".")
    if int(place) > len(held):
        raise NoSuchField(f"there are {len(held)} {first}, so the next is {first}.{len(held)}")
    items = [*held, get_args(hint)[0]()] if int(place) == len(held) else list(held)
    items[int(place)] = set_field(items[int(place)], field, value)
    return dataclasses.replace(config, **{first: tuple(items)})


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the config with fields, given by their dotted names, replaced."""
    for name, value in values.items():
        config = set_field(config, name, value)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# From text


def read_value(text: str, hint: Any) -> Any:
    """Return the value of a text for a field of this type.

    Booleans are true, false, 1, 0, yes, no, on or off; whole numbers may be written 1e3, 1000.0 or 1_000; tuples are separated
    by commas; None clears an optional part.

    Raises:
      ExplainedError: it is no such value; says what it should be.
    """
    text = text.strip() if hint is not str else text
    if get_origin(hint) is UnionType and text == "None":
        return None
    if (inner := nested(hint)) is not None:
        optional = "is None, or " if get_origin(hint) is UnionType else ""
        raise ExplainedError(f"{optional}is set by its fields: {', '.join(hints_of(inner))}")
    if get_origin(hint) is UnionType:
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is tuple:
        if nested(get_args(hint)[0]):
            raise ExplainedError("is set by the fields of each, e.g. 0.kind")
        return tuple(read_value(item, get_args(hint)[0]) for item in split_items(text))
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in get_args(hint)}
        if text not in choices:
            raise ExplainedError(nearest(text, choices))
        return choices[text]
    if hint is bool:
        return _read_bool(text)
    return _read_number(text, hint) if hint in (int, float) else text


def split_items(text: str) -> list[str]:
    """Return the items of a tuple: parts between commas. In name=value items, a comma inside a value stays."""
    separator = r",(?=\s*[\w.]+\s*=)" if "=" in text else ","
    return [item.strip() for item in re.split(separator, text) if item.strip()]


def _read_bool(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise ExplainedError("give True or False")
    return text.lower() in TRUE


def _read_number(text: str, kind: type[int] | type[float]) -> float:
    """Read a whole number, in any notation with a whole value, or a float."""
    try:
        if kind is float:
            return float(text)
        number = decimal.Decimal(text)
        if number.is_finite() and abs(number.adjusted()) < LONGEST_NUMBER and number == int(number):
            return int(number)
    except (ValueError, decimal.InvalidOperation):
        pass
    raise ExplainedError(f"give a {'whole ' if kind is int else ''}number")


# ---------------------------------------------------------------------------------------------------------------------
# Which was meant


def meant(name: str, others: tuple[str, ...] = (), dashes: str = "", fields: bool = True, config: Config | None = None) -> str:
    """Return a hint from a name that is no field to the field that was meant.

    Args:
      others: further names that would have been right.
      dashes: prefix of the names shown.
      fields: whether names of fields would have been right.
      config: the config with these fields; None: `Config`'s.
    """
    names, last = [*others, *(field_names(config or Config) if fields else ())], name.rpartition(".")[2]
    if fields and last in CUTS and name.startswith("objective"):
        return f"answers are drawn at {dashes}objective.grpo.temperature from all tokens; a cut one is not the policy's"
    by_last = {known.rpartition(".")[2]: known for known in reversed(names)}
    same_last = [known for known in names if known.rpartition(".")[2] == last and known != name]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if last in PEERS and fields:
        found = [PEERS[last]]
    elif same_last:
        found = same_last[:3]
    elif close:
        found = close
    else:
        found = [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    section = name.rpartition(".")[0]
    siblings = [known for known in names if known.rpartition(".")[0] == section] if section else []
    if not found and siblings:
        return f"one of: {', '.join(dashes + known for known in siblings)}"
    return f"did you mean {' or '.join(dashes + known for known in found)}?" if found else "--help lists all"
