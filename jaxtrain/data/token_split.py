"""Split token files without a held-out file: by document if a separator tells them apart, else at the end.

The first rule depends on one document alone (see `split`), so copies are on one side. The second depends on one file alone: ids
without separators do not show where a document is, and a copy of some of them in another file goes undetected.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from jaxtrain.data.file_hashes import keep_note, short_hash
from jaxtrain.data.packing import num_full_windows
from jaxtrain.data.progress import progress
from jaxtrain.data.split import LONG_DOCUMENT, hash_share, held_out_start, split_rule
from jaxtrain.data.token_part import FileTokens, JoinedTokens, TokenPart, Tokens, stretch_of

SCAN_TOKENS = 1 << 22
Span = tuple[int, int, bool]
"""(first index, index after the last, whether held out)."""


def split_part(part: TokenPart, fraction: float, length: int, title: str, cache_dir: Path) -> tuple[TokenPart, TokenPart]:
    """Return the training part and the held-out part of a file's ids; either may be empty.

    `title` names the progress bar while the documents are hashed, which happens once: the result is kept in `cache_dir`.
    """
    tokens = part.tokens
    assert not isinstance(tokens, JoinedTokens), "a file is split once"
    if fraction <= 0 or not len(tokens):
        return part, _of_part(part, tokens[:0], "none")
    starts = separators_of(tokens, part.separator) if part.separator >= 0 else np.zeros(0, np.int64)
    if not starts.size:
        return _cut_windows(part, tokens, fraction, length)
    rule = split_rule(fraction)
    note = cache_dir / "hashes" / f"split-{short_hash([part.sha256, part.separator, rule])}.npy"
    spans = _read_note(note)
    if spans is None:
        spans = np.array(list(_merged(_document_spans(tokens, starts, fraction, title))), np.int64).reshape(-1, 3)
        np.save(content := io.BytesIO(), spans)
        keep_note(note, content.getvalue())
    train, held_out = (_joined(tokens, spans[spans[:, 2] == side, :2], int(starts[-1])) for side in (0, 1))
    return _of_part(part, train, f"{rule}: training"), _of_part(part, held_out, f"{rule}: held out")


def _of_part(part: TokenPart, tokens: Tokens, which: str) -> TokenPart:
    """Return some ids of a part, with their own fingerprint and an unknown number of text bytes."""
    return dataclasses.replace(
        part, tokens=tokens, sha256=f"{part.sha256}:{which}", utf8_bytes=0, gzip_bytes=0, gzip_input_bytes=0
    )


def separators_of(tokens: Tokens, separator: int) -> np.ndarray:
    """Return the positions of the separators, ascending."""
    places = [
        start + np.flatnonzero(tokens[start : start + SCAN_TOKENS] == separator) for start in range(0, len(tokens), SCAN_TOKENS)
    ]
    return np.concatenate(places)


def _document_spans(tokens: FileTokens, starts: np.ndarray, fraction: float, title: str) -> Iterator[Span]:
    """Yield every document's span, separator first: whole on the side of the hash of its ids, or a long one cut in two."""
    firsts = starts.tolist() if starts[0] == 0 else [-1, *starts.tolist()]
    with progress(title, tokens.nbytes) as advance:
        for first, end in zip(firsts, [*firsts[1:], len(tokens)], strict=True):
            ids, begin = tokens[first + 1 : end], max(first, 0)
            if not ids.size:
                continue
            if ids.size <= LONG_DOCUMENT:
                yield begin, end, hash_share(ids.astype("<u4").tobytes()) < fraction
            else:
                cut = first + 1 + held_out_start(ids.size, fraction)
                yield begin, cut, False
                yield begin, first + 1, True  # the held-out part begins with the separator too
                yield cut, end, True
            advance(ids.nbytes)


def _merged(spans: Iterator[Span]) -> Iterator[Span]:
    """Join adjacent spans of the same side."""
    last: Span | None = None
    for span in spans:
        if last is not None and last[1:] == (span[0], span[2]):
            last = last[0], span[1], span[2]
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def _joined(tokens: FileTokens, spans: np.ndarray, separator_at: int) -> JoinedTokens:
    """Return the ids of the spans, closed by a separator."""
    closing = [[separator_at, separator_at + 1]] if len(spans) else []
    return JoinedTokens(tokens, np.concatenate([spans, np.array(closing, np.int64).reshape(-1, 2)]))


def _cut_windows(part: TokenPart, tokens: FileTokens, fraction: float, length: int) -> tuple[TokenPart, TokenPart]:
    """Hold out the last windows * fraction windows of a part, rounded up or down by the hash of the file.

    So the share held out of many small files is `fraction`. The two sides share one token: a target on one, an input on the
    other.
    """
    windows = num_full_windows(len(tokens), length)
    whole, rest = divmod(windows * fraction, 1)
    count = min(int(whole) + (hash_share(part.sha256.encode()) < rest), windows - 1)
    if count <= 0:
        return part, _of_part(part, tokens[:0], "none")
    cut = (windows - count) * length
    sides = stretch_of(tokens, 0, cut + 1), stretch_of(tokens, cut, len(tokens))
    return _of_part(part, sides[0], f"{cut + 1}"), _of_part(part, sides[1], f"{cut}:")


def _read_note(path: Path) -> np.ndarray | None:
    with suppress(OSError, ValueError):
        spans = np.load(path, allow_pickle=False)
        if spans.dtype == np.int64 and spans.ndim == 2 and spans.shape[1] == 3:
            return spans
    return None
