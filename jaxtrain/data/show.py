"""Rows of the training data as text, with the tokens that carry loss marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from jaxtrain.data.packing import NO_TARGET
from jaxtrain.data.pipeline import Data
from jaxtrain.data.tokenizers import Tokenizer
from jaxtrain.text import printable


def shown_rows(data: Data, batch_size: int, count: int, marks: tuple[str, str]) -> Iterator[str]:
    """Yield the first `count` rows in the order of training, each as a headline and its documents.

    Args:
      batch_size: rows of a batch.
      marks: texts before and after tokens that carry loss.
    """
    for number in range(count):
        step, place = divmod(number, batch_size)
        batch = data.train_batch(step, slice(place, place + 1))
        (source, row), names = data.train_row_numbers(step, slice(place, place + 1))[0], data.segment_names
        tokens, targets, segments = (batch[name][0] for name in ("tokens", "targets", "segments"))
        documents, learned = int(segments.max()), int((targets != NO_TARGET).sum())
        yield (
            f"batch {step}, row {place}: row {row:,} of data.sources.{source}, {int((segments > 0).sum()):,} tokens in "
            f"{documents} document{'s' * (documents != 1)}, {learned:,} with loss"
        )
        for segment in range(1, documents + 1):
            inside = segments == segment
            name = f" ({names[(segment - 1) % len(names)]})" if names else ""
            yield f"--- {segment}{name}\n{_marked(data.tokenizer, tokens[inside], targets[inside], marks)}"
        yield ""


def _marked(tokenizer: Tokenizer, tokens: np.ndarray, targets: np.ndarray, marks: tuple[str, str]) -> str:
    """Return a document's text. A token carries loss where it is the target of the one before it."""
    ids, learned = tokens.tolist(), [False, *(targets != NO_TARGET).tolist()]
    ids.append(int(targets[-1]) if learned[-1] else -1)
    pieces = []
    for is_learned, group in groupby(zip(ids, learned, strict=True), lambda pair: pair[1]):
        text = printable(_text(tokenizer, [token for token, _ in group if token >= 0]))
        pieces.append(f"{marks[0]}{text}{marks[1]}" if is_learned else text)
    return "".join(pieces)


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of ids, control tokens by their names."""
    groups = groupby(ids, lambda token: token in tokenizer.names)
    return "".join(
        "".join(tokenizer.names[token] for token in group) if is_control else tokenizer.decode(list(group))
        for is_control, group in groups
    )
