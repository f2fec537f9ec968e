"""Turn text into token files once, for runs to read: the verb `jaxtrain tokenize`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from jaxtrain.config import DataSource
from jaxtrain.data.corpus import Corpus, open_corpus
from jaxtrain.data.token_cache import locked, new_folder, trained_tokenizer, write_streams
from jaxtrain.data.token_stream import StreamMetadata
from jaxtrain.data.tokenize_config import TokenizeConfig, find_problems
from jaxtrain.data.tokenize_parts import PART_CHARACTERS
from jaxtrain.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_file
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.files import user_path
from jaxtrain.text import readable_size


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
    parts = output.with_name(f"{output.name}.parts")
    tokenizer, original = _open_tokenizer(config.tokenizer, corpus, cache_dir)
    try:
        with new_folder(output) as folder, locked(parts.with_suffix(".lock")):
            if original is not None:
                (folder / f"tokenizer{original.suffix}").write_bytes(original.read_bytes())
                side = original.with_name("tokenizer_config.json")  # it may name the separator
                if side.is_file():
                    (folder / side.name).write_bytes(side.read_bytes())
            names = config.tokenizer, config.tokenizer if original is None else str(original)
            processes = config.processes or min(os.cpu_count() or 1, 1 + sum(corpus.sizes) // PART_CHARACTERS)
            written = write_streams(corpus, tokenizer, names, folder, parts, processes)
            parts.with_suffix(".lock").unlink(missing_ok=True)
            return written
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
