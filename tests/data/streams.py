"""Token files of our own, document by document."""

from __future__ import annotations

import numpy as np

from jaxtrain.data.token_stream import StreamWriter
from jaxtrain.data.tokenizers import ByteTokenizer


def append(writer: StreamWriter, text: str, ids: np.ndarray) -> None:
    """Add a document to a stream of bytes: its ids, [length]; its text is only measured."""
    content = text.encode()
    writer.extend(np.concatenate([[ByteTokenizer.separator], ids]), 1, len(content), [content])
