"""A process that tokenizes parts: `python -m jaxtrain.data.tokenize_worker TOKENIZER FINGERPRINT`, started by `tokenize_parts`.

It reads a line of JSON from standard input, a part's texts and its path, and answers with a line of JSON: null, or what went
wrong. It ends with its input, so also when the process that started it is killed.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from jaxtrain.data.corpus import Document
from jaxtrain.data.tokenize_parts import encode_part
from jaxtrain.data.tokenizers import load_tokenizer
from jaxtrain.errors import DataError


def main(name: str, fingerprint: str) -> None:
    """Tokenize the parts that standard input names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the process that started this one ends it
    tokenizer = load_tokenizer(name)
    for line in sys.stdin:
        texts, target = map(Path, json.loads(line))
        fault = None
        try:
            if tokenizer.fingerprint != fingerprint:
                raise DataError(f"{name}: was changed while it was used")
            with texts.open(encoding="utf-8") as file:
                documents = [Document(*json.loads(row)) for row in file]
            encode_part(documents, tokenizer, name, target)
            texts.unlink()
        except (DataError, OSError) as error:
            fault = str(error)
        print(json.dumps(fault), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
