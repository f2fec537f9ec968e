"""Thirty fixed layouts, 1b to 405b on 8 to 1024 GPUs: what `estimate_memory` and the collectives' formulas say of each, beside
the program compiled for H100s.

    python -m tests.planner.reference_layouts

compiles those that it has not compiled before, each in a process of its own, and prints a Markdown table. It can be
interrupted: every compiled layout is kept (`--cache=FILE`), under a key that changes with the config, with jax and with the
code of the step. `--only=N` is one layout, counted from 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtrain.config import Config, to_json
from jaxtrain.config.loading import load_config
from jaxtrain.config.rules import validate
from jaxtrain.errors import ExplainedError
from jaxtrain.files import replace_file, user_path
from jaxtrain.planner import deviceless
from jaxtrain.planner.estimates import Memory
from jaxtrain.planner.formulas_collectives import Transfers, collectives, uncovered
from jaxtrain.planner.memory import estimate_memory
from jaxtrain.program.collectives import summed

ROOT = Path(__file__).parents[2]
CONFIGS, PACKAGE = ROOT / "configs", ROOT / "jaxtrain"
CACHE = "~/.cache/jaxtrain/planner/reference_layouts.json"
GIB = 2**30
STEP = ("layout.py", "sharding.py", "models/*.py", "ops/*.py", "parallel/*.py")
STEP += tuple(f"train/{name}.py" for name in ("balance", "exchange", "optimizer", "state", "step", "xla_options"))
"""Files of the package that a compiled step depends on."""
SMALL = 2**20
"""Bytes of a kind of transfer in a step below which its deviation is not counted: scalars that XLA adds up before it sends."""


def totals(entries: Sequence[Transfers]) -> dict[tuple[str, str, str], float]:
    """Payload bytes by (axes, kind, dtype)."""
    sums = summed(entries, lambda entry: (entry.axes, entry.kind, entry.dtype), ("payload",))
    return {key: row["payload"] for key, row in sums.items()}


@dataclass(frozen=True)
class Layout:
    """A file of configs/ with some of its fields changed."""

    model: str
    devices: int
    changes: Mapping[str, Any]
    """Field by its flag's name, "mesh.tensor"."""

    def config(self) -> Config:
        """Valid, its mesh resolved; fsdp takes what no other axis has."""
        config = load_config(CONFIGS / f"{self.model}.py")
        for name, value in self.changes.items():
            section, field = name.split(".")
            config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
        return validate(config, self.devices)

    @property
    def name(self) -> str:
        """ "7b on 64: tensor=8 remat=dots" """
        return f"{self.model} on {self.devices}: " + " ".join(
            f"{n.partition('.')[2]}={_said(v)}" for n, v in self.changes.items()
        )


