"""What weights in 8 or 4 bits cost: bytes, logits and perplexity of a HuggingFace folder, on Python's own documentation.

python -m tests.measure.quantisation DIR [SEQUENCES]
"""

from __future__ import annotations

import sys
from pydoc_data.topics import topics
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxtrain
from jaxtrain.models.quantised_weights import NF4_GROUP

LENGTH = 256
WAYS: list[tuple[Any, int]] = [
    (None, 0),
    ("int8", 0),
    ("int8", 64),
    ("int8", 32),
    ("float8", 0),
    ("float8", 64),
    ("float8", 32),
    ("nf4", 0),
    ("nf4", 32),
]


def main(folder: str, sequences: int = 16) -> None:
    """Print a row for each way of holding the weights."""
    tokenizer = jaxtrain.load(folder).tokenizer
    ids = np.asarray(tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics))))
    tokens = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)[:: max(1, len(ids) // LENGTH // sequences)][:sequences]
    table = Table("weights", "group", "MB held", "mean |logit error|", "largest", "bits a token", "perplexity", "change")
    exact, before = [], 0.0
    for kind, group in WAYS:
        model = jaxtrain.load(folder, quantisation=kind, group=group)
        errors, log_ps = [], []
        for number, row in enumerate(tokens):
            logits = model.logits(row[None])[0]
            if kind is None:
                exact.append(logits)
            errors.append(np.abs(logits - exact[number]))
            log_ps.append(model.score(row[None])[0])
        loss = float(-np.mean(log_ps, dtype=np.float64))
        before = before or loss
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 1e6
        error = [f"{np.mean(errors):.4f}", f"{np.max(errors):.3f}"]
        table.add_row(
            kind or "float32",
            str(group or (NF4_GROUP if kind == "nf4" else "channel")) if kind else "",
            f"{size:.0f}",
            *error,
            f"{loss / np.log(2):.4f}",
            f"{np.exp(loss):.3f}",
            f"{np.expm1(loss - before):+.2%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
