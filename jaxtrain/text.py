"""Standard output and error that accept any text and survive a closed reader; one console for tables; printable user text.

User text, a file name or a model's sample may hold anything: bytes that are not UTF-8 (Python's lone surrogates), control
characters, square brackets that `rich` takes for markup. The terminal may be ASCII, and may be closed at any moment.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any, TextIO

from jaxtrain.errors import EXIT_UNREAD, ExplainedError

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF, errno.ECONNRESET)
"""Errors of writing to a pipe, a terminal or a socket whose other end is closed."""


def printable(text: str) -> str:
    r"""Return the text with control characters and lone surrogates as escapes ("\x1b", "\udcff"); newlines and tabs stay."""
    return _UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], text)


def readable_size(size: float) -> str:
    """Return a number of bytes in its power of 1024, in three digits: "12.3 GiB", "1.50 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    digits = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {unit}"


def listed(words: Iterable[object], last: str = "and") -> str:
    """Return "1, 2 and 4"; with `last` another word before the last one."""
    texts = [str(word) for word in words]
    return f" {last} ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def show(text: str) -> None:
    """Print a line with user text in it (see `printable`)."""
    print(printable(text))


def tell(words: str) -> None:
    """Print a progress line to standard error."""
    print(words, file=sys.stderr, flush=True)


def is_utf8(text: str) -> bool:
    """Return whether the text can be written as UTF-8; a file name of other bytes cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def open_console(width: int) -> Any:
    """Return a rich console on standard output that takes every string literally: no markup, no emoji codes, no highlighting.

    Args:
      width: columns if standard output is no terminal and COLUMNS is not set.
    """
    from rich.console import Console
    from rich.text import Text

    class Literal(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    is_known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return Literal(width=None if is_known else width, markup=False, emoji=False, highlight=False)


def make_streams_safe(answers_on_stdout: bool) -> None:
    """Replace sys.stdout and sys.stderr by streams that raise neither for a character nor for a closed reader.

    A character that the stream's encoding lacks is written as an escape. After the reader of a pipe or the terminal is gone,
    output is discarded; but a program whose result is its output ends then.

    Args:
      answers_on_stdout: end with EXIT_UNREAD if the reader of standard output is gone (SystemExit in the writing thread).
    """
    for descriptor in range(3):  # a closed one would be reused by the next file opened, and text be written into that
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _safe(sys.stdout, 1, answers_on_stdout)
    sys.stderr = _safe(sys.stderr, 2, False)


def _safe(stream: TextIO | None, descriptor: int, is_answer: bool) -> io.TextIOWrapper:
    if stream is not None:
        with suppress(OSError):
            stream.flush()
    outlet = io.BufferedWriter(_Outlet(descriptor, is_answer))
    encoding = "utf-8" if stream is None else stream.encoding
    by_line = isinstance(stream, io.TextIOWrapper) and (stream.line_buffering or stream.write_through)
    return io.TextIOWrapper(outlet, encoding=encoding, errors="backslashreplace", line_buffering=by_line)


class _Outlet(io.FileIO):
    """A descriptor whose writes fail only if the bytes are the program's result."""

    def __init__(self, descriptor: int, is_answer: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._is_answer = is_answer

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in _GONE:
                discard(self)
                if self._is_answer:
                    raise SystemExit(EXIT_UNREAD) from None
            elif self._is_answer:
                discard(self)
                raise ExplainedError(f"standard output cannot be written: {error.strerror}") from error
            return len(data)  # a log on a full disk: later lines may fit again


def discard(stream: IO[Any]) -> None:
    """Redirect a stream without reader to nowhere, so that it fails no more, not even at exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
