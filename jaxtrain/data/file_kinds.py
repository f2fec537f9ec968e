"""Recognise by its first bytes a file that is not text."""

from __future__ import annotations

import re

from jaxtrain.data.compressed import compression_of

_UNPACK = "unpack it"
_DECOMPRESS = "decompress it, or use gzip, bzip2, xz or zstd"
_EXTRACT = "extract its text first"
# (first bytes, kind, way out)
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", "convert it: iconv -f utf-32 -t utf-8"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", "convert it: iconv -f utf-16 -t utf-8"),
    (rb"version https://git-lfs\.github\.com/spec", "a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive", _UNPACK),
    (rb".{257}ustar", "a tar archive", "use kind=tar if its members are text"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (rb"\x04\x22\x4d\x18", "an lz4 file", _DECOMPRESS),
    (rb"\x1f\x9d", "a file of compress (.Z)", _DECOMPRESS),
    (rb"LZIP\x01", "an lzip file", _DECOMPRESS),
    (rb"\x5d\0\0", "an lzma file", _DECOMPRESS),
    (rb"\xff\x06\0\0sNaPpY", "a snappy file", _DECOMPRESS),
    (rb"PAR1[^ -~\s]", "a Parquet file", "use kind=parquet"),
    (rb"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f", "an ArrayRecord file", "use kind=array_record"),
    (rb"\x93NUMPY", "a NumPy array", "use kind=tokens if it holds token ids"),
    (rb"ARROW1\0\0", "an Arrow file", "use kind=arrow"),
    (rb"Obj\x01", "an Avro file", "write it as Parquet, and use kind=parquet"),
    (rb"\x89HDF\r\n", "an HDF5 file", _EXTRACT),
    (rb"SQLite format 3\0", "an SQLite database", _EXTRACT),
    (rb"%PDF-\d", "a PDF document", _EXTRACT),
    (rb"\{\\rtf", "an RTF document", _EXTRACT),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document", _EXTRACT),
    (rb"\x80[\x02-\x05](\x95|\}|\]|c|X|\(|K|\x8a)", "a Python pickle", "write it as JSON lines; pickles run code when read"),
    (rb".{5}\0\0\0\{\"", "a safetensors file", "it holds weights, no text"),
    (rb"GGUF[\x01-\x09]\0", "a GGUF file", "it holds weights, no text"),
    (rb"\x7fELF", "a program", "name other files"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP", "a picture", "name other files"),
)
_PATTERNS = tuple((re.compile(pattern, re.DOTALL), name, way_out) for pattern, name, way_out in _KINDS)
LARGEST_SHARE_OF_NULS = 0.1


def known_kind(head: bytes) -> str | None:
    """Return the kind of a file that begins with `head` and the way out; None if it is not a known kind."""
    if kind := compression_of(head):
        return f"{kind}-compressed; decompress it once"
    return next((f"{name}; {way_out}" for pattern, name, way_out in _PATTERNS if pattern.match(head)), None)


def what_it_is(head: bytes) -> str | None:
    """Return `known_kind`, or unmarked UTF-16 or UTF-32 by its zero bytes; None for possible UTF-8."""
    if kind := known_kind(head):
        return kind
    if head.count(0) <= LARGEST_SHARE_OF_NULS * len(head):
        return None
    zeros = [head[place::4].count(0) / (len(head) / 4) for place in range(4)]
    few, many = 0.1, 0.4
    for name, big, little in (("utf-32", (1, 1, 1, 0), (0, 1, 1, 1)), ("utf-16", (1, 0, 1, 0), (0, 1, 0, 1))):
        for order, wanted in (("be", big), ("le", little)):
            if all(share > many if is_zero else share < few for share, is_zero in zip(zeros, wanted, strict=True)):
                return f"{name.upper()} text; convert it: iconv -f {name}{order} -t utf-8"
    return f"no text: {head.count(0)} of its first {len(head)} bytes are zero; name other files"