def _said(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _layout(model: str, devices: int, **changes: Any) -> Layout:
    """Fields by their own names, which are unique among those that are changed here."""
    return Layout(model, devices, {_SECTION[name] + "." + name: value for name, value in changes.items()})


_SECTION = {name: "mesh" for name in ("replica", "pipe", "data", "fsdp", "expert", "context", "tensor")}
_SECTION |= {
    name: "train" for name in ("global_batch_size", "microbatches", "remat", "remat_save", "reduce_dtype", "loss_chunk")
}
_SECTION |= {name: "sharding" for name in ("zero", "context_attention", "take_turns")}
_SECTION |= {"schedule": "pipeline", "chunks": "pipeline", "sequence_length": "data", "mode": "sync", "name": "optimizer"}

LAYOUTS = (
    _layout("1b", 8, data=8, global_batch_size=32),
    _layout("1b", 8, data=2, global_batch_size=16, remat="none"),
    _layout("1b", 8, tensor=2, global_batch_size=32, remat="full"),
    _layout("1b", 16, pipe=2, global_batch_size=128, microbatches=8, remat="full"),
    _layout("1b", 16, replica=2, global_batch_size=64, mode="diloco"),
    _layout("7b", 8, global_batch_size=8),
    _layout("7b", 16, global_batch_size=128, microbatches=4, name="lion"),
    _layout("7b", 64, global_batch_size=64, remat="dots"),
    _layout("7b", 64, global_batch_size=128, microbatches=2, zero=2),
    _layout("7b", 64, zero=1, global_batch_size=128),
    _layout("7b", 32, pipe=4, global_batch_size=64, microbatches=8),
    _layout("7b", 32, pipe=4, tensor=2, global_batch_size=128, microbatches=8, schedule="interleaved", chunks=2),
    _layout("7b", 64, tensor=8, global_batch_size=64, remat="named"),
    _layout("7b", 64, pipe=4, tensor=4, global_batch_size=64, microbatches=8, schedule="gpipe", remat="dots"),
    _layout("8b", 64, global_batch_size=128),
    _layout("8b", 32, context=4, sequence_length=32768, global_batch_size=8),
    _layout("8b", 64, context=8, sequence_length=131072, global_batch_size=8, context_attention="ulysses"),
    _layout("8b", 128, data=2, tensor=4, global_batch_size=64, remat="dots"),
    _layout("70b", 64, tensor=8, global_batch_size=8),
    _layout("70b", 256, tensor=1, global_batch_size=256),
    _layout("70b", 128, pipe=4, tensor=8, global_batch_size=64, microbatches=16, loss_chunk=1024),
    _layout("70b", 256, tensor=8, global_batch_size=64, remat="named", remat_save=("attention", "mlp_up")),
    _layout("70b", 512, pipe=8, tensor=8, global_batch_size=128, microbatches=16, schedule="interleaved", chunks=2),
    _layout("70b", 1024, pipe=4, data=4, tensor=8, global_batch_size=512, microbatches=8, remat="named"),
    _layout("405b", 512, pipe=8, tensor=8, global_batch_size=128, microbatches=16),
    _layout("405b", 1024, pipe=1, tensor=8, global_batch_size=256, microbatches=2),
    _layout("405b", 1024, pipe=16, tensor=8, global_batch_size=256, microbatches=32, reduce_dtype="bfloat16"),
    _layout("mixtral_8x7b", 64, expert=8, global_batch_size=128),
    _layout("mixtral_8x7b", 32, pipe=4, expert=8, global_batch_size=64, microbatches=8, remat="named"),
    _layout("qwen3_30b_a3b", 64, expert=8, global_batch_size=64),
)
"""Every axis, schedule, remat policy and ZeRO level, at sequence lengths from 2048 to 131,072."""


# ---------------------------------------------------------------------------------------------------------------------
# Estimated against compiled


@dataclass(frozen=True)
class Comparison:
    """One layout, by closed forms and compiled."""

    layout: Layout
    estimate: Memory
    compiled: deviceless.CompiledStep

    @property
    def memory_error(self) -> float:
        """Estimated over compiled memory, less 1."""
        return self.estimate.of_program / self.compiled.memory_bytes - 1

    @property
    def bytes_error(self) -> float | None:
        """The largest share by which the bytes of any (axes, kind, dtype) differ; None where there is no closed form."""
        config = self.layout.config()
        return None if uncovered(config) else worst_deviation(collectives(config), self.compiled)


def worst_deviation(entries: Sequence[Transfers], report: deviceless.CompiledStep) -> float:
    """The largest |compiled - formula| / formula over (axes, kind, dtype), of those that move a MiB or more.

    What is never read (`Transfers.unread`) may be there or not; bytes where the formula has none count as infinitely many.
    """
    want, got = totals(entries), {(row.axes, row.kind, row.dtype): row.payload for row in report.rows}
    unread: dict[tuple[str, str, str], float] = defaultdict(float)
    for entry in entries:
        unread[entry.axes, entry.kind, entry.dtype] += entry.unread
    worst = 0.0
    for key in want.keys() | got.keys():
        expected, found = want.get(key, 0.0), got.get(key, 0.0)
        if max(expected, found) < SMALL or expected - unread[key] <= found <= expected:
            continue
        worst = max(worst, abs(found - expected) / expected if expected else float("inf"))
    return worst


def compare(layout: Layout, cache: Path) -> Comparison:
    """Compiles a layout, unless the cache has it.

    Raises:
      ExplainedError: the plugin is missing, or the compiler gave up.
    """
    config = layout.config()
    kept, key = _read(cache), _key(config)
    if key not in kept:
        kept[key] = dataclasses.asdict(deviceless.report_in_subprocess(config))
        kept[key]["layout"] = layout.name
        cache.parent.mkdir(parents=True, exist_ok=True)
        replace_file(cache, json.dumps(_read(cache) | kept))
    return Comparison(layout, estimate_memory(config), _report(kept[key]))


def _report(kept: dict[str, Any]) -> deviceless.CompiledStep:
    names = {field.name for field in dataclasses.fields(deviceless.CompiledStep)}  # a cache may have more
    fields: dict[str, Any] = {name: value for name, value in kept.items() if name in names}
    fields["rows"] = tuple(deviceless.CollectiveRow(**row) for row in fields["rows"])
    return deviceless.CompiledStep(**fields)


def _read(cache: Path) -> dict[str, Any]:
    return json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}


def _key(config: Config) -> str:
    """Of what a compiled step depends on: the config, jax, and the files of the package that make the step."""
    digest = hashlib.sha256(to_json(config).encode())
    digest.update(importlib.metadata.version("jax").encode())
    for pattern in STEP:
        for path in sorted(PACKAGE.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def row(number: int, comparison: Comparison) -> str:
    """A line of the Markdown table."""
    bytes_error = comparison.bytes_error
    return (
        f"| {number} | {comparison.layout.name} | {comparison.estimate.of_program / GIB:.1f} | "
        f"{comparison.compiled.memory_bytes / GIB:.1f} | {comparison.memory_error:+.1%} | "
        f"{'no formula' if bytes_error is None else f'{bytes_error:.2%}'} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; an exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.planner.reference_layouts", description=__doc__)
    parser.add_argument("--only", type=int, metavar="N", help="one layout, from 1")
    parser.add_argument("--cache", default=CACHE, help="file in which compiled layouts are kept")
    options = parser.parse_args(arguments)
    return print_table(LAYOUTS, options.cache, [options.only] if options.only else None)


def print_table(layouts: Sequence[Layout], cache: str, numbers: Sequence[int] | None = None) -> int:
    """Prints estimated beside compiled memory of layouts, or of those of some numbers, from 1; an exit code."""
    print("| | layout | estimated, GiB | compiled, GiB | error | largest error of bytes moved |")
    print("|---|---|---|---|---|---|")
    errors = []
    for number in numbers or range(1, len(layouts) + 1):
        try:
            comparison = compare(layouts[number - 1], user_path(cache))
        except ExplainedError as error:
            print(f"layout {number}: {error}", file=sys.stderr)
            return 1
        errors.append(comparison.memory_error)
        print(row(number, comparison), flush=True)
    sizes, low = [abs(error) for error in errors], sum(error < 0 for error in errors)
    print(
        f"\nMemory: median error {statistics.median(sizes):.1%}, largest {max(sizes):.1%}, of {len(sizes)} layouts; "
        f"{low} are estimated too low, {len(sizes) - low} too high."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
