"""Handle Ctrl-C in a program's first milliseconds. A verb imports this in its first line, before `cli`, which takes over.

Importing it installs signal handlers, so nothing else may import it. The handler does not raise, since an importing module may
catch everything.
"""

# The module that `signal` wraps, without the milliseconds that its enums take.
import _signal  # pyright: ignore[reportMissingImports]
import os

_NAMES = {_signal.SIGINT: b"SIGINT", _signal.SIGTERM: b"SIGTERM"}


def _end(number: int, frame: object) -> None:
    os.write(2, b"interrupted by " + _NAMES[number] + b"\n")
    os._exit(128 + number)


for _number in _NAMES:
    _signal.signal(_number, _end)
