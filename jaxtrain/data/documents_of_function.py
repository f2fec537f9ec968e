"""Documents that a function gives (`Trainer(documents=...)`): written into the cache once, and read from there like any JSONL.

So they are split, tokenized, shuffled and fingerprinted as files are: batch n stays a pure function of what the documents say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxtrain.config import Config, DataSource
from jaxtrain.errors import DataError
from jaxtrain.files import user_path


def with_documents_kept(config: Config, documents: Callable[[], Iterable[str]]) -> Config:
    """Return the config with the documents of a function as its one source, a file in data.cache_dir named by their hash.

    Raises:
      DataError: the function gives no text, or something else.
    """
    folder = user_path(config.data.cache_dir) / "documents"
    folder.mkdir(parents=True, exist_ok=True)
    digest, count = hashlib.sha256(), 0
    with tempfile.NamedTemporaryFile("wb", dir=folder, delete=False) as file:
        try:
            for count, text in enumerate(documents(), 1):  # noqa: B007
                if not isinstance(text, str):
                    raise DataError(f"documents() gave a {type(text).__name__} as document {count}; it must give texts")
                row = json.dumps({"text": text}).encode() + b"\n"
                digest.update(row)
                file.write(row)
            if not count:
                raise DataError("documents() gave no document")
        except BaseException:
            Path(file.name).unlink()
            raise
    path = folder / f"{digest.hexdigest()[:32]}.jsonl"
    os.replace(file.name, path)
    sources = (DataSource(kind="jsonl", path=str(path), text_field="text"),)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
