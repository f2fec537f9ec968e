"""Rules for a source of data and its tokenizer, read by a run or by `jaxtrain tokenize`."""

from __future__ import annotations

import re

from jaxtrain.config import ROW_KINDS, TEXT_FIELD_KINDS, DataSource

_SMALLEST_BPE, _LARGEST_BPE = 257, 2**20
_ENDINGS = {
    "jsonl": ("jsonl", "json", "ndjson"),
    "parquet": ("parquet",),
    "arrow": ("arrow",),
    "tar": ("tar", "tgz"),
    "array_record": ("array_record", "arrayrecord"),
    "tokens": ("bin", "npy", "idx"),
}
"""Endings of files, by the kind of source that reads them."""
_COPY = {
    "s3": "aws s3 sync {folder} data",
    "gs": "gcloud storage rsync -r {folder} data",
    "hf": "hf download, of the package huggingface_hub",
    "http": "curl -LO {path}",
    "https": "curl -LO {path}",
}


def remote_problems(name: str, paths: str) -> list[str]:
    """Return the problems of field `name` if one of its comma-separated paths is an object store's URL."""
    problems = []
    for path in map(str.strip, paths.split(",")):
        address = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
        if address is None:
            continue
        if address[1].lower() == "file":
            problems.append(f"{name}={path}: give the path alone, without file://")
            continue
        folder = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        copy = _COPY.get(address[1].lower(), "the store's own program").format(folder=folder, path=path)
        problems.append(f"{name}={path}: only files and mounted folders are read; copy it first, e.g. with {copy}")
    return problems


def bad_rows_problems(name: str, kind: str, share: float) -> list[str]:
    """Return the problems of the share of bad rows that field `name` allows in a source of `kind`."""
    if not 0 <= share < 1:
        return [f"{name}={share} is a share: at least 0 and below 1"]
    if share and kind not in ROW_KINDS:
        return [f"{name}={share} has no meaning for kind={kind}, which has no rows; it is for {', '.join(ROW_KINDS)}"]
    return []


def text_field_problems(name: str, kind: str, field: str) -> list[str]:
    """Return the problem of naming, in field `name`, the field of a row that holds the text, where `kind` has no rows."""
    if field == DataSource.text_field or kind in TEXT_FIELD_KINDS:
        return []
    return [f"{name}={field} has no meaning for kind={kind}; it is for {', '.join(TEXT_FIELD_KINDS)}"]


def path_problems(path_name: str, path: str, kind_name: str, kind: str) -> list[str]:
    """Return the problem of a path that is missing, or that a source of `kind` would not read; names are those of fields."""
    if kind not in ("stdlib", "synthetic"):
        return [f"{path_name} is empty; {kind_name}={kind} needs the files to read, e.g. 'books/*.txt'"] * (not path)
    if not path:
        return []
    endings = {end: found for found, ends in _ENDINGS.items() for end in ends}
    name = path.rpartition("/")[2].lower()
    likely = next((endings[part] for part in reversed(name.split(".")) if part in endings), "text")
    return [f"{path_name}={path} is not read by {kind_name}={kind}, which needs no files; give {kind_name}={likely} or so too"]


def source_problems(prefix: str, source: DataSource, vocab_size: int) -> list[str]:
    """List the problems of a source's fields; `prefix` precedes their names ("data.sources.0.")."""
    problems = path_problems(f"{prefix}path", source.path, f"{prefix}kind", source.kind)
    problems += text_field_problems(f"{prefix}text_field", source.kind, source.text_field)
    if source.max_epochs < 0:
        problems.append(f"{prefix}max_epochs={source.max_epochs} must be 0 or more")
    separator = f"{prefix}separator={source.separator}"
    if source.separator != -1 and source.kind != "tokens":
        problems.append(f"{separator} has no meaning for kind={source.kind}, whose separator is its tokenizer's")
    elif source.separator < -1:
        problems.append(f"{separator} must be an id, or -1 for none")
    elif source.separator >= vocab_size:
        problems.append(f"{separator} is beyond model.vocab_size={vocab_size}; ids are below it")
    return problems + bad_rows_problems(f"{prefix}max_bad_rows", source.kind, source.max_bad_rows)


def bpe_size_problem(tokenizer: str) -> str:
    """Return the problem with the SIZE of a tokenizer "bpe:SIZE"; empty for none, and for other tokenizers."""
    if not tokenizer.startswith("bpe:"):
        return ""
    size = tokenizer[4:]
    if not re.fullmatch("[0-9]{1,9}", size) or int(size) < _SMALLEST_BPE:
        return f"the size after bpe: is a whole number of at least {_SMALLEST_BPE}"
    if int(size) > _LARGEST_BPE:
        return f"a vocabulary trained on the data has at most {_LARGEST_BPE:,} ids; bpe:32000 is usual"
    return ""


def tokenizer_problems(tokenizer: str, vocab_size: int) -> list[str]:
    """Return the problems of `data.tokenizer`."""
    if problem := bpe_size_problem(tokenizer):
        return [f"data.tokenizer={tokenizer!r}: {problem}"]
    if tokenizer.startswith("bpe:") and int(tokenizer[4:]) > vocab_size:
        return [f"data.tokenizer={tokenizer!r} makes ids beyond model.vocab_size={vocab_size}"]
    return []
