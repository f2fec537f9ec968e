"""Turn text into token files once, for runs to read: the verb `jaxtrain tokenize`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxtrain.config import DataSource
from jaxtrain.config.source_rules import bad_rows_problems, bpe_size_problem, remote_problems
from jaxtrain.data.corpus import Corpus, open_corpus
from jaxtrain.data.token_cache import new_folder, trained_tokenizer, write_streams
from jaxtrain.data.token_stream import StreamMetadata
from jaxtrain.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_file
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.files import user_path
from jaxtrain.text import readable_size

TextKind = Literal["stdlib", "text", "jsonl", "parquet", "array_record"]


@dataclass(frozen=True)
class TokenizeConfig:
    """Input, tokenizer and output of `jaxtrain tokenize`."""

    output: str
    """New folder for train.bin, validation.bin, their .json files, and a copy of the tokenizer."""
    input: str = ""
    """Files to read, as a glob ("books/**/*.jsonl"); several globs are separated by commas. Not needed for kind=stdlib."""
    kind: TextKind = "text"
    """stdlib: the running Python's own source code. text: one document per file. jsonl, parquet: one document per row.
    array_record: one UTF-8 document per record."""
    tokenizer: str = "byte"
    """byte; bpe:SIZE (trained on the training part); a tokenizer.json; or a SentencePiece .model."""
    text_field: str = "text"
    """Field of a JSONL or Parquet row that holds the text."""
    max_bad_rows: float = 0.0
    """Largest share of the rows that may be broken (not JSON, not UTF-8, without text): they are left out and counted. 0: the
    first one is an error."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out for validation, chosen by the hash of their text; of a document of more than
    100,000 characters, its end."""
    cache_dir: str = "~/.cache/jaxtrain/data"
    """Folder that keeps a bpe:SIZE tokenizer between runs."""


def find_problems(config: TokenizeConfig) -> list[str]:
    """Return all problems of the flags, one line each."""
    problems = []
    if config.kind != "stdlib" and not config.input:
        problems.append(f"--input is missing; --kind={config.kind} needs the files to read, e.g. --input='books/*.txt'")
    if not 0 <= config.validation_fraction < 1:
        problems.append(f"--validation_fraction={config.validation_fraction} must be a share: at least 0 and below 1")
    for field in ("input", "output", "tokenizer", "cache_dir"):
        problems += remote_problems(f"--{field}", getattr(config, field))
    problems += bad_rows_problems("--max_bad_rows", config.kind, config.max_bad_rows)
    name = config.tokenizer
    if problem := bpe_size_problem(name):
        problems.append(f"--tokenizer={name}: {problem}")
    if name == "none":
        problems.append("--tokenizer=none: text needs a tokenizer; use byte, bpe:SIZE, a tokenizer.json or a .model")
    return problems


def tokenize(config: TokenizeConfig) -> dict[str, StreamMetadata]:
    """Write config.output, whole or not at all, and return the content of its two JSON files.

    Raises ConfigError for flags that cannot work, DataError for bad input or a folder that cannot be written.
    """
    problems = find_problems(config)
    if problems:
        raise ConfigError(problems, "on the command line")
    output, cache_dir = user_path(config.output).absolute(), user_path(config.cache_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"--output={config.output}: it exists already; name a new folder")
    source = DataSource(kind=config.kind, path=config.input, text_field=config.text_field, max_bad_rows=config.max_bad_rows)
    corpus = open_corpus(source, "--input", config.validation_fraction, cache_dir)
    tokenizer, original = _open_tokenizer(config.tokenizer, corpus, cache_dir)
    try:
        with new_folder(output) as folder:
            if original is not None:
                (folder / f"tokenizer{original.suffix}").write_bytes(original.read_bytes())
                side = original.with_name("tokenizer_config.json")  # it may name the separator
                if side.is_file():
                    (folder / side.name).write_bytes(side.read_bytes())
            return write_streams(corpus, tokenizer, config.tokenizer, folder)
    except OSError as error:
        raise DataError(f"--output={config.output}: cannot be written ({error.strerror or error})") from error


def _open_tokenizer(name: str, corpus: Corpus, cache_dir: Path) -> tuple[Tokenizer, Path | None]:
    """Return the tokenizer and the file to copy beside the tokens, if it has one."""
    if name.startswith("bpe:"):
        return trained_tokenizer([corpus], int(name[4:]), cache_dir)
    return load_tokenizer(name), None if name == "byte" else tokenizer_file(name)


def summary(config: TokenizeConfig, written: dict[str, StreamMetadata]) -> str:
    """Return a description of the written files, and the flags that train on them."""
    lines = []
    for split, data in written.items():
        ratio = f", {data.utf8_bytes / data.count:.2f} bytes a token" if data.count else ""
        lines.append(
            f"{split:<10} {data.documents:,} documents, {readable_size(data.utf8_bytes)}, {data.count:,} tokens "
            f"({data.dtype}{ratio})"
        )
    lines += [f"left out {data.bad_rows_in_words}" for data in [written["train"]] if data.bad_rows]
    folder = Path(config.output)
    copies = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (user_path(folder) / name).is_file()]
    tokenizer = copies[0] if copies else config.tokenizer
    flags = {
        "data.sources.0.kind": "tokens",
        "data.sources.0.path": str(folder),
        "data.tokenizer": str(tokenizer),
        "model.vocab_size": str(written["train"].vocab_size),
    }
    words = " ".join(f"--{name}={shlex.quote(value)}" for name, value in flags.items())
    lines += ["train on it with:", f"  {words}"]
    return "\n".join(lines)
