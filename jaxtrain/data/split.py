"""Decide which text is held out for validation, by each document's own content alone.

A document stays on its side when files are added, removed or renamed, and two copies of it are on the same side, whatever files
and sources they are in. So no held-out document is trained on, whatever is mixed with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

SPLIT_RULE = "content-2"  # part of every cache key: change it whenever a rule below changes
LONG_DOCUMENT = 100_000
"""Characters (or ids, in a token file) beyond which a document is itself split."""
LINE_SEARCH = 10_000
"""Characters before the cut that are searched for a line end."""


def split_rule(fraction: float) -> str:
    """Return the name of the rule with its fraction: text held out by one rule may be trained on by another."""
    return f"{SPLIT_RULE} at {fraction:g}"


def hash_share(content: bytes) -> float:
    """Return a number in [0, 1), uniform over contents, the same on every machine."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / float(1 << 53)


def split_document(text: str, fraction: float) -> Iterator[tuple[str, bool]]:
    """Yield the non-empty parts of a document in order, each with whether it is held out.

    A document of up to LONG_DOCUMENT characters is one part, held out if hash_share of its UTF-8 bytes < fraction. Of a longer
    one the last `fraction` is held out, cut at a line end, so that a single book or corpus in one file has both sides.
    """
    if len(text) <= LONG_DOCUMENT or fraction <= 0:
        parts = [(text, hash_share(text.encode()) < fraction)]
    else:
        wanted = held_out_start(len(text), fraction)
        cut = text.rfind("\n", max(0, wanted - LINE_SEARCH), wanted) + 1 or wanted
        parts = [(text[:cut], False), (text[cut:], True)]
    yield from (part for part in parts if part[0])


def held_out_start(length: int, fraction: float) -> int:
    """Return where the held-out end of a long document begins: after round(length * (1 - fraction)) characters or ids."""
    return round(length * (1 - fraction))
