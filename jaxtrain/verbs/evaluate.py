"""`jaxtrain evaluate RUN_OR_DIR --tasks=FILE`: what a model of ours or of HuggingFace reaches on tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxtrain.command import Usage, parse
from jaxtrain.command.text_model import ONE_DEVICE, TextModelFlags, check_given, text_model
from jaxtrain.errors import EXIT_DONE, UsageError
from jaxtrain.files import write_output

if TYPE_CHECKING:
    from jaxtrain.evaluation.measures import Settings, TaskResult
    from jaxtrain.evaluation.tasks import Task
    from jaxtrain.inference.model import Model


@dataclass(frozen=True)
class EvaluateFlags(TextModelFlags):
    """Flags of `jaxtrain evaluate`."""

    tasks: tuple[str, ...] = ()
    """File of JSON lines, each a row of a task (see jaxtrain/evaluation/README.md); may be given several times."""
    limit: int = 0
    """Most rows of a task, its first ones; 0: all."""
    length: int = 2048
    """Most tokens of a sequence: longer contexts lose their beginning, longer texts are cut into windows."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    stop: tuple[str, ...] = ("\n",)
    """Text that ends an answer; may be given several times."""
    json: bool = False
    """Print one JSON object for each task."""
    output: str = ""
    """File to write each row's result to, as JSON lines."""


USAGE = Usage(
    "evaluate",
    "Measure a run or a HuggingFace folder on tasks: multiple choice, likelihood of continuations and texts, exact answers. "
    "--mesh.fsdp=2, --mesh.tensor=2 and the like put it on several devices.",
    EvaluateFlags,
    ("model",),
    config="taken",
)


def main(arguments: Sequence[str]) -> int:
    """Parse, load, measure, print; return the exit code."""
    line = parse(USAGE, arguments, over=ONE_DEVICE)
    flags = line.own
    check_given(line, "evaluate")
    if not flags.tasks:
        raise UsageError("no task: give --tasks=FILE.jsonl")
    if flags.length < 2 or flags.max_new_tokens < 1 or flags.limit < 0:
        raise UsageError("--length is at least 2, --max_new_tokens at least 1, --limit 0 or more")
    from jaxtrain.evaluation.measures import Settings
    from jaxtrain.evaluation.tasks import read_task

    tasks = [read_task(path) for path in flags.tasks]
    tasks = [replace(task, rows=task.rows[: flags.limit or None]) for task in tasks]
    with text_model(line) as model:
        table = model.config.model.learned_positions
        settings = Settings(min(flags.length, table or flags.length), flags.max_new_tokens, flags.stop)
        results = [_measured(model, task, settings) for task in tasks]
    _print(results, flags.json)
    if flags.output:
        rows = [json.dumps({"task": result.task.name, **row}) for result in results for row in result.rows]
        write_output("--output", flags.output, "\n".join(rows) + "\n")
    return EXIT_DONE


def _measured(model: Model, task: Task, settings: Settings) -> TaskResult:
    from jaxtrain.data.progress import progress
    from jaxtrain.evaluation.measures import evaluate

    total = sum(len(row.options) for row in task.rows) if task.kind == "choice" else len(task.rows)
    with progress(task.name, total, "choices" if task.kind == "choice" else "rows") as advance:
        return evaluate(model, task, settings, advance)


def _print(results: Sequence[TaskResult], as_json: bool) -> None:
    if as_json:
        for result in results:
            found = {"task": result.task.name, "kind": result.task.kind, "rows": len(result.rows)}
            print(json.dumps(found | dict(result.measures) | {f"{name}_error": e for name, e in result.errors.items()}))
        return
    from rich.console import Console

    from jaxtrain.tables import plain_table, print_table

    table = plain_table("", ("task", "measure"), ("rows", "value", "standard error"))
    for result in results:
        for name, value in result.measures.items():
            error = f"{result.errors[name]:.4f}" if name in result.errors else ""
            table.add_row(result.task.name, name.replace("_", " "), f"{len(result.rows):,}", f"{value:.4f}", error)
    print_table(Console(file=sys.stdout), table)
