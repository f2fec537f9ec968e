"""The flags of `jaxtrain tokenize`, and their rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtrain.config.source_rules import (
    bad_rows_problems,
    bpe_size_problem,
    path_problems,
    remote_problems,
    text_field_problems,
)

TextKind = Literal["stdlib", "text", "jsonl", "parquet", "arrow", "tar", "array_record"]


@dataclass(frozen=True)
class TokenizeConfig:
    """Input, tokenizer and output of `jaxtrain tokenize`."""

    output: str
    """New folder for train.bin, validation.bin, their .json files, and a copy of the tokenizer."""
    input: str = ""
    """Files to read, as a glob ("books/**/*.jsonl"); several globs are separated by commas. Not needed for kind=stdlib."""
    kind: TextKind = "text"
    """stdlib: the running Python's own source code. text: one document per file. jsonl, parquet, arrow: one document per row.
    tar: one per sample, its member .txt or .json. array_record: one UTF-8 document per record."""
    tokenizer: str = "byte"
    """byte; bpe:SIZE (trained on the training part); a tokenizer.json; or a SentencePiece .model."""
    text_field: str = "text"
    """Field of a row, or of a sample's .json, that holds the text."""
    max_bad_rows: float = 0.0
    """Largest share of the rows that may be broken (not JSON, not UTF-8, without text): they are left out and counted. 0: the
    first one is an error."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out for validation, chosen by the hash of their text; of a document of more than
    100,000 characters, its end."""
    processes: int = 0
    """Processes that tokenize; the ids do not depend on it. 0: one for each core, fewer for little
    text."""
    cache_dir: str = "~/.cache/jaxtrain/data"
    """Folder that keeps a bpe:SIZE tokenizer between runs."""


def find_problems(config: TokenizeConfig) -> list[str]:
    """Return all problems of the flags, one line each."""
    problems = path_problems("--input", config.input, "--kind", config.kind)
    problems += text_field_problems("--text_field", config.kind, config.text_field)
    if not 0 <= config.validation_fraction < 1:
        problems.append(f"--validation_fraction={config.validation_fraction} must be a share: at least 0 and below 1")
    for field in ("output", "tokenizer", "cache_dir"):
        problems += remote_problems(f"--{field}", getattr(config, field))
    problems += bad_rows_problems("--max_bad_rows", config.kind, config.max_bad_rows)
    if config.processes < 0:
        problems.append(f"--processes={config.processes} must be at least 1, or 0 for one for each core")
    name = config.tokenizer
    if problem := bpe_size_problem(name):
        problems.append(f"--tokenizer={name}: {problem}")
    if name == "none":
        problems.append("--tokenizer=none: text needs a tokenizer; use byte, bpe:SIZE, a tokenizer.json or a .model")
    return problems
